"DiT3D where the page has no room: every switch at once, many grids, other libraries, save and load, training after sampling."
import itertools

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from sbldm_nb.dit3d import DITS, DiT3D, cut_windows, grid_positions
from sbldm_nb.layers import Cond

SMALL = dict(patch_size=2, in_channels=2, hidden_size=24, depth=3, num_heads=2, window_size=2)


def opened(net):
    "The network with random weights everywhere, none of them zero."
    torch.manual_seed(0)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    return net


def condition(n, size, label, channels, vector):
    return Cond(torch.zeros(n).long() if label else None, torch.randn(n, vector) if vector else None,
                torch.randn(n, channels, *size) if channels else None)


@pytest.mark.parametrize('label,channels,vector,window,qk_norm', list(itertools.product((None, 2), (0, 1), (0, 3), (None, 2), (True, False))))
def test_every_combination(label, channels, vector, window, qk_norm):
    size = (5, 8, 3)
    net = DiT3D(**{**SMALL, 'window_size': window}, input_size=size, num_classes=label, cond_channels=channels, vector_dim=vector, qk_norm=qk_norm)
    x, t, cond = torch.randn(2, 2, *size), torch.tensor([0, 999]), condition(2, size, label, channels, vector)
    for c in (cond, None, cond.null()):
        net.zero_grad()
        out = net(x, t, c)
        assert out.shape == x.shape
        out.sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_foreign_conditions_are_refused():
    net, x, t = DiT3D((8, 8, 8), **SMALL, num_classes=None), torch.randn(2, 2, 8, 8, 8), torch.tensor([0, 1])
    for cond in (condition(2, (8,) * 3, 1, 0, 0), condition(2, (8,) * 3, 0, 1, 0), condition(2, (8,) * 3, 0, 0, 1), condition(3, (8,) * 3, 0, 0, 1)):
        with pytest.raises(ValueError): net(x, t, cond)


def test_sizes():
    net = DiT3D((8, 14, 8), hidden_size=24, depth=1, num_heads=2)
    for size in ((8, 14, 8), (7, 13, 5), (1, 1, 1)): assert net(torch.randn(1, 4, *size), torch.tensor([3])).shape[2:] == size
    for shape in ((1, 4, 8, 8), (1, 4, 9, 8, 8), (1, 3, 8, 8, 8)):
        with pytest.raises(ValueError, match='at most'): net(torch.randn(*shape), torch.tensor([3]))


@pytest.mark.parametrize('window', [(1, 2, 3), (2, 2, 2), (3, 1, 4), (4, 5, 2)])
@pytest.mark.parametrize('shifted', [False, True])
def test_windows_of_many_grids(window, shifted):
    "Every token stands in one place and finds its way back; rooms are boxes of indices, and empty places see only each other."
    for grid in itertools.product((1, 2, 3, 5, 7), repeat=3):
        w, n = cut_windows(grid, window, shifted), grid[0] * grid[1] * grid[2]
        if w is None:
            assert all(g <= most for g, most in zip(grid, window))
            continue
        assert torch.equal(w.order.flatten()[w.back], torch.arange(n))
        assert w.order.shape[1] <= window[0] * window[1] * window[2]
        real = torch.zeros(w.order.numel(), dtype=torch.bool)
        real[w.back] = True
        real = real.reshape(w.order.shape)
        if w.mask is None: assert real.all()
        else:
            sees = w.mask[:, 0]
            assert not (sees & (real[:, :, None] != real[:, None, :])).any()
            assert sees.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize('size,window', [((8, 8, 8), (4, 4, 4)), ((6, 4, 10), (3, 2, 5)), ((4, 8, 4), (4, 4, 4))])
def test_masks_equal_those_of_swin_unetr(size, window):
    swin = pytest.importorskip('monai.networks.nets.swin_unetr')
    shift = tuple(w // 2 if n > w else 0 for n, w in zip(size, window))
    theirs = swin.compute_mask(size, window, shift, torch.device('cpu')) == 0
    ours = cut_windows(size, window, True)
    assert torch.equal(ours.mask[:, 0], theirs)
    index = torch.roll(torch.arange(size[0] * size[1] * size[2]).reshape(1, *size, 1), [-s for s in shift], (1, 2, 3))
    assert torch.equal(ours.order, swin.window_partition(index, window)[..., 0])


def test_positions_equal_diffusers():
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    theirs = torch.as_tensor(embeddings.get_1d_sincos_pos_embed_from_grid(16, torch.arange(6).float(), output_type='pt'))
    assert_close(grid_positions((6, 1, 1), 48)[:, :16], theirs.float(), atol=1e-5, rtol=0)


def test_a_far_voxel_is_heard_only_through_moved_windows():
    net, x, t = opened(DiT3D((16, 2, 2), **{**SMALL, 'depth': 2}, num_classes=None)).eval(), torch.randn(1, 2, 16, 2, 2), torch.tensor([500])
    far = x.clone()
    far[:, :, 0] += 10  # token 0 of 8, in windows of 2: block 0 tells token 1, block 1 token 2
    with torch.no_grad(): changed = (net(x, t) != net(far, t)).any(1).flatten(1).reshape(8, -1).any(1)
    assert changed.tolist() == [True] * 3 + [False] * 5


def test_training_after_sampling_on_the_same_grid():
    cut_windows.cache_clear()
    net, x, t = opened(DiT3D((6, 10, 6), **SMALL, num_classes=None)), torch.randn(2, 2, 6, 10, 6), torch.tensor([0, 999])
    with torch.inference_mode(): net(x, t)
    net(x, t).sum().backward()
    assert cut_windows.cache_info().misses == 2
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_weights_and_config_travel_as_safetensors(tmp_path):
    net = opened(DiT3D((4, 5, 4), **SMALL, vector_dim=1)).eval()
    save_file(net.state_dict(), tmp_path / 'net.safetensors')
    copy = DiT3D(**net.config).eval()
    copy.load_state_dict(load_file(tmp_path / 'net.safetensors'))
    x, t, cond = torch.randn(2, 2, 4, 5, 4), torch.tensor([1, 2]), Cond(label=torch.tensor([0, 1]), vector=torch.randn(2, 1))
    assert torch.equal(net(x, t, cond), copy(x, t, cond))


def test_checkpointing_changes_no_gradient():
    net = opened(DiT3D((6, 10, 6), **SMALL, dropout=.2, checkpointing=True)).train()
    x, t, found = torch.randn(2, 2, 6, 10, 6), torch.tensor([0, 999]), []
    for net.checkpointing in (True, False):
        net.zero_grad()
        torch.manual_seed(1)
        net(x, t).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*found): assert torch.equal(a, b)
    assert 'checkpointing' not in net.config


def test_data_parallel_finds_no_unused_parameter(tmp_path):
    "With its defaults DDP fails in the second step if any parameter of the first had no part in the loss."
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net = DistributedDataParallel(DiT3D((6, 10, 6), **SMALL, vector_dim=2, cond_channels=1))
        x, t = torch.randn(2, 2, 6, 10, 6), torch.tensor([0, 999])
        for cond in (None, condition(2, (6, 10, 6), 1, 1, 2), Cond(label=torch.tensor([0, 1])), None): net(x, t, cond).sum().backward()
    finally: dist.destroy_process_group()


@pytest.mark.parametrize('window', [None, (1, 2, 1)])
def test_overfits_one_batch(window):
    torch.manual_seed(0)
    net = DiT3D((4, 6, 4), 2, 2, hidden_size=48, depth=2, num_heads=4, window_size=window)
    x, noise = torch.randn(4, 2, 4, 6, 4), torch.randn(4, 2, 4, 6, 4)
    opt, t = torch.optim.AdamW(net.parameters(), 4e-3), torch.tensor([100, 300, 600, 900])
    s = (t + 1).reshape(-1, 1, 1, 1, 1) / 1000
    for step in range(150):
        loss = (net((1 - s) * x + s * noise, t, Cond(label=torch.tensor([0, 1, 0, 1]))) - (noise - x)).square().mean()
        if not step: first = loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < .05 * first


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    net, x, t = opened(DiT3D((6, 10, 6), **SMALL)).eval(), torch.randn(2, 2, 6, 10, 6), torch.tensor([0, 999])
    with torch.no_grad():
        y = net(x, t)
        with torch.autocast('cpu', dtype): rough = net(x, t)
        assert rough.dtype == torch.float32
        assert_close(rough, y, atol=.05, rtol=.05)


def test_names():
    assert sorted(DITS) == sorted(f'DiT3D_{s}_{p}' for s in 'SBL' for p in (2, 4))
    assert DITS['DiT3D_S_2'](input_size=(16, 16, 16), depth=1).config['patch_size'] == [2, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    net, x, t = opened(DiT3D((6, 10, 6), **SMALL, num_classes=None)), torch.randn(2, 2, 6, 10, 6), torch.tensor([0, 999])
    with torch.no_grad(): wanted = net(x, t)
    with torch.autocast('cuda', dtype): y = net.cuda()(x.cuda(), t.cuda())
    assert_close(y.detach().cpu(), wanted, atol=.05, rtol=.05)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
