"Samplers against diffusers 0.42.1 and monai 1.6.1 where those are right, and against a known answer where they are not."
import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from torch.testing import assert_close

from sbldm_nb.layers import Cond
from sbldm_nb.samplers import DDIMSampler, DDPMSampler, HeunSampler, get_timesteps
from sbldm_nb.schedules import Schedule, get_schedule

betas = dict(beta_start=.0015, beta_end=.0195)
latent, flow = get_schedule('scaled_linear', **betas), get_schedule('flow')
kinds = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}
M, S = .5, .3


def net(x, t, cond=None):
    "A network of no merit, smooth and bounded."
    return torch.sin(2 * x) * .5 + t.view(-1, *[1] * (x.ndim - 1)) / 2000


@pytest.fixture
def noise(): return torch.randn(4, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('kind', list(kinds))
@pytest.mark.parametrize('steps', [10, 50])
def test_ddim(noise, kind, steps):
    "Leading indices, N divides 1000, and monai is given them too: its own list and its own stride do not fit together."
    seen = []
    DDIMSampler(net, latent, kind, 'leading').sample(noise=noise, steps=steps, callback=lambda i, x, x0: seen.append((x, x0)))
    args = dict(clip_sample=False, set_alpha_to_one=True, prediction_type=kinds[kind], **betas)
    for theirs in (DDIMScheduler(1000, beta_schedule='scaled_linear', **args), MonaiDDIM(1000, 'scaled_linear_beta', **args)):
        theirs.set_timesteps(steps)
        x = noise
        for (ours, ours_x0), t in zip(seen, get_timesteps(1000, steps, 'leading')):
            step = theirs.step(net(x, torch.full((4,), t)), t, x)
            y, x0 = step if isinstance(step, tuple) else (step.prev_sample, step.pred_original_sample)
            scale = max(1, x0.abs().max().item())
            assert_close(ours, y, rtol=0, atol=1e-6 * scale)
            assert_close(ours_x0, x0, rtol=0, atol=1e-6 * scale)
            x = ours


@pytest.mark.parametrize('steps', [8, 20, 100])
@pytest.mark.parametrize('spacing', ['trailing', 'leading', 'linspace'])
def test_timesteps(steps, spacing):
    theirs = DDIMScheduler(1000, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == get_timesteps(1000, steps, spacing)


class Recorder(DDPMSampler):
    "Keeps what went into and came out of the stretch that starts at `watch`."
    def advance(self, x, x0, eps, step, look, draw):
        z = draw()
        y = super().advance(x, x0, eps, step, look, lambda: z)
        if step.t == self.watch: self.seen = x, z, y.clone()
        return y


@pytest.mark.parametrize('kind', list(kinds))
@pytest.mark.parametrize('t', [999, 500, 250, 1])
def test_ddpm_step(kind, t):
    "One step of a walk over the whole table; the peers' noise is taken out again and ours put in."
    sampler = Recorder(net, latent, kind)
    sampler.watch = t
    sampler.sample((2, 3, 4), 1000, generator=torch.Generator().manual_seed(t))
    x, z, y = sampler.seen
    out, args = net(x, torch.full((2,), t)), dict(clip_sample=False, variance_type='fixed_small', prediction_type=kinds[kind], **betas)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    for theirs in (DDPMScheduler(1000, beta_schedule='scaled_linear', **args), MonaiDDPM(1000, 'scaled_linear_beta', **args)):
        step = theirs.step(out, t, x, generator=torch.Generator().manual_seed(5))
        theirs_y = step[0] if isinstance(step, tuple) else step.prev_sample
        assert_close(theirs_y + theirs._get_variance(t)**.5 * (z - drawn), y, rtol=0, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize('steps', [8, 20])
def test_flow_euler_and_heun(noise, steps):
    "diffusers counts time in 1 to 1000, so the network is shown its own index."
    sigmas = [1 - i / steps for i in range(steps)]
    ours = {cls: cls(net, flow, 'flow').sample(noise=noise, steps=steps).x0 for cls in (DDIMSampler, HeunSampler)}
    euler = FlowMatchEulerDiscreteScheduler(1000)
    euler.set_timesteps(sigmas=sigmas)
    x = noise
    for t in euler.timesteps: x = euler.step(net(x, torch.full((4,), round(t.item()) - 1)), t, x).prev_sample
    assert_close(ours[DDIMSampler], x, rtol=0, atol=2e-6)
    textbook, levels = noise, [*sigmas, 0.]
    for a, b in zip(levels, levels[1:]):
        index = lambda s: torch.full((4,), round(1000 * s) - 1)
        d = net(textbook, index(a))
        y = textbook + (b - a) * d
        textbook = y if b == 0 else textbook + (b - a) * (d + net(y, index(b))) / 2
    assert_close(ours[HeunSampler], textbook, rtol=0, atol=2e-6)


def test_heun_against_diffusers(noise):
    "Its levels, which are not ours, become a schedule of their own; the network does not look at the time."
    blind, theirs, x = (lambda x, t, cond=None: torch.sin(2 * x)), FlowMatchHeunDiscreteScheduler(1000), noise
    theirs.set_timesteps(10)
    for t in theirs.timesteps: x = theirs.step(blind(x, t), t, x).prev_sample
    sigma = torch.tensor(sorted(set(theirs.sigmas.tolist()) - {0.}))
    ours = HeunSampler(blind, Schedule(1 - sigma, sigma), 'flow').sample(noise=noise, steps=len(sigma))
    assert ours.steps == 10
    assert_close(ours.x0, x, rtol=0, atol=2e-5)


@pytest.fixture(scope='module')
def start():
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x - x.mean()) / x.std(correction=0)


def exact(schedule, kind='x0'):
    "The perfect denoiser of N(M, S^2) in any parameterisation."
    def model(x, t, cond=None):
        a, s = schedule.levels(t[:1], x)
        x0 = M + S**2 * a / (a**2 * S**2 + s**2) * (x - a * M)
        return schedule.target(x0, (x - a * x0) / s, t[:1], kind)
    return model


@pytest.mark.parametrize('steps,std', [(8, .161), (20, .223), (50, .262), (100, .278), (250, .289), (333, .291), (600, .294), (1000, .295)])
def test_gaussian_ddim(start, steps, std):
    x = DDIMSampler(exact(latent, 'v'), latent, 'v', 'linspace').sample(noise=start, steps=steps).x0
    assert x.dtype == torch.float64
    assert x.mean().item() == pytest.approx(.498, abs=.003) and x.std().item() == pytest.approx(std, abs=.003)


def test_gaussian_ddim_600_trailing_is_right_where_peers_are_not(start):
    ours = DDIMSampler(exact(latent, 'eps'), latent, 'eps').sample(noise=start, steps=600).x0
    assert ours.mean().item() == pytest.approx(.498, abs=.003) and ours.std().item() == pytest.approx(.294, abs=.003)
    theirs = DDIMScheduler(1000, beta_schedule='scaled_linear', clip_sample=False, timestep_spacing='trailing', **betas)
    theirs.set_timesteps(600)
    x = start
    for t in theirs.timesteps: x = theirs.step(exact(latent, 'eps')(x, t.view(1)), t, x).prev_sample
    assert x.std().item() > .4


@pytest.mark.parametrize('steps,std', [(50, .237), (600, .287)])
def test_gaussian_ddpm(start, steps, std):
    x = DDPMSampler(exact(latent), latent, 'x0', 'linspace').sample(noise=start, steps=steps, generator=torch.Generator().manual_seed(1)).x0
    assert x.mean().item() == pytest.approx(.499, abs=.006) and x.std().item() == pytest.approx(std, abs=.006)


def test_gaussian_ddpm_monai_is_wrong_in_50_steps(start):
    theirs = MonaiDDPM(1000, 'scaled_linear_beta', clip_sample=False, **betas)
    theirs.set_timesteps(50)
    x = start
    for t in theirs.timesteps: x, _ = theirs.step(exact(latent, 'eps')(x, t.view(1)), int(t), x, generator=torch.Generator().manual_seed(int(t)))
    assert x.std().item() > .6


@pytest.mark.parametrize('cls,steps,std', [(DDIMSampler, 10, .2469), (DDIMSampler, 30, .2813), (HeunSampler, 10, .2855), (HeunSampler, 20, .2966)])
def test_gaussian_flow(start, cls, steps, std):
    x = cls(exact(flow, 'flow'), flow, 'flow').sample(noise=start, steps=steps).x0
    assert x.mean().item() == pytest.approx(.5, abs=1e-6) and x.std().item() == pytest.approx(std, abs=3e-4)


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


def test_result_can_be_trained_on():
    x = HeunSampler(net, flow, 'flow').sample((2, 3), 4, generator=torch.Generator().manual_seed(0)).x0
    w = torch.ones(3, requires_grad=True)
    (x * w).sum().backward()
    assert_close(w.grad, x.sum(0))


def test_overhead():
    "Sampling costs at most 1.1 forward passes a call, batch of 16; CPU time, best of a few interleaved runs."
    path = Path(__file__).parents[2] / 'benchmarks' / 'sampler_overhead.py'
    spec = importlib.util.spec_from_file_location('sampler_overhead', path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for cls, steps in ((DDIMSampler, 3), (HeunSampler, 2)): assert benchmark.sampling_ratio(cls, steps, 4)['min'] <= 1.1
