"Losses against diffusers 0.42.1, monai 1.6.1, scikit-image, NumPy, SciPy and slow loops."
import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from monai.losses import PatchAdversarialLoss
from scipy.stats import beta, kstest
from skimage.metrics import structural_similarity
from torch import nn
from torch.testing import assert_close

from sbldm_nb.losses import (
    DiffusionLoss,
    EQRegulariser,
    FrequencyAwareLoss,
    LatentCutMix,
    PatchDiscriminator,
    PerceptualLoss,
    VAELoss,
    discriminator_loss,
    draw_partners,
    generator_loss,
    mask_parts,
    mean_square,
    min_snr_weight,
    random_boxes,
    sample_beta,
    sample_t,
    structural_loss,
    turn_and_shrink,
)
from sbldm_nb.schedules import get_schedule, randn

peers = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'cosine': 'squaredcos_cap_v2', 'sigmoid': 'sigmoid'}
schedules = [*[dict(schedule_type=k) for k in ('linear', 'scaled_linear', 'cosine', 'sigmoid', 'gamma_rebalanced', 'flow')],
             dict(schedule_type='gamma_rebalanced', mode='beta', gamma=.5), dict(schedule_type='gamma_rebalanced', zero_terminal_snr=True),
             dict(schedule_type='linear', zero_terminal_snr=True), dict(schedule_type='flow', shift=3.)]
sizes = [(8, 8), (7, 9), (8, 7), (9, 8), (1, 6), (4, 6, 8), (5, 7, 3), (6, 5, 4), (3, 4, 5)]


def seeded(n=0): return torch.Generator().manual_seed(n)


def kinds(schedule): return ('x0', 'v', 'flow') if schedule.zero_terminal else ('eps', 'x0', 'v', 'flow')


@pytest.mark.parametrize('name', peers)
def test_min_snr(name):
    "All four published weights from diffusers' ratio; where their float32 `1 - abar` is rounded, the tolerance is that rounding."
    betas = {} if name == 'cosine' else dict(beta_start=.0015, beta_end=.0195)
    times = torch.tensor([0, 250, 500, 999])
    snr = compute_snr(DDPMScheduler(1000, beta_schedule=peers[name], **betas), times)
    ours, capped = get_schedule(name, **betas), snr.clamp(max=5)
    a, s = ours.levels(times)
    weights = {'eps': capped / snr, 'x0': capped, 'v': capped / (snr + 1), 'flow': capped * (s / (a + s))**2}
    for kind, weight in weights.items():
        assert_close(min_snr_weight(ours, times, kind), weight, rtol=0, atol=5e-6 if name == 'cosine' else 1e-6)


@pytest.mark.parametrize('config', schedules, ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_at_both_ends(config, dtype):
    "Finite loss and gradient at t = 0 and T - 1 for every parameterisation, weight and base; tables untouched."
    schedule, t = get_schedule(**config), torch.tensor([0, 999])
    tables = [k.clone() for k in (schedule.alpha, schedule.sigma, schedule.alphas_cumprod, schedule.lambda_)]
    x0, noise = (torch.randn(2, 3, 6, 7, generator=seeded()) * 3).to(dtype), torch.randn(2, 3, 6, 7, generator=seeded(1)).to(dtype)
    for kind in kinds(schedule):
        for weighting in (None, 'min_snr'):
            for base in ('mse', FrequencyAwareLoss()):
                weight = torch.ones((), dtype=dtype, requires_grad=True)
                objective, mask = DiffusionLoss(schedule, kind, weighting, base=base), x0[:, :1] > -9
                loss = objective.per_sample(lambda x, t, c: weight * x, x0, noise=noise, t=t, mask=mask)
                loss.sum().backward()
                assert loss.dtype == torch.float32 and loss.isfinite().all() and weight.grad.isfinite()
    for table, before in zip((schedule.alpha, schedule.sigma, schedule.alphas_cumprod, schedule.lambda_), tables):
        assert table.dtype == torch.float32 and torch.equal(table, before)


@pytest.mark.parametrize('config', schedules, ids=str)
def test_half_precision_is_near_float32(config):
    "The loss of a bfloat16 batch is that of the same numbers in float32, up to the network's own rounding."
    schedule, x0, noise = get_schedule(**config), *[torch.randn(8, 2, 9, 9, generator=seeded(k)).bfloat16() for k in (0, 1)]
    for kind in kinds(schedule):
        loss, t = DiffusionLoss(schedule, kind), torch.arange(8) * 142
        half, full = [loss.per_sample(lambda x, t, c: x * 0, x0.to(d), noise=noise.to(d), t=t) for d in (torch.bfloat16, torch.float32)]
        assert_close(half, full, rtol=1e-6, atol=0)


@pytest.mark.parametrize('config', schedules, ids=str)
def test_min_snr_is_one_loss_for_all(config):
    "An error of .01 in x0, said in each parameterisation, costs min(SNR, 5) times its square."
    schedule, t = get_schedule(**config), torch.tensor([3, 200, 600, 900])
    x0, noise = [torch.randn(4, 2, 5, 5, generator=seeded(k), dtype=torch.float64) for k in (0, 1)]
    a, s = schedule.levels(t, x0)
    for kind in kinds(schedule):
        wrong = lambda x, t, c: schedule.target(x0 + .01, (x - a * (x0 + .01)) / s, t, kind)
        found = DiffusionLoss(schedule, kind, 'min_snr').per_sample(wrong, x0, noise=noise, t=t)
        assert_close(found, schedule.snr(t).double().clamp(max=5) * 1e-4, rtol=1e-5, atol=0)


@pytest.mark.parametrize('shape', [(3, 2, 5, 6), (2, 3, 4, 3, 5)])
def test_masked_loss(shape):
    "A slow loop over elements, for a mask of each admissible shape."
    x0, noise = [torch.randn(shape, generator=seeded(k), dtype=torch.float64) for k in (0, 1)]
    schedule, t = get_schedule('cosine'), torch.arange(shape[0]) * 300 + 50
    residual = (.3 * schedule.add_noise(x0, noise, t) - schedule.target(x0, noise, t, 'v')).numpy()
    for lead in [(b, c) for b in (1, shape[0]) for c in (1, shape[1])]:
        for mask in (torch.rand(*lead, *shape[2:], generator=seeded(2)) < .4, torch.rand(*lead, *shape[2:], generator=seeded(3))):
            found = DiffusionLoss(schedule).per_sample(lambda x, t, c: .3 * x, x0, noise=noise, t=t, mask=mask)
            full, slow = mask.double().expand(shape).numpy(), []
            for r, m in zip(residual, full):
                top = bottom = 0.
                for index in np.ndindex(r.shape): top, bottom = top + m[index] * r[index]**2, bottom + m[index]
                slow.append(top / bottom)
            assert_close(found.numpy(), np.array(slow), rtol=1e-12, atol=0)


def test_mask_errors():
    x = torch.zeros(2, 4, 8, 8)
    for shape in ((2, 4, 8), (2, 4, 8, 7), (2, 2, 8, 8), (4, 1, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match='does not fit latents of shape'): mask_parts(torch.ones(shape), x)
    with pytest.raises(ValueError, match='empty for sample 0, 1'): mask_parts(torch.zeros(2, 1, 8, 8), x)
    for bad in (-1., 2., math.nan):
        with pytest.raises(ValueError, match='weights from 0 to 1'): mask_parts(torch.full((1, 1, 8, 8), bad), x)


def test_loss_never_reads_values_of_another_device():
    "On 'meta' there are none to read: a look at them, which on a GPU would wait for it, fails there."
    schedule, x = get_schedule('cosine'), torch.zeros(2, 4, 8, 8, device='meta')
    for base in ('mse', FrequencyAwareLoss()):
        loss = DiffusionLoss(schedule, weighting='min_snr', base=base)
        assert loss.per_sample(lambda x, t, c: x, x, mask=torch.ones(2, 1, 8, 8, dtype=torch.bool, device='meta')).shape == (2,)
        assert loss.schedule.device == x.device and schedule.device.type == 'cpu'
        moved = loss.schedule
        loss(lambda x, t, c: x, x)
        assert loss.schedule is moved


@pytest.mark.parametrize('config', schedules, ids=str)
def test_times_follow_the_schedule(config):
    schedule = get_schedule(**config)
    wanted = 'logit_normal' if config['schedule_type'] == 'flow' else 'uniform'
    assert {DiffusionLoss(schedule, kind).times for kind in kinds(schedule)} == {wanted}
    assert DiffusionLoss(schedule, times='uniform').times == 'uniform'


def test_base():
    schedule, frequency = get_schedule('cosine'), FrequencyAwareLoss(1, .3)
    assert DiffusionLoss(schedule).base == 'mse' and DiffusionLoss(schedule, base=frequency).base is frequency
    for wrong in (FrequencyAwareLoss, 'mae', None, torch.nn.functional.mse_loss):
        with pytest.raises(ValueError, match='base'): DiffusionLoss(schedule, base=wrong)
    assert frequency.config == dict(low_freq_weight=1, high_freq_weight=.3, cutoff_ratio=.25, normalize=False)
    with torch.inference_mode(): kept = frequency.per_sample(torch.ones(1, 1, 11, 3))
    r = torch.ones(1, 1, 11, 3, requires_grad=True)
    again = FrequencyAwareLoss(**frequency.config).per_sample(r)
    again.backward()
    assert torch.equal(again.detach(), kept) and r.grad.isfinite().all()


@pytest.mark.parametrize('size', sizes)
def test_parseval(size):
    "Equal weights are the mean squared error; the parts of the spectrum add up to it."
    r = torch.randn(4, 3, *size, generator=seeded(), dtype=torch.float64)
    for normalize in (False, True): assert_close(FrequencyAwareLoss(1, 1, .3, normalize).per_sample(r), mean_square(r), rtol=1e-15, atol=0)
    parts = [FrequencyAwareLoss(*w, .4).per_sample(r) for w in ((1, 0), (0, 1))]
    assert_close(parts[0] + parts[1], mean_square(r), rtol=2e-15, atol=0)


@pytest.mark.parametrize('size', sizes)
@pytest.mark.parametrize('normalize', [False, True])
def test_frequency_loss_against_full_fft(size, normalize):
    "NumPy's full complex transform, every bin weighed by itself."
    r = torch.randn(2, 2, *size, generator=seeded(), dtype=torch.float64)
    radius = np.sqrt(sum(k**2 for k in np.meshgrid(*[2 * np.fft.fftfreq(n) for n in size], indexing='ij')))
    w = np.where(radius <= .45 + 1e-9, 1.3, .2)
    power = np.abs(np.fft.fftn(r.numpy(), axes=range(2, r.ndim)))**2 / math.prod(size)
    slow = (power * w).reshape(2, -1).mean(1) / (w.mean() if normalize else 1)
    assert_close(FrequencyAwareLoss(1.3, .2, .45, normalize).per_sample(r).numpy(), slow, rtol=2e-15, atol=0)


@pytest.mark.parametrize('n', [8, 9, 10, 20, 24, 30])
def test_cutoff_includes_its_edge(n):
    "A bin exactly on the cutoff is low, whatever rounding does to its radius; the next one is high."
    for k in range((n + 1) // 2):
        low = FrequencyAwareLoss(1, 0, 2 * k / n).weights((n, n)) > 0
        assert low[:k + 1, 0].all() and low[0, :k + 1].all() and low[-k or n:, 0].all() and not low[k + 1:n - k, 0].any() and not low[0, k + 1:].any()
    assert (FrequencyAwareLoss(1, 0, 10 / 25).weights((25, 25)) > 0)[3, 4]  # 3-4-5


def test_frequency_loss_gradient():
    for size in ((5, 6), (3, 4, 5)):
        r = torch.randn(2, 1, *size, generator=seeded(), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(FrequencyAwareLoss(1, .3, .5).per_sample, r)
    for dtype in (torch.float16, torch.bfloat16):
        half = r.detach().to(dtype)
        assert_close(FrequencyAwareLoss().per_sample(half), FrequencyAwareLoss().per_sample(half.float()), rtol=0, atol=0)
    zero = torch.zeros(1, 1, 6, 6, requires_grad=True)
    FrequencyAwareLoss()(zero, torch.zeros(1, 1, 6, 6)).backward()
    assert torch.equal(zero.grad, torch.zeros(1, 1, 6, 6))


@pytest.mark.parametrize('alpha', [.2, 1., 3.])
def test_cutmix_law(alpha):
    "SciPy's Beta for the share before rounding, and away from the ends after it."
    assert kstest(sample_beta(20_000, alpha, seeded()).numpy(), beta(alpha, alpha).cdf).pvalue > .01
    share = LatentCutMix(alpha, prob=1.).draw(torch.zeros(4000), (999,), seeded(1))[2]
    at = np.linspace(.05, .95, 19)
    assert abs((share.numpy()[:, None] <= at).mean(0) - beta(alpha, alpha).cdf(at)).max() < .025


@pytest.mark.parametrize('alpha', [1e-3, .01, .05])
def test_beta_of_small_alpha(alpha):
    "Nearly all at the ends: variance 1 / (4 (2 alpha + 1)), SciPy's mass between, and no heap at one half."
    drawn, law = sample_beta(100_000, alpha, seeded()), beta(alpha, alpha)
    assert drawn.isfinite().all() and (drawn == .5).sum() == 0
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=.01)
    for low, high in ((1e-6, .5), (.01, .99), (.4, .6)):
        inside = law.cdf(high) - law.cdf(low)
        assert abs(((drawn > low) & (drawn < high)).double().mean() - inside) < 5 * math.sqrt(inside / 100_000)


@pytest.mark.parametrize('size', [(9,), (6, 11), (8, 14, 8)])
def test_cutmix_boxes(size):
    "Every box is a full rectangle with the voxels it reports, and lies anywhere with the same chance."
    wanted = torch.rand(3000, generator=seeded(), dtype=torch.float64)
    box, share = random_boxes(wanted, size, seeded(1))
    assert abs(share - wanted).max() <= max(.5 / size[-1], 1 / math.prod(size)) + 1e-9
    for b, s in zip(box[:300, 0], share):
        where = b.nonzero()
        assert len(where) == (where.max(0).values - where.min(0).values + 1).prod() == round(s.item() * b.numel())
        assert len(where) / b.numel() == s.item()
    mirrored = box.flip(*range(2, box.ndim))
    assert abs(box.double().mean(0) - mirrored.double().mean(0)).max() < .05


def test_cutmix_partners_and_rate():
    labels = torch.arange(60) % 4
    drawn = torch.stack([draw_partners(labels, seeded(k)) for k in range(400)])
    assert (labels[drawn] == labels).all() and (drawn != torch.arange(60)).all()
    assert abs(torch.bincount(drawn[:, 0], minlength=60)[4::4] / 400 - 1 / 14).max() < .05
    assert draw_partners(torch.tensor([3, 5]), seeded()).tolist() == [0, 1]
    rate = torch.stack([LatentCutMix(prob=.5).draw(labels, (6, 6), seeded(k), .4)[2] > 0 for k in range(400)]).double().mean()
    assert abs(rate - .3) < .01


def test_cutmix_call():
    z, mask = torch.randn(16, 4, 5, 6, 7, generator=seeded()), torch.rand(16, 1, 5, 6, 7, generator=seeded(1)) < .5
    before, labels = z.clone(), torch.arange(16) % 2
    mixed, cut = LatentCutMix(prob=1.)(z, mask, seeded(2))
    partner, box, _ = LatentCutMix(prob=1.).draw(torch.zeros(16), z.shape[2:], seeded(2))
    for i in range(16):
        b = box[i].expand_as(z[i])
        assert torch.equal(mixed[i][b], z[partner[i]][b]) and torch.equal(mixed[i][~b], z[i][~b])
        assert torch.equal(cut[i][box[i]], mask[partner[i]][box[i]]) and cut.dtype == torch.bool
    assert torch.equal(z, before) and torch.equal(LatentCutMix()(z, progress=1., generator=seeded())[0], z)
    assert LatentCutMix()(z, labels, seeded())[1] is labels
    for bad in (torch.zeros(16, 1, 5, 6, 6), torch.zeros(8, 1, 5, 6, 7), torch.zeros(16), torch.zeros(15, dtype=torch.long)):
        with pytest.raises(ValueError, match='neither whole-number labels'): LatentCutMix()(z, bad)


class Features(nn.Module):
    "Two smooth layers of features."
    def __init__(self, dims):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.layers = nn.ModuleList([conv(1, 3, 3, padding=1), conv(3, 5, 3, 2, padding=1)])

    def forward(self, x): return [x := torch.tanh(layer(x)) for layer in self.layers]


def slow_lpips(network, x, y, total=0.):
    "LPIPS, eq. 1 with unit weights, position by position."
    for a, b in zip(network(x), network(y)):
        layer = [sum((p / np.linalg.norm(p) - q / np.linalg.norm(q))**2) for i in range(len(a))
                 for p, q in zip(a[i].flatten(1).T.detach().numpy(), b[i].flatten(1).T.detach().numpy())]
        total += np.mean(layer)
    return total


def test_perceptual_loss():
    torch.manual_seed(0)
    flat, deep = Features(2).double(), Features(3).double()
    x, y = [torch.randn(2, 1, 5, 6, 7, generator=seeded(k), dtype=torch.float64) for k in (0, 1)]
    assert PerceptualLoss(flat, eps=0.)(x[..., 0], y[..., 0]).item() == pytest.approx(slow_lpips(flat, x[..., 0], y[..., 0]), rel=1e-12)
    assert PerceptualLoss(deep, dims=3, eps=0.)(x, y).item() == pytest.approx(slow_lpips(deep, x, y), rel=1e-12)
    axes = [np.mean([slow_lpips(flat, a, b) for a, b in zip(x.unbind(k), y.unbind(k))]) for k in (2, 3, 4)]
    assert PerceptualLoss(flat, eps=0.)(x, y).item() == pytest.approx(np.mean(axes), rel=1e-12)
    assert torch.autograd.gradcheck(PerceptualLoss(flat), (x[:1, ..., 0].requires_grad_(), y[:1, ..., 0]))


def test_perceptual_loss_is_finite_and_frozen():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    assert network.training and not PerceptualLoss(network).network.training
    loss = PerceptualLoss(network).train()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    zero, one = torch.zeros(1, 1, 9, 9), torch.ones(1, 1, 9, 9)
    for x, y in ((zero, zero), (zero, one), (one, one)):
        for judge in (loss, PerceptualLoss(nn.Conv2d(1, 4, 3, bias=False))):
            x = x.detach().requires_grad_()
            value = judge(x, y)
            value.backward()
            assert value.isfinite() and x.grad.isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items()) and not any(p.requires_grad for p in loss.parameters())
    assert network.training and all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_perceptual_loss_widens_its_copy(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    x, y = torch.randn(2, 2, 1, 9, 9, generator=seeded())
    judge, wide = PerceptualLoss(network), PerceptualLoss(copy.deepcopy(network).float())
    assert torch.equal(judge(x.to(dtype), y.to(dtype)), wide(x.to(dtype), y.to(dtype))) and judge(x, y).dtype == torch.float32
    assert network[0].weight.dtype == dtype and judge.network[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize('shapes', [((2, 1, 4, 5), (2, 1, 4, 5)), ((3, 1, 2, 3, 4), (1, 1, 2, 3, 4))])
def test_adversarial_losses(shapes):
    "monai's least squares without its activation; its hinge puts a tanh over the logits first, and its generator adds one."
    real, fake = [2 * torch.randn(s, generator=seeded(k)) for k, s in enumerate(shapes)]
    squares, hinge = PatchAdversarialLoss(criterion='least_squares', no_activation_leastsq=True), PatchAdversarialLoss(criterion='hinge')
    theirs = lambda loss: (loss(real, True, True) + loss(fake, False, True)) / 2
    assert_close(discriminator_loss(real, fake, 'least_squares'), theirs(squares), rtol=1e-6, atol=0)
    assert_close(generator_loss(fake, 'least_squares'), squares(fake, True, False), rtol=1e-6, atol=0)
    assert_close(discriminator_loss(real.tanh(), fake.tanh()), theirs(hinge), rtol=1e-6, atol=0)
    assert_close(generator_loss(fake.tanh()) + 1, hinge(fake, True, False), rtol=1e-6, atol=0)


def test_discriminator_against_monai():
    "Same convolutions and order as monai's; with its instance norm put into ours, equal outputs."
    from monai.networks.nets import PatchDiscriminator as Theirs
    torch.manual_seed(0)
    theirs, ours = Theirs(spatial_dims=2, channels=8, in_channels=1, num_layers_d=3, norm='INSTANCE', bias=True), PatchDiscriminator(channels=8)
    convs = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (theirs, ours)]
    for a, b in zip(*convs, strict=True): b.load_state_dict(a.state_dict())
    for i, m in enumerate(ours):
        if isinstance(m, nn.GroupNorm): ours[i] = nn.InstanceNorm2d(m.num_channels)
    x = torch.randn(2, 1, 61, 70, generator=seeded())
    assert_close(ours(x), theirs(x)[-1])


@pytest.mark.parametrize('size', [(5, 9), (11, 4)])
def test_shrinking(size):
    "The antialiased linear kernel as a matrix; and turns as NumPy's."
    def matrix(n, m):
        centre, at = (np.arange(m)[:, None] + .5) * n / m, np.arange(n) + .5
        w = np.maximum(0, 1 - abs(at - centre) / max(n / m, 1))
        return w / w.sum(1, keepdims=True)
    x = torch.randn(2, 3, 12, 10, 6, generator=seeded(), dtype=torch.float64)
    A, B, C = matrix(12, size[0]), matrix(10, size[1]), matrix(6, 4)
    slow = np.einsum('bcxyz,ix,jy,kz->bcijk', x.numpy(), A, B, C)
    for plane in ((0, 1), (0, 2), (1, 2)):
        found = turn_and_shrink(x, (*size, 4), plane, 3).numpy()
        assert_close(found, np.rot90(slow, 3, [k + 2 for k in plane]).copy(), rtol=0, atol=1e-12)
    flat = np.einsum('bcxy,ix,jy->bcij', x[..., 0].numpy(), A, B)
    assert_close(turn_and_shrink(x[..., 0], size, turns=0).numpy(), flat, rtol=0, atol=1e-12)


def test_eq_regulariser():
    "Zero for decoders that commute with the operation; gradients reach latents and decoder; the generator decides."
    z = torch.randn(2, 1, 4, 4, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 1, 8, 8, 8, generator=seeded(1), dtype=torch.float64)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    decode = lambda z: (w * z).repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    for k in range(30):
        assert EQRegulariser(min_scale=1.)(decode, z, decode(z), seeded(k)).item() == 0
        assert EQRegulariser()(lambda z: 3 * z + 1, z, 3 * z + 1, seeded(k)).item() < 1e-12
    assert torch.autograd.gradcheck(lambda z: EQRegulariser(criterion=nn.functional.mse_loss)(decode, z, x, seeded(3)), z)
    seen, g = [], seeded()
    for _ in range(900): EQRegulariser(True, 1.)(lambda v: seen.append([torch.equal(v, z.rot90(k, (2, 3))) for k in range(4)]) or decode(v), z, x, g)
    assert abs(np.mean(seen, 0) - [0, 1 / 3, 1 / 3, 1 / 3]).max() < .05
    sizes = []
    for _ in range(60): EQRegulariser(min_scale=.25)(lambda v: sizes.append(tuple(v.shape[2:])) or decode(v), z, x, g)
    assert set(sizes) == {(n, n, n) for n in (1, 2, 3, 4)}
    EQRegulariser()(decode, z, x, seeded()).backward()
    assert w.grad != 0
    assert EQRegulariser()(decode, z, x, seeded(5)) == EQRegulariser()(decode, z, x, seeded(5))


def test_eq_regulariser_of_unequal_factors():
    "Refused whatever would have been drawn, and allowed in the plane."
    z = torch.randn(1, 2, 4, 4, 4, generator=seeded())
    decode = lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for k in range(20):
        with pytest.raises(ValueError, match='cannot be turned'): EQRegulariser()(decode, z, decode(z), seeded(k))
        assert EQRegulariser(True, 1.)(decode, z, decode(z), seeded(k)) == 0
    uneven = lambda v: v.repeat_interleave(2, 2)
    with pytest.raises(ValueError, match='cannot be turned'): EQRegulariser()(uneven, z[..., 0], uneven(z[..., 0]), seeded())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_eq_regulariser_of_a_half_precision_decoder(dtype):
    "The decoder sees latents of its own type; the error is that of its output, in float32."
    torch.manual_seed(0)
    z, x, outputs = torch.randn(2, 3, 8, 6, generator=seeded()).to(dtype), torch.randn(2, 1, 8, 6, generator=seeded(1)).to(dtype), []
    decoder = nn.Conv2d(3, 1, 3, padding=1).to(dtype)
    found = EQRegulariser()(lambda v: outputs.append(decoder(v)) or outputs[-1], z, x, seeded(2))
    assert found.dtype == torch.float32 and outputs[0].dtype == dtype
    assert torch.equal(found, EQRegulariser()(lambda v: outputs[0].float(), z.float(), x.float(), seeded(2)))


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


def test_vae_loss_refuses_to_broadcast():
    x = torch.zeros(2, 1, 9, 9)
    gaussian = SimpleNamespace(mean=x, logvar=x)
    for other in (x[:1], x[:, 0], torch.zeros(2, 3, 9, 9)):
        for ssim in (0, .1):
            with pytest.raises(ValueError, match='the reconstruction has shape'): VAELoss(ssim=ssim)(other, x, gaussian)
    assert VAELoss()(x, x, gaussian)['loss'] == 0


def test_loss_follows_generator_and_pickles():
    x0, model = torch.randn(4, 2, 5, 5), lambda x, t, cond: x * 0
    for base in ('mse', FrequencyAwareLoss(1, .3, .4, True)):
        loss = DiffusionLoss(get_schedule('flow'), 'flow', 'min_snr', base=base)
        again = pickle.loads(pickle.dumps(loss))
        a, b = [k(model, x0, generator=torch.Generator().manual_seed(4)) for k in (loss, again)]
        assert torch.equal(a, b)
    t = sample_t(1000, 'logit_normal', 10, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == set(range(10))
    assert np.isclose(randn((4,), torch.Generator().manual_seed(0), 'cpu', torch.float64).numpy(),
                      torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()).all()
