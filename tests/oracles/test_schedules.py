"Schedules and losses against monai 1.6.1, diffusers 0.42.1 and scikit-image."
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers.training_utils import compute_snr
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from skimage.metrics import structural_similarity
from torch.testing import assert_close

from sbldm_nb.losses import DiffusionLoss, min_snr_weight, sample_t, structural_loss
from sbldm_nb.schedules import get_schedule, randn

betas = dict(beta_start=.0015, beta_end=.0195)
times = torch.tensor([0, 250, 500, 999])
names = {'linear': ('linear', 'linear_beta', betas, 1e-7), 'scaled_linear': ('scaled_linear', 'scaled_linear_beta', betas, 3e-7),
         'cosine': ('squaredcos_cap_v2', 'cosine', {}, 5e-6)}  # the peers' products of float32 betas are 3e-7 away from float64


@pytest.fixture(params=list(names))
def trio(request):
    "Our schedule, diffusers' and monai's, and how far their float32 tables may lie from ours."
    diffusers_name, monai_name, args, tolerance = names[request.param]
    ours = get_schedule(request.param, **args)
    return ours, DiffusersDDPM(1000, beta_schedule=diffusers_name, **args), MonaiDDPM(1000, monai_name, **args), tolerance


@pytest.fixture
def pair():
    "An image and a noise."
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 8, 8, 8, generator=g), torch.randn(4, 3, 8, 8, 8, generator=g)


def test_tables(trio):
    ours, diffusers, monai, tolerance = trio
    for theirs in (diffusers, monai): assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=tolerance)


def test_add_noise_and_velocity(trio, pair):
    ours, diffusers, monai, tolerance = trio
    x0, noise = pair
    atol = 2e-5 if diffusers.config.beta_schedule == 'squaredcos_cap_v2' else 1e-6  # their 1 - abar is rounded before its root
    for theirs in (diffusers, monai):
        assert_close(ours.add_noise(x0, noise, times), theirs.add_noise(x0, noise, times), rtol=0, atol=atol)
        assert_close(ours.target(x0, noise, times, 'v'), theirs.get_velocity(x0, noise, times), rtol=0, atol=atol)


def test_half_precision_leaves_tables(pair):
    "One float16 call converts monai's table for good; ours must survive it."
    ours, x0, noise = get_schedule('linear'), *(p.half() for p in pair)
    before = ours.add_noise(*pair, times)
    assert ours.add_noise(x0, noise, times).isfinite().all()
    assert torch.equal(ours.add_noise(*pair, times), before)


def test_min_snr(trio):
    ours, diffusers, _, _ = trio
    snr = compute_snr(diffusers, times)
    capped = snr.clamp(max=5)
    for kind, weight in {'eps': capped / snr, 'x0': capped, 'v': capped / (snr + 1)}.items():
        assert_close(min_snr_weight(ours, times, kind), weight, rtol=0, atol=5e-6 if diffusers.config.beta_schedule == 'squaredcos_cap_v2' else 1e-6)


@pytest.mark.parametrize('shape', [(24, 31), (12, 14, 11)])
def test_structural_loss(shape):
    "scikit-image's uniform window, over the windows that lie inside."
    g = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=g) * 2 - 1
    y = (.6 * x + .4 * torch.rand(shape, generator=g)).clamp(-1, 1)
    full = structural_similarity(*[(k.double().numpy() + 1) / 2 for k in (x, y)], win_size=7, data_range=1, use_sample_covariance=False, full=True)[1]
    inside = full[tuple(slice(3, -3) for _ in shape)].mean()
    assert structural_loss(x[None, None], y[None, None]).item() == pytest.approx(1 - inside, abs=1e-5)


def test_structural_loss_gradient():
    g = torch.Generator().manual_seed(2)
    x, y = [torch.rand(1, 1, 9, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(structural_loss, (x, y))


def test_loss_follows_generator_and_pickles():
    loss = DiffusionLoss(get_schedule('flow'), 'flow')
    again = pickle.loads(pickle.dumps(loss))
    x0, model = torch.randn(4, 2, 5), lambda x, t, cond: x * 0
    a, b = [k(model, x0, generator=torch.Generator().manual_seed(4)) for k in (loss, again)]
    assert torch.equal(a, b)
    t = sample_t(1000, 'logit_normal', 10, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == set(range(10))
    assert np.isclose(randn((4,), torch.Generator().manual_seed(0), 'cpu', torch.float64).numpy(),
                      torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()).all()
