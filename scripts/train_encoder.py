"""Train the encoder behind `sbldm_nb.metrics` on the tissue labels of simulated people.

    python scripts/train_encoder.py [--out sbldm_nb/assets/tissue_encoder.safetensors]

The people come from a population of their own (seed 7), so nobody of a demo, a page or a test is among them. Every second
axial slice from -36 to +54 mm; left-right flips, a little noise and gamma, so that features are not upset by what a
scanner changes. The loss is the cross entropy of background, CSF, grey and white matter. Fixed seed, one thread.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

from sbldm_nb import cohort
from sbldm_nb.data import Intensity, z_of_slices
from sbldm_nb.files import atomic_write
from sbldm_nb.encoder import TissueEncoder


def slices_and_labels(people: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Slices (people, L, 1, 64, 64) in [0, 1] and tissue labels (people, L, 64, 64)"
    images, labels = [], []
    for path in cohort.Cohort(people, seed=seed, spacing=3.).files():
        t1, tissue = (cohort.nib.load(p) for p in (path, path.with_name(path.name.replace('_t1', '_tissue'))))
        z = z_of_slices(t1)
        keep = np.flatnonzero((z > -36) & (z < 54))[::2]
        v = t1.get_fdata(dtype=np.float32)
        images.append((Intensity.fit(v).encode(v)[..., keep] + 1)/2)
        labels.append(np.asanyarray(tissue.dataobj)[..., keep])
    stack = lambda v, dtype: torch.from_numpy(np.stack(v).astype(dtype)).permute(0, 3, 1, 2)
    return stack(images, np.float32).unsqueeze(2), stack(labels, np.int64)


def batch(x: torch.Tensor, y: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Random slices with their labels, augmented"
    i = torch.randint(len(x), (size,))
    x, y = x[i], y[i]
    if torch.rand(()) < .5: x, y = x.flip(2), y.flip(1)
    x = x + .06*torch.rand(size, 1, 1, 1)*torch.randn_like(x)
    return x.clamp(1e-3, 1)**(.15*torch.randn(size, 1, 1, 1)).exp(), y


def dice(encoder: TissueEncoder, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    "Dice overlap of each tissue"
    with torch.inference_mode(): p = torch.cat([encoder.segment(b).argmax(1) for b in x.split(64)])
    return [round(float(2*((p == c) & (y == c)).sum()/((p == c).sum() + (y == c).sum())), 3) for c in range(4)]


def train(people=100, heldout=20, steps=400, size=16, lr=3e-3, seed=7) -> tuple[TissueEncoder, list[float]]:
    "The trained encoder and its Dice on people it has not seen"
    x, y = slices_and_labels(people + heldout, seed)
    xt, yt, xv, yv = x[:people].flatten(0, 1), y[:people].flatten(0, 1), x[people:].flatten(0, 1), y[people:].flatten(0, 1)
    torch.manual_seed(seed)
    encoder = TissueEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr, betas=(.9, .98))
    warm_cosine = lambda k: min(1, (k + 1)/30)*(.02 + .49*(1 + np.cos(np.pi*k/steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine)
    for k in range(steps):
        bx, by = batch(xt, yt, size)
        loss = F.cross_entropy(encoder.segment(bx), by)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if k % 100 == 99: print(f'step {k + 1}/{steps} loss {loss.item():.3f} CPU {time.process_time():.0f} s', flush=True)
    encoder.eval().calibrate(xt[torch.randperm(len(xt))[:1000]])
    return encoder, dice(encoder, xv, yv)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'sbldm_nb'/'assets'/'tissue_encoder.safetensors')
    out = parser.parse_args().out
    torch.set_num_threads(1)
    encoder, overlap = train()
    told = dict(trained_by='scripts/train_encoder.py', data='SIMULATED', cohort_version=str(cohort.VERSION), dice=json.dumps(overlap))
    atomic_write(out, save(encoder.state_dict(), told))
    print(f'{out}: {out.stat().st_size/1e6:.2f} MB, held-out Dice of background, CSF, GM, WM: {overlap}')
