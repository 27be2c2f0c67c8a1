"The embedded cohort with real files and real processes: threads, kills, concurrency, the asset's own recipe"
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from sbldm_nb.anatomy import GROUPS, load_template
from sbldm_nb.cohort import WRITERS, Cohort, make_subject
from sbldm_nb.ct import thick_slices
from sbldm_nb.data import read_image
from sbldm_nb.datasets import SliceDataset
from sbldm_nb.layouts import discover

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


def test_wrong_calls_claim_nothing(tmp_path):
    for n, layout in ((1, 'png'), (2, 'rplhr')):
        with pytest.raises(ValueError, match=f'the layout {layout} is split by people'): Cohort(n, spacing=6.).write(tmp_path/'new', layout)
    with pytest.raises(ValueError, match='seed of 0 or more'): Cohort(2, seed=-1, spacing=6.).write(tmp_path/'new')
    for wrong in (dict(n=2.5), dict(n=2, seed=.5), dict(n='3')):
        with pytest.raises(TypeError, match='integer'): Cohort(**wrong)
    assert not (tmp_path/'new').exists()
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='is a file'): Cohort(2, spacing=6.).write(tmp_path/'file')
    for damaged in (b'', b'{"n": ', b'\xff\xfe', b'[]'):
        (tmp_path/'cohort.json').write_bytes(damaged)
        with pytest.raises(ValueError, match='holds another cohort'): Cohort(2, spacing=6.).write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'file', 'cohort.json'}
    assert json.loads(json.dumps(Cohort(np.int64(2), np.int64(1)).to_dict()))['seed'] == 1


# every layout, there and back

SMALL = dict(n=3, seed=1, spacing=6., groups=('HC', 'TLE-L', 'TLE-R'))


@pytest.fixture(scope='module')
def trees(tmp_path_factory):
    "Layout -> folder, each written when it is first asked for"
    root, made = tmp_path_factory.mktemp('layouts'), {}
    def tree(layout):
        if layout not in made: made[layout] = Cohort(**SMALL).write(root/layout, layout)
        return made[layout]
    return tree


@pytest.fixture(scope='module')
def people(): return [[Cohort(**SMALL).subject(i, tumour) for i in range(3)] for tumour in (False, True)]


def image(data, like, first=0): return nib.Nifti1Image(data, like.affine @ nib.affines.from_matvec(np.eye(3), (0, 0, first)))


def truths(layout, well, ill):
    "Role -> image in the memory of this process, for what a case of the layout must hold"
    array = {k: np.asarray(getattr(ill, k).dataobj) for k in ('t1', 'mask')}
    if layout == 'nifti': return {r: getattr(well, r) for r in ('t1', 'tissue', 'hippocampus')}
    if layout == 'hc_tle': return dict(image=well.t1)
    if layout in ('brats', 'decathlon'): return ill.modalities | dict(seg=ill.tumour)
    if layout == 'dicom_ct': return dict(thick=thick_slices(well.ct(), 5.), thin=well.ct())
    if layout == 'rplhr':
        thick, thin = thick_slices(well.ct(), 5.), well.ct()
        return {r: image((np.asarray(i.dataobj)[:, :, s].clip(-1024, 2048) + 1024)/3072, i, s.start or 0) for r, i, s in (('thick', thick, np.s_[:]), ('thin', thin, np.s_[2:118]))}
    out = {'t1n': ill.t1, 't1n-healthy': ill.healthy, 'mask-unhealthy': ill.mask, 'seg': ill.tumour, 'growth': ill.growth, 'tissue': ill.tissue}
    for k in range(3):
        healthy = ill.healthy_mask(k)
        void = np.asarray(healthy.dataobj) | array['mask']
        out |= {f'mask-healthy-000{k}': healthy, f'mask-000{k}': image(void, ill.t1), f'voided-000{k}': image(array['t1']*(void == 0), ill.t1)}
    return out


@pytest.mark.parametrize('layout', [w for w in WRITERS if w not in ('png', 'latents')])
def test_every_layout_is_found_and_read_back_equal(layout, trees, people):
    found, cohort = discover(trees(layout)), Cohort(**SMALL)
    assert found.layout == dict(dicom_ct='ct_pairs').get(layout, layout) and len(found.cases) == len({c.patient for c in found.cases}) == 3
    for case in found.cases:
        i = next(i for i, s in enumerate(cohort.seeds) if str(s) in case.patient)
        expected = truths(layout, people[0][i], people[1][i])
        assert set(case.files) == set(expected)
        if layout in ('nifti', 'dicom_ct', 'hc_tle'): assert case.label == (cohort.groups[i] if layout != 'hc_tle' else ('HC', 'TLE', 'TLE')[i])
        for role, truth in expected.items():
            got = read_image(case.files[role], volume=case.volumes.get(role))
            np.testing.assert_allclose(got.affine, truth.affine, atol=1e-4, rtol=0, err_msg=role)
            np.testing.assert_allclose(got.get_fdata(), truth.get_fdata(), atol=1e-6 if layout == 'rplhr' else 0, rtol=0, err_msg=role)
    if layout == 'rplhr': assert sorted((c.split, c.patient) for c in found.cases) == sorted((part, i) for part, ids in cohort.split.items() for i in ids)


def test_pictures_and_latents_are_found_and_read_back_equal(trees, people):
    found, cohort = discover(trees('png')), Cohort(**SMALL)
    assert found.layout == 'folder' and len(found.cases) == 24 and {c.patient: c.split for c in found.cases}.keys() == set(cohort.ids)
    for i, person in enumerate(people[0]):
        t1 = person.t1.get_fdata()
        low, high = np.percentile(t1[t1 > 0], (.5, 99.5))
        mine = sorted((int(c.files['image'].stem.split('_z')[1]), read_image(c.files['image']).get_fdata()) for c in found.cases if c.patient == cohort.ids[i])
        assert len(mine) == 8
        for z, got in mine:
            k = round((z - person.t1.affine[2, 3])/6.)
            np.testing.assert_allclose(got[..., 0], ((t1[:, :, k] - low)/(high - low)).clip(0, 1)*255, atol=.51)
    found = discover(trees('latents'))
    assert [(c.patient, c.label) for c in found.cases] == list(zip(cohort.ids, ('HC', 'TLE', 'TLE')))
    for person, case in zip(people[0], found.cases):
        latent, tissue, t1 = np.load(case.files['latent']), person.tissue.get_fdata(), person.t1.get_fdata()
        assert latent.dtype == np.float32 and latent.shape == (4, 8, 8, 8)
        for at in np.ndindex(8, 8, 8):
            block = tuple(slice(4*a, 4*a + 4) for a in at)
            np.testing.assert_allclose(latent[(slice(None), *at)], [*((tissue[block] == k).mean() for k in (1, 2, 3)), t1[block].mean()/1000], atol=1e-6)


def voxels(folder, layout):
    "What a tree holds: bytes, and of DICOM, whose identifiers are new each time, values and places"
    files = content(folder)
    for case in discover(folder).cases if layout == 'dicom_ct' else ():
        for role, path in case.files.items(): files[f'{case.id}/{role}'] = hashlib.sha256((img := read_image(path)).get_fdata().tobytes() + img.affine.tobytes()).hexdigest()
    return {k: v for k, v in files.items() if not k.endswith('.zip')}


@pytest.fixture(scope='module')
def forks():
    "A process that forks one writer for each line it is sent, and says the writer's number"
    code = f'''import os, sys
from sbldm_nb.cohort import Cohort
for line in sys.stdin:
    layout, folder = line.strip().split(" ", 1)
    if not (pid := os.fork()):
        Cohort(**{SMALL!r}).write(folder, layout)
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
'''
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize('layout', WRITERS)
def test_killed_in_any_layout_it_is_completed(layout, trees, forks, tmp_path):
    expected, folder = voxels(trees(layout), layout), tmp_path/'tree'
    def data(): return [p for p in folder.rglob('*') if p.is_file() and not p.name.startswith('.') and p.name != 'cohort.json']
    whole = len([p for p in trees(layout).rglob('*') if p.is_file()]) - 1
    for _ in range(5):                              # until the kill comes before the end
        shutil.rmtree(folder, ignore_errors=True)
        forks.stdin.write(f'{layout} {folder}\n')
        forks.stdin.flush()
        pid = int(forks.stdout.readline())
        while not data(): time.sleep(.001)
        os.kill(pid, signal.SIGKILL)
        if 0 < len(data()) < whole: break
    done = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in data()}
    assert 0 < len(done) < whole
    Cohort(**SMALL).write(folder, layout)
    assert voxels(folder, layout) == expected
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in done} == done, 'what was there is left alone'


def test_files_say_that_they_are_simulated_and_nothing_of_the_machine(trees):
    secrets = [platform.node().encode(), str(Path.home()).encode(), str(trees('dicom_ct').parent).encode()]
    for p in (p for layout in WRITERS for p in trees(layout).rglob('*') if p.is_file()):
        raw = p.read_bytes()
        if p.suffix == '.gz':
            assert raw[3:8] == bytes(5), 'neither a name nor a time'
            raw = gzip.decompress(raw)
            assert nib.Nifti1Image.from_bytes(raw).header['descrip'].item() == b'SIMULATED'
        if p.suffix == '.zip':
            with zipfile.ZipFile(p) as z:
                assert {m.date_time for m in z.infolist()} == {(1980, 1, 1, 0, 0, 0)} and not any(m.extra or m.comment for m in z.infolist())
                datasets = [pydicom.dcmread(io.BytesIO(z.read(m))) for m in z.infolist()]
            assert {(d.SyntheticData, *d.ImageType[:2], d.ContentQualification, str(d.PatientName), d.PatientID) for d in datasets} == {('YES', 'DERIVED', 'SECONDARY', 'RESEARCH', 'SIMULATED', 'SIMULATED')}
            for e in (e for d in datasets for e in d.iterall()):
                if e.VR in ('DA', 'TM', 'DT', 'AE') or e.tag.is_private: assert not e.value
                if e.VR == 'UI' and e.value.startswith('2.25.'): assert uuid.UUID(int=int(e.value[5:])).version == 4, 'neither a network card nor a time'
            raw = b''.join(str(d).encode() for d in datasets)
        assert not any(s in raw for s in secrets if len(s) > 5)


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
