"Slabs against the whole: random networks, every number of slabs, dtypes, a network on another device than its features."
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from sbldm_nb.layers import ConvNd, DepthToSpace, Downsample, ResBlock, SelfAttention, SpaceToDepth, Upsample, group_norm
from sbldm_nb.slabs import in_slabs


def filled(*layers):
    "The layers in a row, without a single zero weight."
    net = nn.Sequential(*layers)
    for p in net.parameters():
        if not p.count_nonzero(): nn.init.normal_(p, std=.1)
    return net.eval().requires_grad_(False)


def random_network(seed, dims):
    "Six layers drawn by lot, at most one of them upwards, and an input of uneven sizes."
    g = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(n, (), generator=g))
    strides = lambda: tuple(1 + pick(2) for _ in range(dims))
    width, layers, kinds = 8, [], ['conv', 'block', 'down', 'attention', 'norm', 'activation', 'up']
    for _ in range(6):
        wide, kind = 8 * (1 + pick(3)), kinds[pick(len(kinds))]
        if kind == 'conv': layers += [ConvNd(dims, width, wide, 1 + 2 * pick(3))]
        if kind == 'block': layers += [ResBlock(dims, width, wide)]
        if kind == 'down': layers += [Downsample(dims, width, wide, strides())]
        if kind == 'attention': layers += [SelfAttention(dims, width), ConvNd(dims, width, wide, 1)]
        if kind == 'norm': layers += [group_norm(width), nn.SiLU(), ConvNd(dims, width, wide)]
        if kind == 'activation': layers += [nn.SiLU(), group_norm(width), ConvNd(dims, width, wide, 3, strides())]
        if kind == 'up': layers += [Upsample(dims, width, wide, strides())]
        if kind == 'up': kinds.remove('up')
        width = wide
    return filled(*layers), torch.randn(2, 8, *(5 + pick(6) for _ in range(dims)), generator=g)


@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('seed', range(8))
def test_random_networks(seed, dims):
    torch.manual_seed(seed)
    net, x = random_network(seed, dims)
    whole, kept, done = net(x), x.clone(), 0
    for splits in (1, 2, 3, 5):
        try: y = in_slabs(net, x, splits)
        except ValueError as e:
            assert 'cannot be cut into' in str(e)
            break
        done += 1
        assert y.shape == whole.shape and y.dtype == whole.dtype
        assert_close(y / whole.std(), whole / whole.std(), atol=1e-5, rtol=1e-5)
    assert done and torch.equal(x, kept)


def test_one_channel_a_group_and_float64_to_the_last_digits():
    net = filled(ResBlock(3, 8, 16), Upsample(3, 16, 8), ResBlock(3, 8, 8, groups=1), nn.GroupNorm(8, 8, eps=1e-5), nn.SiLU()).double()
    x = 50 + torch.randn(1, 8, 9, 8, 7, dtype=torch.double)
    assert_close(in_slabs(net, x, 4), net(x), atol=1e-12, rtol=1e-12)


def test_half_precision_weights():
    net = filled(ConvNd(2, 4, 16), ResBlock(2, 16, 16), group_norm(16), ConvNd(2, 16, 4))
    x = torch.randn(1, 4, 24, 20)
    exact = net(x)
    net, x = net.bfloat16(), x.bfloat16()
    half, slabs = net(x), in_slabs(net, x, 5)
    assert slabs.dtype == torch.bfloat16
    assert (slabs - exact).square().mean() < 1.5 * (half - exact).square().mean()


def test_attention_sees_the_whole_grid():
    net, x = filled(SelfAttention(2, 8)), torch.randn(1, 8, 12, 3)
    moved = x.clone()
    moved[:, :, 0] += 1
    assert (in_slabs(net, moved, 4) - in_slabs(net, x, 4))[:, :, -1].abs().max() > 1e-3


def test_no_gradient_and_a_view_as_input():
    net = filled(ResBlock(2, 8, 8), ConvNd(2, 8, 8))
    x = torch.randn(1, 8, 20, 30, requires_grad=True)[..., ::2]
    y = in_slabs(net, x.transpose(2, 3), 3)
    assert not y.requires_grad
    assert_close(y, net(x.transpose(2, 3)).detach(), atol=1e-5, rtol=1e-5)


def test_empty_overlap_of_thin_grids():
    net = filled(SpaceToDepth(3, (2, 2, 1)), ConvNd(3, 4, 8), ResBlock(3, 8, 8), ConvNd(3, 8, 4), DepthToSpace(3, (2, 2, 1)))
    x = torch.randn(1, 1, 4, 4, 1)
    assert_close(in_slabs(net, x, 2), net(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='a grid of 2 x 2 x 1 voxels cannot be cut into 3 slabs: its longest axis has 2 voxels'): in_slabs(net, x, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('features', ['cpu', 'cuda'])
def test_the_network_on_a_gpu(features):
    net = filled(ConvNd(3, 4, 32), SelfAttention(3, 32), Upsample(3, 32, 32), ResBlock(3, 32, 16), group_norm(16), ConvNd(3, 16, 1)).cuda()
    x = torch.randn(1, 4, 16, 16, 24, device=features)
    whole = net(x.cuda())
    y = in_slabs(net, x, 6)
    assert y.device == x.device
    assert_close(y.cuda(), whole, atol=1e-4, rtol=1e-4)
    with torch.autocast('cuda', torch.float16): half, slabs = net(x.cuda()), in_slabs(net, x, 6).cuda()
    assert (slabs - whole).square().mean() < 1.5 * (half - whole).square().mean()
