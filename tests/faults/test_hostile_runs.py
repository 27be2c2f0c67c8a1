"""Hostile runs of `preprocess`: damaged cases among good ones, disks that are full or locked, kills, crowds, and caches that somebody touched.

Owed every time: what is bad is named in one sentence, the exit code says so, good cases stay, nothing is half written, nothing lies outside."""
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from faults.build import SHAPE, SLICES, VOXELS, archive, dataset, dicom, gz, inner, nifti, write, zeros_gz
from faults.harness import IDENTITY, Table, become_mortal, cache, judge, level, may_become_mortal, one_sentence, preprocess, private, put, snapshot

ENTRY = b'from sbldm_nb.cli import sbldm_preprocess\nsbldm_preprocess()\n'  # what the installed script holds


def person(here, name, raw=None, role='t1n', **more):
    "One case of a BraTS folder, its owner's name everywhere."
    write(here/name/f'{name}-{role}.nii.gz', gz(nifti(np.roll(VOXELS, sum(map(ord, name)))) if raw is None else raw))
    for other, content in more.items(): write(here/name/f'{name}-{other}.nii.gz', gz(content))

def people(here, n=3):
    for k in range(n): person(here, f'DOE-JANE-{k + 1:05d}-000')
    return here

def listen(): signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it, and its children would too

def command(source, out, ground, *more, start=listen):
    "The command line in a process of its own; its environment is the ground's."
    script = write(ground/'bin'/'sbldm_preprocess', ENTRY)
    env = {**os.environ, 'SBLDM_CACHE': str(ground/'home'), 'TMPDIR': str(ground/'tmp'), 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    return subprocess.Popen([sys.executable, script, source, out, *more], env=env, cwd=ground/'work', text=True, start_new_session=True, preexec_fn=start,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(process, source, out):
    "(exit code, what it printed), after the test that it names nobody."
    stdout, stderr = process.communicate(timeout=120)
    private(stdout + stderr, [source, out])
    return process.returncode, stdout, stderr

def whole(out, n=None):
    "Every case that is visible in a cache is whole, and nothing is half written; returns the cases."
    assert not [p for p in out.rglob('*') if 'partial' in p.name or p.name.endswith('.tmp')]
    cards = sorted(out.glob('*/case.json'))
    for card in cards:
        for role, r in json.loads(card.read_bytes())['roles'].items():
            data = np.load(card.parent/f'{role}.npy')
            assert list(data.shape) == r['shape'] and data.dtype.name == r['dtype']
    if n is not None: assert len(cards) == n
    return [c.parent.name for c in cards]

def nameless(out):
    "Nothing that was written, by name or by content, tells who was in it."
    for top, folders, files in os.walk(out):
        for name in folders + files: private(name)
        for name in files:
            with open(os.path.join(top, name), 'rb') as f: assert not IDENTITY.search(f.read().decode('latin-1')), name

def bytes_of(out): return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "(source, cache, its bytes) of an honest run in a process of its own."
    ground = level(tmp_path_factory.mktemp('made'))
    source, out = people(ground/'given'), ground/'out'
    code, stdout, stderr = finish(command(source, out, ground), source, out)
    assert code == 0, stderr
    return source, out, bytes_of(out), ground


# damaged cases among good ones

def hurt(data=VOXELS, **header): return nifti(data, **header)

BAD = {
    'cut': hurt()[:-60], 'no image': b'<html>JANE</html>', 'nan': hurt(np.where(VOXELS == 50, np.nan, VOXELS).astype(np.float32)),
    'singular': hurt(sform_code=1, qform_code=0, srow_x=[2, 0, 0, 0], srow_y=[2, 0, 0, 0], srow_z=[0, 0, 3, 0]),
    'huge': hurt(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), 'air': hurt(np.zeros(SHAPE, np.int16)), 'constant': hurt(np.full(SHAPE, 7, np.int16)),
    'negative': hurt(-VOXELS), 'volumes': hurt(np.stack([VOXELS]*3, 3)), 'complex': hurt(VOXELS.astype(np.complex64)), 'metres': hurt(xyzt_units=1),
}

def test_bad_cases_fail_and_good_ones_stay(ground):
    source, out = people(ground/'given'), ground/'out'
    for k, raw in enumerate(BAD.values()): person(source, f'DOE-JANE-{k + 100:05d}-000', raw)
    person(source, 'DOE-JANE-00200-000', t2w=hurt(np.ones((3, 3, 3), np.int16)))
    person(source, 'DOE-JANE-00201-000', seg=hurt(np.where(VOXELS > 50, 1.5, 0).astype(np.float32)))
    person(source, 'DOE-JANE-00202-000', seg=hurt(np.where(VOXELS > 50, 4000, 0).astype(np.int16)))
    name = 'DOE-JANE-00203-000'
    write(source/name/f'{name}-t1n.nii.gz', gz(hurt()) + zeros_gz(1024))
    before = {k: v for k, v in snapshot(ground).items() if not k.startswith('bin')}
    code, stdout, stderr = finish(command(source, out, ground), source, out)
    assert code == 1 and 'Traceback' not in stderr, stderr
    failures = [line for line in stdout.splitlines() if ' failed: ' in line]
    assert len(failures) == len(BAD) + 4, stdout
    for line in failures: one_sentence(line.partition(' failed: ')[2])
    whole(out, 3)
    nameless(out)
    manifest = json.loads((out/'manifest.json').read_bytes())
    assert len(manifest['cases']) == 3 and len(manifest['failed']) == len(failures)
    after = snapshot(ground)
    assert {k: v for k, v in after.items() if not k.startswith(('out', 'bin'))} == before


def test_bombs_do_not_fill_the_workers_memory(ground):
    source = people(ground/'given', 2)
    head = nifti(dim=[3, 1024, 1024, 1024, 1, 1, 1, 1], datatype=4, bitpix=16)[:352]
    write(source/'DOE-JANE-00009-000'/'DOE-JANE-00009-000-t1n.nii.gz', gz(head) + zeros_gz(2048))
    out = put(preprocess, source, ground, 60, options=dict(out=ground/'out'))
    assert not out.error, out.told
    assert out.value['exit_code'] == 1 and out.value['done'] == 2 and len(out.value['failed']) == 1
    assert out.grown_mb < 100 and out.largest_child_mb < 900, (out.grown_mb, out.largest_child_mb)
    private(out.told + out.value['text'])


def test_nothing_but_bad_cases(ground):
    source, out = ground/'given', ground/'out'
    for k, raw in enumerate([BAD['cut'], BAD['air'], BAD['nan']]): person(source, f'DOE-JANE-{k:05d}-000', raw)
    said = put(preprocess, source, ground, 60, options=dict(out=out))
    assert said.value and said.value['exit_code'] == 1 and said.value['done'] == 0, said
    whole(out, 0)
    nameless(out)


def test_archives_with_identities_in_every_name_and_tag(ground):
    "Pairs of thick and thin DICOM series in zips, one of them good: names of people in folders, files, members, tags and errors."
    source, out = ground/'given', ground/'out'
    def pair(**tags): return {f'DOE_JANE/{d}/{inner(k)}': dicom(dataset(k, series=int(d), **{'RescaleIntercept': 0., **tags})) for d in '12' for k in range(SLICES)}
    for k in range(3): archive(source/'DOE'/f'JANE_4711_{k}.zip', pair())
    archive(source/'DOE'/'JANE_gap.zip', {k: v for k, v in pair().items() if not k.endswith('003.dcm')})
    archive(source/'DOE'/'JANE_tag.zip', pair(RescaleSlope=b'DOE^JANE'))
    archive(source/'DOE'/'JANE_cut.zip', {k: v[:-50] for k, v in pair().items()})
    raw = archive(source/'DOE'/'JANE_slip.zip', {**pair(), '../../slipped_DOE.dcm': b'x'}).read_bytes()
    write(source/'DOE'/'JANE_half.zip', raw[:len(raw)//2])
    before = snapshot(ground/'given')
    said = put(preprocess, source, ground, 90, options=dict(out=out))
    assert said.value and said.value['exit_code'] == 1 and said.value['done'] == 3 and len(said.value['failed']) == 3, said
    for why in said.value['failed'].values(): one_sentence(why)
    private(said.told + said.value['text'])
    whole(out, 3)
    nameless(out)
    assert snapshot(ground/'given') == before and not list((ground/'tmp').iterdir())


def test_names_of_every_kind(ground):
    "Scripts, quotes, 200 bytes, a newline, bytes that are no text: read or left out, and none of them comes out."
    source, out = ground/'given', ground/'out'
    for name in ('Größe-DOE', 'пациент 🧠 DOE', "it's $(DOE) `x`; y", 'JANE'*50, 'DOE\nJANE'): person(source, name)
    odd = os.path.join(os.fsencode(source), b'DOE\xff')
    os.mkdir(odd)
    with open(os.path.join(odd, b'DOE\xff-t1n.nii.gz'), 'wb') as f: f.write(gz(nifti()))
    said = put(preprocess, source, ground, 60, options=dict(out=out))
    assert said.value and said.value['done'] >= 5, said
    private(said.told + said.value['text'])
    whole(out)
    nameless(out)


# a run that cannot begin

WRONG = {
    'no source': dict(given='nowhere'), 'empty source': dict(given='empty'), 'a file for a source': dict(given='file.txt'),
    'layout': dict(layout='brast'), 'modality': dict(modality='t9'), 'size of zero': dict(size=0), 'size below zero': dict(size=(8, -8, 8)), 'size that is a fraction': dict(size=1.5),
    'size of two': dict(size=(8, 8)), 'size of a word': dict(size='big'), 'spacing of zero': dict(spacing=0.), 'spacing below zero': dict(spacing=-1.), 'spacing nan': dict(spacing=float('nan')),
    'spacing infinite': dict(spacing=float('inf')), 'no workers': dict(workers=0), 'workers below zero': dict(workers=-3), 'shard 0/2': dict(shard='0/2'), 'shard 3/2': dict(shard='3/2'),
    'shard of words': dict(shard='all'), 'shard 1/0': dict(shard='1/0'), 'no time': dict(time_limit=0.), 'time nan': dict(time_limit=float('nan')),
    'fractions of two': dict(fractions=(.5, .5)), 'fractions that do not sum': dict(fractions=(.5, .1, .1)), 'fractions below zero': dict(fractions=(1.5, -.5, 0.)),
}

@pytest.mark.parametrize('what', WRONG)
def test_wrong_wishes_write_nothing(what, ground):
    options = dict(WRONG[what])
    people(ground/'given'/'good')
    (ground/'given'/'empty').mkdir()
    write(ground/'given'/'file.txt', b'DOE')
    before = snapshot(ground)
    said = put(preprocess, ground/'given'/options.pop('given', 'good'), ground, 30, options=dict(options, out=ground/'out'))
    assert said.error in ('ValueError', 'FileNotFoundError'), said
    one_sentence(said.message, ground/'given', named=False)
    assert snapshot(ground) == before


BY_LINE = {  # (source, out, more words) below the ground, and what the one line on standard error must say
    'no source': (('nowhere', 'out'), ['no such folder']), 'layout': (('given', 'out', '--layout', 'brast'), ['layout', 'brats']),
    'output is a file': (('given', 'file.txt'), ['file.txt']), 'output in the source': (('given', 'given/out'), ['source']),
    'size of words': (('given', 'out', '--size', 'large'), ['large']), 'fractions of two': (('given', 'out', '--fractions', '.5,.5'), ['fractions|3']),
    'spacing of zero': (('given', 'out', '--spacing', '0'), ['spacing']), 'window upside down': (('given', 'out', '--window', '40,-400'), ['width above 0']),
    'shard that is none': (('given', 'out', '--shard', '5/3'), ['shard']), 'workers below zero': (('given', 'out', '--workers', '-1'), ['worker']),
    'modality that is none': (('given', 'out', '--modality', 't9'), ['modality'])}

@pytest.mark.parametrize('what', BY_LINE)
def test_refusals_of_the_command_are_one_line(what, ground):
    "Exit code, one sentence, no traceback, nothing written."
    (source, out, *more), says = BY_LINE[what]
    people(ground/'given')
    write(ground/'file.txt', b'mine')
    before = {k: v for k, v in snapshot(ground).items() if not k.startswith('bin')}
    code, _, stderr = finish(command(ground/source, ground/out, ground, *more), ground/source, ground/out)
    assert code not in (0, None) and 'Traceback' not in stderr, stderr
    one_sentence(stderr.strip(), '', says)
    assert {k: v for k, v in snapshot(ground).items() if not k.startswith('bin')} == before

def test_the_command_blames_the_folder_that_is_locked(ground):
    "A source that may not be read is the source's fault, an output that may not be written is the output's."
    if not may_become_mortal(): pytest.skip("root's rights cannot be given up here")
    source = people(ground/'given'/'secret')
    for folder, out in ((source, ground/'work'/'out'), (ground/'locked', ground/'locked'/'out')):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o555 if folder != source else 0)
        code, _, stderr = finish(command(source, out, ground, start=become_mortal), source, out)
        folder.chmod(0o755)
        assert code == 1
        one_sentence(stderr.strip(), source if folder == source else out)
        assert not out.exists()


def refused_output(ground, out, mortal=False, says=()):
    "A run that cannot write says so in one sentence and leaves everything as it was."
    source = ground/'given'
    if not any(source.iterdir()): people(source)
    before = snapshot(ground)
    said = put(preprocess, source, ground, 60, mortal, dict(out=out))
    assert said.error in ('ValueError', 'FileNotFoundError', 'NotADirectoryError', 'FileExistsError', 'PermissionError', 'OSError'), said
    one_sentence(said.message, out, says, named=False)
    private(said.told, [ground/'given', out])
    assert snapshot(ground) == before

def test_output_is_a_file(ground): refused_output(ground, write(ground/'out', b'mine'))

def test_output_lies_below_a_file(ground): refused_output(ground, write(ground/'file', b'mine')/'out')

def test_output_is_the_source(ground): refused_output(ground, ground/'given')

def test_output_lies_in_the_source(ground): refused_output(ground, people(ground/'given')/'out')

def test_output_reaches_the_source_through_a_link(ground):
    (ground/'door').symlink_to(people(ground/'given'), target_is_directory=True)
    refused_output(ground, ground/'door'/'out')

def test_output_has_a_name_of_300_bytes(ground): refused_output(ground, ground/('n'*300))

def test_output_may_not_be_written(ground):
    (ground/'locked').mkdir(mode=0o555)
    refused_output(ground, ground/'locked'/'out', mortal=True, says=['permission'])

def test_output_is_a_cache_that_may_not_be_written(ground, made):
    shutil.copytree(made[1], ground/'out')
    shutil.copytree(made[0], ground/'given', dirs_exist_ok=True)
    person(ground/'given', 'DOE-JANE-00077-000')
    for p in [ground/'out', *(ground/'out').rglob('*')]: p.chmod(0o555 if p.is_dir() else 0o444)
    shutil.copy(made[3]/'home'/'pseudonym.key', ground/'home'/'pseudonym.key')
    (ground/'home'/'pseudonym.key').chmod(0o644)
    before = snapshot(ground/'out')
    said = put(preprocess, ground/'given', ground, 60, True, dict(out=ground/'out'))
    assert said.error or said.value['exit_code'] == 1, said
    one_sentence(said.message or said.value['failed'].popitem()[1], ground/'out', ['permission'], named=False)
    assert snapshot(ground/'out') == before

def test_output_on_a_disk_that_is_read_only(ground):
    (ground/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro,size=1m', 'none', ground/'disk'], capture_output=True).returncode: pytest.skip('mount is not allowed here')
    try: refused_output(ground, ground/'disk'/'out', says=['read-only'])
    finally: subprocess.run(['umount', '-l', ground/'disk'], check=True)

@pytest.mark.parametrize('home', ['locked', 'damaged'])
def test_key_of_the_pseudonyms_cannot_be_had(home, ground):
    "No secret, no pseudonyms: nothing may be written under a weaker name."
    people(ground/'given')
    if home == 'locked': (ground/'home').chmod(0o555)
    else: write(ground/'home'/'pseudonym.key', b'DOE^JANE\n').chmod(0o644)
    said = put(preprocess, ground/'given', ground, 30, True, dict(out=ground/'work'/'out'))
    assert said.error in ('ValueError', 'PermissionError', 'OSError'), said
    one_sentence(said.message, ground/'home', named=False)
    private(said.told)
    assert not (ground/'work'/'out').exists() or not whole(ground/'work'/'out')


# disks that fill

def big(here, n=6):
    "Cases of 250 kB each, which do not shrink."
    rng = np.random.default_rng(0)
    for k in range(n): person(here, f'DOE-JANE-{k + 1:05d}-000', nifti(rng.integers(1, 30000, (50, 50, 50)).astype(np.int16)))
    return here

def test_disk_that_fills_up_and_is_emptied(ground):
    "1 MB of disk for 1.5 MB of cache: what fits is kept and whole, the rest fails in words; with more room the same call makes it complete."
    (ground/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', ground/'disk'], capture_output=True).returncode: pytest.skip('mount is not allowed here')
    try:
        source, out = big(ground/'given'), ground/'disk'/'out'
        said = put(preprocess, source, ground, 60, options=dict(out=out, crop=False))
        assert said.error or said.value['exit_code'] == 1 and 'space' in said.value['text'].lower(), said
        if said.error: one_sentence(said.message, out, ['space'], named=False)
        private(said.told)
        kept = whole(out)
        assert 1 <= len(kept) < 6
        subprocess.run(['mount', '-o', 'remount,size=64m', ground/'disk'], check=True)
        again = put(preprocess, source, ground, 60, options=dict(out=out, crop=False))
        assert again.value and again.value['exit_code'] == 0 and again.value['done'] == 6 - len(kept), again
        whole(out, 6)
        assert json.loads((out/'manifest.json').read_bytes())['failed'] == {} and not list(out.glob('failed/*'))
    finally: subprocess.run(['umount', '-l', ground/'disk'], check=True)

def limited(given, **options):
    "No file above 100 kB, as a quota has it; Python ignores the signal and gets an error."
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return preprocess(given, **options)

def test_quota_for_single_files(ground):
    source, out = big(ground/'given', 2), ground/'out'
    person(source, 'DOE-JANE-00050-000')
    said = put(limited, source, ground, 60, options=dict(out=out, crop=False))
    assert said.value and said.value['exit_code'] == 1 and said.value['done'] == 1 and len(said.value['failed']) == 2, said
    for why in said.value['failed'].values(): one_sentence(why)
    whole(out, 1)


# kills and crowds

def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.005)

def members(group):
    "The living processes of a session."
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/stat') as f: fields = f.read().rpartition(')')[2].split()
        except OSError: continue
        if int(fields[3]) == group and fields[0] != 'Z': found.append(int(pid))
    return found

@pytest.mark.parametrize('how', ['SIGKILL', 'SIGINT'])
def test_killed_between_two_cases_and_begun_again(how, ground):
    "After the first case is there: what is visible is whole, no process stays behind, and going on gives the bytes of a run that was left alone."
    source, out = big(ground/'given', 40), ground/'out'
    process = command(source, out, ground)
    until(lambda: list(out.glob('p*/case.json')) or process.poll() is not None)
    process.send_signal(getattr(signal, how))
    code, *_ = finish(process, source, out)
    assert code != 0
    until(lambda: not members(process.pid), 20)
    kept = sorted(p.parent.name for p in out.glob('p*/case.json'))
    assert 1 <= len(kept) < 40, 'the kill came too late to test anything'
    if how == 'SIGINT': whole(out)  # who is asked to stop tidies up
    for name in kept:
        for role, r in json.loads((out/name/'case.json').read_bytes())['roles'].items(): assert list(np.load(out/name/f'{role}.npy').shape) == r['shape']
    times = {name: (out/name/'case.json').stat().st_mtime_ns for name in kept}
    again = put(preprocess, source, ground, 60, options=dict(out=out))
    assert again.value and again.value['exit_code'] == 0 and again.value['done'] == 40 - len(kept), again
    assert times == {name: (out/name/'case.json').stat().st_mtime_ns for name in kept}
    whole(out, 40)
    put(preprocess, source, ground, 60, options=dict(out=ground/'alone'))
    assert bytes_of(out) == bytes_of(ground/'alone')

def test_two_runs_at_once(ground):
    "Two processes on one source and one output: both end well, and the result is that of one."
    source, out = people(ground/'given', 6), ground/'out'
    both = [command(source, out, ground) for _ in range(2)]
    for process in both:
        code, _, stderr = finish(process, source, out)
        assert code == 0, stderr
    whole(out, 6)
    assert len(json.loads((out/'manifest.json').read_bytes())['cases']) == 6


# what somebody put there before

def copy_of(made, ground):
    shutil.copytree(made[1], ground/'out')
    shutil.copytree(made[0], ground/'given', dirs_exist_ok=True)
    shutil.copy(made[3]/'home'/'pseudonym.key', ground/'home')
    return ground/'given', ground/'out'

def test_foreign_files_stay(ground, made):
    source, out = copy_of(made, ground)
    write(out/'notes.txt', b'mine')
    write(out/'mine'/'thesis.tex', b'mine')
    write(out/'.hidden', b'mine')
    assert put(preprocess, source, ground, 60, options=dict(out=out)).value['exit_code'] == 0
    assert [(out/p).read_bytes() for p in ('notes.txt', 'mine/thesis.tex', '.hidden')] == [b'mine']*3

def test_links_in_the_output_do_not_lead_out(ground, made):
    "A manifest, a case and the folder of failures that are links: what they point to stays as it was."
    source, out = copy_of(made, ground)
    outside = ground/'work'
    (out/'manifest.json').rename(outside/'manifest.json')
    (out/'manifest.json').symlink_to(outside/'manifest.json')
    case = sorted(out.glob('p*/case.json'))[0].parent
    shutil.move(case, outside/case.name)
    case.symlink_to(outside/case.name, target_is_directory=True)
    (outside/case.name/'t1n.npy').write_bytes(b'mine')
    (outside/case.name/'mine.txt').write_bytes(b'mine')
    before = snapshot(outside)
    said = put(preprocess, source, ground, 60, options=dict(out=out))
    assert said.error or said.value['exit_code'] == 0, said
    assert snapshot(outside) == before
    whole(out)

@pytest.mark.parametrize('what', ['manifest cut', 'manifest gone', 'card cut', 'card gone', 'array cut', 'array gone', 'array of another shape', 'array is a pickle', 'leftovers of the dead'])
def test_touched_and_begun_again(what, ground, made):
    "Whatever was damaged is made anew, to the same bytes."
    source, out = copy_of(made, ground)
    case = sorted(out.glob('p*/case.json'))[0].parent
    match what.split():
        case ['manifest', 'cut']: write(out/'manifest.json', (out/'manifest.json').read_bytes()[:50])
        case ['manifest', 'gone']: (out/'manifest.json').unlink()
        case ['card', 'cut']: write(case/'case.json', (case/'case.json').read_bytes()[:50])
        case ['card', 'gone']: (case/'case.json').unlink()
        case ['array', 'cut']: write(case/'t1n.npy', (case/'t1n.npy').read_bytes()[:-10])
        case ['array', 'gone']: (case/'t1n.npy').unlink()
        case ['array', 'of', *_]: np.save(case/'t1n.npy', np.zeros((2, 2, 2), np.int16))
        case ['array', 'is', *_]: write(case/'t1n.npy', pickle.dumps([1, 2, 3]))
        case _:
            dead = subprocess.Popen(['true'])
            dead.wait()
            (out/f'.{case.name}.0-{dead.pid}.partial').mkdir()
            write(out/f'.manifest.json.{"0"*12}.partial', b'{')
            for p in out.glob('.*'): os.utime(p, (1, 1))
    said = put(preprocess, source, ground, 60, options=dict(out=out))
    assert said.value and said.value['exit_code'] == 0, said
    made_anew, honest = bytes_of(out), dict(made[2])
    for name in list(made_anew):
        if name.endswith('.json'): made_anew[name], honest[name] = (_without_stamps(b) for b in (made_anew[name], honest[name]))
    assert made_anew == honest

def _without_stamps(raw):
    "A record without the digest of the source's times, which a copy changes."
    def strip(x): return {k: strip(v) for k, v in x.items() if k != 'stamp'} if isinstance(x, dict) else x
    return json.dumps(strip(json.loads(raw)))


# reading a cache that somebody touched

touched = Table()

def copy_in(here):
    shutil.copytree(CACHE[0], here/'cache')
    return here/'cache'

CACHE = []

@pytest.fixture(scope='module', autouse=True)
def template(made): CACHE[:] = [made[1]]

def edited(here, change):
    "A cache whose manifest was changed by a function of its content."
    out = copy_in(here)
    manifest = json.loads((out/'manifest.json').read_bytes())
    new = change(manifest)
    write(out/'manifest.json', json.dumps(manifest if new is None else new).encode())
    return out

def first(manifest): return manifest['cases'][min(manifest['cases'])]

def array(here, content):
    out = copy_in(here)
    path = sorted(out.glob('*/t1n.npy'))[0]
    if content is None: path.unlink()
    elif callable(content): write(path, content(path.read_bytes()))
    else: write(path, content)
    return out

@touched(cache, reads=lambda v: v['items'] == 3)
def unhurt(here): return copy_in(here)

@touched(cache, kinds=(FileNotFoundError, ValueError))
def no_cache(here): return here

@touched(cache, kinds=(FileNotFoundError, ValueError))
def no_folder(here): return here/'nowhere'

@touched(cache)
def manifest_of_no_bytes(here): return write(copy_in(here)/'manifest.json', b'').parent

@touched(cache)
def manifest_cut(here):
    out = copy_in(here)
    return write(out/'manifest.json', (out/'manifest.json').read_bytes()[:200]).parent

@touched(cache)
def manifest_that_is_a_list(here): return write(copy_in(here)/'manifest.json', b'["DOE"]').parent

@touched(cache)
def manifest_nested_100000_deep(here): return write(copy_in(here)/'manifest.json', b'['*100_000).parent

@touched(cache)
def manifest_that_is_no_text(here): return write(copy_in(here)/'manifest.json', b'\xff\xfe\0DOE').parent

@touched(cache)
def manifest_without_cases(here): return edited(here, lambda m: m.pop('cases') and None)

@touched(cache)
def case_that_climbs_out(here):
    def change(m):
        case = first(m)
        m['cases']['../../work'] = {**case, 'case': '../../work'}
    np.save(here.parent/'work'/'t1n.npy', np.zeros((2, 2, 2), np.int16))
    return edited(here, change)

@touched(cache)
def role_that_climbs_out(here): return edited(here, lambda m: first(m)['roles'].update({'../../../work/DOE': first(m)['roles']['t1n']}))

@touched(cache)
def role_that_is_not_there(here): return edited(here, lambda m: first(m)['roles'].update({'t2w': first(m)['roles']['t1n']}))

@touched(cache)
def shape_that_is_huge(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(shape=[99999, 99999, 99999]))

@touched(cache)
def shape_that_is_no_list(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(shape='DOE'))

@touched(cache)
def affine_of_nan(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(affine=[[float('nan')]*4]*4))

@touched(cache)
def affine_of_another_size(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(affine=[[1, 0], [0, 1]]))

@touched(cache)
def affine_of_words(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(affine='DOE'))

@touched(cache)
def intensity_upside_down(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(intensity={'kind': 'window', 'low': 5, 'high': -5}))

@touched(cache)
def intensity_of_other_words(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(intensity={'DOE': 1}))

@touched(cache)
def intensity_of_nan(here): return edited(here, lambda m: first(m)['roles']['t1n'].update(intensity={'kind': 'window', 'low': float('nan'), 'high': 1}))

@touched(cache)
def array_gone(here): return array(here, None)

@touched(cache)
def array_empty(here): return array(here, b'')

@touched(cache)
def array_cut(here): return array(here, lambda raw: raw[:-20])

@touched(cache)
def array_that_is_text(here): return array(here, b'DOE^JANE')

class Mark:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')

@touched(cache)
def array_that_is_a_pickle(here): return array(here, pickle.dumps(Mark(str(here.parent/'unpickled'))))

@touched(cache, mb=60)
def array_that_declares_a_petabyte(here):
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (99999, 99999, 99999)}\n"
    return array(here, b'\x93NUMPY\1\0' + len(text).to_bytes(2, 'little') + text)

@touched(cache)
def array_of_another_shape(here):
    out = copy_in(here)
    np.save(sorted(out.glob('*/t1n.npy'))[0], np.zeros((2, 2, 2), np.int16))
    return out

@pytest.mark.parametrize('case', touched, ids=lambda c: c.name)
def test_cache(case, ground): judge(case, ground)
