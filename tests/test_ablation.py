"The ablation end to end, that its arms are paired, and that wrong names are refused before anything is trained."
import math

import pytest
import torch
from torch.testing import assert_close

from sbldm_nb.ablation import ARMS, METRICS, ablation_table, ablation_verdict, arm_model, lay_ground, paired, run_ablation, run_arm
from sbldm_nb.losses import DiffusionLoss, FrequencyAwareLoss
from sbldm_nb.samplers import DPMSolverSampler


def silent(line): pass


@pytest.fixture(scope='module')
def ground(tmp_path_factory):
    "Twelve people and an autoencoder after two steps"
    return lay_ground(tmp_path_factory.mktemp('ground'), train_people=6, test_people=6, vae_steps=2, log=silent)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def runs(ground, folder): return run_ablation(ground, folder, seeds=(0, 1), steps=2, sample_steps=2, log=silent)


def test_ground_separates_people_and_has_an_anchor_for_every_metric(ground):
    assert len(ground.real) == 6 and len(ground.heights) == 12 and len(ground.cache) == 48
    assert set(ground.ceiling) == set(ground.floor) == set(METRICS)


def test_every_arm_and_seed_is_there_and_in_the_table(ground, runs):
    assert [(r.arm, r.seed) for r in runs] == [(a, s) for a in ARMS for s in (0, 1)]
    assert all(math.isfinite(v) for r in runs for v in r.scores.values())
    assert all(r.samples.shape == (12, 1, 64, 64) and r.samples.abs().max() <= 1 for r in runs)
    lines = ablation_table(runs, ground).splitlines()
    assert len(lines) == 2 + 4 + 3 + 2 + 2 and len({line.count('|') for line in lines[:11]}) == 1
    assert all(f'{r.scores["kid"]:.3f}' in ablation_table([r], ground) for r in runs), 'one run alone has a table without a spread'
    assert len(ablation_verdict(runs).splitlines()) == 3 + 2
    assert 'out of 3 comparisons' in ablation_verdict(runs, ('kid',))


def test_same_arm_and_seed_gives_the_same_bits(ground, runs, tmp_path):
    for k in (0, 7):
        again = run_arm(ground, runs[k].arm, runs[k].seed, tmp_path, steps=2, sample_steps=2)
        assert_close(again.samples, runs[k].samples, rtol=0, atol=0)
        assert again.scores == runs[k].scores


def test_every_arm_and_every_seed_makes_a_difference(runs):
    "A setting that did not reach the model would leave equal samples"
    for i, a in enumerate(runs):
        for b in runs[i + 1:]: assert not torch.equal(a.samples, b.samples), (a.arm, a.seed, b.arm, b.seed)


def test_arms_of_a_seed_share_weights_batches_times_noise_and_start(ground, tmp_path, monkeypatch):
    seen = {}

    def watch(loss, model, x0, cond, generator, *rest):
        seen[key].append((x0.clone(), cond.vector.clone(), generator.get_state().clone()))
        return plain(loss, model, x0, cond, generator, *rest)

    def start(sampler, *args, noise=None, **rest):
        seen[key].append((noise.clone(), rest['cond'].vector.clone()))
        return sample(sampler, *args, noise=noise, **rest)
    plain, sample = DiffusionLoss.per_sample, DPMSolverSampler.sample
    monkeypatch.setattr(DiffusionLoss, 'per_sample', watch)
    monkeypatch.setattr(DPMSolverSampler, 'sample', start)
    for arm in ARMS:
        for seed in (0, 1):
            key = arm, seed
            seen[key] = [tuple(p.detach().clone() for p in arm_model(ground, *arm, seed).denoiser.parameters())]
            run_arm(ground, arm, seed, tmp_path, steps=8, sample_steps=2)  # 6 batches are an epoch
    for (arm, seed), events in seen.items():
        assert len(events) == 1 + 8 + 1
        for event, other in zip(events, seen[ARMS[0], seed]):
            for a, b in zip(event, other): assert_close(a, b, rtol=0, atol=0)
        if seed == 0:
            for event, other in zip(events, seen[arm, 1]): assert not all(torch.equal(a, b) for a, b in zip(event, other))


def test_arms_have_the_loss_and_the_schedule_that_they_name(ground):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 16, 16, generator=g)
    t, silence = torch.tensor([10, 500, 999]), lambda x, t, cond: torch.zeros_like(x)
    for schedule_type, loss in ARMS:
        model = arm_model(ground, schedule_type, loss, seed=0)
        assert model.schedule.config['schedule_type'] == schedule_type and float(model.schedule.alpha[-1]) == 0
        v = model.schedule.alpha[t].view(3, 1, 1, 1)*noise - model.schedule.sigma[t].view(3, 1, 1, 1)*x0
        wanted = v.square().flatten(1).mean(1) if loss == 'simple' else FrequencyAwareLoss(1., .5, .25, normalize=True).per_sample(v)
        assert_close(model.objective.per_sample(silence, x0, noise=noise, t=t), wanted)
    assert abs(float(wanted.mean()/v.square().mean()) - 1) < .05 and not torch.allclose(wanted, v.square().flatten(1).mean(1))


def test_finished_runs_are_not_trained_again(ground, runs, folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*.safetensors')}
    assert len(before) >= 3*len(runs)
    again = run_ablation(ground, folder, seeds=(1,), arms=ARMS[1:2], steps=2, sample_steps=2, log=silent)
    assert_close(again[0].samples, runs[3].samples, rtol=0, atol=0)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*.safetensors')} == before


@pytest.mark.parametrize('arm, hint', [(('linear', 'frequency'), "did you mean 'frequency_aware'"), (('gama_rebalanced', 'simple'), "did you mean 'gamma_rebalanced'")])
def test_unknown_arms_are_refused_before_anything_is_trained(ground, tmp_path, arm, hint):
    with pytest.raises(ValueError, match=hint): run_ablation(ground, tmp_path/'none', arms=(*ARMS, arm), log=silent)
    assert not (tmp_path/'none').exists()


def test_only_equal_seeds_and_known_metrics_can_be_paired(runs):
    with pytest.raises(ValueError, match='the same seeds'): paired(runs[:2], runs[2:3], 'kid')
    with pytest.raises(ValueError, match="did you mean 'kid'"): paired(runs[:2], runs[2:4], 'kidd')
    assert paired(runs[:1], runs[2:3], 'kid').half == math.inf
