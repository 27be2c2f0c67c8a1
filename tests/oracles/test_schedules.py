"Schedules against diffusers 0.42.1 and monai 1.6.1, where they are right and where they are not."
import copy
import math
import random

import pytest
import torch
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers import FlowMatchEulerDiscreteScheduler
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from monai.networks.schedulers import RFlowScheduler
from torch.testing import assert_close

from sbldm_nb.schedules import SCHEDULES, Schedule, Tables, get_schedule, inverse_form, randn

betas = dict(beta_start=.0015, beta_end=.0195)
times, ends = torch.tensor([0, 250, 500, 999]), torch.tensor([0, 0, 999, 999])
names = {'linear': ('linear', 'linear_beta', betas, 1e-7), 'scaled_linear': ('scaled_linear', 'scaled_linear_beta', betas, 3e-7),
         'sigmoid': ('sigmoid', 'sigmoid_beta', betas, 4e-7), 'cosine': ('squaredcos_cap_v2', 'cosine', {}, 5e-6)}  # last: what float32 products cost the peers
family = {f'{kind}-{mode}-{zero}': dict(schedule_type=kind, mode=mode, zero_terminal_snr=zero) for kind in SCHEDULES for zero in (False, True)
          for mode in (('alpha_bar', 'beta') if kind == 'gamma_rebalanced' else ('alpha_bar',))}
family |= {f'flow-shift-{k}': dict(schedule_type='flow', shift=k) for k in (.3, 3.)}


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


@pytest.fixture(params=list(family))
def member(request):
    "Every type, mode, zero at the end and shift."
    return get_schedule(**family[request.param])


def kinds_of(schedule: Schedule) -> list:
    "The parameterisations that a schedule allows."
    return [kind for kind in ('eps', 'x0', 'v', 'flow') if kind != 'eps' or not schedule.zero_terminal]


def widened(peer):
    "The peer with its own betas multiplied in float64."
    peer = copy.deepcopy(peer)
    peer.alphas_cumprod = (1 - peer.betas.double()).cumprod(0)
    return peer


def test_tables(trio):
    ours, *peers, tolerance = trio
    for theirs in peers: assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=tolerance)


def test_tables_from_their_betas(trio):
    "The distance above is the peers' float32 product: their own betas, multiplied in float64, end within 1e-7 of ours."
    ours, diffusers, monai, _ = trio
    for theirs in (diffusers, monai):
        rounded = theirs is monai and 'beta_start' not in ours.config  # monai's cosine takes its betas from float32 cosines
        assert_close(ours.alphas_cumprod, widened(theirs).alphas_cumprod.float(), rtol=0, atol=5e-6 if rounded else 1e-7)


def test_add_noise_and_velocity(trio, pair):
    ours, *peers, tolerance = trio
    x0, noise = pair
    atol = {5e-6: 2e-5, 4e-7: 2e-6}.get(tolerance, 1e-6)  # cosine: their 1 - abar is rounded before its root; sigmoid: their abar is 4e-7 away
    for theirs in peers:
        assert_close(ours.add_noise(x0, noise, times), theirs.add_noise(x0, noise, times), rtol=0, atol=atol)
        assert_close(ours.target(x0, noise, times, 'v'), theirs.get_velocity(x0, noise, times), rtol=0, atol=atol)


def test_add_noise_and_velocity_from_their_betas(trio, pair):
    "In float64, from the peers' own betas, one tolerance serves all."
    ours, diffusers, monai, _ = trio
    x0, noise = [k.double() for k in pair]
    for theirs in [widened(diffusers)] + [widened(monai)] * ('beta_start' in ours.config):
        assert_close(ours.add_noise(x0, noise, times), theirs.add_noise(x0, noise, times), rtol=0, atol=3e-7)
        assert_close(ours.target(x0, noise, times, 'v'), theirs.get_velocity(x0, noise, times), rtol=0, atol=3e-7)


def test_zero_terminal(trio):
    ours, diffusers, *_ = trio
    ours = get_schedule(**{**ours.config, 'zero_terminal_snr': True})
    theirs = DiffusersDDPM.from_config(diffusers.config, rescale_betas_zero_snr=True)
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-6)
    assert_close(ours.alpha, theirs.alphas_cumprod.sqrt(), rtol=0, atol=1e-6)
    assert ours.alpha[-1] == 0 and ours.sigma[-1] == 1 and ours.lambda_[-1] == -math.inf


def test_gamma_as_betas(pair):
    "diffusers takes any betas: with those of mode 'beta' it must build our table."
    for gamma in (.5, .75, 1.5):
        ours = get_schedule('gamma_rebalanced', gamma=gamma, mode='beta')
        given = [1e-4 + .0199 * (i / 999)**gamma for i in range(1000)]
        assert_close(ours.alphas_cumprod, widened(DiffusersDDPM(trained_betas=given)).alphas_cumprod.float(), rtol=0, atol=1e-7)


def test_gamma_convention():
    "Which reading of t / T the published numbers ask for: .0778 without, .0316 with gamma = .75."
    found = {}
    for name, first, last in (('t/(T-1)', 0, 1), ('t/T', 0, .999), ('(t+1)/T', .001, 1)):
        u = torch.linspace(first, last, 1000, dtype=torch.float64)
        found[name] = [round((1 - 1e-4 - .0199 * u**gamma).cumprod(0)[500].item(), 4) for gamma in (1, .75)]
    assert [name for name, numbers in found.items() if numbers == [.0778, .0316]] == ['t/(T-1)']
    assert [round(get_schedule('gamma_rebalanced', gamma=k, mode='beta').alphas_cumprod[500].item(), 4) for k in (1, .75)] == found['t/(T-1)']


@pytest.mark.parametrize('shift', [.3, 1., 3.])
def test_flow_shift_once(shift, pair):
    "diffusers shifts once in the table that it is made with, and when the levels are given."
    ours, theirs = get_schedule('flow', shift=shift), FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    assert_close(ours.sigma, theirs.sigmas.flip(0), rtol=0, atol=2e-7)
    x0, noise = pair
    noisy = theirs.scale_noise(x0, theirs.timesteps[999 - times], noise)
    assert_close(ours.add_noise(x0, noise, times), noisy, rtol=0, atol=1e-6)
    theirs.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    assert_close(ours.sigma[999 - 125 * torch.arange(8)], theirs.sigmas[:-1], rtol=0, atol=2e-7)


@pytest.mark.parametrize('shift', [.3, 3.])
def test_fault_diffusers_shifts_twice(shift):
    "`set_timesteps` begins at the shifted smallest level and shifts again: its last level is ours for shift squared."
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    once = theirs.sigmas[-1].item()
    theirs.set_timesteps(1000)
    twice = theirs.sigmas[-2].item()
    assert once == pytest.approx(get_schedule('flow', shift=shift).sigma[0].item(), rel=1e-5)
    assert twice == pytest.approx(get_schedule('flow', shift=shift**2).sigma[0].item(), rel=1e-5)
    assert twice / once == pytest.approx(shift, rel=.02)


def test_fault_monai_ignores_transform_scale():
    "Its own formula would move the times; the scheduler stores the scale and does not pass it on."
    from monai.networks.schedulers.rectified_flow import timestep_transform
    made = [RFlowScheduler(1000, use_discrete_timesteps=False, use_timestep_transform=True, transform_scale=k) for k in (1., 3.)]
    for scheduler in made: scheduler.set_timesteps(8, input_img_size_numel=32**3)
    assert made[1].transform_scale == 3. and torch.equal(made[0].timesteps, made[1].timesteps)
    intended = timestep_transform(made[0].timesteps.double(), 32**3, scale=3.)
    index = 999 - 125 * torch.arange(8)
    assert_close(get_schedule('flow', shift=3.).sigma[index].double(), intended / 1000, rtol=0, atol=1e-6)
    assert_close(get_schedule('flow').sigma[index].double(), made[1].timesteps.double() / 1000, rtol=0, atol=1e-6)


def test_fault_monai_converts_its_table(pair):
    "One float16 call, and the first noise level is zero for good; ours survives the same call."
    theirs, ours, x0 = MonaiDDPM(1000, 'linear_beta'), get_schedule('linear'), torch.zeros_like(pair[0])
    for scheduler in (theirs, ours): scheduler.add_noise(*[k.half() for k in pair], times)
    assert theirs.alphas_cumprod.dtype == torch.float16 and ours.alpha.dtype == ours.sigma.dtype == torch.float32
    first = torch.zeros(4, dtype=torch.long)
    assert theirs.add_noise(x0, pair[1], first).abs().max() == 0
    assert_close(ours.add_noise(x0, pair[1], first), .01 * pair[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(member, pair, dtype):
    "Finite at both ends, within the rounding of the type, and no trace left in the tables."
    before = {k: v.clone() for k, v in vars(member).items() if isinstance(v, torch.Tensor)}
    x0, noise = [k.to(dtype) for k in pair]
    exact = [k.double() for k in (x0, noise)]
    rounding = 16 * torch.finfo(dtype).eps
    noisy = member.add_noise(x0, noise, ends)
    assert noisy.dtype == dtype
    assert torch.equal(noisy, member.add_noise(x0.float(), noise.float(), ends).to(dtype))  # levels and sum in float32, one rounding
    for kind in kinds_of(member):
        answer = member.target(x0, noise, ends, kind)
        assert answer.dtype == dtype
        assert_close(answer.double(), member.target(*exact, ends, kind), rtol=rounding, atol=rounding)
        back = member.to_x0_eps(answer, noisy, ends, kind)
        assert all(k.dtype == torch.float32 and k.isfinite().all() for k in back)
        if kind in ('v', 'flow'):
            for k, wanted in zip(back, exact): assert_close(k.double(), wanted, rtol=rounding, atol=rounding)
    for name, table in before.items(): assert torch.equal(getattr(member, name), table) and getattr(member, name).dtype == torch.float32


def test_answers_there_and_back(member, pair):
    "Float64 exactly, float32 to what a division by the smallest level costs."
    for dtype, exact in ((torch.float64, 1e-10), (torch.float32, 4e-6)):
        x0, noise = [k.to(dtype) for k in pair]
        noisy = member.add_noise(x0, noise, times)
        for kind in kinds_of(member):
            smallest = dict(eps=member.alpha[-1], x0=member.sigma[0]).get(kind, 1.) if dtype == torch.float32 else 1.
            back = member.to_x0_eps(member.target(x0, noise, times, kind), noisy, times, kind)
            for k, wanted in zip(back, (x0, noise)): assert_close(k, wanted, rtol=0, atol=float(exact / smallest))


@pytest.mark.parametrize('seed', range(40))
def test_any_arguments(seed):
    "Random type, length, gamma, mode, betas, zero and shift: all that the page promises."
    rng = random.Random(seed)
    kind, (low, high) = rng.choice(list(SCHEDULES)), sorted(10**rng.uniform(-5, -1.3) for _ in range(2))
    args = dict(schedule_type=kind, num_timesteps=rng.choice((2, 3, 10, rng.randint(2, 3000))), gamma=rng.uniform(.1, 3), mode=rng.choice(('alpha_bar', 'beta')),
                beta_start=low, beta_end=high, zero_terminal_snr=rng.random() < .5, shift=rng.uniform(.05, 20) if kind == 'flow' else 1.)
    schedule = get_schedule(**args)
    a, s, lam = [k.double() for k in (schedule.alpha, schedule.sigma, schedule.lambda_)]
    assert len(a) == args['num_timesteps'] and (lam.diff() < 0).all() and (a.diff() <= 0).all() and (s.diff() >= 0).all()
    assert 0 <= a.min() and a.max() <= 1 and 0 < s.min() and s.max() <= 1
    assert_close(a + s if kind == 'flow' else a**2 + s**2, torch.ones_like(a), rtol=0, atol=3e-7)
    shown = a > 1e-30
    assert_close(lam[shown], (a / s).log()[shown], rtol=1e-6, atol=1e-6)
    assert (a[-1] == 0) == schedule.zero_terminal and (schedule.zero_terminal or kind != 'flow' and not args['zero_terminal_snr'])
    again = get_schedule(**schedule.config)
    assert again.config == schedule.config and torch.equal(again.alpha, schedule.alpha) and torch.equal(again.sigma, schedule.sigma)
    t = torch.arange(len(a))
    x0, noise = torch.randn(2, len(a), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noisy = schedule.add_noise(x0, noise, t)
    assert_close(noisy, a[:, None] * x0 + s[:, None] * noise)
    for answer in ('x0', 'v', 'flow'):
        back = schedule.to_x0_eps(schedule.target(x0, noise, t, answer), noisy, t, answer)
        for k, wanted in zip(back, (x0, noise)): assert_close(k, wanted, rtol=0, atol=1e-8)


def test_gamma_is_monotone():
    "Less gamma is more signal in one mode and less in the other, at every index."
    for mode, sign in (('alpha_bar', -1), ('beta', 1)):
        tables = [get_schedule('gamma_rebalanced', 400, gamma=k, mode=mode).lambda_ for k in (.2, .5, .9, 1., 1.3, 2.5)]
        for less, more in zip(tables, tables[1:]): assert (sign * (more - less)[1:] > 0).all()
    assert_close(get_schedule('gamma_rebalanced', gamma=1.).alpha, get_schedule('linear').alpha, rtol=0, atol=0)


def test_old_configurations_load():
    "Models saved before a type kept only what it reads."
    for kind in ('linear', 'scaled_linear', 'cosine', 'flow'):
        old = get_schedule(**dict(schedule_type=kind, num_timesteps=1000, beta_start=1e-4, beta_end=.02))
        assert torch.equal(old.alpha, get_schedule(kind).alpha) and torch.equal(old.sigma, get_schedule(kind).sigma)


@pytest.mark.parametrize('call, said', [
    (lambda s: s.add_noise(torch.zeros(2, 3), torch.zeros(2, 1), torch.tensor([1, 2])), 'noise has shape (2, 1)'),
    (lambda s: s.target(torch.zeros(2, 3), torch.zeros(3), torch.tensor([1, 2])), 'noise has shape (3,)'),
    (lambda s: s.to_x0_eps(torch.zeros(2, 6), torch.zeros(2, 3), torch.tensor([1, 2])), 'output has shape (2, 6)'),
    (lambda s: s.add_noise(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.tensor([1, 2])), 'must be floating-point tensors, got torch.int64'),
    (lambda s: s.add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1, 2, 3])), 'shape (1,) or (2,)'),
    (lambda s: s.levels(torch.tensor([[1]])), 'got (1, 1)'),
    (lambda s: s.snr(torch.tensor([-1])), 'must lie from 0 to 999, got values from -1 to -1'),
    (lambda s: s.snr(torch.tensor([3, 1000])), 'must lie from 0 to 999, got values from 3 to 1000'),
    (lambda s: s.snr(torch.tensor([.5])), 'whole-number tensor'),
    (lambda s: s.check('velocity'), "prediction_type 'velocity' is unknown"),
    (lambda s: get_schedule('scaled-linear'), "did you mean 'scaled_linear'?"),
    (lambda s: get_schedule('gamma_rebalanced', mode='betas'), "did you mean 'beta'?"),
    (lambda s: get_schedule('gamma_rebalanced', gamma=math.nan), 'gamma must be a finite number above 0, got nan'),
    (lambda s: get_schedule('gamma_rebalanced', gamma=1e4), 'alpha / sigma finite and falling'),
    (lambda s: get_schedule('flow').check('eps'), "'eps' cannot recover x0 where alpha is 0"),
    (lambda s: get_schedule('cosine', zero_terminal_snr=True).to_x0_eps(*torch.zeros(2, 1, 3), torch.tensor([0]), 'eps'), "use 'v', 'x0' or 'flow'"),
    (lambda s: get_schedule('flow', shift=0), 'shift must be a finite number above 0, got 0'),
    (lambda s: get_schedule('gamma_rebalanced', gamma=-1), 'gamma must be a finite number above 0, got -1'),
    (lambda s: get_schedule('flow', shift=math.inf), 'shift must be a finite number above 0, got inf'),
    (lambda s: get_schedule('linear', shift=2), "shift belongs to the 'flow' schedule"),
    (lambda s: get_schedule('linear', 10.5), 'whole number of at least 2, got 10.5'),
    (lambda s: get_schedule('linear', math.inf), 'whole number of at least 2, got inf'),
    (lambda s: get_schedule('linear', math.nan), 'whole number of at least 2, got nan'),
    (lambda s: get_schedule('linear', beta_start=1e-3, beta_end=.5), 'above 0 in float32 before the last entry'),
    (lambda s: Tables(torch.tensor([.5, 1e-50, 0.], dtype=torch.float64), torch.ones(3)), 'above 0 in float32 before the last entry'),
])
def test_errors(call, said):
    with pytest.raises(ValueError) as error: call(get_schedule('cosine'))
    assert said in str(error.value)


def test_errors_of_the_answer(member):
    "One unit of error in `v` or `flow` is at most 1.2072 units in the image and in the noise; in `x0` it is alpha / sigma in the noise."
    for kind in ('v', 'flow'):
        for _, factor in inverse_form(member.alpha, member.sigma, kind): assert factor.abs().max() < 1.2072
    assert_close(inverse_form(member.alpha, member.sigma, 'x0')[1][1].abs(), member.alpha / member.sigma)


def test_names_and_copies(member):
    "A copy has a configuration of its own, and plain tables do not call themselves a schedule."
    copied = member.to('cpu')
    copied.config['schedule_type'] = 'changed'
    assert member.config['schedule_type'] in SCHEDULES and repr(member).startswith('Schedule(')
    assert repr(Tables(member.alpha, member.sigma)) == 'Tables()'


def test_randn_is_torchs():
    g = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(randn((4,), g(), 'cpu', torch.float64), torch.randn(4, generator=g(), dtype=torch.float64))
    assert randn((2,), g(), 'meta').device.type == 'meta'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(pair):
    "Same tables, same numbers; an index or a table that lies on the other device is fetched."
    ours, (x0, noise) = get_schedule('cosine'), [k.cuda() for k in pair]
    moved, wanted = ours.to('cuda'), ours.add_noise(*pair, times)
    assert moved.device.type == 'cuda' and ours.device.type == 'cpu'
    for schedule in (ours, moved):
        for t in (times, times.cuda()): assert_close(schedule.add_noise(x0, noise, t).cpu(), wanted, rtol=0, atol=1e-6)
    assert randn((3,), torch.Generator().manual_seed(1), 'cuda').device.type == 'cuda'
