"The UNet where a page has no room: every switch at once, other libraries, save and load."
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sbldm_nb.layers import Cond
from sbldm_nb.unet3d import UNETS, UNet, UNet2D, UNet3D


def condition(n, size, label, channels, vector):
    return Cond(torch.zeros(n).long() if label else None, torch.randn(n, vector) if vector else None,
                torch.randn(n, channels, *size) if channels else None)


@pytest.mark.parametrize('dims,label,channels,vector,coords', list(itertools.product((2, 3), (None, 2), (0, 1), (0, 3), (0, 2))))
def test_every_combination_of_conditions(dims, label, channels, vector, coords):
    size = (5, 6, 3)[:dims]
    net = UNet(dims, 2, 3, (8, 8), (True, False), label, channels, vector, coords=coords)
    x, t, cond = torch.randn(2, 2, *size), torch.tensor([0, 999]), condition(2, size, label, channels, vector)
    for c in (cond, None, cond.null()):
        net.zero_grad()
        out = net(x, t, c)
        assert out.shape == (2, 3, *size)
        out.sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_foreign_conditions_are_refused():
    net, x, t = UNet2D(in_channels=1, channels=(8, 8), attention=(False, False)), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    for cond in (condition(2, (8, 8), 1, 0, 0), condition(2, (8, 8), 0, 1, 0), condition(2, (8, 8), 0, 0, 1), condition(3, (8, 8), 0, 0, 1)):
        with pytest.raises(ValueError): net(x, t, cond)


def test_unet_2d_is_a_3d_unet_on_one_slice():
    "A 3D net that keeps the depth, and whose kernels act in the middle plane alone, must treat a volume of one slice as the 2D net does."
    torch.manual_seed(0)
    flat = UNet2D(in_channels=2, channels=(8, 16), attention=(False, True), vector_dim=1)
    deep = UNet3D(in_channels=2, channels=(8, 16), attention=(False, True), vector_dim=1, strides=((2, 2, 1),))
    for p in flat.parameters(): torch.nn.init.normal_(p, std=.2)
    state = deep.state_dict()
    for k, v in flat.state_dict().items():
        if v.ndim == 4:
            state[k].zero_()
            state[k][..., state[k].shape[-1] // 2] = v
        else: state[k] = v
    deep.load_state_dict(state)
    x, t, cond = torch.randn(2, 2, 9, 6), torch.tensor([3, 700]), Cond(vector=torch.randn(2, 1))
    assert_close(deep(x[..., None], t, cond)[..., 0], flat(x, t, cond), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('label,channels,vector,coords,checkpointing', list(itertools.product((None, 2), (0, 1), (0, 3), (0, 2), (False, True))))
def test_stack_is_the_flat_net_at_first_and_all_of_it_learns(label, channels, vector, coords, checkpointing):
    kind = dict(dims=2, in_channels=2, channels=(8, 16), attention=(True, False), num_classes=label, cond_channels=channels, vector_dim=vector, coords=coords, strides=((2, 3),))
    flat, stack = UNet(**kind), UNet(**kind, stack=True, checkpointing=checkpointing)
    for p in flat.parameters(): torch.nn.init.normal_(p, std=.1)
    stack.load_state_dict(flat.state_dict(), strict=False)
    x, t, cond = torch.randn(2, 2, 5, 7, 4), torch.tensor([0, 999]), condition(2, (5, 7, 4), label, channels, vector)
    for c in (cond, None, cond.null()):
        stack.zero_grad()
        out = stack(x, t, c)
        for z in range(4):
            slim = c if c is None or c.concat is None else Cond(c.label, c.vector, c.concat[..., z], c.keep)
            assert_close(out[..., z], flat(x[..., z], t, slim), atol=1e-5, rtol=1e-4)
        out.sum().backward()
        assert all(p.grad is not None for p in stack.parameters())


@pytest.mark.parametrize('kind', [dict(), dict(dims=2, stack=True, coords=1), dict(strides=((2, 2, 1), (1, 2, 2)), dropout=.3), dict(res_blocks=(1, 2, 2), heads=2, groups=4)])
def test_checkpointing_changes_no_gradient(kind):
    torch.manual_seed(0)
    net, x, t = UNet(channels=(8, 8, 16), **kind), torch.randn(2, 4, 9, 6, 5), torch.tensor([3, 700])
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    found = []
    for net.checkpointing in (False, True):
        torch.manual_seed(1)
        net.zero_grad()
        net(x, t).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert_close(*found, atol=0, rtol=0)


def test_configs_from_before_mean_what_they_meant():
    old = dict(dims=2, in_channels=4, out_channels=4, channels=[8, 8], attention=[False, True], num_classes=None, cond_channels=0, vector_dim=1, res_blocks=2, coords=2)
    new = UNet(**old).config
    assert new == dict(old, res_blocks=[2, 2], strides=[[2, 2]], heads=None, groups=8, dropout=0., stack=False)
    assert UNet(**json.loads(json.dumps(new))).config == new


@pytest.mark.parametrize('kind,words', [(dict(channels=(8, 8)), '2 channels and 3 attention flags where 2'), (dict(strides=(2,)), '1 strides where 2'),
                                        (dict(res_blocks=(1, 2)), '2 numbers of residual blocks where 3'), (dict(strides=((2, 2), 2)), 'one for each spatial axis'),
                                        (dict(channels=(8, 8, 12)), 'multiples of 8'), (dict(stack=True), 'dims=2 is wanted'), (dict(heads=3), '3 heads do not divide')])
def test_networks_that_cannot_be(kind, words):
    with pytest.raises(ValueError, match=words): UNet3D(**kind)


@pytest.mark.parametrize('kind,shape', [(dict(), (1, 4, 8, 8, 3)), (dict(strides=((2, 2, 1),) * 2), (1, 4, 3, 8, 1)), (dict(), (1, 4, 8, 8)), (dict(), (1, 3, 8, 8, 8)),
                                        (dict(dims=2, stack=True), (1, 4, 3, 8, 8)), (dict(dims=2, stack=True), (1, 4, 8, 8))])
def test_latents_that_do_not_fit(kind, shape):
    with pytest.raises(ValueError, match='came to a UNet|too small for a UNet'): UNet(channels=(8, 8, 8), **kind)(torch.randn(shape), torch.tensor([1]))


def test_presets_take_their_latents():
    sizes = dict(small_cpu=(16, 16), small_t4=(28, 32, 20), stack=(24, 24, 5), adm=(30, 30, 20), ct=(13, 9, 7))
    for name, kind in UNETS.items():
        with torch.device('meta'): net = UNet(**kind)
        shape = (1, kind['in_channels'], *sizes[name])
        assert net(torch.zeros(shape, device='meta'), torch.zeros(1, device='meta')).shape == shape


def test_coordinates_break_the_symmetry_and_nothing_else():
    torch.manual_seed(0)
    plain, told = (UNet2D(in_channels=1, channels=(8, 8), attention=(False, False), coords=c) for c in (0, 2))
    told.load_state_dict(plain.state_dict(), strict=False)
    for net in (plain, told): torch.nn.init.ones_(net.head[-1].weight)
    with torch.no_grad():
        torch.nn.init.zeros_(told.place.weight), torch.nn.init.zeros_(told.place.bias)
        x, t = torch.randn(1, 1, 7, 9), torch.tensor([5])
        assert torch.equal(plain(x, t), told(x, t))
        torch.nn.init.ones_(told.place.weight)
        assert (plain(x, t) - told(x, t)).abs().max() > .1


def test_weights_and_config_travel_as_safetensors(tmp_path):
    net = UNet2D(in_channels=2, channels=(8, 16), attention=(False, True), num_classes=2, coords=1)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    save_file(net.state_dict(), tmp_path / 'net.safetensors')
    copy = UNet(**net.config)
    copy.load_state_dict(load_file(tmp_path / 'net.safetensors'))
    x = torch.randn(2, 2, 6, 7)
    cond = Cond(label=torch.tensor([0, 1]))
    assert torch.equal(net(x, torch.tensor([1, 2]), cond), copy(x, torch.tensor([1, 2]), cond))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_unet_on_a_gpu(dtype):
    net, x, t = UNet3D(channels=(8, 16), attention=(False, True), coords=2), torch.randn(2, 4, 5, 6, 7), torch.tensor([0, 999])
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    with torch.no_grad(), torch.autocast('cuda', dtype): y = net.cuda()(x.cuda(), t.cuda())
    with torch.no_grad(): assert_close(y.cpu(), net.cpu()(x, t), atol=.05, rtol=.05)
