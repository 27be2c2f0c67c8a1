"""What the trainer costs: `python benchmarks/training.py [rounds] [overhead|ema|processes ...]`.

- overhead: steps of the demo's latent diffusion model (2D UNet, latents of 16 x 16 from a cache, batches of 16) by `Trainer`, against a loop written by hand for the same model: the same loader, forward and backward in
  fp32, clipped gradients, fused AdamW with the same groups and learning rates, an average by torch._foreach_lerp_. The trainer does all that it does in a run: seeds for every batch, the check of the loss, the log every ten
  steps, progress, the wish to stop. Validation and checkpoints are counted apart: both sides run whole epochs without them, and what one of each costs is given beside it.
- ema: one update of the average of the same network, by ours and by diffusers' EMAModel (as it comes, and with its foreach=True).
- processes: the same training by one process with accumulate=2 and by two processes on two cores under torchrun; seconds a step without what starting costs.

One thread a process, precision fp32. The overhead is given in wall time and in CPU time, which neighbours on the machine disturb less. Sides take turns, in an order that is reversed every round; given are the medians of the times, and median, lowest and highest of the ratios of neighbouring runs.
Results go to benchmarks/results/training.json.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import diffusers
import numpy as np
import torch
from diffusers.training_utils import EMAModel

import sbldm_nb.training as training
from sbldm_nb.averages import EMA
from sbldm_nb.datasets import SliceDataset, loaders
from sbldm_nb.kaggle_e2e import cpu_name
from sbldm_nb.ldm import LatentDiffusion, SlicePosition
from sbldm_nb.schedules import get_schedule
from sbldm_nb.tracking import Progress
from sbldm_nb.training import Trainer, warmup_cosine
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, LatentCache, LatentSpace

RESULTS = Path(__file__).parent / 'results' / 'training.json'
STEPS = 40  # in an epoch, which is one turn of a side


def make_model():
    torch.manual_seed(0)
    latent = LatentSpace(AutoencoderKL(2, latent_channels=4, channels=(16, 32)))
    denoiser = UNet(2, channels=(48, 96), attention=(False, True), vector_dim=1)
    return LatentDiffusion(latent, denoiser, get_schedule('flow'), SlicePosition(drop=.1), size=(64, 64))


def make_loaders(latent, size=32):
    "Forty batches of sixteen latents of 16 x 16."
    g = torch.Generator().manual_seed(0)
    slices = lambda n: SliceDataset(torch.rand(n, 1, size, size, generator=g) * 2 - 1, torch.rand(n, generator=g), [f'p{i}' for i in range(n)])
    return loaders(LatentCache(latent, slices(16 * STEPS)), LatentCache(latent, slices(64), flips=False), 16)


def make_trainer(folder, validate=False, **changes):
    model = make_model()
    train_dl, valid_dl = make_loaders(model.latent)
    settings = dict(max_steps=100_000, precision='fp32', checkpoint_every=10**9, log=lambda line: None)
    return Trainer(model, train_dl, valid_dl if validate else None, folder, **{**settings, **changes})


class Ours:
    "Epochs of the trainer's own loop, one at a turn."
    def __init__(self, folder):
        self.trainer = make_trainer(folder)
        training.open_run(self.trainer, 'auto')
        self.trainer.state.module.train()
        self.progress = Progress(self.trainer.total_steps, STEPS, 16, self.trainer.log)
        self.look = SimpleNamespace(step=lambda: setattr(self.trainer, 'stopped', None if self.trainer.step % STEPS else 'for the other side'))

    def epoch(self):
        self.trainer.stopped = None
        with training.Signals() as signals: training.run_steps(self.trainer, signals, self.progress, self.look)


class ByHand:
    "The loop that one would write."
    def __init__(self):
        self.model = make_model()
        self.loader, _ = make_loaders(self.model.latent)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, 2e-3, betas=(.9, .99), weight_decay=1e-2, fused=True)
        self.average = [p.detach().clone() for p in self.weights]
        self.generator, self.step = torch.Generator().manual_seed(0), 0
        self.model.train()

    def epoch(self):
        self.loader.sampler.set_epoch(self.step // STEPS)
        for batch in self.loader:
            for group in self.optimizer.param_groups: group['lr'] = 2e-3 * warmup_cosine(self.step, 100_000)
            loss = self.model.loss(batch, self.generator)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.)
            self.optimizer.step()
            decay = min(.998, (1 + self.step) / (10 + self.step))
            with torch.no_grad(): torch._foreach_lerp_(self.average, self.weights, 1 - decay)
            self.step += 1
            if not math.isfinite(loss.item()): raise FloatingPointError


def in_turn(sides: dict, rounds: int, clock=time.perf_counter) -> dict:
    "Seconds of every side in every round; one turn of each before does not count."
    seconds = {name: [] for name in sides}
    for side in sides.values(): side()
    for r in range(rounds):
        for name in list(sides)[::(-1)**r]:
            begin = clock()
            sides[name]()
            seconds[name].append(clock() - begin)
    return seconds


def report(seconds: dict, base: str, per: int = 1) -> dict:
    "Medians of the time of one of `per` steps, and how many times as long as `base` each took."
    rows = {}
    for name, t in seconds.items():
        ratios = np.divide(t, seconds[base])
        rows[name] = dict(ms=round(1000 * float(np.median(t)) / per, 4), ratio=round(float(np.median(ratios)), 4), lowest=round(float(ratios.min()), 4), highest=round(float(ratios.max()), 4))
        print(f'{name:44} {rows[name]["ms"]:10.3f} ms   x{rows[name]["ratio"]:.3f} (x{rows[name]["lowest"]:.3f} to x{rows[name]["highest"]:.3f})')
    return rows


def overhead(work: Path, rounds: int) -> dict:
    ours, hand = Ours(work / 'run'), ByHand()
    both = lambda: np.array([time.perf_counter(), time.process_time()])
    seconds = in_turn({'loop by hand': hand.epoch, 'Trainer': ours.epoch}, 3 * rounds, both)
    rows = report({name: [t[0] for t in turns] for name, turns in seconds.items()}, 'loop by hand', STEPS)
    rows |= report({f'{name}, CPU time': [t[1] for t in turns] for name, turns in seconds.items()}, 'loop by hand, CPU time', STEPS)
    assert ours.trainer.step == hand.step == (3 * rounds + 1) * STEPS, 'the sides did not do the same work'
    trainer = make_trainer(work / 'other', validate=True)
    training.open_run(trainer, 'auto')
    trainer.state.step([next(iter(trainer.train_dl))], [(0, 0)], 1e-3)  # so that the optimizer has its moments
    apart = {'validation of 4 batches': lambda: training.validate(trainer), 'checkpoint': lambda: training.save(trainer)}
    more = {name: dict(ms=round(1000 * float(np.median(t)), 2)) for name, t in in_turn(apart, rounds).items()}
    for name, row in more.items(): print(f'{name:44} {row["ms"]:10.3f} ms, not in the above')
    return rows | more | dict(parameters=sum(p.numel() for p in hand.weights), batch=16)


def ema(work: Path, rounds: int) -> dict:
    net = make_model().denoiser
    ours, theirs, foreach = EMA(net), EMAModel(net.parameters()), EMAModel(net.parameters(), foreach=True)
    many = lambda update: lambda: [update() for _ in range(50)]
    sides = {'EMA.update': many(ours.update), 'diffusers EMAModel.step': many(lambda: theirs.step(net.parameters())), 'diffusers EMAModel.step, foreach': many(lambda: foreach.step(net.parameters()))}
    return report(in_turn(sides, 3 * rounds), 'EMA.update', 50)


def processes(work: Path, rounds: int) -> dict:
    "Each side is a process or two of its own, which trains 60 steps and says how long they took."
    def side(name, world, accumulate):
        def turn():
            command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(world), __file__, 'train', str(work / f'{name}{len(times[name])}'), str(accumulate)]
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(json.loads((work / f'{name}{len(times[name])}' / 'seconds.json').read_text()))
        return turn
    names = {'two processes': (2, 1), 'one process, accumulate=2': (1, 2)}
    times = {name: [] for name in names}
    turns = {name: side(name, *how) for name, how in names.items()}
    for r in range(rounds):
        for name in list(names)[::(-1)**r]: turns[name]()
    return report(times, 'two processes', 40)


def train(folder: Path, accumulate: int):
    "Sixty steps; the seconds of the last forty, by the main process."
    trainer, begin = make_trainer(folder, accumulate=accumulate, max_steps=60), []
    original = trainer.state.step
    def step(*args):
        if trainer.step == 20: begin.append(time.perf_counter())
        return original(*args)
    trainer.state.step = step
    trainer.fit()
    if trainer.accelerator.is_main_process: (folder / 'seconds.json').write_text(json.dumps(time.perf_counter() - begin[0]))


if __name__ == '__main__':
    if sys.argv[1:2] == ['train']: sys.exit(train(Path(sys.argv[2]), int(sys.argv[3])))
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    tasks = dict(overhead=overhead, ema=ema, processes=processes)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[2:] or tasks:
        with tempfile.TemporaryDirectory() as work:
            print(f'-- {name}')
            load = os.getloadavg()[0]
            results[name] = tasks[name](Path(work), rounds)
            results['conditions'] = dict(results.get('conditions', {}), cpu=cpu_name(), torch=torch.__version__, accelerate=accelerate.__version__, diffusers=diffusers.__version__)
            results['conditions'][name] = dict(rounds=rounds, load_before=round(load, 1))
            RESULTS.write_text(json.dumps(results, indent=1) + '\n')
