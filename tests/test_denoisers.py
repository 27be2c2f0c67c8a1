"UNet and DiT3D where a page has no room: every switch at once, other libraries, save and load."
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sbldm_nb.dit3d import DiT3D, grid_positions
from sbldm_nb.layers import Cond
from sbldm_nb.unet3d import UNet, UNet2D, UNet3D


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
    "A 3D net whose kernels act in the middle plane alone must treat each slice as the 2D net does."
    torch.manual_seed(0)
    flat = UNet2D(in_channels=2, channels=(8, 16), attention=(False, True), vector_dim=1)
    deep = UNet3D(in_channels=2, channels=(8, 16), attention=(False, True), vector_dim=1)
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


@pytest.mark.parametrize('net', [UNet2D(in_channels=2, channels=(8, 16), attention=(False, True), num_classes=2, coords=1),
                                 DiT3D((4, 5, 4), 2, 2, hidden_size=24, depth=2, num_heads=2)])
def test_weights_and_config_travel_as_safetensors(net, tmp_path):
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    save_file(net.state_dict(), tmp_path / 'net.safetensors')
    copy = type(net)(**net.config)
    copy.load_state_dict(load_file(tmp_path / 'net.safetensors'))
    x = torch.randn(2, 2, *((6, 7) if isinstance(net, UNet) else (4, 5, 4)))
    cond = Cond(label=torch.tensor([0, 1]))
    assert torch.equal(net(x, torch.tensor([1, 2]), cond), copy(x, torch.tensor([1, 2]), cond))


def test_dit_positions_equal_diffusers():
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    theirs = torch.as_tensor(embeddings.get_1d_sincos_pos_embed_from_grid(16, torch.arange(6).float(), output_type='pt'))
    assert_close(grid_positions((6, 1, 1), 48)[:, :16], theirs.float(), atol=1e-5, rtol=0)


def test_dit_overfits_one_batch():
    torch.manual_seed(0)
    net, x, noise = DiT3D((4, 6, 4), 2, 2, hidden_size=48, depth=2, num_heads=4), torch.randn(4, 2, 4, 6, 4), torch.randn(4, 2, 4, 6, 4)
    opt, t = torch.optim.AdamW(net.parameters(), 4e-3), torch.tensor([100, 300, 600, 900])
    s = (t + 1).reshape(-1, 1, 1, 1, 1) / 1000
    for step in range(150):
        loss = (net((1 - s) * x + s * noise, t, Cond(label=torch.tensor([0, 1, 0, 1]))) - (noise - x)).square().mean()
        if not step: first = loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < .05 * first


def test_sizes_of_the_dit():
    net = DiT3D((8, 14, 8), hidden_size=24, depth=1, num_heads=2)
    for size in ((8, 14, 8), (7, 13, 5), (1, 1, 1)): assert net(torch.randn(1, 4, *size), torch.tensor([3])).shape[2:] == size
    with pytest.raises(ValueError, match='at most'): net(torch.randn(1, 4, 8, 8), torch.tensor([3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_denoisers_on_a_gpu(dtype):
    for net, size in ((UNet3D(channels=(8, 16), attention=(False, True), coords=2), (5, 6, 7)), (DiT3D((5, 6, 7), 2, hidden_size=24, depth=2, num_heads=2), (5, 6, 7))):
        for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
        x, t = torch.randn(2, 4, *size), torch.tensor([0, 999])
        with torch.no_grad(), torch.autocast('cuda', dtype): y = net.cuda()(x.cuda(), t.cuda())
        with torch.no_grad(): assert_close(y.cpu(), net.cpu()(x, t), atol=.05, rtol=.05)
