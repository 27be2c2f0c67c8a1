"""What sampling costs beyond the network: `python benchmarks/sampler_overhead.py [repeats]`.

1. Time of `sample` over (network calls x one forward pass), batch of 16 latents (8, 16, 16), the demo's UNet. Wanted: at most 1.1.
2. Time that a step takes by itself, with a network that returns its input, on one latent (4, 8, 14, 8): DDIM beside diffusers and monai, DPM-Solver++ 2M beside diffusers.
   A run is a whole `sample`, batch after batch as in use; a peer calls `set_timesteps`, which it must, and then `step` in a loop, under `inference_mode`. Beside it our
   `first` run, which has to prepare its numbers. The ratio is peer / ours: one number for each pair of neighbouring runs, and that of the best runs. Wanted: at least 5.

One thread, CPU time; runs are interleaved, so that a busy neighbour meets both sides. Minimum and median are printed as JSON.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import json
import statistics
import sys
import time

import torch

from sbldm_nb.samplers import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler
from sbldm_nb.schedules import get_schedule
from sbldm_nb.unet3d import UNet


def timed(f) -> float:
    "CPU seconds of one call."
    start = time.process_time()
    f()
    return time.process_time() - start


def both(numbers: list, digits: int) -> dict:
    "Minimum and median, rounded."
    return dict(min=round(min(numbers), digits), median=round(statistics.median(numbers), digits))


def sampling_ratio(cls, steps: int, repeats: int) -> dict:
    "`sample` against as many bare forward passes, A B A B."
    torch.manual_seed(0)
    net = UNet(2, 8, channels=(64, 128, 128), attention=(False, False, True)).eval()
    sampler, x, t = cls(net, get_schedule('flow'), 'flow'), torch.randn(16, 8, 16, 16), torch.full((16,), 500)
    calls = 2 * steps - 1 if cls is HeunSampler else steps
    def forwards():
        with torch.inference_mode():
            for _ in range(calls): net(x, t, None)
    def sample(): sampler.sample(noise=x, steps=steps)
    sample(), forwards()
    return dict(sampler=cls.__name__, steps=steps, calls=calls, **both([timed(sample) / timed(forwards) for _ in range(repeats)], 3))


def peers() -> dict:
    "The schedulers to compare with: {(our class, name): scheduler}, without those that are not installed."
    found, args = {}, dict(beta_start=.0015, beta_end=.0195)
    try:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
        found[DDIMSampler, 'diffusers'] = DDIMScheduler(1000, beta_schedule='scaled_linear', clip_sample=False, **args)
        found[DPMSolverSampler, 'diffusers'] = DPMSolverMultistepScheduler(1000, beta_schedule='scaled_linear', **args)
    except ImportError: pass
    try:
        from monai.networks.schedulers import DDIMScheduler
        found[DDIMSampler, 'monai'] = DDIMScheduler(1000, 'scaled_linear_beta', clip_sample=False, **args)
    except ImportError: pass
    return found


def step_cost(repeats: int, steps: int = 100) -> list[dict]:
    "Microseconds of one step, ours and theirs, and the ratio of the two, for each peer."
    x = torch.randn(1, 4, 8, 14, 8, generator=torch.Generator().manual_seed(0))
    rows = []
    for (cls, name), scheduler in peers().items():
        sampler = cls(lambda x, t, cond: x, get_schedule('scaled_linear', beta_start=.0015, beta_end=.0195), 'eps', 'leading')
        def ours(): sampler.sample(noise=x, steps=steps)
        def first():
            sampler.kept.clear()
            ours()
        def theirs():
            y = x
            with torch.inference_mode():
                scheduler.set_timesteps(steps)
                for t in scheduler.timesteps: y = scheduler.step(y, t, y, return_dict=False)[0] if name == 'diffusers' else scheduler.step(y, t, y)[0]
        runs, us = dict(ours=ours, theirs=theirs, first=first), dict(ours=[], theirs=[], first=[])
        for run in runs.values(): run()
        for _ in range(repeats):
            for k, run in runs.items(): us[k].append(timed(run) / steps * 1e6)
        compare = lambda k: dict(both([b / a for a, b in zip(us[k], us['theirs'])], 2), of_best=round(min(us['theirs']) / min(us[k]), 2))
        rows.append(dict(sampler=cls.__name__, peer=name, ratio=compare('ours'), ratio_first=compare('first'), microseconds={k: both(v, 1) for k, v in us.items()}))
    return rows


if __name__ == '__main__':
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(json.dumps(dict(torch=torch.__version__, ratio_to_forwards=[sampling_ratio(*k, repeats) for k in ((DDIMSampler, 15), (DDPMSampler, 15), (HeunSampler, 8))],
                          step_beside_peers=step_cost(8 * repeats)), indent=1))
