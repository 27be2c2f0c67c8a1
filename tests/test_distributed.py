"""Training with two real processes (torchrun, gloo, CPU): equal to one process, killed, out of disk, stopped, sharded.

The same file is what torchrun starts: `torchrun --standalone --nproc_per_node 2 tests/test_distributed.py WORK FOLDER`, where WORK is one of the functions in WORKS."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

for name, value in dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', TORCH_CPP_LOG_LEVEL='ERROR').items(): os.environ.setdefault(name, value)

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

import sbldm_nb.state as state_module
import sbldm_nb.training as training
from sbldm_nb.checkpoints import checkpoints, load_checkpoint
from sbldm_nb.datasets import SliceDataset, loaders
from sbldm_nb.files import pseudonym
from sbldm_nb.ldm import LatentDiffusion, SlicePosition
from sbldm_nb.losses import PatchDiscriminator, PerceptualLoss, VAELoss
from sbldm_nb.recipes import VAETraining
from sbldm_nb.schedules import get_schedule
from sbldm_nb.tracking import say
from sbldm_nb.training import Trainer
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, LatentCache, LatentSpace

RANK = int(os.environ.get('RANK', 0))
STEPS, LONG = 16, 30  # of most runs, and of those that are killed: a step takes two batches, an epoch has five steps and one batch that is left over
MIDDLE = 'step-00000008'  # inside an epoch, after the critic has joined


def slices(n=44, seed=0):
    "Random slices of five subjects: eleven batches of four."
    g = torch.Generator().manual_seed(seed)
    return SliceDataset(torch.rand(n, 1, 16, 16, generator=g) * 2 - 1, torch.rand(n, generator=g), [f'person-{i % 5}' for i in range(n)])


def with_nan():
    data = slices()
    data.images[3] = float('nan')
    return data


class Dropping(nn.Module):
    "A denoiser with dropout before it, so that a step has a second source of randomness."
    def __init__(self, net):
        super().__init__()
        self.net, self.dropout, self.config = net, nn.Dropout(.1), net.config

    def forward(self, x, t, cond=None): return self.net(self.dropout(x), t, cond)


def make_ldm(folder, seed=0, **changes):
    "A latent diffusion model of a few thousand parameters; `seed` is that of the initial weights; three validation batches, the last one smaller."
    torch.manual_seed(1)
    latent = LatentSpace(AutoencoderKL(2, latent_channels=4, channels=(8, 8)))
    torch.manual_seed(seed)
    model = LatentDiffusion(latent, Dropping(UNet(2, channels=(8, 16), attention=(False, True), vector_dim=1)), get_schedule('flow'), SlicePosition(drop=.2), size=(16, 16))
    data = [LatentCache(latent, slices()), LatentCache(latent, slices(10, 1), flips=False)]
    settings = dict(max_steps=STEPS, precision='fp32', snapshot_at=.3, post_hoc=2, checkpoint_every=8, keep=99, ema=.9, log=None)
    return Trainer(model, *loaders(*data, batch_size=4), folder, **{**settings, **changes})


def make_vae(folder, seed=0, data=None, **changes):
    "The autoencoder's whole recipe: the KL warms up for two epochs, the critic joins in step 7."
    torch.manual_seed(1)
    judge = PerceptualLoss(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
    torch.manual_seed(seed)
    vae, critic = AutoencoderKL(2, latent_channels=4, channels=(8, 8)), PatchDiscriminator(channels=8, layers=1)
    module = VAETraining(vae, VAELoss(), judge, discriminator=critic, adversarial_from=1.2, discriminator_lr=.5, kl_warmup=2.)
    settings = dict(max_steps=STEPS, precision='fp32', snapshot_at=.5, checkpoint_every=8, keep=99, ema=.9, log=None)
    return Trainer(module, *loaders(data or slices(), slices(10, 1), batch_size=4), folder, **{**settings, **changes})


class Line(nn.Module):
    "As small as a model can be; each weight of it knows which items it has seen."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(44))

    def loss(self, batch, generator=None): return (self.weight[batch['item']] - torch.randn(4, generator=generator)).square().mean()


class Items(Dataset):
    def __len__(self): return 44
    def __getitem__(self, i): return dict(item=torch.tensor(i))


def make_plain(folder, **changes):
    "A loader that knows nothing of this package."
    return Trainer(Line(), DataLoader(Items(), 4, shuffle=True), None, folder, **{**dict(max_steps=STEPS, precision='fp32', log=None), **changes})


# --- what the processes do

def attempt(trainer, folder, **arguments):
    "Train, and leave a note of how it ended."
    error, lines = None, []
    if RANK == 0: trainer.log = lines.append
    try: trainer.fit(**arguments)
    except (Exception, SystemExit) as e: error = f'{type(e).__name__}: {e}'
    note = dict(error=error, step=trainer.step, stopped=trainer.stopped, world=trainer.accelerator.num_processes, lines=lines)
    (folder / f'note{RANK}.json').write_text(json.dumps(note))


def at_step(trainer, step, what):
    "Do something before the step after `step`."
    original = trainer.state.step
    def stepping(*args):
        if trainer.step == step: what()
        return original(*args)
    trainer.state.step = stepping


def whole(home):
    "Both recipes from beginning to end; the same from the middle of a run of one process; a longer run; torch's own random loader."
    attempt(make_ldm(home / 'ldm', trackers=('tensorboard',)), home / 'ldm')
    attempt(make_vae(home / 'vae', preview_every=2), home / 'vae')
    for name, make in (('ldm', make_ldm), ('vae', make_vae)):
        attempt(make(home / f'{name}-from-one', seed=99), home / f'{name}-from-one', resume=home / f'{name}-one' / 'checkpoints' / MIDDLE)
    make_ldm(home / 'long', max_steps=LONG).fit()
    make_plain(home / 'plain').fit()
    stops(home / 'stopped')


def stops(home):
    "Runs that one of the two processes ends for both: a NaN in its batch, its clock, its signal, its full disk; the last three then go on to the end. And settings that only the main process can refuse."
    home.mkdir(exist_ok=True)
    attempt(make_vae(home / 'nan', data=with_nan()), home / 'nan')
    attempt(make_ldm(home / 'hours', max_hours=1e-9 if RANK == 1 else None), home / 'hours')
    trainer = make_ldm(home / 'term')
    at_step(trainer, 9, lambda: os.kill(os.getpid(), signal.SIGTERM) if RANK == 1 else None)
    attempt(trainer, home / 'term')
    attempt_on_full_disk(home / 'disk')
    for name in ('hours', 'term', 'disk'): make_ldm(home / name, seed=99).fit()
    attempt(make_ldm(home / 'term', max_steps=STEPS + 1), home / 'term' / 'averages')


def attempt_on_full_disk(folder):
    "After the checkpoint in the middle the main process cannot write a file of more than 5000 bytes."
    trainer, before = make_ldm(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if RANK == 0: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    at_step(trainer, 9, full)
    attempt(trainer, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def long(home):
    "A run that somebody outside interrupts; the same command goes on."
    home.mkdir(exist_ok=True)
    (home / f'pid{RANK}').write_text(str(os.getpid()))
    make_ldm(home / 'run', seed=99 if checkpoints(home / 'run' / 'checkpoints') else 0, max_steps=LONG, log=say).fit()


class Sharding(Accelerator):
    """An Accelerator that shards on CPU processes.

    Accelerate grants FSDP to accelerator cards only: AcceleratorState looks at the plugin in its branch for MULTI_GPU and the like, not for MULTI_CPU.
    Past that gate its FSDP 2 code does not ask what the device is. So the test, and only the test, sets by hand what the branch would have set."""
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy='transformer_based_wrap', transformer_cls_names_to_wrap=['ResBlock'], cpu_ram_efficient_loading=False)
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        PartialState._shared_state['distributed_type'] = DistributedType.FSDP


def sharded(home):
    "First the end of the long run, unsharded. Then weights, averages and optimizer in halves: from beginning to end, from the middle of a run of one process, and with a NaN."
    long(home / 'killed')
    state_module.Accelerator = Sharding
    trainer = make_ldm(home / 'ldm')
    attempt(trainer, home / 'ldm')
    state, whole_tensors = trainer.state, sum(t.numel() for t in trainer.state.weights.values())
    parts = [state.weights.values(), [dict(trainer.ema.named_parameters())[n] for n in state.weights], [s['exp_avg'] for s in state.optimizer.state.values()]]
    assert all(isinstance(t, DTensor) for part in parts for t in part)
    (home / f'halves{RANK}.json').write_text(json.dumps([*(sum(t.to_local().numel() for t in part) for part in parts), whole_tensors]))
    model = trainer.fit()
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    attempt(make_vae(home / 'vae-from-one', seed=99), home / 'vae-from-one', resume=home / 'vae-one' / 'checkpoints' / MIDDLE)
    attempt(make_vae(home / 'nan', data=with_nan()), home / 'nan')


WORKS = {f.__name__: f for f in (whole, long, sharded)}

if __name__ == '__main__':
    WORKS[sys.argv[1]](Path(sys.argv[2]))
    sys.exit()


# --- the tests

def start(work, folder):
    "Two processes under torchrun."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', __file__, work, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def end(job, seconds=300):  # what it printed
    "Wait for a job; leave nothing behind."
    try: return job.communicate(timeout=seconds)[0]
    finally: clear(job)


def clear(job):
    "torchrun kills its processes half a minute after SIGTERM at the latest."
    if job.poll() is None:
        job.terminate()
        job.wait(60)


def run(work, folder):
    job = start(work, folder)
    text = end(job)
    assert job.returncode == 0, text[:4000]


def tensors_of(folder, step=None):
    last = checkpoints(folder / 'checkpoints')[-1]
    groups, numbers = load_checkpoint(last if step is None else folder / 'checkpoints' / f'step-{step:08}')
    return {g: v for g, v in groups.items() if g != 'rng'}, numbers


def rows_of(folder): return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def notes_of(folder): return [json.loads((folder / f'note{r}.json').read_text()) for r in range(2)]


def same_run(a, b, bits=True):
    "Raise unless two runs ended with the same weights, averages, optimizer and log: to the last bit, or to 1e-5."
    (ours, numbers), (theirs, others) = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys() and numbers['step'] == others['step']
    for group in ours:
        assert ours[group].keys() == theirs[group].keys()
        for name, tensor in ours[group].items():
            if bits: assert torch.equal(tensor, theirs[group][name]), f'{group} {name} differs'
            elif not is_noise(theirs['optimizer'], name): torch.testing.assert_close(tensor, theirs[group][name], rtol=0, atol=1e-5, msg=lambda m: f'{group} {name}: {m}')
    for row, other in zip(rows_of(a), rows_of(b), strict=True):
        assert row == (other if bits else pytest.approx(other, rel=1e-5))


def is_noise(optimizer, name):
    "A bias that the normalisation after it takes away: its gradient is nought but rounding, which Adam turns into steps of full length."
    square = optimizer.get(f'{name}/exp_avg_sq')
    return name.endswith('bias') and square is not None and square.sqrt().max() < 1e-7


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "One process that takes two batches a step."
    home = tmp_path_factory.mktemp('one')
    make_ldm(home / 'ldm-one', accumulate=2).fit()
    make_vae(home / 'vae-one', accumulate=2, preview_every=2).fit()
    return home


@pytest.fixture(scope='module')
def two(one, tmp_path_factory):
    "The same with two processes."
    home = shutil.copytree(one, tmp_path_factory.mktemp('two') / 'runs')
    run('whole', home)
    return home


@pytest.mark.parametrize('name', ['ldm', 'vae'])
def test_two_processes_are_one_that_takes_two_batches(one, two, name):
    assert [(n['error'], n['step'], n['world']) for n in notes_of(two / name)] == [(None, STEPS, 2)] * 2
    same_run(two / name, one / f'{name}-one')
    assert sum('loss' in r for r in rows_of(two / name)) == 2 and sum('valid_loss' in r for r in rows_of(two / name)) == 4


def test_the_critic_joins_all_processes_without_a_search_for_unused_weights(two):
    before, after = tensors_of(two / 'vae', 5)[0], tensors_of(two / 'vae')[0]
    joined = [any(n.startswith('discriminator') for n in groups['optimizer']) for groups in (before, after)]
    assert joined == [False, True]
    assert 'find_unused' not in Path(state_module.__file__).read_text()


@pytest.mark.parametrize('name', ['ldm', 'vae'])
def test_one_process_goes_on_for_two_and_two_for_one(one, two, name, tmp_path):
    same_run(two / f'{name}-from-one', one / f'{name}-one')
    make = dict(ldm=make_ldm, vae=make_vae)[name]
    make(tmp_path / 'run', seed=99, accumulate=2).fit(resume=two / name / 'checkpoints' / MIDDLE)
    same_run(tmp_path / 'run', one / f'{name}-one')


def test_torchs_own_random_loader_is_shared_out_too(two, tmp_path):
    make_plain(tmp_path / 'run', accumulate=2).fit()
    same_run(two / 'plain', tmp_path / 'run')


def test_only_one_process_writes_and_speaks(two):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here, because the processes need it not
    steps = [r['step'] for r in rows_of(two / 'ldm')]
    assert steps == [5, 10, 10, 15, 16, 16]
    notes = notes_of(two / 'ldm')
    assert notes[1]['lines'] == [] and sum('done:' in line for line in notes[0]['lines']) == 1
    events = list((two / 'ldm' / 'tensorboard' / 'ldm').glob('events.*'))
    accumulator = EventAccumulator(str(events[0].parent))
    accumulator.Reload()
    assert [e.step for e in accumulator.Scalars('loss')] == [10, 16] and [e.step for e in accumulator.Scalars('valid_loss')] == [5, 10, 15, 16]
    assert len(events) == 1
    assert sorted(p.name for p in (two / 'vae' / 'previews').iterdir()) == sorted(f'step-{s:08}-{n}.{e}' for s in (10, 16) for n in ('real', 'copies') for e in ('png', 'nii.gz'))
    assert len(list((two / 'ldm' / 'averages').iterdir())) == 4


def test_a_nan_of_one_process_is_told_by_all(two):
    a, b = notes_of(two / 'stopped' / 'nan')
    assert a['error'] == b['error'] and a['step'] == b['step']
    assert a['error'].startswith("FloatingPointError: a number is not finite at step") and "first the batch itself, in 'image'" in a['error']
    assert pseudonym('person-3') in a['error'] and 'person' not in a['error']
    guilty = {pseudonym(f'person-{i}') in a['error'] for i in range(5)}
    assert guilty == {True, False}, 'only the subjects of the one bad batch are named'
    groups, numbers = tensors_of(two / 'stopped' / 'nan')
    assert numbers['step'] == a['step'] and all(torch.isfinite(t).all() for g in groups.values() for t in g.values())


@pytest.mark.parametrize('name, step, stop, error', [('hours', 1, 'max_hours', None), ('term', 11, 'SIGTERM', 'SystemExit: 143')])
def test_one_process_stops_both_at_the_same_step(two, name, step, stop, error):
    for note in notes_of(two / 'stopped' / name): assert (note['step'], note['stopped'], note['error']) == (step, stop, error)
    assert (two / 'stopped' / name / 'checkpoints' / f'step-{step:08}').exists()
    same_run(two / 'stopped' / name, two / 'ldm')


def test_a_full_disk_is_told_by_all(two):
    a, b = notes_of(two / 'stopped' / 'disk')
    assert a['error'] == b['error'] and a['error'].startswith('OSError: the ') and 'could not be written' in a['error'] and 'untouched' in a['error']
    same_run(two / 'stopped' / 'disk', two / 'ldm')


def test_a_refusal_of_the_main_process_is_one_of_all(two):
    a, b = notes_of(two / 'stopped' / 'term' / 'averages')
    assert a['error'] == b['error'] and f'max_steps = {STEPS} where {STEPS + 1} is asked for now' in a['error']


def wait_for(what, seconds=90):
    "Look again and again."
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, 'the job did not get going'
        time.sleep(.002)


def interrupt(home, rank, number, saved=1, delay=0.):  # (exit status, seconds that it took to end, what it printed)
    "Start a job and send a signal to one of its processes, or to torchrun where `rank` is None, when it has written so many checkpoints."
    there = lambda: len(checkpoints(home / 'run' / 'checkpoints'))
    before, pids = there(), [home / f'pid{r}' for r in range(2)]
    for path in pids: path.unlink(missing_ok=True)
    job = start('long', home)
    try:
        wait_for(lambda: job.poll() is not None or there() >= before + saved)
        time.sleep(delay)
        pids = [int(path.read_text()) for path in pids]
        os.kill(job.pid if rank is None else pids[rank], number)
        begin = time.monotonic()
        text = end(job, 60)
    finally: clear(job)
    assert not any(Path(f'/proc/{pid}').exists() for pid in pids)
    return job.returncode, time.monotonic() - begin, text


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    home = tmp_path_factory.mktemp('killed') / 'run'
    return home, *interrupt(home, 1, signal.SIGKILL)


@pytest.fixture(scope='module')
def shards(one, killed, tmp_path_factory):
    "What was killed goes on to its end, and the same processes then train sharded."
    home = shutil.copytree(one, tmp_path_factory.mktemp('shards') / 'runs')
    shutil.copytree(killed[0], home / 'killed')
    run('sharded', home)
    return home


def test_a_job_ends_soon_after_one_of_its_processes(killed):
    home, status, seconds, text = killed
    print(f'exit status {status} after {seconds:.1f} s, newest checkpoint at step {tensors_of(home / "run")[1]["step"]}')
    assert status != 0 and seconds < 60 and tensors_of(home / 'run')[1]['step'] < LONG, text


def test_a_killed_job_goes_on_to_the_same_bits(shards, two):
    same_run(shards / 'killed' / 'run', two / 'long')


def test_sharded_processes_hold_half_each(shards):
    halves = [json.loads((shards / f'halves{r}.json').read_text()) for r in range(2)]
    for a, b in list(zip(*halves))[:3]: assert a + b == halves[0][3] and max(a, b) < .55 * halves[0][3]


@pytest.mark.parametrize('name, wanted', [('ldm', 'ldm-one'), ('vae-from-one', 'vae-one')])
def test_sharded_training_is_the_same_training(shards, one, name, wanted):
    assert [n['error'] for n in notes_of(shards / name)] == [None, None]
    same_run(shards / name, one / wanted, bits=False)


def test_a_sharded_checkpoint_loads_and_goes_on_in_one_process(shards, one, tmp_path):
    make_ldm(tmp_path / 'run', seed=99, accumulate=2).fit(resume=shards / 'ldm' / 'checkpoints' / MIDDLE)
    same_run(tmp_path / 'run', one / 'ldm-one', bits=False)


def test_a_nan_of_one_sharded_process_is_told_by_all(shards):
    a, b = notes_of(shards / 'nan')
    assert a['error'] == b['error'] and "first the batch itself, in 'image'" in a['error'] and pseudonym('person-3') in a['error']


@pytest.mark.slow
def test_torchrun_is_asked_to_stop(two, tmp_path):
    "SIGTERM, as a cluster sends it: torchrun passes it on, both processes finish the step and leave a checkpoint of it."
    status, seconds, text = interrupt(tmp_path / 'long', None, signal.SIGTERM, 3)
    step = tensors_of(tmp_path / 'long' / 'run')[1]['step']
    print(f'exit status {status} after {seconds:.1f} s, newest checkpoint at step {step}')
    assert status != 0 and seconds < 30 and f'stopped by SIGTERM after {step} steps' in text, text
    run('long', tmp_path / 'long')
    same_run(tmp_path / 'long' / 'run', two / 'long')


@pytest.mark.slow
def test_kills_at_random_moments(two, tmp_path):
    "Either process, three times a run."
    rng, home = random.Random(0), tmp_path / 'long'
    for saved in (1, 1, 1):
        status, seconds, text = interrupt(home, rng.randrange(2), signal.SIGKILL, saved, rng.uniform(0, .1))
        print(f'exit status {status} after {seconds:.1f} s')
        assert status != 0, text
    run('long', home)
    same_run(home / 'run', two / 'long')
