"""Quality beside MONAI at equal parameters: `python benchmarks/parity.py TASK [seconds] [seeds]`, TASK one of vae2d, vae2d_small, vae3d, unet3d; `tune TASK` tries learning rates.

Each pair of networks sees the same batches in the same order, has the same loss, optimiser, warm-up and average (EMA .99), and is trained for the same CPU seconds (evaluation not counted).
The curve of the average on held-out people is written down at fixed steps, so one run answers both questions: who is better after equally many steps, who after equal time.

- Data: 112 simulated people at 3 mm, (64, 64, 64) voxels; 96 to learn from, 16 held out. 2D: 12 axial slices of each. 3D: random patches of 32 voxels a side.
- Autoencoders: L1 + 1e-4 KL, 4 latent channels, 4x smaller; `vae2d_small` is a network of a seventh of the size, so that all sides make many steps; `plain` is ours without the folded stem. Scored by PSNR of the reconstruction from the mean (range 2), averaged over people; 3D on one fixed patch of each person, and at the end on 8 whole volumes.
- Denoisers: latents (4, 16, 16, 16) of one autoencoder for both, flow matching with logit-normal times. Scored by the loss on held-out people with fixed times and noise.

Learning rates: `tune` was run for MONAI's autoencoders with all three values and for ours with 3e-4 and 1e-3; the denoisers' was not tuned. One thread, bfloat16 autocast where the CPU has it. Results go to benchmarks/results/parity_TASK.json after every run; runs that are there are not repeated.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from monai.networks.nets import AutoencoderKL as MonaiAutoencoder
from monai.networks.nets import DiffusionModelUNet as MonaiUNet
from torch import Tensor

from sbldm_nb.cohort import Cohort
from sbldm_nb.files import cache_dir
from sbldm_nb.data import Intensity, read_image
from sbldm_nb.kaggle_e2e import cpu_name
from sbldm_nb.losses import DiffusionLoss, VAELoss
from sbldm_nb.schedules import get_schedule
from sbldm_nb.training import EMA, best_precision
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, Gaussian

RESULTS = Path(__file__).parent / 'results'
MARKS = [25, 50, 75, 100, 150, *range(200, 1000, 100), *range(1000, 20001, 200)]
BF16 = best_precision() == 'bf16'


class MonaiVAE(nn.Module):
    "MONAI's autoencoder behind our interface."
    def __init__(self, dims: int, channels: tuple, res_blocks: int, groups: int = 32):
        super().__init__()
        self.net = MonaiAutoencoder(dims, 1, 1, num_res_blocks=(res_blocks,) * len(channels), channels=channels, attention_levels=(False,) * len(channels), latent_channels=4,
                                    norm_num_groups=groups, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)

    def encode(self, x: Tensor) -> Gaussian:
        h = self.net.encoder(x)
        return Gaussian(self.net.quant_conv_mu(h).float(), self.net.quant_conv_log_sigma(h).float().clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor: return self.net.decode(z).float()

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple:
        gaussian = self.encode(x)
        return self.decode(gaussian.sample(generator)), gaussian


class MonaiDenoiser(nn.Module):
    "MONAI's UNet behind our interface."
    def __init__(self, channels: tuple):
        super().__init__()
        self.net = MonaiUNet(3, 4, 4, channels=channels, attention_levels=(False, False, True), num_head_channels=(0, 0, 32), num_res_blocks=2, norm_num_groups=32)

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor: return self.net(x, t).float()


def volumes() -> Tensor:
    "112 people (112, 1, 64, 64, 64) in [-1, 1]."
    def load(file):
        v = np.asanyarray(read_image(file).dataobj).astype(np.float32)
        return torch.from_numpy(Intensity.fit(v).encode(v))
    return torch.stack([load(f) for f in Cohort(112, spacing=3.).files()])[:, None].float()


def crop(x: Tensor, size: int, g: torch.Generator) -> Tensor:
    "The same random box of all images of a batch."
    start = [int(torch.randint(n - size + 1, (), generator=g)) for n in x.shape[2:]]
    return x[(..., *(slice(a, a + size) for a in start))]


def psnr(vae: nn.Module, x: Tensor) -> float:
    "Mean PSNR over images with a range of 2, from the mean of the latents."
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=BF16):
        error = [(vae.decode(vae.encode(b).mean).float() - b).square().flatten(1).mean(1) for b in x.split(4)]
    return float((10 * (4 / torch.cat(error)).log10()).mean())


class VAETask:
    "Reconstruction; higher is better."
    unit = 'dB'

    def __init__(self, dims: int):
        v = volumes()
        if dims == 2:
            v = v[..., 14:50:3].movedim(-1, 1)
            self.train, self.test, self.patch, self.batch = v[:96].flatten(0, 1), v[96:, ::3].flatten(0, 1), 64, 8
        else:
            g = torch.Generator().manual_seed(1)
            self.train, self.patch, self.batch = v[:96], 32, 2
            self.test, self.whole = torch.cat([crop(x, 32, g) for x in v[96:, None]]), v[96:104]
        self.objective = VAELoss(l1=1., l2=0., ssim=0., kl=1e-4)

    def loss(self, net: nn.Module, g: torch.Generator) -> Tensor:
        x = crop(self.train[torch.randint(len(self.train), (self.batch,), generator=g)], self.patch, g)
        with torch.autocast('cpu', torch.bfloat16, enabled=BF16): y, gaussian = net(x, g)
        return self.objective(y, x, gaussian)['loss']

    def score(self, net: nn.Module) -> float: return psnr(net, self.test)
    def final(self, net: nn.Module) -> dict: return dict(whole=psnr(net, self.whole)) if self.patch == 32 else {}


def latents() -> Tensor:
    "Normalised mean latents (112, 4, 16, 16, 16) of our autoencoder after 400 steps; made once."
    path = cache_dir() / 'parity' / 'latents.npy'
    if not path.exists():
        task, net = VAETask(3), build('vae3d', 'ours', 0)
        average = train(task, net, RATES['vae3d']['ours'], 0, steps=400)[0]
        with torch.no_grad(): z = torch.cat([average.encode(v).mean for v in volumes().split(4)])
        z = (z - z[:96].mean((0, 2, 3, 4), True)) / z[:96].std((0, 2, 3, 4), keepdim=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, z.numpy())
    return torch.from_numpy(np.load(path))


class DenoiserTask:
    "Flow matching on latents; lower is better."
    unit = 'loss'

    def __init__(self):
        z = latents()
        self.train, self.test, self.objective = z[:96], z[96:], DiffusionLoss(get_schedule('flow'), 'flow')

    def loss(self, net: nn.Module, g: torch.Generator) -> Tensor:
        z = self.train[torch.randint(96, (4,), generator=g)]
        if torch.rand((), generator=g) < .5: z = z.flip(2)
        with torch.autocast('cpu', torch.bfloat16, enabled=BF16): return self.objective(net, z, None, g)

    def score(self, net: nn.Module) -> float:
        g = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=BF16):
            return float(torch.stack([self.objective(net, z, None, g) for _ in range(4) for z in self.test.split(4)]).mean())

    def final(self, net: nn.Module) -> dict: return {}


TASKS = dict(vae2d=lambda: VAETask(2), vae2d_small=lambda: VAETask(2), vae3d=lambda: VAETask(3), unet3d=DenoiserTask)
NETWORKS = dict(
    vae2d=dict(ours=lambda: AutoencoderKL(2, 1, 4, (40, 80), res_blocks=2), monai=lambda: MonaiVAE(2, (32, 64, 64), 2)),
    vae2d_small=dict(ours=lambda: AutoencoderKL(2, 1, 4, (16, 32), res_blocks=2), monai=lambda: MonaiVAE(2, (16, 32, 32), 1, 16),
                     plain=lambda: AutoencoderKL(2, 1, 4, (16, 16, 24), res_blocks=2, stem_patch=1)),
    vae3d=dict(ours=lambda: AutoencoderKL(3, 1, 4, (32, 56), res_blocks=2), monai=lambda: MonaiVAE(3, (32, 64, 64), 1)),
    unet3d=dict(ours=lambda: UNet(3, 4, channels=(32, 64, 208), res_blocks=2), monai=lambda: MonaiDenoiser((32, 64, 128))))
RATES = dict(vae2d=dict(ours=1e-3, monai=1e-3), vae2d_small=dict(ours=1e-3, monai=1e-3, plain=1e-3), vae3d=dict(ours=1e-3, monai=1e-3), unet3d=dict(ours=1e-3, monai=1e-3))


def build(task: str, name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[task][name]()


def train(task, net: nn.Module, rate: float, seed: int, seconds: float = float('inf'), steps: int = 10**9) -> tuple:
    "Train for CPU seconds or steps; the average, and rows of step, CPU seconds and score."
    g, average, rows, used, step = torch.Generator().manual_seed(seed), EMA(net, .99), [], 0., 0
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(.9, .99), weight_decay=1e-3, fused=True)
    while used < seconds and step < steps:
        start = time.process_time()
        optimizer.param_groups[0]['lr'] = rate * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        task.loss(net, g).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        average.update()
        step, used = step + 1, used + time.process_time() - start
        if step in MARKS or used >= seconds or step == steps:
            rows.append(dict(step=step, seconds=round(used, 1), score=round(task.score(average.module), 4)))
    return average.module, rows


def parameters(net: nn.Module) -> int: return sum(p.numel() for p in net.parameters())


def tune(name: str, seconds: float):
    "Print the score of each learning rate."
    task = TASKS[name]()
    for which in NETWORKS[name]:
        for rate in (3e-4, 1e-3, 3e-3):
            net = build(name, which, 9)
            print(name, which, parameters(net), rate, train(task, net, rate, 9, seconds)[1][-1], flush=True)


def run(name: str, seconds: float, seeds: int):
    "Train the missing runs of a task and keep its file up to date."
    path, task = RESULTS / f'parity_{name}.json', TASKS[name]()
    about = dict(task=name, unit=task.unit, seconds=seconds, torch=torch.__version__, cpu=cpu_name(), precision='bf16' if BF16 else 'fp32', rates=RATES[name])
    done = json.loads(path.read_text())['runs'] if path.exists() else []
    for seed in range(seeds):
        for which in NETWORKS[name]:
            if any((r['network'], r['seed']) == (which, seed) for r in done): continue
            net = build(name, which, seed)
            average, rows = train(task, net, RATES[name][which], seed, seconds)
            done.append(dict(network=which, seed=seed, parameters=parameters(net), curve=rows, **task.final(average)))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(dict(about, runs=done), indent=1) + '\n')
            print(name, which, seed, rows[-1], task.final(average), flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1] == 'tune': tune(sys.argv[2], float(sys.argv[3]))
    else: run(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
