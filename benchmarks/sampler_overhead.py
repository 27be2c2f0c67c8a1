"""What sampling costs beyond the network: `python benchmarks/sampler_overhead.py [repeats]`.

1. Time of `sample` over (network calls x one forward pass), batch of 16 latents (8, 16, 16), the demo's UNet. Wanted: at most 1.1.
2. Time a DDIM step takes by itself, with a network that returns its input, beside diffusers and monai where they are installed.

One thread; runs are interleaved, so that a busy neighbour meets both sides. Minimum and median of the ratio are printed as JSON.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import json
import statistics
import sys
import time

import torch

from sbldm_nb.samplers import DDIMSampler, DDPMSampler, HeunSampler
from sbldm_nb.schedules import get_schedule
from sbldm_nb.unet3d import UNet


def timed(f) -> float:
    "CPU seconds of one call."
    start = time.process_time()
    f()
    return time.process_time() - start


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
    ratios = [timed(sample) / timed(forwards) for _ in range(repeats)]
    return dict(sampler=cls.__name__, steps=steps, calls=calls, min=round(min(ratios), 3), median=round(statistics.median(ratios), 3))


def step_cost(repeats: int, steps: int = 100) -> dict:
    "Microseconds that one DDIM step adds, for one small latent and a network that does nothing."
    x = torch.randn(1, 4, 16, 16)
    sampler = DDIMSampler(lambda x, t, cond: x, get_schedule('scaled_linear'), 'eps', 'leading')
    runs = {'sbldm_nb': lambda: sampler.sample(noise=x, steps=steps)}
    def peer(scheduler):
        scheduler.set_timesteps(steps)
        def run():
            y = x
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    y = scheduler.step(y, t, y)
                    y = y[0] if isinstance(y, tuple) else y.prev_sample
        return run
    try:
        from diffusers import DDIMScheduler
        runs['diffusers'] = peer(DDIMScheduler(1000, clip_sample=False))
    except ImportError: pass
    try:
        from monai.networks.schedulers import DDIMScheduler
        runs['monai'] = peer(DDIMScheduler(1000, clip_sample=False))
    except ImportError: pass
    for run in runs.values(): run()
    times = {k: [] for k in runs}
    for _ in range(repeats):
        for k, run in runs.items(): times[k].append(timed(run) / steps * 1e6)
    return {k: dict(min=round(min(v), 1), median=round(statistics.median(v), 1)) for k, v in times.items()}


if __name__ == '__main__':
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(json.dumps(dict(torch=torch.__version__, ratio_to_forwards=[sampling_ratio(*k, repeats) for k in ((DDIMSampler, 15), (DDPMSampler, 15), (HeunSampler, 8))],
                          microseconds_a_step=step_cost(4 * repeats)), indent=1))
