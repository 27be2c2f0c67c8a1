"MONAI's AutoencoderKL and its conversion: the same mean, deviation and decoded image."
import copy

import pytest
import torch
from torch.testing import assert_close

from sbldm_nb.convert import from_monai, load_monai

monai = pytest.importorskip('monai.networks.nets')
variants = {'plain': {}, 'no attention': dict(with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False),
            'no projection': dict(include_fc=False), 'one matrix': dict(use_combined_linear=True), 'flash': dict(use_flash_attention=True),
            'in levels': dict(attention_levels=(False, True, True)), 'in levels alone': dict(attention_levels=(False, False, True), with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)}
refused = [(dict(use_convtranspose=True), 'transposed convolution'), (dict(with_decoder_nonlocal_attn=False), 'mirror of its encoder'), (dict(with_encoder_nonlocal_attn=False), 'mirror of its encoder'),
           (dict(out_channels=2), 'turns 1 channels into 2')]
shapes = [dict(in_channels=2, out_channels=2, channels=(8, 8), num_res_blocks=(2, 1), attention_levels=(False,) * 2, latent_channels=5),
          dict(channels=(16,), num_res_blocks=(1,), attention_levels=(False,)), dict(channels=(32, 16, 8))]


def peer(dims, **how):
    "MONAI's network with random weights, biases and norms."
    args = dict(num_res_blocks=(1, 2, 1), channels=(16, 32, 32), attention_levels=(False,) * 3, latent_channels=3, norm_num_groups=8) | how
    net = monai.AutoencoderKL(dims, args.pop('in_channels', 1), args.pop('out_channels', 1), **args).eval().requires_grad_(False)
    for p in net.parameters():
        if p.ndim == 1: p += .3 * torch.randn_like(p)
    return net


def compare(ours, theirs, x, z):
    "Ours within 1e-5 of MONAI in float64: in float32 MONAI's own rounding comes to as much."
    exact, gaussian = copy.deepcopy(theirs).double(), ours.encode(x)
    mean, std = exact.encode(x.double())
    for got, wanted in ((gaussian.mean, mean), (gaussian.std, std), (ours.decode(z), exact.decode(z.double()))):
        assert wanted.std() > .05
        assert_close(got.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('variant', list(variants))
def test_same_outputs(dims, variant):
    torch.manual_seed(0)
    theirs = peer(dims, **variants[variant])
    ours = from_monai(theirs.state_dict(), groups=8).requires_grad_(False)
    compare(ours, theirs, torch.randn(2, 1, *(24, 16, 8)[:dims]), torch.randn(2, 3, *(6, 4, 2)[:dims]))


@pytest.mark.parametrize('how', shapes)
def test_other_shapes(how):
    torch.manual_seed(0)
    theirs = peer(2, **how)
    ours = from_monai(theirs.state_dict(), groups=8).requires_grad_(False)
    compare(ours, theirs, torch.randn(1, how.get('in_channels', 1), 16, 24), torch.randn(1, how.get('latent_channels', 3), 5, 4))


def test_a_network_of_default_arguments():
    torch.manual_seed(0)
    theirs = monai.AutoencoderKL(2, channels=(32, 32, 32, 32)).eval().requires_grad_(False)
    ours, x = from_monai(theirs.state_dict()).requires_grad_(False), torch.randn(1, 1, 32, 32)
    compare(ours, theirs, x, torch.randn(1, 3, 4, 4))


def test_the_default_groups_and_files(tmp_path):
    theirs = peer(3, channels=(32, 64), num_res_blocks=(1, 1), attention_levels=(False,) * 2, norm_num_groups=32)
    torch.save(theirs.state_dict(), tmp_path / 'vae.pt')
    ours, x = load_monai(tmp_path / 'vae.pt').requires_grad_(False), torch.randn(1, 1, 8, 8, 8)
    assert_close(ours.encode(x).mean, theirs.encode(x)[0], atol=1e-5, rtol=1e-5)
    rebuilt = type(ours)(**ours.config)
    rebuilt.load_state_dict(ours.state_dict())


@pytest.mark.parametrize('how, sentence', refused)
def test_refusals(how, sentence):
    with pytest.raises(ValueError, match=sentence): from_monai(peer(2, **how).state_dict(), groups=8)


def test_refuses_one_axis_and_other_networks():
    with pytest.raises(ValueError, match='has 1 spatial axes'): from_monai(peer(1).state_dict(), groups=8)
    other = monai.DiffusionModelUNet(2, 1, 1, channels=(8, 8), num_res_blocks=1, attention_levels=[False] * 2, norm_num_groups=8, num_head_channels=8)
    with pytest.raises(ValueError, match='not those of a MONAI AutoencoderKL'): from_monai(other.state_dict())
    with pytest.raises(ValueError, match='not those of a MONAI AutoencoderKL'): from_monai({})


def test_a_malicious_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self): return (tmp_path.joinpath('ran').touch, ())
    torch.save({'encoder.blocks.0.conv.weight': Trap()}, tmp_path / 'a.pt')
    with pytest.raises(Exception): load_monai(tmp_path / 'a.pt')
    assert not (tmp_path / 'ran').exists()
