"Latent caches and fingerprints in other processes, killed processes, and what the page has no room for."
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from sbldm_nb.vae import AutoencoderKL, ChannelStats, LatentCache, LatentSpace, fingerprint, read_table

MAKE = '''
import torch
from sbldm_nb.vae import AutoencoderKL, LatentCache, LatentSpace, fingerprint
torch.manual_seed(0)
vae = AutoencoderKL(dims=2, latent_channels=4, channels=(8, 16))
items = [dict(image=torch.randn(1, 20, 18), position=torch.tensor(i / 10), subject=torch.tensor(i // 2)) for i in range(12)]
space = LatentSpace.fit(vae, [torch.stack([i['image'] for i in items])])
'''


@pytest.fixture(scope='module')
def made():
    names = {}
    exec(MAKE, names)
    return names


def python(code, **kwargs):
    return subprocess.run([sys.executable, '-c', MAKE + code], capture_output=True, text=True, check=True, **kwargs).stdout.strip()


def test_fingerprint_and_draws_are_the_same_in_another_process(made, tmp_path):
    cache = LatentCache(made['space'], made['items'], seed=7)
    cache.save(tmp_path / 'c.safetensors')
    out = python(f'''
cache = LatentCache.load({str(tmp_path / "c.safetensors")!r}, space)
cache.set_epoch(3)
print(fingerprint(vae), cache[5]['latent'].double().sum().item())
''')
    cache.set_epoch(3)
    name, total = out.split()
    assert name == fingerprint(made['vae'])
    assert float(total) == cache[5]['latent'].double().sum().item()


def test_a_killed_save_leaves_a_whole_file_or_none(made, tmp_path):
    path = tmp_path / 'c.safetensors'
    loop = MAKE + f'''
cache = LatentCache(space, items)
cache.table['mean'] = cache.table['mean'].repeat(400, 1, 1, 1, 1)
print('ready', flush=True)
while True: cache.save({str(path)!r})
'''
    for wait in (.02, .3):
        p = subprocess.Popen([sys.executable, '-c', loop], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == 'ready\n'
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
        if path.exists(): assert len(read_table(path)[0]['mean']) == 4800


def test_a_full_disk_leaves_nothing_behind(made, tmp_path):
    cache = LatentCache(made['space'], made['items'])
    cache.save(tmp_path / 'c.safetensors')
    before = (tmp_path / 'c.safetensors').read_bytes()
    code = f'''
import resource
cache = LatentCache(space, items)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try: cache.save({str(tmp_path / "c.safetensors")!r})
except Exception as e: print(type(e).__name__)
'''
    assert python(code)
    assert [p.name for p in tmp_path.iterdir()] == ['c.safetensors']
    assert (tmp_path / 'c.safetensors').read_bytes() == before


def test_persistent_workers_see_the_epoch(made):
    cache = LatentCache(made['space'], made['items'], seed=1)
    loader = DataLoader(cache, 4, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        cache.set_epoch(epoch)
        assert torch.equal(torch.cat([b['latent'] for b in loader]), torch.stack([cache[i]['latent'] for i in range(12)]))


def test_read_table_refuses_other_files(tmp_path):
    from safetensors.torch import save_file
    save_file(dict(weight=torch.zeros(2)), tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match='w.safetensors holds .*weight'): read_table(tmp_path / 'w.safetensors')
    (tmp_path / 'text').write_text('not a cache at all')
    with pytest.raises(ValueError, match='cannot be read'): read_table(tmp_path / 'text')


def test_cache_without_flips_and_in_3d():
    torch.manual_seed(0)
    vae = AutoencoderKL(dims=3, channels=(8, 8))
    items = [dict(image=torch.randn(1, 9, 8, 7), position=torch.tensor(0.), subject=torch.tensor(0), label=torch.tensor(i)) for i in range(3)]
    cache = LatentCache(LatentSpace(vae), items, flips=False)
    assert cache.table['mean'].shape == (3, 1, 4, 3, 2, 2)
    assert cache[2]['latent'].shape == (4, 3, 2, 2) and cache[2]['label'] == 2


def test_gradient_reaches_the_input_through_a_frozen_space(made):
    z = torch.randn(1, 4, 5, 5, requires_grad=True)
    made['space'].decode(z).square().mean().backward()
    assert z.grad.abs().max() > 0
    assert all(p.grad is None for p in made['vae'].parameters())


def test_stats_of_half_precision_batches():
    x = (torch.randn(64, 3, 50) * 3 + 100).bfloat16()
    stats = ChannelStats()
    for part in x.split(7): stats.update(part)
    assert_close(stats.var, x.double().var((0, 2), unbiased=False), rtol=1e-10, atol=0)


def test_bfloat16_training_step_has_finite_gradients():
    torch.manual_seed(0)
    vae = AutoencoderKL(dims=2, latent_channels=8, channels=(32, 64))
    assert sum(p.numel() for p in vae.parameters()) == 368_372
    x = torch.randn(2, 1, 30, 33)
    with torch.autocast('cpu', torch.bfloat16): y, g = vae(x)
    assert y.dtype == g.mean.dtype == g.logvar.dtype == torch.float32
    ((y - x).square().mean() + g.logvar.exp().mean()).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_float16_autocast_on_a_gpu_changes_nothing(made):
    space = LatentSpace(AutoencoderKL(**made['vae'].config).cuda())
    x = torch.randn(2, 1, 20, 18, device='cuda')
    with torch.autocast('cuda', torch.float16): half = space.decode(space.encode(x))
    assert_close(half, space.decode(space.encode(x)))
