"The blocks against other libraries' blocks, with the same weights."
import pytest
import torch
from torch.testing import assert_close

from sbldm_nb.layers import Cond, CondEmbedding, Conv3d, DepthToSpace, ResBlock, SelfAttention, SpaceToDepth, sinusoidal


def test_sinusoidal_equals_diffusers_and_monai():
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    t = torch.tensor([0, 1, 17, 500, 999])
    assert_close(sinusoidal(t, 64), embeddings.get_timestep_embedding(t, 64, downscale_freq_shift=0), atol=2e-4, rtol=0)
    monai = pytest.importorskip('monai.networks.nets.diffusion_model_unet')
    assert_close(sinusoidal(t, 64).roll(32, 1), monai.get_timestep_embedding(t, 64), atol=2e-4, rtol=0)


@pytest.mark.parametrize('width', [16, 24])
def test_resblock_equals_diffusers(width):
    resnet = pytest.importorskip('diffusers.models.resnet')
    theirs = resnet.ResnetBlock2D(in_channels=16, out_channels=width, temb_channels=32, groups=8, eps=1e-6, time_embedding_norm='scale_shift')
    ours = ResBlock(2, 16, width, 32)
    names = dict(norm1='norm1', conv1='conv1', norm2='norm2', conv2='conv2', time_emb_proj='emb', conv_shortcut='skip')
    state = {f'{names[k.rpartition(".")[0]]}.{k.rpartition(".")[2]}': v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x, emb = torch.randn(2, 16, 9, 7), torch.randn(2, 32)
    assert_close(ours(x, torch.nn.functional.silu(emb)), theirs(x, emb), atol=1e-5, rtol=1e-5)


def test_attention_equals_diffusers():
    attention = pytest.importorskip('diffusers.models.attention_processor')
    theirs = attention.Attention(32, heads=4, dim_head=8, norm_num_groups=8, eps=1e-6, bias=True, residual_connection=True)
    ours, flat = SelfAttention(2, 32, 4), theirs.state_dict()
    stack = lambda kind: torch.cat([flat[f'to_{n}.{kind}'] for n in 'qkv'])
    ours.load_state_dict({'norm.weight': flat['group_norm.weight'], 'norm.bias': flat['group_norm.bias'],
                          'qkv.weight': stack('weight')[:, :, None, None], 'qkv.bias': stack('bias'),
                          'out.weight': flat['to_out.0.weight'][:, :, None, None], 'out.bias': flat['to_out.0.bias']})
    x = torch.randn(2, 32, 5, 6)
    assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_space_to_depth_equals_monai_in_3d():
    utils = pytest.importorskip('monai.networks.utils')
    x = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(SpaceToDepth(3, 2)(x), utils.pixelunshuffle(x, 3, 2))
    y = torch.randn(2, 24, 2, 3, 4)
    assert torch.equal(DepthToSpace(3, 2)(y), utils.pixelshuffle(y, 3, 2))


def test_a_single_volume_can_be_compiled():
    "torch.compile cannot trace the operator that `Conv3d` asks for when nothing is compiled."
    layer, x = Conv3d(2, 8, 3, padding=1), torch.randn(1, 2, 5, 6, 4)
    y = torch.compile(layer, backend='aot_eager', fullgraph=True)(x)
    assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert layer.weight.grad.count_nonzero()


def test_guidance_batch_equals_two_passes():
    embed, zero = CondEmbedding(8, num_classes=3, vector_dim=2), torch.zeros(4, 8)
    cond = Cond(label=torch.tensor([0, 1, 2, 0]), vector=torch.randn(4, 2))
    both = embed(zero.repeat(2, 1), Cond.cat([cond, cond.null()]))
    assert_close(both, torch.cat([embed(zero, cond), embed(zero)]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_blocks_follow_the_device(dtype):
    block, embed = ResBlock(3, 16, 16, 8).cuda(), CondEmbedding(8, 2, 1).cuda()
    x = torch.randn(2, 16, 5, 6, 7, device='cuda')
    cond = Cond(label=torch.tensor([0, 1]), vector=torch.zeros(2, 1)).to('cuda')
    with torch.autocast('cuda', dtype): y = block(x, embed(torch.zeros(2, 8, device='cuda'), cond))
    assert y.device == x.device and y.isfinite().all()
