"The demo as a user runs it: its own process, stopped by SIGKILL, run again."
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sbldm_nb.cohort import Cohort
from sbldm_nb.data import read_image
from sbldm_nb.datasets import SliceDataset, loaders
from sbldm_nb.kaggle_e2e import get_slices, slices_config
from sbldm_nb.ldm import LatentDiffusion, SlicePosition
from sbldm_nb.losses import VAELoss
from sbldm_nb.recipes import VAETraining
from sbldm_nb.schedules import get_schedule
from sbldm_nb.training import Trainer
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, LatentCache, LatentSpace


def start(out, *more):
    "The console script's function in a process of its own."
    code = 'import sys; from sbldm_nb.kaggle_e2e import demo; demo()'
    script = out.parent / 'run_demo.py'
    script.write_text(code)
    return subprocess.Popen([sys.executable, '-u', script, '--preset', 'smoke', '--out', out, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_demo_survives_a_kill_and_leaves_what_it_promises(tmp_path):
    out = tmp_path / 'demo'
    first = start(out)
    for line in first.stdout:
        if '[diffusion]' in line and 'steps in' in line: break
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and (out / 'autoencoder' / 'checkpoints').is_dir()
    weights = [(p, p.stat().st_mtime_ns) for p in (out / 'autoencoder').rglob('*.safetensors')]
    second = start(out)
    text = second.communicate(timeout=500)[0]
    assert second.returncode == 0, text
    assert '[autoencoder] resumed' in text and 'left)' in text and str(out / 'report.html') in text.splitlines()[-1]
    assert weights == [(p, p.stat().st_mtime_ns) for p in (out / 'autoencoder').rglob('*.safetensors')]
    page = (out / 'report.html').read_text()
    assert page.count('data:image/png') == 2 and 'SIMULATED' in page and '<script' not in page
    numbers = json.loads((out / 'metrics.json').read_text())
    assert {'quality', 'autoencoder', 'memorisation', 'stages', 'versions', 'total_cpu_s', 'peak_memory_mib'} <= set(numbers)
    samples = sorted((out / 'samples').glob('*.nii.gz'))
    assert len(samples) == slices_config('smoke').sampling.samples == len(list((out / 'samples').glob('*.png')))
    assert nib.load(samples[0]).header['descrip'].item().startswith(b'SIMULATED')
    other = start(out, '--folder', Cohort(24, seed=3, spacing=3.).write(tmp_path / 'others'), '--pattern', '*_t1.nii.gz')
    assert 'other people' in other.communicate(timeout=100)[0] and other.returncode == 1
    model = LatentDiffusion.from_pretrained(out / 'model')
    assert torch.isfinite(model.sample(1, positions=.1, steps=2, generator=torch.Generator().manual_seed(0))).all()


def test_demo_names_what_is_wrong_before_it_trains(tmp_path):
    run = start(tmp_path / 'demo', '--folder', tmp_path / 'nowhere')
    text = run.communicate(timeout=100)[0]
    assert run.returncode and 'nowhere: no such folder' in text.splitlines()[-1]
    mine = tmp_path / 'mine.yaml'
    mine.write_text('extends: smoke\nname: mine\nvae:\n  training: {epoch: 3}\n')
    for preset, why in (('debgu', "did you mean 'debug'"), ('inpainting', 'no preset of this story')):
        with pytest.raises(ValueError, match=why): slices_config(preset)
    run = start(tmp_path / 'demo', '--preset', mine)
    assert "did you mean 'epochs'" in run.communicate(timeout=100)[0].splitlines()[-1] and run.returncode == 1
    run = start(tmp_path / 'demo', '--dry_run')
    text = run.communicate(timeout=100)[0]
    assert run.returncode == 0 and 'nothing was written' in text and '48 embedded people' in text and not (tmp_path / 'demo').exists()
    with pytest.raises(ValueError, match='held-out slices'): get_slices(slices_config('smoke'), real_images()[0].parent, pattern='mni_icbm152_*.nii.gz')


def real_images():
    "Images that nobody here made: the ICBM152 T1 of nilearn, the EPI of nibabel."
    nilearn = Path(importlib.util.find_spec('nilearn').origin).parent / 'datasets' / 'data'
    return [nilearn / 'mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz', Path(nib.__file__).parent / 'tests' / 'data' / 'anatomical.nii']


def test_real_images_train_both_networks(tmp_path):
    paths = real_images()
    data = SliceDataset.from_nifti(paths, spacing=3., size=64, slices=16)
    assert data.images.shape == (32, 1, 64, 64) and float(data.images.max()) > .9
    for i, path in ((0, paths[0]), (16, paths[1])):
        assert np.linalg.norm(data.to_image(i).affine[:3, 3] - read_image(path).affine[:3, 3]) < 200
    torch.manual_seed(0)
    module = VAETraining(AutoencoderKL(dims=2, latent_channels=8, channels=(16, 32)), VAELoss())
    trainer = Trainer(module, *loaders(data, data, 4), tmp_path / 'vae', max_steps=60, warmup=5, ema=.9, log=None)
    space = LatentSpace.fit(trainer.fit().vae, data.images.split(16))
    losses = [row['loss'] for row in trainer.history if 'loss' in row]
    assert losses[-1] < .6 * losses[0]
    model = LatentDiffusion(space, UNet(dims=2, in_channels=8, channels=(16, 32), attention=(False, True), vector_dim=1), get_schedule('flow'), SlicePosition())
    cache = LatentCache(space, data)
    trainer = Trainer(model, *loaders(cache, cache, 8), tmp_path / 'ldm', max_steps=60, warmup=5, ema=.9, log=None)
    model = trainer.fit()
    losses = [row['loss'] for row in trainer.history if 'loss' in row]
    assert losses[-1] < .95 * losses[0]
    images = model.sample(2, positions=[0., .3], steps=4, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 64, 64) and torch.isfinite(images).all()
