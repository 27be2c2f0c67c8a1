"Latent caches and fingerprints in other processes, killed processes, and what the page has no room for."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from sbldm_nb.vae import AUTOENCODERS, AutoencoderKL, ChannelStats, LatentCache, LatentSpace, MappedTable, fingerprint

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
    cache.save(tmp_path / 'c')
    out = python(f'''
cache = LatentCache.load({str(tmp_path / "c")!r}, space)
cache.set_epoch(3)
print(fingerprint(vae), cache[5]['latent'].double().sum().item())
''')
    cache.set_epoch(3)
    name, total = out.split()
    assert name == fingerprint(made['vae'])
    assert float(total) == cache[5]['latent'].double().sum().item()


def test_a_killed_save_leaves_a_whole_folder_or_none(made, tmp_path):
    path = tmp_path / 'c'
    loop = MAKE + f'''
cache = LatentCache(space, items)
cache.table = {{k: v.repeat(400, 0) for k, v in cache.table.items()}}
print('ready', flush=True)
while True: cache.save({str(path)!r})
'''
    seen = 0
    for wait in (.02, .3, .31, .32, .33):
        p = subprocess.Popen([sys.executable, '-c', loop], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == 'ready\n'
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
        if path.exists():
            seen += 1
            table = MappedTable(path)
            assert {len(v) for v in table.values()} == {4800} and np.isfinite(table['logvar']).all()
    assert seen


def test_a_killed_encoding_leaves_nothing_at_its_place(made, tmp_path):
    loop = MAKE + f'''
import os, signal
class Items(list):
    def __getitem__(self, i):
        if i == 9: os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)
LatentCache(space, Items(items), batch_size=2, path={str(tmp_path / "c")!r})
'''
    assert subprocess.run([sys.executable, '-c', loop]).returncode == -signal.SIGKILL
    assert not (tmp_path / 'c').exists()
    assert all(p.name.startswith('.c.') for p in tmp_path.iterdir())


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(made, tmp_path):
    for end in ('part', 'old'):
        (tmp_path / f'.c.{os.getpid()}.{end}').mkdir()
        (tmp_path / f'.c.{os.getpid()}.{end}' / 'mean.npy').write_text('half')
    LatentCache(made['space'], made['items'], path=tmp_path / 'c')
    assert [p.name for p in tmp_path.iterdir()] == ['c']


def test_encoding_to_a_path_holds_one_batch(made, tmp_path):
    "When the last item is asked for, all earlier batches are already on disk."
    sizes = []
    class Items(list):
        def __getitem__(self, i):
            sizes.extend(p.stat().st_size for p in tmp_path.glob('.c.*.part/mean.npy'))
            return super().__getitem__(i)
    images = [dict(image=torch.randn(1, 200, 180)) for _ in range(6)]
    LatentCache(made['space'], Items(images), batch_size=1, path=tmp_path / 'c')
    row = 2 * 4 * 50 * 45 * 4
    assert max(sizes) > 4 * row and sizes == sorted(sizes)
    assert (tmp_path / 'c' / 'mean.npy').stat().st_size == 6 * row + 128


def test_a_full_disk_leaves_nothing_behind(made, tmp_path):
    cache = LatentCache(made['space'], made['items'])
    cache.save(tmp_path / 'c')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'c').iterdir()}
    code = f'''
import resource
cache = LatentCache(space, items)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for write in (lambda: cache.save({str(tmp_path / "c")!r}), lambda: LatentCache(space, items, path={str(tmp_path / "c")!r})):
    try: write()
    except OSError as e: print(type(e).__name__)
'''
    assert python(code) == 'OSError\nOSError'
    assert [p.name for p in tmp_path.iterdir()] == ['c']
    assert {p.name: p.read_bytes() for p in (tmp_path / 'c').iterdir()} == before


def test_a_cache_is_replaced_and_other_folders_are_not(made, tmp_path):
    LatentCache(made['space'], made['items'][:4], path=tmp_path / 'c')
    LatentCache(made['space'], made['items'], path=tmp_path / 'c')
    loaded = LatentCache.load(tmp_path / 'c', made['space'])
    loaded.save(tmp_path / 'c')
    assert len(loaded) == len(LatentCache.load(tmp_path / 'c', made['space'])) == 12
    assert [p.name for p in tmp_path.iterdir()] == ['c']
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'scan').write_text('dear')
    (tmp_path / 'file').write_text('dear')
    for name in ('data', 'file'):
        with pytest.raises(FileExistsError, match='no latent cache'): loaded.save(tmp_path / name)
    assert (tmp_path / 'data' / 'scan').read_text() == (tmp_path / 'file').read_text() == 'dear'


def test_spawned_workers_open_the_path_and_see_the_epoch(made, tmp_path):
    cache = LatentCache(made['space'], made['items'], seed=1, path=tmp_path / 'c')
    loader = DataLoader(cache, 4, num_workers=1, persistent_workers=True, multiprocessing_context='spawn')
    for epoch in range(2):
        cache.set_epoch(epoch)
        assert torch.equal(torch.cat([b['latent'] for b in loader]), torch.stack([cache[i]['latent'] for i in range(12)]))


def test_persistent_workers_see_the_epoch(made):
    cache = LatentCache(made['space'], made['items'], seed=1)
    loader = DataLoader(cache, 4, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        cache.set_epoch(epoch)
        assert torch.equal(torch.cat([b['latent'] for b in loader]), torch.stack([cache[i]['latent'] for i in range(12)]))


def test_mapped_table_refuses_other_folders(made, tmp_path):
    (tmp_path / 'text').write_text('not a cache at all')
    with pytest.raises(FileNotFoundError, match='text is not there where the folder'): MappedTable(tmp_path / 'text')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty cannot be read'): MappedTable(tmp_path / 'empty')
    for name, words in (('broken', '{"vae"'), ('list', '[]'), ('number', '3'), ('bare', '{}'), ('less', '{"vae": "", "seed": 0, "shapes": {"mean": [1]}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'cache.json').write_text(words)
        with pytest.raises(ValueError, match=f'{name} (cannot be read|holds)'): MappedTable(tmp_path / name)


def test_mapped_table_executes_nothing_and_notices_every_change(made, tmp_path):
    path = tmp_path / 'c'
    LatentCache(made['space'], made['items'], path=path)
    good = (path / 'position.npy').read_bytes()
    for bad in (b'', good[:40], good[:-1], b'junk' + good[4:], good.replace(b'(12,)', b'(11,)')):
        (path / 'position.npy').write_bytes(bad)
        with pytest.raises(ValueError, match='c (cannot be read|holds)'): MappedTable(path)
    np.save(path / 'position.npy', np.array([print] * 12, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match='c cannot be read'): MappedTable(path)
    (path / 'position.npy').write_bytes(good)
    np.save(path / 'more.npy', np.zeros(12))
    with pytest.raises(ValueError, match='c holds .*more'): MappedTable(path)


def test_cache_without_flips_and_in_3d():
    torch.manual_seed(0)
    vae = AutoencoderKL(dims=3, channels=(8, 8))
    items = [dict(image=torch.randn(1, 9, 8, 7), position=torch.tensor(0.), subject=torch.tensor(0), label=torch.tensor(i)) for i in range(3)]
    cache = LatentCache(LatentSpace(vae), items, flips=False)
    assert cache.table['mean'].shape == (3, 1, 4, 3, 2, 2)
    assert cache[2]['latent'].shape == (4, 3, 2, 2) and cache[2]['label'] == 2


def test_encoding_leaves_the_global_generator_alone(made):
    before = torch.get_rng_state()
    LatentCache(made['space'], made['items'])[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_items_of_two_kinds_leave_a_whole_cache_in_place(made, tmp_path):
    "An entry whose type or length changes, or that is missing, would be read back as something else."
    path, image = tmp_path / 'c', torch.randn(1, 20, 18)
    LatentCache(made['space'], made['items'], path=path)
    for first, second in ((dict(v=3), dict(v=3.5)), (dict(v=torch.zeros(2)), dict(v=torch.zeros(3))), (dict(v=1.), {}), ({}, dict(v=1.))):
        items = [dict(image=image, **entry) for entry in (first, second)]
        with pytest.raises(ValueError, match='v is .* after|rows of each entry'): LatentCache(made['space'], items, batch_size=1, path=path)
    assert len(LatentCache.load(path, made['space'])) == 12
    assert [p.name for p in tmp_path.iterdir()] == ['c']


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
    assert sum(p.numel() for p in vae.parameters()) == 294_332
    x = torch.randn(2, 1, 30, 33)
    with torch.autocast('cpu', torch.bfloat16): y, g = vae(x)
    assert y.dtype == g.mean.dtype == g.logvar.dtype == torch.float32
    ((y - x).square().mean() + g.logvar.exp().mean()).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())


def test_an_old_config_means_the_same_layout():
    "A model saved before dropout, groups and attention could be chosen has a config without them and one number of blocks."
    old = dict(dims=2, in_channels=1, latent_channels=4, channels=[8, 16], strides=[[2, 2]], res_blocks=1, stem_patch=[2, 2])
    new = AutoencoderKL(**old).config
    assert {**new, 'res_blocks': 1} == {**old, 'attention': False, 'attention_levels': None, 'groups': 8, 'dropout': 0.}


@pytest.mark.parametrize('name', AUTOENCODERS)
def test_presets_survive_json_and_keep_any_size(name):
    with torch.device('meta'):
        vae = AutoencoderKL(**json.loads(json.dumps(AUTOENCODERS[name])))
        again = AutoencoderKL(**json.loads(json.dumps(vae.config)))
    assert again.config == vae.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in vae.state_dict().items()}
    x = torch.zeros(1, 1, *(61, 47, 155)[:vae.config['dims']], device='meta')
    assert vae(x)[0].shape == x.shape


def test_decoding_in_slabs_respects_bfloat16_autocast_and_ignores_float16():
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=(8, 16)).eval()
    for p in vae.parameters(): torch.nn.init.normal_(p, std=.1)
    z = torch.randn(1, 4, 5, 6, 4)
    with torch.no_grad():
        plain = vae.decode(z)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast('cpu', dtype): whole, parts = vae.decode(z), vae.decode(z, splits=4)
            assert whole.dtype == parts.dtype == torch.float32
            assert torch.equal(whole, plain) == (dtype == torch.float16)
            assert_close(parts, whole, rtol=0, atol=1e-5 if dtype == torch.float16 else .05 * plain.std().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_float16_autocast_on_a_gpu_changes_nothing(made):
    space = LatentSpace(AutoencoderKL(**made['vae'].config).cuda())
    x = torch.randn(2, 1, 20, 18, device='cuda')
    with torch.autocast('cuda', torch.float16): half = space.decode(space.encode(x))
    assert_close(half, space.decode(space.encode(x)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_volume_on_the_cpu_goes_through_a_network_on_the_gpu_in_slabs(made):
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=(16, 32), attention=True).eval()
    for p in vae.parameters(): torch.nn.init.normal_(p, std=.05)
    space, x = LatentSpace(vae), torch.randn(1, 1, 40, 33, 35)
    z = space.encode(x)
    y = space.decode(z, x.shape[2:])
    space.cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        there = space.encode(x, splits=4)
        assert there.device.type == 'cpu'
        assert_close(there, z, atol=1e-4, rtol=0)
        assert_close(space.decode(z, x.shape[2:], splits=4), y, atol=1e-4, rtol=0)
        assert_close(space.decode(z.cuda(), x.shape[2:]).cpu(), y, atol=1e-4, rtol=0)
