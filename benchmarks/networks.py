"""The networks beside MONAI 1.6.1 at equal parameters and equal latent or grid size: `python benchmarks/networks.py [repeats]`.

| row | input | what runs |
|---|---|---|
| vae3d | 1 x 64^3 | MONAI AutoencoderKL (32, 64, 64), 4 latent channels, 4x, attention in the middle; forward and backward of the L1 loss |
| vae2d | 2 x 128^2 | the same in 2D, (64, 128, 128) |
| unet3d | 2 x (4, 16, 16, 16) | MONAI DiffusionModelUNet (64, 128, 256), 2 blocks a level, attention on the coarsest; forward and backward |
| sample3d | 1 x (4, 16, 16, 16) | the same two networks, forward only, under inference_mode |
| dit | 8^3, 12^3, 16^3 and 24^3 tokens | a pair of blocks of DiT3D-S (384 wide, 6 heads), windows of 4^3, every second shifted, against dense; forward and backward, and forward only |

Time: CPU seconds, one thread, the two networks in turn (A B A B), so that a busy neighbour meets both; minimum of each, and minimum and median of the ratio of neighbouring runs.
Memory: how far one forward and backward pass lifts the resident set of a fresh process above what the built network holds. All in float32. The table is printed and written to benchmarks/results/networks.json.
On a CUDA device the same rows run there, in float32, bfloat16 and float16, with the allocator's own peak, and then a training step of both networks of every preset; that goes to networks_cuda.json.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import json
import math
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
import torch.nn as nn

from sbldm_nb.dit3d import DiT3D
from sbldm_nb.kaggle_e2e import cpu_name
from sbldm_nb.presets import SYSTEMS, costs
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL

RESULTS = Path(__file__).parent / 'results'


def monai_vae(dims: int, channels: tuple) -> nn.Module:
    from monai.networks.nets import AutoencoderKL
    return AutoencoderKL(dims, 1, 1, num_res_blocks=(2,) * 3, channels=channels, attention_levels=(False,) * 3, latent_channels=4, norm_num_groups=32)


def monai_unet() -> nn.Module:
    from monai.networks.nets import DiffusionModelUNet
    return DiffusionModelUNet(3, 4, 4, channels=(64, 128, 256), attention_levels=(False, False, True), num_head_channels=(0, 0, 32), num_res_blocks=2, norm_num_groups=32)


ours_unet = lambda: UNet(3, 4, channels=(48, 128, 416), res_blocks=2)
NETWORKS = dict(vae3d=dict(ours=lambda: AutoencoderKL(3, 1, 4, (48, 80), attention=True), monai=lambda: monai_vae(3, (32, 64, 64))),
                vae2d=dict(ours=lambda: AutoencoderKL(2, 1, 4, (96, 144), res_blocks=2, attention=True), monai=lambda: monai_vae(2, (64, 128, 128))),
                unet3d=dict(ours=ours_unet, monai=monai_unet), sample3d=dict(ours=ours_unet, monai=monai_unet))
INPUTS = dict(vae3d=(1, 1, 64, 64, 64), vae2d=(2, 1, 128, 128), unet3d=(2, 4, 16, 16, 16), sample3d=(1, 4, 16, 16, 16))
WANTED = dict(vae3d=3.5, vae2d=1.8, unet3d=1.5, sample3d=1.4)


def build(row: str, name: str, device: str = 'cpu') -> tuple:
    "The network, and a call without arguments that does what the row measures."
    torch.manual_seed(0)
    net, x = NETWORKS[row][name]().to(device), torch.randn(INPUTS[row], device=device)
    if row == 'sample3d': net.eval()
    t = torch.full((len(x),), 500, device=device)
    def call():
        if row == 'sample3d':
            with torch.inference_mode(): return net(x, t)
        net.zero_grad()
        y = net(x)[0] if row.startswith('vae') else net(x, t)
        (y.float() - x).abs().mean().backward()
    return net, call


def seconds(f, device: str = 'cpu') -> float:
    "CPU seconds of one call; on a GPU, seconds."
    if device != 'cpu': torch.cuda.synchronize()
    clock = time.process_time if device == 'cpu' else time.perf_counter
    start = clock()
    f()
    if device != 'cpu': torch.cuda.synchronize()
    return clock() - start


def side_by_side(calls: dict, repeats: int, device: str = 'cpu') -> dict:
    "The two calls in turn: fastest of each, and the ratio of neighbours."
    for f in calls.values(): f()
    times = {k: [] for k in calls}
    for _ in range(repeats):
        for k, f in calls.items(): times[k].append(seconds(f, device))
    a, b = times.values()
    ratios = [y / x for x, y in zip(a, b)]
    return dict({f'{k}_ms': round(1000 * min(v), 2) for k, v in times.items()}, ratio_min=round(min(ratios), 2), ratio_median=round(statistics.median(ratios), 2))


def peak_of_process() -> float:
    "MiB: the largest resident set of this process (Linux; `ru_maxrss` would count what the parent held before it started this one)."
    return int(next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')).split()[1]) / 1024


def lifted(row: str, name: str) -> float:
    "MiB by which one call lifts this process, which must be fresh."
    net, call = build(row, name)
    before = psutil.Process().memory_info().rss
    call()
    return peak_of_process() - before / 2**20


def memory(row: str, name: str) -> float:
    "`lifted` in a process of its own."
    done = subprocess.run([sys.executable, __file__, '--lifted', row, name], capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]), 1)


def on_cpu(repeats: int) -> list:
    rows = []
    for row in NETWORKS:
        nets = {k: build(row, k) for k in ('ours', 'monai')}
        result = dict(row=row, wanted=WANTED[row], **{f'{k}_parameters': sum(p.numel() for p in net.parameters()) for k, (net, _) in nets.items()})
        result |= side_by_side({k: call for k, (_, call) in nets.items()}, repeats)
        result |= {f'{k}_mib': memory(row, k) for k in nets}
        result['memory_ratio'] = round(result['monai_mib'] / result['ours_mib'], 2)
        rows.append(result)
        print(json.dumps(result), flush=True)
    return rows


def cuda_peak(f) -> float:
    "MiB that one call allocates above what is there."
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def under(kind: torch.dtype, f):
    "The call under autocast to `kind`."
    def call():
        with nullcontext() if kind == torch.float32 else torch.autocast('cuda', kind): return f()
    return call


def on_cuda(repeats: int) -> list:
    rows = []
    for row in NETWORKS:
        nets = {k: build(row, k, 'cuda') for k in ('ours', 'monai')}
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            calls = {k: under(kind, call) for k, (_, call) in nets.items()}
            result = dict(row=row, wanted=WANTED[row], dtype=str(kind).split('.')[-1], **{f'{k}_parameters': sum(p.numel() for p in net.parameters()) for k, (net, _) in nets.items()})
            result |= side_by_side(calls, repeats, 'cuda') | {f'{k}_mib': cuda_peak(f) for k, f in calls.items()}
            rows.append(result | dict(memory_ratio=round(result['monai_mib'] / result['ours_mib'], 2)))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def presets_on_cuda(repeats: int) -> list:
    "Milliseconds and peak of one training step of every preset's two networks, beside the counted memory."
    rows = []
    for name, system in SYSTEMS.items():
        for (network, (shape, cost)), make in zip(costs(name).items(), (system.make_vae, system.make_denoiser)):
            net, x = make().to('cuda'), torch.randn(shape, device='cuda')
            optimizer, t = torch.optim.AdamW(net.parameters(), fused=True), torch.full((len(x),), 500, device='cuda')
            for kind in (torch.float32, torch.bfloat16, torch.float16):
                forward = under(kind, lambda: net(x)[0] if network.startswith('vae') else net(x, t))
                def step():
                    optimizer.zero_grad()
                    forward().float().square().mean().backward()
                    optimizer.step()
                step()
                rows.append(dict(preset=name, network=network, shape=shape, dtype=str(kind).split('.')[-1], ms=round(1000 * min(seconds(step, 'cuda') for _ in range(repeats)), 1),
                                 peak_gib=round(cuda_peak(step) / 1024, 2), counted_gib=round(cost.total / 2**30, 2)))
                print(json.dumps(rows[-1]), flush=True)
            del net, optimizer
            torch.cuda.empty_cache()
    return rows


def dit_rows(repeats: int, device: str = 'cpu') -> list:
    "Two blocks of DiT3D-S at growing grids, windows against dense."
    rows = []
    for n in (8, 12, 16, 24):
        torch.manual_seed(0)
        nets = dict(window=DiT3D((n,) * 3, 1, 4, depth=2), dense=DiT3D((n,) * 3, 1, 4, depth=2, window_size=None))
        x, t = torch.randn(1, 4, n, n, n, device=device), torch.tensor([500], device=device)
        def forward(net):
            with torch.inference_mode(): net(x, t)
        def both(net): net(x, t).square().mean().backward()
        for what, call in (('forward and backward', both), ('forward', forward)):
            calls = {k: (lambda net=net.to(device): call(net)) for k, net in nets.items()}
            rows.append(dict(tokens=n**3, what=what, **side_by_side(calls, repeats if n < 24 else max(2, repeats // 2), device)))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def exponents(rows: list) -> dict:
    "The power of the number of tokens with which the cost grows from the smallest to the largest grid."
    def power(what, kind):
        (a, first), (b, last) = ((r['tokens'], r[f'{kind}_ms']) for r in (lambda rs: (rs[0], rs[-1]))([r for r in rows if r['what'] == what]))
        return round(math.log(last / first) / math.log(b / a), 3)
    return {what: {kind: power(what, kind) for kind in ('window', 'dense')} for what in ('forward and backward', 'forward')}


def table(rows: list) -> str:
    "The rows for people."
    head = f'{"":9} {"":9} {"M parameters":>14} {"milliseconds":>16} {"ratio: median, min, wanted":>27} {"MiB":>13} {"ratio":>6}'
    line = lambda r: (f"{r['row']:9} {r.get('dtype', 'float32'):9} {r['ours_parameters'] / 1e6:6.2f} {r['monai_parameters'] / 1e6:7.2f} {r['ours_ms']:8.1f} {r['monai_ms']:7.1f} "
                      f"{r['ratio_median']:13.2f} {r['ratio_min']:5.2f} {r['wanted']:7} {r['ours_mib']:6.0f} {r['monai_mib']:6.0f} {r['memory_ratio']:6.2f}")
    return '\n'.join([head, *map(line, rows)])


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1:2] == ['--lifted']:
        print(lifted(*sys.argv[2:]))
        sys.exit()
    repeats, cuda = int(sys.argv[1]) if len(sys.argv) > 1 else 5, torch.cuda.is_available()
    about = dict(torch=torch.__version__, device=torch.cuda.get_device_name() if cuda else f'{cpu_name()}, one thread')
    networks, dit = on_cuda(repeats) if cuda else on_cpu(repeats), dit_rows(repeats, 'cuda' if cuda else 'cpu')
    result = dict(about, networks=networks, dit=dit, dit_exponents=exponents(dit), **(dict(presets=presets_on_cuda(repeats)) if cuda else {}))
    print(table(networks), result['dit_exponents'], sep='\n')
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ('networks_cuda.json' if cuda else 'networks.json')).write_text(json.dumps(result, indent=1) + '\n')
