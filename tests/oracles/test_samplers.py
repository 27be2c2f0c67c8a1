"Samplers against diffusers 0.42.1 and monai 1.6.1 where those are right, and against a known answer where they are not."
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       FlowMatchHeunDiscreteScheduler)
from diffusers.guiders.guider_utils import rescale_noise_cfg
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from torch.testing import assert_close

from sbldm_nb.layers import Cond
from sbldm_nb.samplers import (SPACINGS, AdaptiveSampler, DDIMSampler, DDPMSampler, DPMSolverSampler, EulerSampler, HeunSampler, KnownRegion,
                               Measurement, SliceCoherent, get_timesteps, guide, invert, slerp)
from sbldm_nb.schedules import Schedule, get_schedule, output_form, randn

betas = dict(beta_start=.0015, beta_end=.0195)
TABLES = {'latent': get_schedule('scaled_linear', **betas), 'cosine': get_schedule('cosine'), 'flow': get_schedule('flow'),
          'zero': get_schedule('linear', zero_terminal_snr=True)}
latent, cosine, flow = TABLES['latent'], TABLES['cosine'], TABLES['flow']
kinds = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}  # ours: diffusers' and monai's
STEPS = 1, 2, 5, 8, 20, 50, 100, 250, 333, 600, 1000
M, S = .5, .3


def net(x, t, cond=None):
    "A network of no merit, smooth and bounded."
    return torch.sin(2 * x) * .5 + t.view(-1, *[1] * (x.ndim - 1)) / 2000


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


@pytest.fixture
def noise(): return torch.randn(4, 3, 8, 8, 8, generator=seeded(0))


class Draws:
    "A source of noise that gives the k-th numbers of a run from seed k, and keeps them."
    def __init__(self): self.seen = []

    def __call__(self, shape, generator, device, dtype):
        self.seen.append(torch.randn(shape, generator=seeded(len(self.seen)), dtype=dtype))
        return self.seen[-1]


# Which indices are visited

@pytest.mark.parametrize('steps', STEPS)
@pytest.mark.parametrize('spacing', ['trailing', 'leading', 'linspace'])
def test_counted_timesteps(steps, spacing):
    "As diffusers', but for its leading list where N does not divide T (it never gets near T) and its linspace of one index (the cleanest)."
    ours, theirs = get_timesteps(latent, steps, spacing), DDIMScheduler(1000, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    if spacing == 'leading' and 1000 % steps:
        k = np.arange(steps)[::-1]
        assert ours == np.floor(k * 1000 / steps + 1e-9).astype(int).tolist()
    elif spacing == 'linspace' and steps == 1: assert ours == [999] and theirs.timesteps.tolist() == [0]
    else: assert ours == theirs.timesteps.tolist()


@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('steps', STEPS)
def test_timesteps_are_unique_and_fall(table, spacing, steps):
    index = np.array(get_timesteps(TABLES[table], steps, spacing))
    assert len(index) == steps and (np.diff(index) < 0).all() and index[-1] >= 0 and index[0] <= 999
    if spacing != 'leading': assert index[0] == 999
    if spacing in ('linspace', 'lambda', 'karras') and steps > 1: assert index[-1] == 0
    if steps == 1000: assert index.tolist() == list(range(1000))[::-1]


@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('steps', STEPS[1:])
def test_noise_aware_timesteps(table, steps):
    """The entries nearest to diffusers' own karras sigmas, before it rounds them, and to equal steps of log sigma / alpha.

    Where several want one entry, the noisier ones go on to the next free one: entry k is the largest of (nearest_j + k - j) over j <= k, unless the table ends.
    Where alpha ends at 0, the ratio is infinite; that entry comes first and the rule shares out the others."""
    schedule = TABLES[table]
    end = 1000 - schedule.zero_terminal
    ratio, n, k = (schedule.sigma[:end].double() / schedule.alpha[:end].double()).numpy(), steps - schedule.zero_terminal, np.arange(steps - schedule.zero_terminal)
    want = {'karras': EulerDiscreteScheduler(1000)._convert_to_karras(torch.from_numpy(ratio[::-1].copy()), n)[::-1], 'lambda': np.geomspace(ratio[0], ratio[-1], n)}
    for spacing, levels in want.items():
        nearest = np.abs(np.log(ratio)[None] - np.log(levels)[:, None]).argmin(1)
        apart = np.minimum(np.maximum.accumulate(nearest - k) + k, end - n + k) if n > 1 else np.array([0])
        assert get_timesteps(schedule, steps, spacing)[::-1] == [*apart.tolist(), *[999] * schedule.zero_terminal]


# Step by step with the peers

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('steps', [10, 50])
@pytest.mark.parametrize('eta', [0., .4, 1.])
def test_ddim(noise, kind, steps, eta):
    """Leading indices, N divides 1000, and monai is given them too: its own list and its own stride do not fit together.

    1e-6 of the largest number without fresh noise; 2e-6 with it, whose std the peers take from 1 - abar in float32."""
    seen, draw = [], Draws()
    draw(noise.shape, None, None, noise.dtype)  # the peers' k-th step uses seed k
    DDIMSampler(net, latent, kind, 'leading', eta=eta, draw=draw).sample(noise=noise, steps=steps, callback=lambda i, x, x0: seen.append((x, x0)))
    assert len(draw.seen) == (steps if eta else 1)
    args = dict(clip_sample=False, set_alpha_to_one=True, prediction_type=kinds[kind], **betas)
    for theirs in (DDIMScheduler(1000, beta_schedule='scaled_linear', **args), MonaiDDIM(1000, 'scaled_linear_beta', **args)):
        theirs.set_timesteps(steps)
        x = noise
        for k, ((ours, ours_x0), t) in enumerate(zip(seen, get_timesteps(latent, steps, 'leading')), 1):
            step = theirs.step(net(x, torch.full((4,), t)), t, x, eta=eta, generator=seeded(k))
            y, x0 = step if isinstance(step, tuple) else (step.prev_sample, step.pred_original_sample)
            scale = max(1, x0.abs().max().item())
            assert_close(ours, y, rtol=0, atol=(2e-6 if eta else 1e-6) * scale)
            assert_close(ours_x0, x0, rtol=0, atol=1e-6 * scale)
            x = ours


@pytest.mark.parametrize('kind', kinds)
def test_ddpm_steps(kind):
    "Four steps of a walk over the whole table; the peers' noise is taken out again and ours put in."
    draw = Draws()
    frames = DDPMSampler(net, latent, kind, draw=draw).sample((2, 3, 4), 1000, trajectory=True).trajectory
    args = dict(clip_sample=False, variance_type='fixed_small', prediction_type=kinds[kind], **betas)
    for t in (999, 500, 250, 1):
        x, y, z = frames[999 - t].x, frames[1000 - t].x, draw.seen[1000 - t]
        assert frames[999 - t].t == t
        for theirs in (DDPMScheduler(1000, beta_schedule='scaled_linear', **args), MonaiDDPM(1000, 'scaled_linear_beta', **args)):
            step = theirs.step(net(x, torch.full((2,), t)), t, x, generator=seeded(5))
            theirs_y = step[0] if isinstance(step, tuple) else step.prev_sample
            drawn = torch.randn(x.shape, generator=seeded(5))
            assert_close(theirs_y + theirs._get_variance(t)**.5 * (z - drawn), y, rtol=0, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize('sde', [False, True])
@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('steps', [10, 20, 50])
def test_dpm_solver(noise, sde, kind, steps):
    "The same indices for both (diffusers' linspace leaves out its cleanest, so both take trailing), the same fresh noise."
    seen, draw = [], Draws()
    draw(noise.shape, None, None, noise.dtype)
    DPMSolverSampler(net, latent, kind, 'trailing', sde=sde, draw=draw).sample(noise=noise, steps=steps, callback=lambda i, x, x0: seen.append(x))
    theirs = DPMSolverMultistepScheduler(1000, beta_schedule='scaled_linear', timestep_spacing='trailing', lower_order_final=False, prediction_type=kinds[kind],
                                         algorithm_type='sde-dpmsolver++' if sde else 'dpmsolver++', **betas)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == get_timesteps(latent, steps, 'trailing')
    x = noise
    for k, (t, ours) in enumerate(zip(theirs.timesteps, seen), 1):
        x = theirs.step(net(x, t.expand(4)), t, x, variance_noise=torch.randn(x.shape, generator=seeded(k)) if sde else None).prev_sample
        assert_close(ours, x, rtol=0, atol=1e-5 * max(1, x.abs().max().item()))


def test_dpm_solver_on_the_levels_of_diffusers(noise):
    "Its karras sigmas, taken over unrounded as a schedule of their own; a network that does not look at the time."
    blind = lambda x, t, cond=None: torch.sin(2 * x) * .5
    theirs, x = DPMSolverMultistepScheduler(1000, beta_schedule='scaled_linear', use_karras_sigmas=True, lower_order_final=False, **betas), noise
    theirs.set_timesteps(10)
    for t in theirs.timesteps: x = theirs.step(blind(x, t), t, x).prev_sample
    sigma = theirs.sigmas[:-1].double().flip(0)
    ours = DPMSolverSampler(blind, Schedule(1 / (1 + sigma**2)**.5, sigma / (1 + sigma**2)**.5), 'eps').sample(noise=noise, steps=10).x0
    assert_close(ours, x, rtol=0, atol=1e-5 * x.abs().max().item())


@pytest.mark.parametrize('steps', [8, 20])
def test_flow_euler_and_heun(noise, steps):
    "diffusers counts time in 1 to 1000, so the network is shown its own index."
    sigmas = [1 - i / steps for i in range(steps)]
    ours = {cls: cls(net, flow, 'flow').sample(noise=noise, steps=steps).x0 for cls in (EulerSampler, DDIMSampler)}
    euler = FlowMatchEulerDiscreteScheduler(1000)
    euler.set_timesteps(sigmas=sigmas)
    x = noise
    for t in euler.timesteps: x = euler.step(net(x, torch.full((4,), round(t.item()) - 1)), t, x).prev_sample
    for cls in (EulerSampler, DDIMSampler): assert_close(ours[cls], x, rtol=0, atol=1e-6 if steps == 8 else 2e-6)
    textbook, levels = noise.double(), [*sigmas, 0.]
    for a, b in zip(levels, levels[1:]):
        index = lambda s: torch.full((4,), round(1000 * s) - 1)
        d = net(textbook, index(a))
        y = textbook + (b - a) * d
        textbook = y if b == 0 else textbook + (b - a) * (d + net(y, index(b))) / 2
    assert_close(HeunSampler(net, flow, 'flow').sample(noise=noise.double(), steps=steps).x0, textbook, rtol=0, atol=1e-6)


def test_heun_against_diffusers(noise):
    "Its levels, which are not ours, become a schedule of their own; the network does not look at the time."
    blind, theirs, x = (lambda x, t, cond=None: torch.sin(2 * x)), FlowMatchHeunDiscreteScheduler(1000), noise
    theirs.set_timesteps(10)
    for t in theirs.timesteps: x = theirs.step(blind(x, t), t, x).prev_sample
    sigma = torch.tensor(sorted(set(theirs.sigmas.tolist()) - {0.}))
    ours = HeunSampler(blind, Schedule(1 - sigma, sigma), 'flow').sample(noise=noise, steps=len(sigma))
    assert ours.steps == 10
    assert_close(ours.x0, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize('phi', [.3, .7, 1.])
def test_guidance_rescale(noise, phi):
    good, bad = (lambda x, t, cond: torch.sin(2 * x)), (lambda x, t, cond: x * .1)
    guided = bad(noise, 0, None) + 3 * (good(noise, 0, None) - bad(noise, 0, None))
    assert_close(guide(good, 3., bad, phi)(noise, 0), rescale_noise_cfg(guided, good(noise, 0, None), phi), rtol=0, atol=1e-6 * guided.abs().max().item())


# A Gaussian, for which every sampler's answer is known.
#
# Data N(M, S^2) have a linear denoiser, so a sample is linear in every random number that a run draws. A batch whose rows are impulses (row 0: all random
# numbers zero; row j: the j-th one is 1) therefore shows mean and variance exactly, and no sample is needed. They must equal what the papers' formulas,
# written down once more for a mean and a variance instead of an image, make of the same levels.

def gain(a, s):
    "E[x0 | x] = g x + k of the perfect denoiser."
    g = S**2 * a / (a**2 * S**2 + s**2)
    return g, M * (1 - g * a)


def ddim_law(levels, eta=0.):
    "arXiv 2010.02502, eqs. 12 and 16, in abar; a pair with alpha^2 + sigma^2 != 1 is a scaled copy of one for which it is 1."
    mean, var = 0., 1.
    for (a, s), (b, u) in zip(levels, levels[1:]):
        now, then = a**2 / (a**2 + s**2), b**2 / (b**2 + u**2)
        g, k = gain(now**.5, (1 - now)**.5)
        fresh = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        turn = ((1 - then - fresh) / (1 - now))**.5
        slope = then**.5 * g + turn * (1 - now**.5 * g)
        mean, var = slope * mean + (then**.5 - turn * now**.5) * k, slope**2 * var + fresh
    return mean, var**.5


def ddpm_law(levels):
    "arXiv 2006.11239, eq. 7, with the beta of the whole stretch."
    mean, var = 0., 1.
    for (a, s), (b, u) in zip(levels, levels[1:]):
        now, then = a**2 / (a**2 + s**2), b**2 / (b**2 + u**2)
        g, k = gain(now**.5, (1 - now)**.5)
        beta = 1 - now / then
        image, state = then**.5 * beta / (1 - now), (1 - beta)**.5 * (1 - then) / (1 - now)
        mean, var = (state + image * g) * mean + image * k, (state + image * g)**2 * var + (1 - then) / (1 - now) * beta
    return mean, var**.5


def ode_law(levels, order):
    "Euler (1) and Heun (2) for dx = x0 d alpha + eps d sigma; what multiplies a deviation is the same walk without constants."
    mean, std = 0., math.hypot(*levels[0])
    for (a, s), (b, u) in zip(levels, levels[1:]):
        def slope(x, here, const):
            g, k = gain(*here)
            x0 = g * x + const * k
            return (b - a) * x0 + (u - s) * (x - here[0] * x0) / here[1]
        def walk(x, const):
            first = slope(x, (a, s), const)
            return x + first if order == 1 or u == 0 else x + (first + slope(x + first, (b, u), const)) / 2
        mean, std = walk(mean, 1), walk(std, 0)
    return mean, std


def multistep_law(levels, sde):
    "arXiv 2211.01095, algorithm 2, and its SDE, in lambda; the law of the pair (state, last expected image)."
    lam = [-math.inf if a == 0 else math.log(a / s) for a, s in levels[:-1]]
    mean, last, xx, xd, dd = 0., 0., math.hypot(*levels[0])**2, 0., 0.
    for i, ((a, s), (b, u)) in enumerate(zip(levels, levels[1:-1])):
        g, k = gain(a, s)
        h = lam[i + 1] - lam[i]
        r = (lam[i] - lam[i - 1]) / h if i else math.inf
        line = 1 / (2 * r) if i and r < math.inf else 0.
        fade = math.exp(-h)
        shrink, toward, std = (u / s * fade, b * (1 - fade**2), u * (1 - fade**2)**.5) if sde else (u / s, b * (1 - fade), 0.)
        p, q = shrink + toward * (1 + line) * g, toward * line
        mean, last = p * mean - q * last + toward * (1 + line) * k, g * mean + k
        xx, xd, dd = p**2 * xx - 2 * p * q * xd + q**2 * dd + std**2, g * (p * xx - q * xd), g**2 * xx
    g, k = gain(*levels[-2])
    return g * mean + k, g * xx**.5


EXAM = {'ddim': (DDIMSampler, {}, ddim_law), 'ddim-eta.5': (DDIMSampler, dict(eta=.5), lambda levels: ddim_law(levels, .5)), 'ddpm': (DDPMSampler, {}, ddpm_law),
        'euler': (EulerSampler, {}, lambda levels: ode_law(levels, 1)), '2m': (DPMSolverSampler, {}, lambda levels: multistep_law(levels, False)),
        '2m-sde': (DPMSolverSampler, dict(sde=True), lambda levels: multistep_law(levels, True)), 'heun': (HeunSampler, {}, lambda levels: ode_law(levels, 2))}


def levels_of(schedule, steps, spacing):
    "What is visited: (alpha, sigma) from the noisiest to the clean image, the float32 table values as Python floats."
    index = get_timesteps(schedule, steps, spacing)
    return [*zip(schedule.alpha[index].tolist(), schedule.sigma[index].tolist()), (1., 0.)]


def law(name, schedule, steps, spacing='trailing'):
    "What a sampler's mean and std must be."
    return EXAM[name][2](levels_of(schedule, steps, spacing))


def exact(schedule, kind='x0'):
    "The perfect denoiser of N(M, S^2) in any parameterisation, on tables of numbers made in advance."
    a, s = schedule.alpha.double(), schedule.sigma.double()
    g, k = gain(a, s)
    p, q = output_form(a, s, kind)
    slopes, constants = [(w + a * 0).tolist() for w in (p * g + q * (1 - a * g) / s, p * k - q * a * k / s)]
    def model(x, t, cond=None):
        t = int(t[0])
        return x * slopes[t] + constants[t]
    return model


def impulses(name, schedule, kind, steps, spacing):
    "Mean, std, and what becomes of an impulse in the starting noise."
    cls, more, _ = EXAM[name]
    rows = steps + 1 if name in ('ddim-eta.5', 'ddpm', '2m-sde') else 2
    start, used = torch.zeros(rows, 1, dtype=torch.float64), [1]
    start[1] = 1
    def draw(shape, generator, device, dtype):
        used[0] += 1
        z = torch.zeros(shape, dtype=dtype)
        z[used[0]] = 1
        return z
    x = cls(exact(schedule, kind), schedule, kind, spacing, draw=draw, **more).sample(noise=start, steps=steps).x0[:, 0]
    assert x.dtype == torch.float64 and used[0] == rows - 1  # fresh noise in all steps but the last
    return x[0].item(), (x[1:] - x[0]).norm().item(), (x[1] - x[0]).item()


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('name', EXAM)
def test_gaussian(name, table, spacing):
    """Every sampler, schedule, spacing, N and parameterisation (eps where it is allowed).

    The mean misses M only by what the start lacks, alpha M, as far as the start still matters: were it there, the mean would be exact."""
    schedule = TABLES[table]
    for steps in STEPS:
        want, (alpha, sigma) = law(name, schedule, steps, spacing), levels_of(schedule, steps, spacing)[0]
        for kind in ('x0', 'v', 'flow') if schedule.zero_terminal else ('eps', 'x0', 'v', 'flow'):
            mean, std, kept = impulses(name, schedule, kind, steps, spacing)
            assert (mean, std) == pytest.approx(want, rel=1e-7), (steps, kind)
            assert M - mean == pytest.approx(kept * M * alpha / math.hypot(alpha, sigma), abs=1e-9), (steps, kind)


@pytest.mark.parametrize('table', TABLES)
def test_gaussian_approaches_the_truth(table):
    """First order: the std grows towards S with every N of the list from 8 on, for every spacing. Second order: from 50 steps on, with the spacings
    made for it, the std comes nearer to its limit (up to what rounding to table entries moves).

    At N = 1000 the relative error has two parts: the last step jumps to the image expected at index 0, which costs `short`; the rest is the sampler's."""
    schedule, last = TABLES[table], levels_of(TABLES[table], 1, 'leading')[0]
    short = 1 - last[0] * S / math.hypot(last[0] * S, last[1])
    for name in EXAM:
        for spacing in SPACINGS:
            stds = [law(name, schedule, steps, spacing)[1] for steps in STEPS]
            if name not in ('2m', '2m-sde', 'heun'): assert stds[3:] == sorted(stds[3:]) and stds[-1] < S, (name, spacing)
            elif spacing in ('lambda', 'karras'):
                errors = [abs(std - stds[-1]) for std in stds[5:]]
                assert all(b <= a + 2e-4 for a, b in zip(errors, errors[1:])), (name, spacing)
        bound = {'ddim': .008, 'euler': .008, 'ddim-eta.5': .011, 'ddpm': .022, '2m': .002, '2m-sde': .006, 'heun': .0002}[name]
        assert abs(stds[-1] / S - 1 + short) < bound, (name, stds[-1] / S - 1, short)
    assert short < .0084


@pytest.mark.parametrize('name', EXAM)
def test_order_of_convergence(name):
    "Twice as many steps of equal size in lambda: the error to the exact flow falls by 2 (first order) or by 4 (second)."
    errors = []
    for steps in (40, 80, 160):
        lam = torch.linspace(4, -5, steps, dtype=torch.float64)
        schedule = Schedule((2 * lam).sigmoid().sqrt(), (-2 * lam).sigmoid().sqrt())
        levels = levels_of(schedule, steps, 'trailing')
        spread = [math.hypot(a * S, s) for a, s in levels]
        start = 1. if name in ('ddim-eta.5', 'ddpm', '2m-sde') else spread[0]  # an SDE forgets its start, an ODE does not
        errors.append(abs(impulses(name, schedule, 'v', steps, 'trailing')[1] - gain(*levels[-2])[0] * spread[-2] / start))
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert ratios == pytest.approx([4, 4] if name in ('2m', '2m-sde', 'heun') else [2, 2], rel=.05)


def test_few_steps():
    """What order and spacing are worth at 8 and 10 steps (truth .300). DPM-Solver++ 2M with lambda or karras spacing is within .02 at 8 on the latent schedule;
    at 10, with lambda, within 5 % on every schedule.

    Heun (15 and 19 calls) is not with those: .327 and .347 at 8, and still 5.4 % off at 10. Linspace suits it: under 2 % at 8 on flow, under 4 % at 10 on cosine."""
    std = lambda name, schedule, steps, spacing: impulses(name, schedule, 'v', steps, spacing)[1]
    assert [std('2m', latent, 8, spacing) for spacing in SPACINGS] == pytest.approx([.1441, .2882, .2749, .2945, .2886], abs=1e-4)
    assert [std('heun', latent, 8, spacing) for spacing in SPACINGS] == pytest.approx([.1472, .3535, .3639, .3272, .3474], abs=1e-4)
    for spacing in ('lambda', 'karras'): assert abs(std('2m', latent, 8, spacing) - S) < .02 and abs(std('2m', latent, 10, spacing) - S) < .002
    assert std('2m-sde', latent, 8, 'lambda') == pytest.approx(.2793, abs=1e-4)
    for schedule in TABLES.values(): assert abs(std('2m', schedule, 10, 'lambda') / S - 1) < .05
    assert std('heun', latent, 10, 'lambda') == pytest.approx(.3162, abs=1e-4)
    assert [std('heun', flow, 8, 'linspace'), std('heun', cosine, 10, 'linspace')] == pytest.approx([.3055, .3101], abs=1e-4)


@pytest.mark.parametrize('name,table,spacing,stds', [
    ('ddim', 'latent', 'linspace', {8: .161, 20: .223, 50: .262, 100: .278, 250: .289, 333: .291, 600: .294, 1000: .295}),
    ('ddpm', 'latent', 'linspace', {50: .237, 600: .287}), ('ddim', 'latent', 'trailing', {600: .292}),
    ('euler', 'flow', 'trailing', {10: .2469, 30: .2813}), ('heun', 'flow', 'trailing', {10: .2855, 20: .2966})])
def test_gaussian_published_numbers(name, table, spacing, stds):
    for steps, std in stds.items():
        got = impulses(name, TABLES[table], 'v', steps, spacing)
        assert got[1] == pytest.approx(std, abs=5e-5 if table == 'flow' else 6e-4)
        assert got[0] == pytest.approx(.5 if table == 'flow' else .4985, abs=2e-3)


# The same, with samples, where the peers fail

@pytest.fixture(scope='module')
def start():
    x = torch.randn(20_000, 1, generator=seeded(0), dtype=torch.float64)
    return (x - x.mean()) / x.std(correction=0)


def walked(scheduler, start, **more):
    "Mean and std of what a peer makes of the perfect denoiser."
    x = start
    for t in scheduler.timesteps:
        step = scheduler.step(exact(latent, 'eps')(x, t.view(1)), int(t), x, **{k: v(int(t)) for k, v in more.items()})
        x = step[0] if isinstance(step, tuple) else step.prev_sample
    return x.mean().item(), x.std().item()


def test_fault_1_ddpm_in_fewer_steps(start):
    theirs = MonaiDDPM(1000, 'scaled_linear_beta', clip_sample=False, **betas)
    theirs.set_timesteps(50)
    assert walked(theirs, start, generator=seeded) == pytest.approx((.086, .884), abs=.02)
    ours = DDPMSampler(exact(latent), latent, 'x0', 'linspace').sample(noise=start, steps=50, generator=seeded(1)).x0
    assert (ours.mean().item(), ours.std().item()) == pytest.approx((.4996, .237), abs=.005)


def test_fault_2_ddim_where_n_does_not_divide_t(start):
    "600 steps; right is .498 / .294 with linspace and .292 with trailing."
    monai, diffusers = MonaiDDIM(1000, 'scaled_linear_beta', clip_sample=False, **betas), DDIMScheduler(
        1000, beta_schedule='scaled_linear', clip_sample=False, timestep_spacing='trailing', **betas)
    for theirs, wrong in ((monai, (.386, .479)), (diffusers, (.385, .484))):
        theirs.set_timesteps(600)
        assert walked(theirs, start) == pytest.approx(wrong, abs=.003)
    for spacing, std in (('linspace', .2936), ('trailing', .2921)):
        ours = DDIMSampler(exact(latent, 'eps'), latent, 'eps', spacing).sample(noise=start, steps=600).x0
        assert (ours.mean().item(), ours.std().item()) == pytest.approx((.4982, std), abs=3e-4)


def test_fault_6_spacing_beats_order(start):
    "DPM-Solver++ 2M in 8 steps with diffusers' defaults, and with lambda spacing; ours starts there."
    for more, std in (({}, .143), (dict(use_lu_lambdas=True), .294)):
        theirs = DPMSolverMultistepScheduler(1000, beta_schedule='scaled_linear', lower_order_final=False, **more, **betas)
        theirs.set_timesteps(8)
        assert walked(theirs, start)[1] == pytest.approx(std, abs=.002)
    assert DPMSolverSampler(exact(latent, 'eps'), latent, 'eps').sample(noise=start, steps=8).x0.std().item() == pytest.approx(.2945, abs=2e-4)


@pytest.mark.parametrize('name', EXAM)
def test_eps_is_refused_where_no_signal_is_left(name):
    for table in ('flow', 'zero'):
        with pytest.raises(ValueError, match="'eps' cannot recover x0"): EXAM[name][0](net, TABLES[table], 'eps', **EXAM[name][1])


# Two modes

WEIGHTS, MODES, WIDTH = torch.tensor([.3, .7], dtype=torch.float64), torch.tensor([-1., 1.], dtype=torch.float64), .1


def exact_mixture(schedule, kind):
    "The perfect denoiser of .3 N(-1, .1^2) + .7 N(1, .1^2)."
    def model(x, t, cond=None):
        a, s = schedule.alpha[t[0]].double(), schedule.sigma[t[0]].double()
        var = a**2 * WIDTH**2 + s**2
        share = (WEIGHTS.log() - (x - a * MODES)**2 / (2 * var)).softmax(-1)
        x0 = (share * (MODES + WIDTH**2 * a / var * (x - a * MODES))).sum(-1, keepdim=True)
        p, q = output_form(a, s, kind)
        return p * x0 + q * (x - a * x0) / s
    return model


@pytest.mark.parametrize('table', ['latent', 'cosine', 'flow'])
@pytest.mark.parametrize('name', EXAM)
def test_mixture(name, table):
    "Both modes stay, with their weights (4 standard errors of the binomial law, three seeds) and widths (4 standard errors and 5 %)."
    schedule, spacing, n = TABLES[table], 'lambda' if table == 'latent' else 'trailing', 4000
    cls, more, _ = EXAM[name]
    last = levels_of(schedule, 1, 'leading')[0]
    width = WIDTH * last[0] * WIDTH / math.hypot(last[0] * WIDTH, last[1])  # the last step jumps to a mean
    for seed, kind in enumerate(('v', 'x0', 'flow')):
        x = cls(exact_mixture(schedule, kind), schedule, kind, spacing, **more).sample((n, 1), 200, noise=torch.randn(n, 1, generator=seeded(seed), dtype=torch.float64),
                                                                                  generator=seeded(100 + seed)).x0
        up = x > 0
        assert abs(up.double().mean().item() - .7) < 4 * math.sqrt(.21 / n)
        assert ((x.abs() - 1).abs() < .5).all()
        for part, mode in ((x[~up], -1), (x[up], 1)):
            assert abs(part.mean().item() - mode) < 4 * width / math.sqrt(len(part)) + .005
            assert abs(part.std().item() / width - 1) < 4 / math.sqrt(2 * len(part)) + .05


@pytest.mark.parametrize('name', ['ddim', '2m', 'heun'])
def test_mixture_without_chance(name):
    "Noise on the quantiles of the normal law: a deterministic sampler's weights without sampling error."
    cls, more, _ = EXAM[name]
    z = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + .5) / 10_000)[:, None]
    for schedule in (cosine, flow):
        up = cls(exact_mixture(schedule, 'v'), schedule, 'v', 'trailing', **more).sample(noise=z, steps=200).x0 > 0
        assert up.double().mean().item() == pytest.approx(.7, abs=.001)


# Types, chance, guidance, training

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('name', [*EXAM, 'adaptive'])
def test_half_precision(name, table, dtype):
    "Linspace visits t = 0 and t = T - 1. The network sees the small type, the tables do not."
    cls, more = (AdaptiveSampler, {}) if name == 'adaptive' else EXAM[name][:2]
    schedule, seen = TABLES[table], []
    before = schedule.alpha.clone(), schedule.sigma.clone()
    for kind in ('v', 'x0', 'flow') if schedule.zero_terminal else ('eps', 'v', 'x0', 'flow'):
        def model(x, t, cond):
            seen.append((x.dtype, t[0].item()))
            return exact(schedule, kind)(x, t)
        small = torch.randn(2, 3, 5, generator=seeded(0)).to(dtype)
        for steps in (1, 2, 20):
            x = cls(model, schedule, kind, 'linspace', **more).sample(noise=small, steps=steps, generator=seeded(1)).x0
            assert x.dtype == dtype and x.isfinite().all()
    assert {d for d, _ in seen} == {dtype} and {0, 999} <= {t for _, t in seen}
    assert schedule.alpha.dtype == torch.float32 and torch.equal(schedule.alpha, before[0]) and torch.equal(schedule.sigma, before[1])


@pytest.mark.parametrize('name', [*EXAM, 'adaptive'])
def test_chance_enters_by_the_generator_or_by_draw(name):
    cls, more = (AdaptiveSampler, {}) if name == 'adaptive' else EXAM[name][:2]
    sample = lambda seed, **options: cls(net, cosine, **options, **more).sample((2, 3, 4), 6, generator=seeded(seed)).x0
    state = torch.random.get_rng_state()
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    draw = Draws()
    x, fresh = sample(1, draw=draw), 5 if name in ('ddim-eta.5', 'ddpm', '2m-sde') else 0
    assert len(draw.seen) == 1 + fresh and torch.equal(x, sample(2, draw=Draws()))
    assert torch.equal(torch.random.get_rng_state(), state)
    if not fresh: assert torch.equal(x, cls(net, cosine, **more).sample(noise=draw.seen[0], steps=6).x0)


def test_guidance_calls_and_conditions():
    "Without guidance the weak model sleeps; with it the condition goes to the weak model, or is dropped for the model itself."
    seen = []
    model = lambda x, t, cond: seen.append(('model', None if cond is None else cond.keep is None)) or x
    weak = lambda x, t, cond: seen.append(('weak', cond.keep is None)) or .5 * x
    cond = Cond(label=torch.tensor([1, 2]))
    DDIMSampler(model, flow, 'flow', weak=weak).sample((2, 1), 1, cond)
    assert seen == [('model', True)]
    seen.clear()
    DDIMSampler(model, flow, 'flow', guidance=2., weak=weak).sample((2, 1), 1, cond)
    assert seen == [('model', True), ('weak', True)]
    seen.clear()
    DDIMSampler(model, flow, 'flow', guidance=2.).sample((2, 1), 1, cond)
    assert seen == [('model', True), ('model', False)]


@pytest.mark.parametrize('cls', [DDIMSampler, DPMSolverSampler, HeunSampler])
def test_guidance_interval(cls):
    "The weak model is asked where low <= t <= high and nowhere else, at Heun's second look too; elsewhere the run is the unguided one."
    good, bad = [], []
    sampler = cls(lambda x, t, cond: good.append(t[0].item()) or net(x, t), flow, 'flow', 'trailing', guidance=2.,
                  weak=lambda x, t, cond: bad.append(t[0].item()) or .5 * x, interval=(299, 699))
    frames = sampler.sample((2, 3), 10, generator=seeded(0), trajectory=True).trajectory
    assert set(good) == set(get_timesteps(flow, 10)) and bad == [t for t in good if 299 <= t <= 699] and len(set(bad)) == 5
    plain = cls(net, flow, 'flow', 'trailing').sample((2, 3), 10, generator=seeded(0), trajectory=True).trajectory
    untouched = [torch.equal(a.x, b.x) for a, b in zip(frames, plain)]
    assert untouched == [t >= (699 if cls is not HeunSampler else 799) for t in get_timesteps(flow, 10)]


@pytest.mark.parametrize('name', [*EXAM, 'adaptive'])
def test_inference_mode_inside_and_a_plain_tensor_outside(name):
    "The network runs in inference mode; the result can be trained on."
    cls, more = (AdaptiveSampler, {}) if name == 'adaptive' else EXAM[name][:2]
    modes = []
    result = cls(lambda x, t, cond: modes.append(torch.is_inference_mode_enabled()) or net(x, t), flow, 'flow', **more).sample((2, 3), 4, generator=seeded(0))
    assert all(modes) and not torch.is_inference_mode_enabled() and not result.x0.is_inference()
    w = torch.ones(3, requires_grad=True)
    (result.x0 * w).sum().backward()
    assert_close(w.grad, result.x0.sum(0))


# Stopping early

@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('spacing', SPACINGS)
def test_adaptive_without_threshold_is_ddim(table, spacing):
    for steps in STEPS:
        sampler = lambda cls, **more: cls(exact(TABLES[table], 'v'), TABLES[table], 'v', spacing, **more).sample((3, 2), steps, generator=seeded(steps))
        ours, plain = sampler(AdaptiveSampler, threshold=0.), sampler(DDIMSampler)
        assert torch.equal(ours.x0, plain.x0) and ours.steps == plain.steps == steps and ours.taken.tolist() == [steps] * 3


def test_adaptive_stops_each_sample_by_itself():
    """Sample i's expected image moves until its own index and then rests: it stops `patience` steps later, and not before `min_steps`.

    The others go on as in DDIM, with their own conditions; a sample that stopped returns the image expected there."""
    rest, T, steps = torch.tensor([980., 700., 300., -1.]), 1000, 50
    def model(x, t, cond):
        assert len(x) == len(t) == len(cond.vector)
        moved = (t - cond.vector[:, 1]).clamp(min=0) / T
        return (cond.vector[:, 0] * (1 + moved)).view(-1, 1, 1).expand_as(x)
    cond = Cond(vector=torch.stack([torch.tensor([1., 2., 3., 4.]), rest], 1))
    sampler = AdaptiveSampler(model, flow, 'x0', threshold=1e-3, patience=4, min_steps=10)
    result = sampler.sample((4, 2, 3), steps, cond, generator=seeded(0), trajectory=True)
    index = np.array(get_timesteps(flow, steps))
    expected = []
    for r in rest.tolist():
        calm = [i > 0 and i >= 10 and index[i - 1] <= r for i in range(steps)]
        stop = [i for i in range(steps) if i >= 3 and all(calm[i - 3:i + 1])]
        expected.append(stop[0] + 1 if stop else steps)
    assert result.taken.tolist() == expected and len(set(expected)) == 4 and expected[0] == 14 and result.steps == expected[-1] == steps
    plain = DDIMSampler(model, flow, 'x0').sample((4, 2, 3), steps, cond, generator=seeded(0), trajectory=True)
    for i, taken in enumerate(expected): assert torch.equal(result.x0[i], plain.trajectory[taken - 1].x0[i])
    assert len(result.trajectory) == steps and torch.equal(result.trajectory[-1].x0, result.x0)


def test_adaptive_counts_consecutive_steps():
    "One restless step in between starts the count anew."
    index = get_timesteps(flow, 20)
    restless = index[12]
    model = lambda x, t, cond: torch.full_like(x, 2. if t[0] == restless else 1.)
    sampler = lambda patience: AdaptiveSampler(model, flow, 'x0', threshold=1e-3, patience=patience, min_steps=4)
    stops = [sampler(patience).sample((2, 3), 20, generator=seeded(0)).steps for patience in (3, 8, 9, 10)]
    assert stops == [7, 12, 20, 20]


# Agreeing with what is known

MU, COV = np.array([.5, -.2]), np.array([[.64, .432], [.432, .36]])  # correlation .9
KNOWN = 1.7
CONDITIONAL = MU[1] + COV[0, 1] / COV[0, 0] * (KNOWN - MU[0]), math.sqrt(COV[1, 1] - COV[0, 1]**2 / COV[0, 0])


def image_map(a, s):
    "E[x0 | x] = G x + k for data N(MU, COV)."
    G = a * COV @ np.linalg.inv(a**2 * COV + s**2 * np.eye(2))
    return G, MU - a * G @ MU


def exact_pair(schedule):
    maps = [image_map(a, s) for a, s in zip(schedule.alpha.double().tolist(), schedule.sigma.double().tolist())]
    maps = [(torch.from_numpy(G.T.copy()), torch.from_numpy(k)) for G, k in maps]
    return lambda x, t, cond=None: x @ maps[int(t[0])][0] + maps[int(t[0])][1]


def repaint_law(levels, repeats, jump):
    "RePaint's algorithm 1 (arXiv 2201.09865) on a mean and a covariance, in abar, its way back walked in single steps; the first part, out of pure noise, once."
    abar, (mean, cov), unknown = [a**2 for a, _ in levels], (np.zeros(2), np.eye(2)), np.diag([0., 1.])
    for first in range(0, len(abar) - 1, jump):
        end = min(first + jump, len(abar) - 1)
        turns = repeats if first else 1
        for turn in range(turns):
            for i in range(first, end):
                now, then = abar[i:i + 2]
                beta = 1 - now / then
                G, k = image_map(now**.5, (1 - now)**.5)
                image, state = then**.5 * beta / (1 - now), (1 - beta)**.5 * (1 - then) / (1 - now)
                A = unknown @ (state * np.eye(2) + image * G)
                mean = A @ mean + unknown @ (image * k) + np.array([then**.5 * KNOWN, 0])
                cov = A @ cov @ A.T + np.diag([1 - then, (1 - then) / (1 - now) * beta])
            for i in reversed(range(first, end)) if turn + 1 < turns else ():
                keep = abar[i] / abar[i + 1]
                mean, cov = keep**.5 * mean, keep * cov + (1 - keep) * np.eye(2)
    return mean, cov


def hole(repeats, jump): return KnownRegion(torch.tensor([[[KNOWN, math.nan]]], dtype=torch.float64), torch.tensor([[[False, True]]]), repeats, jump)


@pytest.mark.parametrize('repeats,jump', [(1, 1), (1, 5), (3, 5), (4, 7), (2, 1)])
def test_repaint_step_by_step(repeats, jump):
    "The whole run is linear in its random numbers, so impulses show its mean and covariance exactly (latent schedule, float32 tables)."
    def run(draw, rows): return DDPMSampler(exact_pair(latent), latent, 'x0', draw=draw).sample(
        noise=draw((rows, 1, 2), None, None, torch.float64), steps=20, projection=hole(repeats, jump)).x0[:, 0]
    count = []
    run(lambda shape, generator, device, dtype: count.append(0) or torch.zeros(shape, dtype=dtype), 1)
    used, rows = [0], 1 + 2 * len(count)
    def impulse(shape, generator, device, dtype):
        z = torch.zeros(shape, dtype=dtype)
        z[1 + 2 * used[0], 0, 0] = z[2 + 2 * used[0], 0, 1] = 1
        used[0] += 1
        return z
    x = run(impulse, rows).numpy()
    mean, cov = repaint_law(levels_of(latent, 20, 'trailing'), repeats, jump)
    assert (x[:, 0] == KNOWN).all()
    np.testing.assert_allclose(x[0], mean, atol=2e-6)
    np.testing.assert_allclose((x[1:] - x[0]).T @ (x[1:] - x[0]), cov, atol=2e-6)


@pytest.mark.parametrize('cls', [DDPMSampler, DDIMSampler, DPMSolverSampler, HeunSampler])
def test_repaint_approaches_the_true_conditional(cls):
    "Pasting alone (repeats = 1) puts the unknown half way between its prior mean and the truth; walking each part again brings it there."
    z, found = torch.randn(4000, 1, 2, generator=seeded(0), dtype=torch.float64), {}
    for repeats in (1, 5, 20):
        x = cls(exact_pair(flow), flow, 'x0', 'trailing').sample(noise=z, steps=50, generator=seeded(1), projection=hole(repeats, 5)).x0[:, 0]
        assert (x[:, 0] == KNOWN).all()
        found[repeats] = x[:, 1].mean().item(), x[:, 1].std().item()
    misses = [abs(found[r][0] - CONDITIONAL[0]) for r in (1, 5, 20)]
    assert misses[0] > .15 and misses[1] < misses[0] / 2 and misses[2] < .025
    assert found[20][1] == pytest.approx(CONDITIONAL[1], abs=.04)


def test_multistep_forgets_where_it_jumps_back():
    "Nothing known, all noise zero: what is left of a part walked twice is scaling by alpha / alpha', and the textbook in lambda that begins anew after each jump."
    x0, seen, everywhere = (lambda t: math.sin(t / 100)), [], torch.ones(1, 1, 2, dtype=torch.bool)
    sampler = DPMSolverSampler(lambda x, t, cond: torch.full_like(x, x0(int(t[0]))), latent, 'x0',
                               draw=lambda shape, generator, device, dtype: torch.zeros(shape, dtype=dtype))
    sampler.sample(noise=everywhere.double(), steps=6, callback=lambda i, x, image: seen.append(x[0, 0, 0].item()),
                   projection=KnownRegion(everywhere.double(), everywhere, repeats=2, jump=3))
    index, levels, want = get_timesteps(latent, 6, 'lambda'), levels_of(latent, 6, 'lambda'), []
    x = math.hypot(*levels[0])
    for k, begins in zip((0, 1, 2, 3, 4, 5, 3, 4, 5), (True, False, False, False, False, False) + (True, False, False)):
        if begins and want: x *= levels[k][0] / levels[k + 3][0]
        (a, s), (b, u) = levels[k:k + 2]
        h = math.log(b / a * s / u) if u else math.inf
        line = 0. if begins or u == 0 else h / (2 * last) * (x0(index[k]) - x0(index[k - 1]))
        x, last = u / s * x - b * math.expm1(-h) * (x0(index[k]) + line), h
        want.append(x)
    assert seen == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize('name', EXAM)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_known_voxels_are_untouched(name, dtype):
    cls, more, _ = EXAM[name]
    known, mask = torch.randn(1, 3, 4, 5, generator=seeded(7)).to(dtype), torch.rand(2, 1, 4, 5, generator=seeded(8)) < .4
    for table in TABLES:
        x = cls(net, TABLES[table], **more).sample((2, 3, 4, 5), 7, noise=torch.randn(2, 3, 4, 5, generator=seeded(0)).to(dtype), generator=seeded(9),
                                                   projection=KnownRegion(known, mask, repeats=2, jump=3)).x0
        keep = ~mask.expand_as(x)
        assert torch.equal(x[keep], known.expand_as(x)[keep]) and x.isfinite().all()
        assert not torch.equal(x[~keep], known.expand_as(x)[~keep])


def slabs(x): return x.unflatten(-1, (-1, 4)).mean(-1)
def thin(y): return y.repeat_interleave(4, -1)


@pytest.mark.parametrize('name', EXAM)
@pytest.mark.parametrize('table', TABLES)
def test_measurement(name, table):
    """Slab means of the sample are those measured, to rounding. For data with independent voxels the rest must be as if nothing had been measured:
    same noise, same deviations from the slab means."""
    cls, more, _ = EXAM[name]
    schedule, measured = TABLES[table], torch.randn(3, 2, 5, 2, generator=seeded(3), dtype=torch.float64)
    draw = lambda model, **given: cls(model, schedule, 'v', 'trailing', **more).sample(
        noise=torch.randn(3, 2, 5, 8, generator=seeded(0), dtype=torch.float64), steps=10, generator=seeded(1), **given).x0
    projection = Measurement(measured, slabs, thin)
    assert_close(slabs(draw(net, projection=projection)), measured, rtol=0, atol=1e-12)
    free, held = draw(exact(schedule, 'v')), draw(exact(schedule, 'v'), projection=projection)
    assert_close(slabs(held), measured, rtol=0, atol=1e-12)
    assert_close(held - thin(slabs(held)), free - thin(slabs(free)), rtol=0, atol=1e-9)


# Noise for stacks, interpolation, inversion

@pytest.mark.parametrize('correlation', [0., .5, .9, 1.])
def test_slice_coherent_covariance(correlation):
    "Unit variance, correlation r^|j - k| along the axis and none across; 200,000 draws, so 4 standard errors are .009 (variance .013)."
    k = torch.arange(5)
    want = correlation ** (k[:, None] - k).abs().double()
    for axis, shape in ((0, (5, 200_000)), (-1, (200_000, 5))):
        z = SliceCoherent(correlation, axis)(shape, seeded(0))
        z = (z if axis == 0 else z.T).double()
        assert_close(z @ z.T / 200_000, want, rtol=0, atol=.013)
        assert z.mean(1).abs().max() < .009
        assert abs((z[:, ::2] * z[:, 1::2]).mean().item()) < .009
    assert torch.equal(SliceCoherent(0.)((4, 6), seeded(2)), randn((4, 6), seeded(2)))


@pytest.mark.parametrize('name', ['ddim', 'ddpm', '2m-sde'])
def test_slice_coherent_samples(name):
    "With a linear denoiser the slices of a sample are correlated as the noise is, and each keeps mean and std of the sampler."
    cls, more, _ = EXAM[name]
    x = cls(exact(cosine, 'v'), cosine, 'v', 'trailing', draw=SliceCoherent(.8), **more).sample((4, 40_000), 20, generator=seeded(0)).x0
    mean, std = law(name, cosine, 20)
    assert_close(x.mean(1), torch.full((4,), mean), rtol=0, atol=.006)
    assert_close(x.std(1), torch.full((4,), std), rtol=.015, atol=0)
    k = torch.arange(4)
    assert_close(torch.corrcoef(x), .8 ** (k[:, None] - k).abs().float(), rtol=0, atol=.02)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16])
def test_slerp(dtype):
    "On the great circle: the angle to the start grows evenly, the norm of a pair of equal norms stays, the ends are the ends; a weight for each sample."
    a, b = (torch.randn(3, 4, 5, generator=seeded(k), dtype=torch.float64) for k in (0, 1))
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None]
    atol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-3}[dtype]
    angle = lambda p, q: torch.atan2((p / p.norm() - q / q.norm()).norm(), (p / p.norm() + q / q.norm()).norm()) * 2
    for w in (0., .25, .6, 1.):
        mid = slerp(a.to(dtype), b.to(dtype), w)
        assert mid.dtype == dtype and mid.shape == a.shape
        for p, q, m in zip(a, b, mid.double()):
            assert m.norm().item() == pytest.approx(p.norm().item(), rel=atol)
            assert angle(p, m).item() == pytest.approx(w * angle(p, q).item(), abs=2 * atol)
            assert angle(m, q).item() == pytest.approx((1 - w) * angle(p, q).item(), abs=2 * atol)
    each = slerp(a, b, torch.tensor([0., .5, 1.]))
    assert_close(each[0], a[0]) and assert_close(each[2], b[2])
    assert_close(each[1], slerp(a, b, .5)[1])
    assert_close(slerp(a, 3 * a, .5), 2 * a)
    assert slerp(a, -a, .3).isfinite().all()


@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('kind', ['x0', 'v', 'flow'])
def test_inversion_of_a_gaussian(table, kind):
    "DDIM maps noise z to mean + std z, with the law's numbers; inversion must find (x - mean) / std, the better the more rounds, and sampling leads back."
    schedule = TABLES[table]
    sampler = DDIMSampler(exact(schedule, kind), schedule, kind)
    x = M + S * torch.randn(5, 3, generator=seeded(0), dtype=torch.float64)
    mean, std = law('ddim', schedule, 40)
    misses = [(invert(sampler, x, 40, rounds=rounds) - (x - mean) / std).abs().max().item() for rounds in (1, 3, 10, 60)]
    assert misses == sorted(misses, reverse=True) and misses[-1] < 1e-6 and misses[0] > 1e-2
    assert_close(sampler.sample(noise=invert(sampler, x, 40, rounds=60), steps=40).x0, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize('table', TABLES)
def test_inversion_of_samples(table):
    "Round trips of a network that is not linear: noise -> sample -> noise -> sample."
    soft = lambda x, t, cond=None: torch.tanh(x) * .5
    sampler = DDIMSampler(soft, TABLES[table], 'x0')
    z = torch.randn(4, 3, 5, generator=seeded(0), dtype=torch.float64)
    x = sampler.sample(noise=z, steps=20).x0
    back = invert(sampler, x, 20, rounds=200)
    assert not back.is_inference()
    assert_close(sampler.sample(noise=back, steps=20).x0, x, rtol=0, atol=1e-9)
    assert_close(back, z, rtol=0, atol=1e-8)


# Time

@pytest.fixture(scope='module')
def benchmark():
    path = Path(__file__).parents[2] / 'benchmarks' / 'sampler_overhead.py'
    spec = importlib.util.spec_from_file_location('sampler_overhead', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overhead(benchmark):
    "Sampling costs at most 1.1 forward passes a call, batch of 16; CPU time, best of a few interleaved runs."
    for cls, steps in ((DDIMSampler, 3), (HeunSampler, 2)): assert benchmark.sampling_ratio(cls, steps, 4)['min'] <= 1.1


def test_step_cost(benchmark):
    "A step by itself, beside the peers': at least five times faster, batch after batch; CPU time, best of interleaved runs."
    rows = benchmark.step_cost(20)
    assert {(row['sampler'], row['peer']) for row in rows} == {('DDIMSampler', 'diffusers'), ('DDIMSampler', 'monai'), ('DPMSolverSampler', 'diffusers')}
    for row in rows: assert row['ratio']['of_best'] >= 5, row
