"The embedded cohort with real files and real processes: threads, kills, concurrency, the asset's own recipe"
import csv
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sbldm_nb.anatomy import GROUPS, load_template
from sbldm_nb.cohort import WRITERS, Cohort, make_subject
from sbldm_nb.datasets import SliceDataset

FILES = 'from sbldm_nb.cohort import Cohort; Cohort({n}, spacing=6., groups=("HC", "TLE-R")).files()'


def start(code: str, **env) -> subprocess.Popen:
    "A fresh Python process"
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)


def content(folder: Path) -> dict:
    "Path -> digest of everything visible below a folder"
    visible = [p for p in sorted(folder.rglob('*')) if p.is_file() and not any(s.startswith('.') for s in p.relative_to(folder).parts)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in visible}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv('SBLDM_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def test_same_bytes_with_any_number_of_threads():
    code = '''import hashlib, torch; from sbldm_nb.cohort import make_subject
torch.set_num_threads({n}); s = make_subject(11, 3., "TLE-L")
print(hashlib.sha256(b"".join(i.dataobj.tobytes() for i in (s.t1, s.tissue, s.hippocampus))).hexdigest())'''
    runs = [start(code.format(n=n), OMP_NUM_THREADS=str(n)) for n in (1, 2)]
    one, two = (p.communicate()[0] for p in runs)
    assert one == two and len(one) == 65


def test_killed_generation_continues(cache, tmp_path):
    n = 16
    whole = start(FILES.format(n=n), SBLDM_CACHE=str(tmp_path/'whole'))
    killed = start(FILES.format(n=n))
    while killed.poll() is None and len(list(cache.glob('cohort/*/sim-*'))) < 2: time.sleep(.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    folder, = cache.glob('cohort/*')
    done = {p: p.stat().st_mtime_ns for p in folder.glob('sim-*/*')}
    assert 2 <= len(list(folder.glob('sim-*'))) < n and not (folder/'participants.csv').exists()
    assert whole.wait() == 0 and start(FILES.format(n=n)).wait() == 0
    assert content(folder) == content(tmp_path/'whole'/'cohort'/folder.name)
    assert {p: p.stat().st_mtime_ns for p in done} == done, 'finished subjects are not made again'


def test_leftovers_of_a_killed_run_are_swept(cache):
    cohort = Cohort(2, spacing=6.)
    folder = cohort.files()[0].parents[1]
    for i, age in enumerate((3600, 0)):
        leftover = folder/cohort.ids[i]/f'.{i}.nii.gz.0123456789ab.partial'
        leftover.touch()
        os.utime(leftover, (time.time() - age,)*2)
    (folder/'participants.csv').unlink()
    cohort.files()
    assert [p.name for p in folder.rglob('.*.partial')] == ['.1.nii.gz.0123456789ab.partial']


def test_two_processes_make_one_cohort(cache):
    both = [start(FILES.format(n=6)) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    folder, = cache.glob('cohort/*')
    assert len(list(folder.glob('sim-*'))) == 6 and not list(folder.glob('.partial*'))


def test_second_call_reads(cache, monkeypatch):
    first = Cohort(3, spacing=6.).files()
    before = content(first[0].parents[1])
    monkeypatch.setattr('sbldm_nb.cohort.make_subject', None)
    assert Cohort(3, spacing=6.).files() == first and content(first[0].parents[1]) == before


def test_each_parameter_has_its_own_cache(cache):
    cohorts = [Cohort(2, spacing=6.), Cohort(3, spacing=6.), Cohort(2, seed=1, spacing=6.), Cohort(2, spacing=8.), Cohort(2, spacing=6., groups=GROUPS)]
    assert len({c.files()[0].parents[1] for c in cohorts}) == len(cohorts)


def test_files_are_whole_marked_and_readable(tmp_path):
    cohort = Cohort(4, seed=2, spacing=3., groups=('HC', 'TLE-L'))
    folder = cohort.write(tmp_path/'out')
    for i, name in enumerate(cohort.ids):
        s = cohort.subject(i)
        for kind, dtype in (('t1', np.int16), ('tissue', np.uint8), ('hippocampus', np.uint8)):
            img = nib.load(folder/name/f'{name}_{kind}.nii.gz')
            assert img.get_data_dtype() == dtype and nib.aff2axcodes(img.affine) == ('R', 'A', 'S')
            assert img.header['descrip'].item() == b'SIMULATED' and img.header.get_xyzt_units()[0] == 'mm'
            np.testing.assert_array_equal(np.asarray(img.dataobj), np.asarray(getattr(s, kind).dataobj))
            np.testing.assert_allclose(img.affine, s.t1.affine)
    with open(folder/'participants.csv') as f: rows = list(csv.DictReader(f))
    assert [(r['id'], r['group']) for r in rows] == list(zip(cohort.ids, ('HC', 'TLE-L')*2)) and rows[0]['note'].startswith('SIMULATED')
    data = SliceDataset.from_nifti(sorted(folder.glob('*/*_t1.nii.gz')), levels=(-10., 40.), spacing=3., size=64, slices=4)
    assert len(data) == 16 and data[0]['image'].shape == (1, 64, 64) and float(data[0]['image'].min()) == -1


def test_pictures_are_split_by_person_and_completed(tmp_path):
    cohort = Cohort(5, spacing=4.)
    folder = cohort.write(tmp_path/'pictures', layout='png')
    people = {side: {p.name[:10] for p in (folder/side).glob('*.png')} for side in ('train', 'val')}
    assert len(people['train']) == 4 and len(people['val']) == 1 and not people['train'] & people['val']
    before = content(folder)
    assert len(before) == 5*8 + 1
    next((folder/'train').glob('*.png')).unlink()
    assert content(cohort.write(folder, layout='png')) == before
    with pytest.raises(ValueError, match='another cohort'): cohort.write(folder)
    assert len(SliceDataset.from_pictures(folder, 'train', size=48)) == 32


def test_a_larger_cohort_contains_the_smaller_and_seeds_share_nobody():
    assert Cohort(3).ids == Cohort(5).ids[:3] and not set(Cohort(9).ids) & set(Cohort(9, seed=1).ids)
    a, b = Cohort(3, seed=1, spacing=6.).subject(2), make_subject(1_000_002, 6.)
    np.testing.assert_array_equal(a.t1.dataobj, b.t1.dataobj)


def test_a_seed_is_the_same_person_at_any_spacing():
    fine, coarse = (np.asarray(make_subject(5, s).tissue.dataobj) for s in (2., 6.))
    np.testing.assert_array_equal(fine[1::3, 1::3, 1::3], coarse)


@pytest.mark.parametrize('bad, words', [
    (lambda: make_subject(0, -1.), 'spacing'), (lambda: make_subject(0, 3., 'tle'), 'TLE-L'), (lambda: make_subject(-2), 'seed'),
    (lambda: Cohort(0), 'people'), (lambda: Cohort(2, groups=()), 'groups'), (lambda: Cohort(2, spacing=99), 'spacing'),
    (lambda: Cohort(2, seed=-1).subject(0), 'seed'), (lambda: Cohort(2).subject(2), 'person')])
def test_errors_say_what_was_wanted(bad, words):
    with pytest.raises(ValueError, match=words): bad()


def test_a_subject_is_fast_and_small():
    load_template(), make_subject(0, 3.)
    begin = time.process_time()
    for seed in range(5): make_subject(seed, 3.)
    assert (time.process_time() - begin)/5 < .4          # .08 s on the machine it was written on


def test_the_asset_is_what_its_script_bakes(tmp_path):
    pytest.importorskip('nilearn')
    script = Path(__file__).parents[1]/'scripts'/'bake_cohort.py'
    spec = importlib.util.spec_from_file_location('bake_cohort', script)
    bake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bake)
    shipped = script.parents[1]/'sbldm_nb'/'assets'/'icbm152_2mm.npz'
    assert shipped.stat().st_size < 900_000
    with np.load(bake.bake(tmp_path/'asset.npz')) as new, np.load(shipped) as old:
        assert new.files == old.files
        for k in old.files: assert np.abs(new[k].astype(int) - old[k]).max() <= 1, k
