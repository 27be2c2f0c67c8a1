"Training with real processes: killed by SIGKILL, out of disk, resumed; and saved models that are damaged."
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset

import numpy as np

import sbldm_nb.checkpoints as checkpoint_files
import sbldm_nb.training as training
from sbldm_nb.averages import post_hoc_average
from sbldm_nb.checkpoints import checkpoints, load_checkpoint, sync
from sbldm_nb.datasets import SliceDataset, loaders
from sbldm_nb.ldm import LatentDiffusion, SlicePosition
from sbldm_nb.losses import PatchDiscriminator, PerceptualLoss, VAELoss
from sbldm_nb.schedules import get_schedule
from sbldm_nb.files import pseudonym
from sbldm_nb.recipes import VAETraining
from sbldm_nb.state import best_precision, check_precision, seed_of
from sbldm_nb.training import Trainer
from sbldm_nb.tracking import RunLog
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, LatentCache, LatentSpace

steps = 60


def slices(n=40, seed=0):
    "Random slices of five subjects."
    g = torch.Generator().manual_seed(seed)
    return SliceDataset(torch.rand(n, 1, 16, 16, generator=g) * 2 - 1, torch.rand(n, generator=g), [f'person-{i % 5}' for i in range(n)])


class Dropping(nn.Module):
    "A denoiser with dropout before it, so that a step has a second source of randomness."
    def __init__(self, net):
        super().__init__()
        self.net, self.dropout, self.config = net, nn.Dropout(.1), net.config

    def forward(self, x, t, cond=None): return self.net(self.dropout(x), t, cond)


def diffusion(seed=0, wrap=Dropping):
    "A latent diffusion model of a few thousand parameters."
    torch.manual_seed(1)
    latent = LatentSpace(AutoencoderKL(2, latent_channels=4, channels=(8, 8)))
    torch.manual_seed(seed)
    denoiser = wrap(UNet(2, channels=(8, 16), attention=(False, True), vector_dim=1))
    return LatentDiffusion(latent, denoiser, get_schedule('flow'), SlicePosition(drop=.2), size=(16, 16))


def make_trainer(folder, seed=0, model=None, **changes):
    "A trainer of sixty steps; `seed` is that of the initial weights."
    model = model or diffusion(seed)
    train, valid = LatentCache(model.latent, slices()), LatentCache(model.latent, slices(8, 1), flips=False)
    settings = dict(max_steps=steps, precision='fp32', snapshot_at=.3, checkpoint_every=7, ema=.9, log=None)
    return Trainer(model, *loaders(train, valid, batch_size=4), folder, **{**settings, **changes})


def make_adversarial(folder, seed=0, critic=True, **changes):
    "A trainer of the autoencoder's whole recipe, ten steps an epoch: the KL warms up for two epochs, the critic joins in step 15."
    torch.manual_seed(1)
    judge = PerceptualLoss(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
    torch.manual_seed(seed)
    vae, discriminator = AutoencoderKL(2, latent_channels=4, channels=(8, 8)), PatchDiscriminator(channels=8, layers=1)
    module = VAETraining(vae, VAELoss(), judge, discriminator=discriminator if critic else None, adversarial_from=1.5, discriminator_lr=.5, kl_warmup=2.)
    settings = dict(max_steps=28, precision='fp32', snapshot_at=.5, checkpoint_every=7, ema=.9, log=None)
    return Trainer(module, *loaders(slices(), slices(8, 1), batch_size=4), folder, **{**settings, **changes})


def result(folder, step=steps):
    "Every tensor of the last checkpoint but the generators that nobody seeded, and the log."
    last = checkpoints(Path(folder) / 'checkpoints')[-1]
    groups, state = load_checkpoint(last)
    assert state['step'] == step and set(groups) == {'model', 'ema', 'optimizer', 'snapshot', 'rng'}
    del groups['rng']
    return groups, (Path(folder) / 'log.jsonl').read_text()


def same_bits(a, b):
    "Raise unless both results are equal to the last bit."
    (groups, log), (others, other_log) = a, b
    for group in groups:
        assert groups[group].keys() == others[group].keys()
        for name, tensor in groups[group].items():
            assert torch.equal(tensor, others[group][name]), f'{group} {name} differs'
    assert log == other_log


def process(work):
    "Run `work` in a process of its own and return its id."
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as e:
        print(type(e).__name__, e, file=sys.stderr, flush=True)
        os._exit(1)


def wait(pid):
    "Exit status of a process, negative for a signal."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def go_on(folder, **changes):
    "Train in `folder`, with other initial weights wherever a checkpoint should replace them."
    make_trainer(folder, seed=99 if checkpoints(folder / 'checkpoints') else 0, **changes).fit()


def finish(folder, **changes):
    "Go on in `folder` to the end."
    assert wait(process(lambda: go_on(folder, **changes))) == 0


def rows_in(folder):
    "How many lines the run's log has; there is one for ten steps."
    log = folder / 'log.jsonl'
    return log.read_text().count('\n') if log.exists() else 0


def kill_randomly(home, make, last, rows, rng):
    "Kill at random moments once the log has so many rows, hurt the newest checkpoint, finish; how many died."
    assert wait(process(lambda: make(home / 'whole').fit())) == 0
    wanted, killed = result(home / 'whole', last), 0

    def go_on(folder): make(folder, seed=99 if checkpoints(folder / 'checkpoints') else 0).fit()  # a checkpoint replaces the initial weights
    for trial, moments in enumerate(rows):
        folder = home / f'trial{trial}'
        for moment in moments:
            pid = process(lambda: go_on(folder))
            deadline = time.monotonic() + 60
            while rows_in(folder) < moment and time.monotonic() < deadline: time.sleep(.002)
            time.sleep(rng.uniform(0, .03))
            os.kill(pid, signal.SIGKILL)
            killed += wait(pid) == -signal.SIGKILL
        newest = checkpoints(folder / 'checkpoints')[-1:]
        for path in newest:
            victim = rng.choice(sorted(path.glob('*.safetensors')))
            os.truncate(victim, int(victim.stat().st_size * rng.random()))
        assert wait(process(lambda: go_on(folder))) == 0
        same_bits(result(folder, last), wanted)
    return killed


def scenario_random(home):
    "Twenty random moments: a diffusion model twelve times, an adversarial autoencoder eight times; the newest checkpoint is cut short in between."
    rng = random.Random(0)
    killed = kill_randomly(home / 'ldm', make_trainer, steps, [sorted(rng.sample(range(1, 8), 3)) for _ in range(4)], rng)
    killed += kill_randomly(home / 'vae', make_adversarial, 28, [sorted(rng.sample(range(1, 5), 2)) for _ in range(4)], rng)
    print('killed', killed)
    assert killed == 20


def die(): os.kill(os.getpid(), signal.SIGKILL)


def die_at_sync(n):
    "Make the `n`-th forcing to the disk the last thing this process does."
    calls = iter(range(1, 10**6))

    def killer(path):
        if next(calls) == n: die()
        sync(path)
    checkpoint_files.sync = killer


def die_in_file(n, share):
    "Kill this process in the middle of writing its `n`-th safetensors file."
    original, calls = checkpoint_files.save_file, iter(range(1, 10**6))

    def killer(tensors, path, *args):
        original(tensors, path, *args)
        if next(calls) == n:
            os.truncate(path, int(Path(path).stat().st_size * share))
            die()
    checkpoint_files.save_file = killer


def die_in_rename(n, before):
    "Kill this process right before or after its `n`-th rename."
    original, calls = os.replace, iter(range(1, 10**6))

    def killer(*args):
        last = next(calls) == n
        if last and before: die()
        original(*args)
        if last: die()
    os.replace = killer


def die_in_pruning(n):
    "Kill this process when half of the `n`-th old checkpoint is removed."
    original, calls = checkpoint_files.shutil.rmtree, iter(range(1, 10**6))

    def killer(path, *args, **kwargs):
        if Path(path).name.endswith('.old.partial') and Path(path).exists() and next(calls) == n:
            (Path(path) / 'ema.safetensors').unlink()
            die()
        original(path, *args, **kwargs)
    checkpoint_files.shutil.rmtree = killer


def scenario_saving(home):
    "Kill at every stage of writing a checkpoint."
    short = dict(max_steps=28)
    assert wait(process(lambda: make_trainer(home / 'whole', **short).fit())) == 0
    wanted = result(home / 'whole', 28)
    faults = [(die_at_sync, n) for n in (1, 5, 8, 12, 20, 35)] + [(die_in_file, 5, .5), (die_in_file, 12, .99)]
    faults += [(die_in_rename, n, before) for n in (4, 11, 14) for before in (True, False)] + [(die_in_pruning, 1)]
    for i, (fault, *args) in enumerate(faults):
        folder = home / f'fault{i}'

        def work():
            fault(*args)
            make_trainer(folder, **short).fit()
        assert wait(process(work)) == -signal.SIGKILL, f'{fault.__name__} {args} did not kill'
        finish(folder, **short)
        same_bits(result(folder, 28), wanted)
        left = {p.name for p in (folder / 'checkpoints').iterdir()}
        assert left == {'step-00000020', 'step-00000021', 'step-00000028'}, left  # the last two and the best
    print('killed', len(faults))


def scenario_disk(home):
    "A file system that takes no more bytes leaves the previous checkpoint; with room again the run goes on."
    assert wait(process(lambda: make_trainer(home / 'whole').fit())) == 0
    folder, wanted = home / 'full', result(home / 'whole')

    def work():
        trainer = make_trainer(folder)
        original, calls = training.save, iter(range(1, 100))

        def full(t):
            if next(calls) == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            original(t)
        training.save = full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            trainer.fit()
        except OSError as e:
            print(e)
            assert 'step-00000020 could not be written' in str(e) and 'untouched' in str(e)
            assert {p.name for p in (folder / 'checkpoints').iterdir()} == {'step-00000010', 'step-00000014'}
            os._exit(7)
    assert wait(process(work)) == 7
    finish(folder)
    same_bits(result(folder), wanted)


def scenario_adversarial(home):
    "Kill an adversarial run in steps 13, 18 and 25: the first two go on before the critic has joined, the third after."
    assert wait(process(lambda: make_adversarial(home / 'whole').fit())) == 0
    folder = home / 'killed'
    for step, last in ((12, 10), (17, 14), (24, 21)):
        def work():
            trainer = make_adversarial(folder, seed=0 if step == 12 else step)  # a checkpoint replaces the initial weights, the critic's too
            original = trainer.state.step

            def killer(*args):
                if trainer.step == step: die()
                return original(*args)
            trainer.state.step = killer
            trainer.fit()
        assert wait(process(work)) == -signal.SIGKILL
        assert checkpoints(folder / 'checkpoints')[-1].name == f'step-{last:08}'
    assert wait(process(lambda: make_adversarial(folder, seed=99).fit())) == 0
    groups, _ = result(folder, 28)
    assert any(name.startswith('discriminator') for name in groups['optimizer']) and any(name.startswith('discriminator') for name in groups['model'])
    assert not any(name.startswith('discriminator') for group in ('ema', 'snapshot') for name in groups[group])
    same_bits(result(folder, 28), result(home / 'whole', 28))


@pytest.mark.parametrize('scenario', ['random', 'saving', 'disk', 'adversarial'])
def test_survives(scenario, tmp_path):
    run = subprocess.run([sys.executable, __file__, scenario, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def test_run_folder_holds_nothing_executable(tmp_path):
    make_trainer(tmp_path / 'run', max_steps=15).fit()
    files = [p for p in (tmp_path / 'run').rglob('*') if p.is_file()]
    assert {p.suffix for p in files} == {'.json', '.jsonl', '.csv', '.safetensors'}
    for path in files:
        if path.suffix == '.json': json.loads(path.read_text())
        if path.suffix == '.safetensors':
            with safe_open(path, 'pt') as f: assert len(list(f.keys()))


def test_the_average_validates_and_is_returned(tmp_path):
    trainer = make_trainer(tmp_path / 'run', max_steps=10)
    model = trainer.fit()
    assert model is trainer.ema and not model.training
    assert trainer.history[-1]['valid_loss'] == training.validate(trainer)
    assert trainer.snapshot is not None and not any(p.requires_grad for p in trainer.snapshot.parameters())
    assert next(model.latent.vae.parameters()) is next(trainer.state.module.latent.vae.parameters())


def test_no_begins_again_and_other_settings_are_refused(tmp_path):
    make_trainer(tmp_path / 'run', max_steps=8).fit()
    (tmp_path / 'run' / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='max_steps = 8 where 9 is asked for now'):
        make_trainer(tmp_path / 'run', max_steps=9).fit()
    again = make_trainer(tmp_path / 'run', max_steps=9)
    again.fit(resume=False)
    assert [r['step'] for r in again.history] == [9, 9]
    assert (tmp_path / 'run' / 'notes.txt').read_text() == 'mine'


def test_other_validation_images_are_refused(tmp_path):
    def run(mark):
        train, held = slices(), slices(8, 1)
        held.fingerprint = mark
        Trainer(diffusion(), *loaders(train, held, batch_size=4), tmp_path / 'run', max_steps=3, precision='fp32', log=None).fit()
    run('a')
    with pytest.raises(ValueError, match='valid = a where b is asked for now'): run('b')


def test_another_autoencoder_is_refused(tmp_path):
    make_trainer(tmp_path / 'run', max_steps=3).fit()
    model = diffusion()
    with torch.no_grad(): next(model.latent.vae.parameters()).add_(1)
    with pytest.raises(ValueError, match='frozen = .* where .* is asked for now'):
        make_trainer(tmp_path / 'run', model=model, max_steps=3).fit()


def test_a_critic_that_has_not_joined_is_not_there(tmp_path):
    for name in ('with', 'without'):
        make_adversarial(tmp_path / name, critic=name == 'with', checkpoint_every=14, keep=9).fit()
    (a, _), (b, _) = [load_checkpoint(tmp_path / name / 'checkpoints' / 'step-00000014') for name in ('with', 'without')]
    for group in ('model', 'ema', 'optimizer', 'snapshot'):
        left = {n: t for n, t in a[group].items() if not n.startswith('discriminator')}
        assert left.keys() == b[group].keys() and all(torch.equal(t, b[group][n]) for n, t in left.items())
    torch.manual_seed(0)
    AutoencoderKL(2, latent_channels=4, channels=(8, 8))
    critic = PatchDiscriminator(channels=8, layers=1).state_dict()
    assert all(torch.equal(t, a['model'][f'discriminator.{n}']) for n, t in critic.items())
    assert not any(n.startswith('discriminator') for n in a['optimizer'])
    (a, _), (b, _) = [load_checkpoint(tmp_path / name / 'checkpoints' / 'step-00000028') for name in ('with', 'without')]
    assert not any(torch.equal(t, a['model'][f'discriminator.{n}']) for n, t in critic.items())
    assert any(not torch.equal(t, a['ema'][n]) for n, t in b['ema'].items())


def test_a_rehearsal_plays_the_critic_and_leaves_nothing_of_it(tmp_path):
    trainer, played = make_adversarial(tmp_path / 'run', max_steps=None, budget=2.), []
    module, original = trainer.state.module, trainer.state.module.contest
    module.contest = lambda *args: played.append(module.epoch) or original(*args)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    training.plan_steps(trainer)
    assert played == [float('inf')] * 25 and not trainer.state.optimizer.state
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    trainer.state.step(next(training.steps_from(trainer, 0)), [(0, 0)], 1e-3, 0.)
    moved = {n.split('.')[0] for n, t in module.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {'vae'}


def test_the_log_holds_the_terms_and_the_validation_compares(tmp_path):
    trainer = make_adversarial(tmp_path / 'run')
    trainer.fit()
    steps, valid = [[r for r in trainer.history if key in r] for key in ('loss', 'valid_loss')]
    assert ['discriminator' in r for r in steps] == [False, True, True] and all({'l1', 'kl', 'perceptual'} <= r.keys() for r in steps)
    module, batches = trainer.ema, list(trainer.valid_dl)
    wanted = 0
    for i, batch in enumerate(batches):
        x, noise = batch['image'], torch.Generator().manual_seed(seed_of(0, 'validation', i))
        reconstruction, gaussian = module.vae(x, noise)
        wanted += (VAELoss()(reconstruction, x, gaussian)['loss'] + .1 * module.perceptual(reconstruction, x)).item() / len(batches)
    assert valid[-1]['valid_loss'] == pytest.approx(wanted, rel=1e-6)


def test_nan_names_the_subjects_but_not_by_name(tmp_path):
    data = slices()
    data.images[3] = float('nan')
    model = diffusion()
    trainer = Trainer(model, *loaders(data, slices(8, 1), batch_size=4), tmp_path / 'run', epochs=2, log=None)
    with pytest.raises(FloatingPointError, match=r"a number is not finite at step \d+ in epoch 0: first the batch itself, in 'image'") as caught: trainer.fit()
    assert pseudonym('person-3') in str(caught.value) and 'person' not in str(caught.value)
    assert checkpoints(tmp_path / 'run' / 'checkpoints')[-1].name == f'step-{trainer.step:08}'
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_nan_in_validation_alone_is_told(tmp_path):
    held = slices(8, 1)
    held.images[6] = float('nan')
    trainer = Trainer(diffusion(), *loaders(slices(), held, batch_size=4), tmp_path / 'run', epochs=2, precision='fp32', log=None)
    with pytest.raises(FloatingPointError, match='the validation loss is nan after step 10') as caught: trainer.fit()
    assert pseudonym('person-1') in str(caught.value) and 'person' not in str(caught.value)
    assert checkpoints(tmp_path / 'run' / 'checkpoints')[-1].name == 'step-00000010'


class Gambler(nn.Module):
    "Draws from Python's and numpy's generators, which the trainer does not seed."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def loss(self, batch, generator=None):
        return (self.weight - np.random.rand() - random.random() + torch.rand(1, generator=generator)).square().mean()


def test_generators_that_nobody_seeds_go_on_too(tmp_path):
    def run(name, seed, resume='auto'):
        random.seed(seed)
        np.random.seed(seed)
        trainer = Trainer(Gambler(), DataLoader(Epochs(), 3), None, tmp_path / name, max_steps=30, checkpoint_every=15, keep=9, precision='fp32', log=None)
        trainer.fit(resume)
        return trainer
    whole = run('whole', 5)
    again = run('again', 6, tmp_path / 'whole' / 'checkpoints' / 'step-00000015')
    assert torch.equal(again.state.module.weight, whole.state.module.weight) and again.history == whole.history


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_a_process_with_a_checkpoint(number, code, tmp_path):
    make_trainer(tmp_path / 'whole').fit()
    pid = os.fork()
    if not pid:
        try: make_trainer(tmp_path / 'run', checkpoint_every=1000).fit()
        except SystemExit as e: os._exit(e.code)
        except KeyboardInterrupt: os._exit(1)
        os._exit(0)
    while not rows_in(tmp_path / 'run'): time.sleep(.002)
    os.kill(pid, number)
    assert wait(pid) == code
    _, state = load_checkpoint(checkpoints(tmp_path / 'run' / 'checkpoints')[-1])
    assert 10 < state['step'] < steps
    make_trainer(tmp_path / 'run', seed=99, checkpoint_every=1000).fit()
    same_bits(result(tmp_path / 'run'), result(tmp_path / 'whole'))


class Card:
    "A card that would emulate bfloat16; there is none here to ask."
    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4')


def test_a_card_that_only_pretends_is_refused(monkeypatch):
    Card(monkeypatch)
    assert best_precision() == 'fp16'
    with pytest.raises(ValueError, match="'bf16' would be emulated on Tesla T4; choose 'auto' or 'fp16'"): check_precision('bf16')


def test_a_full_card_says_what_to_change(tmp_path):
    model = diffusion()
    trainer = make_trainer(tmp_path / 'run', model=model)
    def full(*args): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    model.loss = full
    with pytest.raises(MemoryError, match='step 0: halve the batch size and double accumulate'): trainer.fit()


def test_a_full_card_in_a_preview_is_told_too(tmp_path):
    trainer = make_adversarial(tmp_path / 'run', preview_every=1)
    def full(*args): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    trainer.ema.preview = full
    with pytest.raises(MemoryError, match='step 10: halve the batch size'): trainer.fit()


class Scaler:
    "A loss scaler that has found an infinite gradient in every step; there is no card here to have one."
    def __init__(self, scale): self.scale = scale
    def get_scale(self): return self.scale


@pytest.mark.parametrize('scale, moves', [(65536., True), (1e-4, False)])
def test_a_scale_that_shrinks_for_ever_is_no_overflow(scale, moves, tmp_path):
    state = make_trainer(tmp_path / 'run').state
    for p in state.weights.values(): p.grad = torch.full_like(p, torch.inf)
    state.accelerator.unscale_gradients, state.accelerator.scaler = (lambda: None), Scaler(scale)
    state.optimizer = SimpleNamespace(param_groups=state.optimizer.param_groups, step=lambda: None, step_was_skipped=True)
    assert state.move(1e-3) is moves and state.skipped == 1


@pytest.mark.parametrize('name, value', [(n, 0) for n in ('accumulate', 'keep', 'patience', 'checkpoint_every', 'overfit_batches', 'preview_every', 'post_hoc', 'profile', 'lr', 'clip', 'max_hours', 'snapshot_at')])
def test_a_number_that_would_do_nothing_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=name): make_trainer(tmp_path / 'run', **{name: value})
    assert not (tmp_path / 'run').exists()


def test_going_back_forgets_what_came_after(tmp_path):
    make_trainer(tmp_path / 'run', keep=99).fit()
    make_trainer(tmp_path / 'run', seed=99, max_hours=1e-9).fit(tmp_path / 'run' / 'checkpoints' / 'step-00000014')
    assert checkpoints(tmp_path / 'run' / 'checkpoints')[-1].name == 'step-00000015'
    make_trainer(tmp_path / 'run', seed=98).fit()
    make_trainer(tmp_path / 'whole').fit()
    same_bits(result(tmp_path / 'run'), result(tmp_path / 'whole'))


def test_a_flipped_bit_in_the_newest_costs_one_checkpoint(tmp_path):
    make_trainer(tmp_path / 'run').fit()
    path = checkpoints(tmp_path / 'run' / 'checkpoints')[-1] / 'ema.safetensors'
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    make_trainer(tmp_path / 'run', keep=1, checkpoint_every=1, max_hours=1e-9).fit()
    assert checkpoints(tmp_path / 'run' / 'checkpoints')[-1].name == 'step-00000057'


def test_patience_remembers_the_best_of_another_folder(tmp_path):
    def make(folder, **more): return make_trainer(folder, max_steps=200, patience=3, lr=5., clip=1e9, ema=.1, snapshot_at=None, **more)
    first = make(tmp_path / 'a')
    best = first.fit()
    assert first.stopped == 'patience'
    again = make(tmp_path / 'b', model=diffusion(9)).fit(tmp_path / 'a')
    for a, b in zip(best.parameters(), again.parameters(), strict=True): assert torch.equal(a, b)


def test_averages_of_another_folder_come_along(tmp_path):
    make_trainer(tmp_path / 'whole', post_hoc=8, keep=99).fit()
    make_trainer(tmp_path / 'part', post_hoc=8, seed=99).fit(tmp_path / 'whole' / 'checkpoints' / 'step-00000028')
    names = [sorted(p.name for p in (tmp_path / name / 'averages').iterdir()) for name in ('whole', 'part')]
    assert names[0] == names[1] and len(names[0]) == 16


def test_previews_are_pictures_and_volumes(tmp_path):
    trainer = make_adversarial(tmp_path / 'run', preview_every=2)
    trainer.fit()
    names = {p.name for p in (tmp_path / 'run' / 'previews').iterdir()}
    assert names == {f'step-000000{step}-{name}.{end}' for step in (20, 28) for name in ('real', 'copies') for end in ('png', 'nii.gz')}
    again = make_adversarial(tmp_path / 'plain')
    again.fit()
    same_bits(result(tmp_path / 'run', 28), result(tmp_path / 'plain', 28))


def test_averages_of_any_width_afterwards(tmp_path):
    trainer = make_trainer(tmp_path / 'run', post_hoc=8)
    trainer.fit()
    files = sorted(p.name for p in (tmp_path / 'run' / 'averages').iterdir())
    assert len(files) == 16 and files[-1] == f'step-{steps:08}-1.safetensors'
    stored = post_hoc_average(tmp_path / 'run' / 'averages', .10)
    for name, tensor in trainer.state.powers.tensors(1).items(): torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-5)


def test_more_batches_in_a_step_than_in_an_epoch(tmp_path):
    with pytest.raises(ValueError, match='a step takes 11 batches.* an epoch has 10'): make_trainer(tmp_path / 'run', accumulate=11)


@pytest.mark.slow
def test_compiled_parts_train_alike(tmp_path):
    histories = []
    for name in (False, True):
        trainer = make_trainer(tmp_path / str(name), model=diffusion(wrap=lambda net: net), max_steps=10, snapshot_at=None, compile=name)
        trainer.fit()
        histories.append([r['loss'] for r in trainer.history if 'loss' in r])
    np.testing.assert_allclose(*histories, rtol=1e-4)


class Epochs(Dataset):
    "A data set whose items tell the epoch, read through torch's own random sampler."
    epoch = -1
    def __len__(self): return 12
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitem__(self, i): return dict(x=torch.tensor([float(i), float(self.epoch)]))


class Recorder(nn.Module):
    "Keeps the batches it is trained on."
    def __init__(self, stop=None):
        super().__init__()
        self.weight, self.seen, self.stop = nn.Parameter(torch.zeros(2)), [], stop

    def loss(self, batch, generator=None):
        if len(self.seen) == self.stop: raise KeyboardInterrupt
        self.seen.append(batch['x'].tolist())
        return (batch['x'] * self.weight).mean()


def test_the_order_of_a_plain_random_loader_survives_too(tmp_path):
    def run(name, stop=None):
        recorder = Recorder(stop)
        try: Trainer(recorder, DataLoader(Epochs(), 3, shuffle=True), None, tmp_path / name, epochs=3, checkpoint_every=1, precision='fp32', log=None).fit()
        except KeyboardInterrupt: pass
        return recorder.seen
    whole = run('whole')
    assert [b[0][1] for b in whole] == [0] * 4 + [1] * 4 + [2] * 4
    assert run('parts', 6) + run('parts', 5) + run('parts') == whole


def test_budget_becomes_a_number_of_steps_once(tmp_path):
    trainer = make_trainer(tmp_path / 'run', max_steps=None, budget=2.5, checkpoint_every=None)
    start = time.process_time()
    trainer.fit()
    assert 1. < time.process_time() - start < 7.
    again = make_trainer(tmp_path / 'run', max_steps=None, budget=2.5)
    again.fit()
    assert again.total_steps == trainer.total_steps == trainer.step


def test_progress_tells_the_time_left(tmp_path):
    lines = []
    trainer = make_trainer(tmp_path / 'run', max_steps=60, accumulate=2, log=lines.append)
    trainer.fit()
    assert trainer.summary['samples_per_s'] * trainer.summary['seconds'] == pytest.approx(60 * 2 * 4, rel=.2)
    assert 'step 60/60' in lines[-2] and 'samples/s' in lines[-2] and 'valid' in lines[-2]
    assert lines[-1].startswith('done: 60 steps (12.0 epochs)') and 'best validation' in lines[-1]


def test_log_survives_a_line_cut_short(tmp_path):
    log = RunLog(tmp_path / 'log.jsonl')
    log.append(step=1, loss=.5)
    log.path.write_text(log.path.read_text() + '{"step": 2, "lo')
    assert log.rows() == [dict(step=1, loss=.5)]


def test_a_pickle_in_place_of_weights_is_refused(tmp_path):
    model = diffusion(wrap=lambda net: net)
    model.save_pretrained(tmp_path / 'model')
    torch.save(model.state_dict(), tmp_path / 'model' / 'model.safetensors')
    with pytest.raises(ValueError, match='damaged'): LatentDiffusion.from_pretrained(tmp_path / 'model')


if __name__ == '__main__':
    torch.set_num_threads(1)
    make_trainer(Path(sys.argv[2]) / 'imports')
    globals()[f'scenario_{sys.argv[1]}'](Path(sys.argv[2]))
