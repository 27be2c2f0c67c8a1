"Preprocessing as it goes wrong: killed, resumed, shared between machines, fed damaged files; and what it must never write."
import contextlib
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from sbldm_nb.data import Cache, Intensity, foreground_box, prepare, preprocess, read_image, resample, spacing_of, write_image
from sbldm_nb.dicom import write_dicom
from sbldm_nb.files import pseudonym
from sbldm_nb.layouts import Case, Found

AFFINE = np.diag([-1.5, 1.5, 2, 1])


def head(seed, shape=(24, 28, 20)):
    "A ball of tissue in air, with noise that tells people apart."
    rng, (x, y, z) = np.random.default_rng(seed), np.indices(shape)
    inside = ((x - 12)/9)**2 + ((y - 13)/11)**2 + ((z - 10)/8)**2 < 1
    return nib.Nifti1Image(np.where(inside, 400 + 100*rng.random(shape), 0).astype(np.float32), AFFINE), inside


def write_brats(folder, n, names='BraTS-GLI-{:05}-000', shape=(24, 28, 20)):
    for i in range(n):
        img, inside = head(i, shape)
        for role in ('t1n', 't2f'): write_image(img, folder/names.format(i)/f'{names.format(i)}-{role}.nii.gz')
        seg = nib.Nifti1Image((inside & (np.indices(shape)[0] < 10)).astype(np.uint8)*3, AFFINE)
        write_image(seg, folder/names.format(i)/f'{names.format(i)}-seg.nii.gz')
    return folder


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module', autouse=True)
def own_key():
    "Pseudonyms under a key of these tests, which the processes they start inherit."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SBLDM_ID_KEY', 'a key for these tests only')
        yield


@pytest.fixture(scope='module')
def source(tmp_path_factory): return write_brats(tmp_path_factory.mktemp('source'), 6)


@pytest.fixture(scope='module')
def whole(source, tmp_path_factory):
    "What an undisturbed run leaves."
    out = tmp_path_factory.mktemp('whole')/'cache'
    report = preprocess(source, out, spacing=2.)
    assert (len(report.done), report.skipped, report.failed, report.exit_code) == (6, (), {}, 0)
    return out


# the numbers

def test_a_case_by_hand(source, whole):
    "Affine, box, line and numbers of one case, computed here from the file."
    cache, who = Cache(whole), 'BraTS-GLI-00002'
    case = next(c for c in cache.cases() if c['patient'] == pseudonym(who))
    img = read_image(source/f'{who}-000/{who}-000-t1n.nii.gz')
    line = Intensity.fit(np.asanyarray(img.dataobj))
    fine = resample(img, 2.)
    box = foreground_box(np.asanyarray(fine.dataobj))
    assert cache.intensity(case, 't1n') == line and cache.intensity(case, 'seg') is None
    assert tuple(case['roles']['t1n']['shape']) == tuple(s.stop - s.start for s in box)
    np.testing.assert_array_equal(cache.array(case, 't1n'), np.rint(line.encode(np.asanyarray(fine.dataobj)[box])*32767))
    corner = fine.affine @ [*(s.start for s in box), 1]
    for role in ('t1n', 't2f', 'seg'): np.testing.assert_allclose(np.array(case['roles'][role]['affine'])[:, 3], corner)
    image = cache.image(case, 't1n')
    np.testing.assert_allclose(image.get_fdata(), np.asanyarray(fine.dataobj)[box].clip(line.low, line.high), atol=(line.high - line.low)/2/32767*1.01)
    assert cache.array(case, 'seg').dtype == np.uint8 and set(np.unique(cache.array(case, 'seg'))) == {0, 3}
    assert cache.image(case, 'seg').get_data_dtype() == np.uint8


def test_sides_of_the_split_are_those_of_split_patients(source, whole):
    from sbldm_nb.data import split_patients
    expected = split_patients([f'BraTS-GLI-{i:05}' for i in range(6)])
    cache = Cache(whole)
    for part, patients in expected.items():
        assert cache.manifest['split'][part] == sorted(map(pseudonym, patients))
        assert {c['patient'] for c in cache.cases(part)} == set(map(pseudonym, patients))


def test_time_points_are_one_patient_and_a_given_split_is_kept(tmp_path):
    for who in ('a', 'b', 'c', 'd', 'e'):
        for visit in range(2): write_image(head(visit)[0], tmp_path/f'in/{who}{visit}.nii.gz')
    cases = tuple(Case(f'{w}{v}', w, {'image': tmp_path/f'in/{w}{v}.nii.gz'}, label='x', split='test' if w == 'e' else None) for w in 'abcde' for v in range(2))
    preprocess(Found('folder', tmp_path/'in', cases, ()), tmp_path/'out', workers=2)
    cache, sides = Cache(tmp_path/'out'), {}
    for c in cache.cases(): sides.setdefault(c['patient'], set()).add(c['split'])
    assert all(len(s) == 1 for s in sides.values()) and sides[pseudonym('e')] == {'test'} and len(sides) == 5
    assert sorted(c['case'] for c in cache.cases() if c['patient'] == pseudonym('a')) == [f'{pseudonym("a")}-{k}' for k in range(2)]


def test_one_spacing_and_size_with_an_axis_left_alone(source, tmp_path):
    preprocess(source, tmp_path/'out', spacing=(3, None, 1.), size=(16, None, 40), modality=['t1n', 'seg'], crop=False)
    cache = Cache(tmp_path/'out')
    for c in cache.cases():
        assert set(c['roles']) == {'t1n', 'seg'}
        np.testing.assert_allclose(spacing_of(cache.image(c, 't1n')), (3, 1.5, 1), rtol=1e-6)
        assert cache.array(c, 't1n').shape == cache.array(c, 'seg').shape == (16, 28, 40)
        assert cache.array(c, 't1n').min() == -32767               # what was filled in is background


def test_one_volume_of_a_series_is_a_role(tmp_path):
    series = np.stack([np.asanyarray(head(s)[0].dataobj)*(s + 1) for s in range(3)], -1)
    (tmp_path/'in').mkdir()
    nib.save(nib.Nifti1Image(series, AFFINE), tmp_path/'in/a.nii.gz')
    roles = {f'm{k}': tmp_path/'in/a.nii.gz' for k in range(3)}
    found = Found('decathlon', tmp_path/'in', (Case('a', 'a', roles, split='train', volumes={f'm{k}': k for k in range(3)}),), ())
    preprocess(found, tmp_path/'out', crop=False)
    cache = Cache(tmp_path/'out')
    for k in range(3):
        np.testing.assert_allclose(cache.image(cache.cases()[0], f'm{k}').get_fdata(), series[::-1, ..., k].clip(
            *(np.percentile(series[..., k][series[..., k] > 0], p) for p in (.5, 99.5))), atol=.1)


def test_a_role_that_a_case_lacks_is_told(tmp_path):
    source = write_brats(tmp_path/'in', 3)
    (source/'BraTS-GLI-00001-000/BraTS-GLI-00001-000-t2f.nii.gz').unlink()
    report = preprocess(source, tmp_path/'out', modality=['t1n', 't2f'])
    assert report.failed == {f'{pseudonym("BraTS-GLI-00001")}-0': 'has no t2f; it has seg, t1n'}


def test_rplhr_becomes_hounsfield(tmp_path):
    "RPLHR holds -1024..2048 HU as 0..1; thick and thin share the plane only."
    hu = np.random.default_rng(0).integers(-1024, 2048, (12, 12, 20)).astype(np.float32)
    for side, who in (('train', 'a'), ('val', 'b')):
        write_image(nib.Nifti1Image((hu + 1024)/3072, np.eye(4)), tmp_path/f'in/{side}/1mm/{who}.nii.gz')
        write_image(nib.Nifti1Image((hu[:, :, ::5] + 1024)/3072, np.diag([1, 1, 5, 1])), tmp_path/f'in/{side}/5mm/{who}.nii.gz')
    preprocess(tmp_path/'in', tmp_path/'out', intensity=Intensity('window', -1024, 2048))
    cache = Cache(tmp_path/'out')
    assert {c['split'] for c in cache.cases()} == {'train', 'valid'}
    for c in cache.cases():
        np.testing.assert_allclose(cache.image(c, 'thin').get_fdata(), hu, atol=.06)
        np.testing.assert_allclose(cache.image(c, 'thick').get_fdata(), hu[:, :, ::5], atol=.06)
    with pytest.raises(ValueError, match='share the plane only'): preprocess(tmp_path/'in', tmp_path/'other', spacing=1.)


def write_pair(path, seed=0):
    "Thin slices of 1 mm and thick ones of 5 mm over the same 40 mm, as DICOM in a zip."
    hu = np.random.default_rng(seed).integers(-100, 200, (20, 24, 40))
    hu[:4] = hu[:, :5] = -1000
    thin = nib.Nifti1Image(hu.astype(np.int16), np.diag([.8, .8, 1, 1]))
    thick = nib.Nifti1Image(hu.reshape(20, 24, 8, 5).mean(-1).round().astype(np.int16), thin.affine @ nib.affines.from_matvec(np.diag([1, 1, 5]), [0, 0, 2]))
    path.parent.mkdir(parents=True, exist_ok=True)
    return thick, thin, write_dicom({'1': thick, '2': thin}, path)


def test_thick_and_thin_dicom_keep_their_places(tmp_path):
    pairs = {who: write_pair(tmp_path/f'in/{who}.zip', seed) for seed, who in enumerate('abc')}
    report = preprocess(tmp_path/'in', tmp_path/'out', size=(16, 18, None))
    cache = Cache(tmp_path/'out')
    assert not report.failed and {tuple(sorted(c['roles'])) for c in cache.cases()} == {('thick', 'thin')}
    for who, (thick, thin, _) in pairs.items():
        case = next(c for c in cache.cases() if c['patient'] == pseudonym(who))
        for role, img in (('thick', thick), ('thin', thin)):
            ours = cache.image(case, role)
            assert ours.shape == (16, 18, img.shape[2]) and cache.intensity(case, role) == Intensity.window(40, 400)
            index = np.rint(nib.affines.apply_affine(np.linalg.solve(img.affine, ours.affine), np.argwhere(np.ones(ours.shape)))).astype(int)
            assert index.min() >= 0 and (index.max(0) < img.shape).all()
            expected = np.asanyarray(img.dataobj)[tuple(index.T)].clip(-160, 240)
            np.testing.assert_allclose(ours.get_fdata().ravel(), expected, atol=.0062)
            assert ours.header['descrip'].item() == b'SIMULATED'


def test_identities_in_dicom_zips_stay_there(tmp_path):
    "Names of the archive, of its members and in its tags; good, cut short, and with two series."
    import io
    import zipfile

    import pydicom
    for seed, who in enumerate(('Mustermann-1', 'Mustermann-2', 'Mustermann-3', 'Mustermann-4')):
        *_, path = write_pair(tmp_path/f'in/{who}.zip', seed)
        with zipfile.ZipFile(path) as z: members = {n: z.read(n) for n in z.namelist()}
        with zipfile.ZipFile(path, 'w') as z:
            for k, (name, raw) in enumerate(members.items()):
                ds = pydicom.dcmread(io.BytesIO(raw))
                ds.PatientName, ds.PatientID, ds.StudyDescription = 'Mustermann^Erika', '19640812', 'Mustermann'
                if seed == 1 and k == 3: ds.PixelData = ds.PixelData[:-40]
                if seed == 2 and k == 3: ds.SeriesInstanceUID = pydicom.uid.generate_uid()
                buffer = io.BytesIO()
                ds.save_as(buffer)
                z.writestr(f'{name.split("/")[0]}/Mustermann_{k:03}.dcm', buffer.getvalue())
    assert b'Mustermann^Erika' in (tmp_path/'in/Mustermann-1.zip').read_bytes()
    run = subprocess.run([sys.executable, '-c', RUN.replace('spacing=2.', 'size=(16, 18, None)'), tmp_path/'in', tmp_path/'out', '2'], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == '' and run.stdout.count('failed: ') == 2 and '2 cases done' in run.stdout
    everything = [run.stdout, *content(tmp_path/'out'), *(v.decode('latin-1') for v in content(tmp_path/'out').values())]
    for name in ('Mustermann', 'Erika', '1964', str(tmp_path/'in')):
        assert not [t for t in everything if name.lower() in t.lower()], name


def test_pictures_keep_their_range(tmp_path):
    from PIL import Image
    for side in ('train', 'val'):
        for who in 'ab':
            (tmp_path/'in'/side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12) + 100).save(tmp_path/f'in/{side}/{who}{side}_1.png')
    preprocess(tmp_path/'in', tmp_path/'out', size=16)
    cache = Cache(tmp_path/'out')
    for c in cache.cases():
        assert cache.array(c, 'image').shape == (16, 16, 1) and cache.intensity(c, 'image') == Intensity('window', 0., 255.)
        assert cache.image(c, 'image').get_fdata().max() == pytest.approx(219, abs=.01)


def test_the_simulated_mark_survives(tmp_path):
    img = head(0)[0]
    img.header['descrip'] = b'SIMULATED'
    write_image(img, tmp_path/'in/a.nii.gz')
    preprocess(Found('folder', tmp_path/'in', (Case('a', 'a', {'image': tmp_path/'in/a.nii.gz'}, split='train'),), ()), tmp_path/'out')
    cache = Cache(tmp_path/'out')
    assert cache.image(cache.cases()[0], 'image').header['descrip'].item() == b'SIMULATED'


# resuming and sharing

RUN = '''
import sys
from sbldm_nb.data import preprocess
report = preprocess(sys.argv[1], sys.argv[2], spacing=2., workers=int(sys.argv[3]), shard=sys.argv[4] if len(sys.argv) > 4 else None)
print(report)
sys.exit(report.exit_code)
'''


def start(*args, **kwargs):
    "A run in a process of its own; a script without `if __name__ == '__main__'`, which has to work."
    return subprocess.Popen([sys.executable, '-c', RUN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def children(pid):
    import psutil
    with contextlib.suppress(psutil.NoSuchProcess): return psutil.Process(pid).children(recursive=True)
    return []


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, 'waited in vain'
        time.sleep(.005)


@pytest.mark.parametrize('after', [0, 1, 4])
def test_a_killed_run_resumes_to_the_same_bytes(after, source, whole, tmp_path):
    "SIGKILL of the run after so many cases: nothing is half there, its worker ends by itself, the next run does only the rest."
    run, out = start(source, tmp_path/'out', 1), tmp_path/'out'
    wait_for(lambda: len(list(out.glob('p*/case.json'))) >= after and out.exists())
    workers = children(run.pid)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    wait_for(lambda: not any(w.is_running() and w.status() != 'zombie' for w in workers))
    kept = {p.parent.name for p in out.glob('p*/case.json')}
    for key in kept: assert {k: v for k, v in content(out/key).items()} == content(whole/key)
    assert not (out/'manifest.json').exists()
    report = preprocess(source, out, spacing=2.)
    assert set(report.skipped) == kept and len(report.done) == 6 - len(kept) and not report.failed
    assert content(out) == content(whole)


def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(source, whole, tmp_path):
    from sbldm_nb.data import _MACHINE, _partial
    out = tmp_path/'out'
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    gone = [out/f'.p1-0.{_MACHINE}-{dead.pid}.partial', out/'.p2-0.elsewhere-1.partial', out/'.manifest.json.0123456789ab.partial',
            out/f'.settings.json.{_MACHINE}-{dead.pid}-01234567.partial']
    stay = [_partial(out, 'p3-0'), out/'.p4-0.elsewhere-1.partial']
    for p in (gone[0], gone[1], *stay): (p/'x').mkdir(parents=True)
    for p in gone[2:]: p.write_text('half')
    for p in gone[1:3]: os.utime(p, (time.time() - 1e5,)*2)
    preprocess(source, out, spacing=2.)
    assert [p.exists() for p in (*gone, *stay)] == [False]*4 + [True]*2


def test_shards_at_the_same_time_make_the_whole(source, whole, tmp_path):
    runs = [start(source, tmp_path/'out', 1, f'{i}/3') for i in (1, 2, 3)]
    for run in runs: assert run.communicate()[1] == '' and run.returncode == 0
    assert content(tmp_path/'out') == content(whole)
    assert len(Cache(tmp_path/'out')) == 6


def test_one_shard_says_what_is_missing(source, tmp_path):
    report = preprocess(source, tmp_path/'out', spacing=2., shard='2/3')
    assert len(report.done) == 2 and Cache(tmp_path/'out').manifest['missing'] == 4


def test_the_number_of_workers_changes_nothing(source, whole, tmp_path):
    preprocess(source, tmp_path/'out', spacing=2., workers=3)
    assert content(tmp_path/'out') == content(whole)


def test_other_settings_another_key_and_a_nested_folder_are_refused(source, whole, tmp_path, monkeypatch):
    before = content(whole)
    for kwargs, what in ((dict(spacing=3.), 'spacing 2.0 there, 3.0 here'), (dict(spacing=2., seed=1), 'seed 42 there, 1 here'),
                         (dict(spacing=2., intensity=Intensity.window(0, 9)), 'intensity None there')):
        with pytest.raises(ValueError, match=what): preprocess(source, whole, **kwargs)
    with pytest.raises(ValueError, match='lies in the source folder'): preprocess(source, source/'cache')
    monkeypatch.setenv('SBLDM_ID_KEY', 'another key for another hospital')
    with pytest.raises(ValueError, match='key [0-9a-f]{8} there'): preprocess(source, whole, spacing=2.)
    assert content(whole) == before and not (source/'cache').exists()


@pytest.mark.parametrize('kwargs, what', [
    (dict(size=0), 'expected a size above 0'), (dict(size=(1, 2)), 'expected a size above 0'), (dict(size=(4., 4, 4)), 'expected a size above 0'),
    (dict(spacing=-1.), 'expected a spacing above 0'), (dict(spacing=float('nan')), 'expected a spacing above 0'), (dict(modality='t1'), "modality 't1' is unknown"),
    (dict(shard='0/2'), "expected shard 'i/n'"), (dict(shard='3/2'), "expected shard 'i/n'"), (dict(shard='half'), "expected shard 'i/n'"),
    (dict(workers=0), 'at least 1 worker'), (dict(time_limit=0), 'time limit above 0'), (dict(fractions=(.5, .1, .1)), 'sum to 1'), (dict(layout='bids'), 'layout')])
def test_wrong_requests_are_refused_before_anything_is_made(kwargs, what, source, tmp_path):
    with pytest.raises(ValueError, match=what): preprocess(source, tmp_path/'out', **kwargs)
    assert not (tmp_path/'out').exists()


def test_a_changed_source_is_done_again_and_a_touched_case_too(source, whole, tmp_path):
    mine = write_brats(tmp_path/'in', 3)
    first = preprocess(mine, tmp_path/'out')
    who = 'BraTS-GLI-00001-000'
    write_image(head(77)[0], mine/who/f'{who}-t1n.nii.gz')
    key = f'{pseudonym("BraTS-GLI-00001")}-0'
    old = np.array(Cache(tmp_path/'out').array(key, 't1n'))
    assert preprocess(mine, tmp_path/'out').done == (key,)
    new = Cache(tmp_path/'out').array(key, 't1n')
    assert new.shape != old.shape or (new != old).any()
    with open(tmp_path/'out'/key/'seg.npy', 'r+b') as f: f.truncate(200)
    assert preprocess(mine, tmp_path/'out').done == (key,)
    assert set(preprocess(mine, tmp_path/'out').skipped) == set(first.done)


def test_patients_who_come_later(tmp_path):
    "The others are not done again, and the manifest tells the split of all."
    preprocess(write_brats(tmp_path/'in', 4), tmp_path/'out')
    report = preprocess(write_brats(tmp_path/'in', 7), tmp_path/'out')          # written again: new times, so all are done
    assert len(report.done) == 7
    write_brats(tmp_path/'more', 9)
    for i in (7, 8): os.rename(tmp_path/f'more/BraTS-GLI-{i:05}-000', tmp_path/f'in/BraTS-GLI-{i:05}-000')
    report = preprocess(tmp_path/'in', tmp_path/'out')
    assert (len(report.done), len(report.skipped)) == (2, 7)
    preprocess(tmp_path/'in', tmp_path/'fresh')
    assert content(tmp_path/'out') == content(tmp_path/'fresh')


def test_a_patient_who_is_withdrawn_leaves_the_manifest_and_the_report_says_what_is_left(tmp_path):
    import shutil
    preprocess(write_brats(tmp_path/'in', 4), tmp_path/'out')
    shutil.rmtree(tmp_path/'in/BraTS-GLI-00001-000')
    report = preprocess(tmp_path/'in', tmp_path/'out')
    assert (len(report.skipped), report.strays) == (3, 1) and '1 older folder of cases that the source does not hold' in str(report)
    assert pseudonym('BraTS-GLI-00001') not in (tmp_path/'out/manifest.json').read_text()


def test_two_runs_that_begin_at_once_with_different_settings_never_mix(source, tmp_path):
    "However the race ends: who laid down the settings may finish, the other is refused, and the manifest holds one kind only."
    code = RUN.replace('spacing=2.', 'spacing=float(sys.argv[5])')
    runs = [subprocess.Popen([sys.executable, '-c', code, source, tmp_path/'out', '1', '1/1', s], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for s in '23']
    said = [run.communicate()[1] for run in runs]
    kept = json.loads((tmp_path/'out/settings.json').read_bytes())['spacing']
    for s, run, errors in zip((2., 3.), runs, said):
        if s != kept: assert run.returncode == 1 and 'made with other settings' in errors
    report = preprocess(source, tmp_path/'out', spacing=kept)
    assert not report.failed
    preprocess(source, tmp_path/'fresh', spacing=kept)
    assert content(tmp_path/'out') == content(tmp_path/'fresh')


def test_leftovers_inside_case_folders_go_but_nothing_behind_a_link(source, tmp_path):
    preprocess(source, tmp_path/'out')
    case = next((tmp_path/'out').glob('p*/case.json')).parent
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'out/link').symlink_to(tmp_path/'elsewhere')
    files = [case/'.case.json.0123456789ab.partial', tmp_path/'elsewhere/.x.0123456789ab.partial', tmp_path/'out/.odd.partial']
    for p in files:
        p.write_text('half')
        os.utime(p, (time.time() - 1e5,)*2)
    preprocess(source, tmp_path/'out')
    assert [p.exists() for p in files] == [False, True, False]


def test_numbers_of_numpy_are_numbers(source, tmp_path):
    kwargs = dict(spacing=np.float32(2), size=(np.int64(8), None, 9), seed=np.int64(42), fractions=np.array([.8, .1, .1]))
    preprocess(source, tmp_path/'out', **kwargs)
    assert preprocess(source, tmp_path/'out', spacing=2., size=(8, None, 9)).exit_code == 0


# failing cases

def test_failing_cases_are_told_and_the_others_kept(tmp_path):
    source = write_brats(tmp_path/'in', 6)

    def file(i, role): return source/f'BraTS-GLI-{i:05}-000'/f'BraTS-GLI-{i:05}-000-{role}.nii.gz'
    file(0, 't1n').write_bytes(file(0, 't1n').read_bytes()[:-50])
    nan = np.asanyarray(read_image(file(1, 't2f')).dataobj).copy()
    nan[:2] = np.nan
    nib.save(nib.Nifti1Image(nan, AFFINE), file(1, 't2f'))
    write_image(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), file(2, 'seg'))
    write_image(nib.Nifti1Image(np.full((24, 28, 20), .5, np.float32), AFFINE), file(3, 'seg'))
    write_image(nib.Nifti1Image(np.zeros((24, 28, 20), np.float32), AFFINE), file(4, 't1n'))
    report = preprocess(source, tmp_path/'out', workers=2)
    key = {i: f'{pseudonym(f"BraTS-GLI-{i:05}")}-0' for i in range(6)}
    causes = {key[0]: 't1n: not a readable NIfTI file', key[1]: 't2f: 1120 of 13440 voxels are NaN', key[2]: 'seg (4, 4, 4) and t1n (24, 28, 20) lie on different grids',
              key[3]: 'seg: labels are whole numbers from 0 to 255, got 0.5 to 0.5', key[4]: 't1n: no voxel above 0'}
    assert report.done == (key[5],) and report.exit_code == 1 and set(report.failed) == set(causes)
    for k, why in causes.items(): assert why in report.failed[k] and '\n' not in report.failed[k] and f'{k} failed: ' in str(report)
    cache = Cache(tmp_path/'out')
    assert len(cache) == 1 and cache.manifest['failed'] == report.failed and cache.manifest['missing'] == 0
    for i in range(5): write_brats_one(source, i)
    mended = preprocess(source, tmp_path/'out')
    assert len(mended.done) == 5 and mended.exit_code == 0 and Cache(tmp_path/'out').manifest['failed'] == {}
    preprocess(source, tmp_path/'fresh')
    assert content(tmp_path/'out') == content(tmp_path/'fresh')


def write_brats_one(folder, i):
    name = f'BraTS-GLI-{i:05}-000'
    img, inside = head(i)
    for role in ('t1n', 't2f'): write_image(img, folder/name/f'{name}-{role}.nii.gz')
    write_image(nib.Nifti1Image(inside.astype(np.uint8), AFFINE), folder/name/f'{name}-seg.nii.gz')


def test_a_case_that_takes_too_long_is_given_up(tmp_path):
    source = tmp_path/'in'
    for who in 'abc': write_image(head(ord(who))[0], source/f'{who}.nii')
    write_image(nib.Nifti1Image(np.random.default_rng(0).random((300, 300, 300)).astype(np.float32) + 1, np.eye(4)), source/'big.nii')
    cases = tuple(Case(p.name.split('.')[0], p.name.split('.')[0], {'image': p}, split='train') for p in sorted(source.iterdir()))
    report = preprocess(Found('folder', source, cases, ()), tmp_path/'out', spacing=.9, time_limit=4.)
    assert report.failed == {f'{pseudonym("big")}-0': 'not done within 4 s'} and len(report.done) == 3
    assert not list((tmp_path/'out').glob('.*'))


def test_a_worker_that_is_killed_costs_its_case_only(tmp_path):
    source = tmp_path/'in'
    for who in 'abc': write_image(head(ord(who))[0], source/f'{who}.nii')
    write_image(nib.Nifti1Image(np.random.default_rng(0).random((220, 220, 220)).astype(np.float32) + 1, np.eye(4)), source/'big.nii')
    cases = tuple(Case(p.name.split('.')[0], p.name.split('.')[0], {'image': p}, split='train') for p in sorted(source.iterdir()))
    (tmp_path/'found.pickle').write_bytes(pickle.dumps(Found('folder', source, cases, ())))
    code = 'import pickle, sys\nfrom sbldm_nb.data import preprocess\nprint(preprocess(pickle.load(open(sys.argv[1], "rb")), sys.argv[2], spacing=.9))'
    run = subprocess.Popen([sys.executable, '-c', code, tmp_path/'found.pickle', tmp_path/'out'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    hit = []

    def grown():
        hit[:] = [w for w in children(run.pid) if w.memory_info().rss > 3e8]
        return hit or run.poll() is not None
    wait_for(grown)
    hit[0].kill()
    text, errors = run.communicate()
    assert f'{pseudonym("big")}-0 failed: its process was killed by signal 9' in text and '3 cases done' in text and errors == ''
    assert not list((tmp_path/'out').glob('.*'))


def test_an_alarm_ends_a_worker_whose_parent_is_gone(tmp_path):
    "Nothing hangs for ever: the parent is killed while its worker is at a long case."
    write_image(nib.Nifti1Image(np.random.default_rng(0).random((160, 160, 160)).astype(np.float32) + 1, np.eye(4)), tmp_path/'in/big.nii')
    (tmp_path/'found.pickle').write_bytes(pickle.dumps(Found('folder', tmp_path/'in', (Case('big', 'big', {'image': tmp_path/'in/big.nii'}, split='train'),), ())))
    code = 'import pickle, sys\nfrom sbldm_nb.data import preprocess\npreprocess(pickle.load(open(sys.argv[1], "rb")), sys.argv[2], spacing=.3, time_limit=2.)'
    run = subprocess.Popen([sys.executable, '-c', code, tmp_path/'found.pickle', tmp_path/'out'])
    wait_for(lambda: any(w.memory_info().rss > 15e7 for w in children(run.pid)))
    workers = children(run.pid)
    run.kill()
    run.wait()
    wait_for(lambda: not any(w.is_running() and w.status() != 'zombie' for w in workers), 8)
    assert not list((tmp_path/'out').glob('p*'))


def test_a_disk_that_refuses_is_told_in_its_own_words(tmp_path):
    "The system refuses files beyond 100 kB, as a full disk would: the small cases are kept, of the large one nothing, and the reason is told."
    source = tmp_path/'in'
    for who in 'abc': write_image(head(ord(who))[0], source/f'train/{who}_0.nii')
    write_image(head(0, (40, 50, 60))[0], source/'val/big_0.nii')
    code = 'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n' + RUN.replace('spacing=2.', 'crop=False')
    run = subprocess.run([sys.executable, '-c', code, source, tmp_path/'out', '1'], capture_output=True, text=True)
    key = f'{pseudonym("big")}-0'
    assert run.returncode == 1 and run.stderr == '' and f'{key} failed: File too large' in run.stdout and '3 cases done' in run.stdout
    assert not (tmp_path/'out'/key).exists() and not list((tmp_path/'out').rglob('.*'))
    report = preprocess(source, tmp_path/'out', crop=False)
    assert (report.done, len(report.skipped)) == ((key,), 3)


# privacy

def test_a_label_of_one_patient_is_no_class_but_a_name(tmp_path):
    "Folders or tables may label each patient with a name; what several patients share is a class."
    cases = []
    for who, label in (('a', 'TLE'), ('b', 'TLE'), ('c', 'Mustermann'), ('d', 'Mueller')):
        for visit in range(2):
            write_image(head(visit)[0], tmp_path/f'in/{who}{visit}.nii.gz')
            cases.append(Case(f'{who}{visit}', who, {'image': tmp_path/f'in/{who}{visit}.nii.gz'}, label=label))
    preprocess(Found('folder', tmp_path/'in', tuple(cases), ()), tmp_path/'out')
    labels = {c['patient']: c['label'] for c in Cache(tmp_path/'out').cases()}
    assert labels == {pseudonym('a'): 'TLE', pseudonym('b'): 'TLE', pseudonym('c'): pseudonym('Mustermann'), pseudonym('d'): pseudonym('Mueller')}
    assert not [k for k, v in content(tmp_path/'out').items() if b'Mu' in v and k.endswith('.json')]


def planted(tmp_path):
    "BraTS files of one Erika Mustermann: her name in folders, files, headers; one file is damaged, one has no orientation."
    source = tmp_path/'in'
    for i in range(4):
        who = f'Mustermann-Erika-1964081{i}'
        img, inside = head(i)
        img.header['descrip'], img.header['db_name'] = b'Mustermann Erika', b'Mustermann'
        img.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'Mustermann Erika'))
        (source/who).mkdir(parents=True)
        if i == 2:
            img.set_sform(AFFINE, code=0)
            img.set_qform(AFFINE, code=0)
        nib.save(img, source/who/f'{who}-t1n.nii.gz')
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), img.affine, img.header), source/who/f'{who}-seg.nii.gz')
    bad = source/who/f'{who}-t1n.nii.gz'
    bad.write_bytes(bad.read_bytes()[:-30])
    return source


def test_an_identity_is_nowhere_in_what_is_written(tmp_path):
    source = planted(tmp_path)
    assert b'Mustermann' in gzip.decompress(next(source.rglob('*Erika-19640810-t1n*')).read_bytes())
    run = start(source, tmp_path/'out', 2)
    text, errors = run.communicate()
    report = preprocess(source, tmp_path/'out', spacing=2.)
    everything = [text, errors, str(report), repr(report), *content(tmp_path/'out'), *(v.decode('latin-1') for v in content(tmp_path/'out').values())]
    assert run.returncode == 1 and errors == '' and 'failed: t1n: not a readable NIfTI file' in text
    for name in ('Mustermann', 'Erika', '1964', str(source)):
        assert not [t for t in everything if name.lower() in t.lower()], name
    notes = [n for c in Cache(tmp_path/'out').cases() for n in c['notes']]
    assert 't1n: the header holds no orientation, so left and right are a guess' in notes


def test_refusals_name_the_folder_given_and_nothing_inside(tmp_path):
    source = planted(tmp_path)
    for kwargs in (dict(layout='rplhr'), dict(modality='flair'), dict(fractions=(1, 1, 1))):
        with pytest.raises(ValueError) as e: preprocess(source, tmp_path/'out', **kwargs)
        assert 'Muster' not in str(e.value) and 'Erika' not in str(e.value)


# reading the cache

def test_cache_refuses_what_is_damaged(whole, tmp_path):
    import shutil
    with pytest.raises(FileNotFoundError, match='no manifest.json'): Cache(tmp_path)
    for bad in (b'', b'{', b'[]', b'{}', b'{"cases": []}', b'{"cases": {"a": {}}}', b'{"cases": {"a": 3}}', b'\xff\xfe', b'[' * 10000):
        (tmp_path/'manifest.json').write_bytes(bad)
        with pytest.raises(ValueError, match='manifest.json: '): Cache(tmp_path)
    climbing = json.loads((whole/'manifest.json').read_bytes())
    case = next(iter(climbing['cases'].values()))
    climbing['cases'] = {'../x': case | {'case': '../x'}}
    (tmp_path/'manifest.json').write_text(json.dumps(climbing))
    with pytest.raises(ValueError, match='not a manifest'): Cache(tmp_path)

    shutil.copytree(whole, tmp_path/'copy')
    cache = Cache(tmp_path/'copy')
    key = cache.cases()[0]['case']
    path = tmp_path/'copy'/key/'t1n.npy'
    good = path.read_bytes()
    for bad in (b'', good[:100], good[:-1], b'x' + good[1:], good.replace(b'<i2', b'|O8')):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='t1n.npy: '): cache.array(key, 't1n')
    np.save(path, np.zeros((3, 3, 3), np.int16))
    with pytest.raises(ValueError, match='expected int16'): cache.array(key, 't1n')
    path.unlink()
    with pytest.raises(ValueError, match='missing'): cache.array(key, 't1n')
    with pytest.raises(ValueError, match="role 't1' is unknown"): cache.array(key, 't1')
    with pytest.raises(ValueError, match='case'): cache.array('p0-0', 't1n')
    with pytest.raises(ValueError, match="split 'val' is unknown"): cache.cases('val')


def test_cache_travels_as_a_path_and_maps_without_reading(whole):
    cache = Cache(whole)
    case = cache.cases()[0]
    patch = np.array(cache.array(case, 't1n')[2:5, 3:6, 4:7])
    text = pickle.dumps(cache)
    assert len(text) < 500
    np.testing.assert_array_equal(pickle.loads(text).array(case, 't1n')[2:5, 3:6, 4:7], patch)
    assert isinstance(cache.array(case, 't1n'), np.memmap) and cache.array(case, 't1n') is cache.array(case, 't1n')
    with pytest.raises(ValueError, match='read-only'): cache.array(case, 't1n')[0] = 0


def test_prepare_refuses_what_does_not_fit():
    img, inside = head(0)
    moved = nib.Nifti1Image(np.asanyarray(img.dataobj), img.affine @ nib.affines.from_matvec(np.eye(3), (1, 0, 0)))
    turned = nib.Nifti1Image(np.asanyarray(img.dataobj), nib.affines.from_matvec([[0, -1.5, 0], [1.5, 0, 0], [0, 0, 2]]))
    for other in (moved, turned):
        with pytest.raises(ValueError, match='t1n .* and t2f .* lie on different grids'): prepare({'t1n': img, 't2f': other})
    nearly = nib.Nifti1Image(np.asanyarray(img.dataobj), img.affine @ nib.affines.from_matvec(np.eye(3), (.01, 0, 0)))
    assert prepare({'t1n': img, 't2f': nearly})['t2f'][0].shape == prepare({'t1n': img})['t1n'][0].shape
