"Averages and checkpoints with real files and processes: killed at every stage, out of disk, damaged, tampered with, sharded."
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sbldm_nb.checkpoints as checkpoints_module
from sbldm_nb.averages import EMA, PowerEMA, frozen_copy, moving_tensors, post_hoc_average, save_average, solve_weights
from sbldm_nb.checkpoints import (_digest, _seal, checkpoints, drop_after, find_checkpoint, load_checkpoint, newest_intact, prune, random_state, save_checkpoint,
                                  set_random_state, sync)

linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='wants fork and Linux file systems')


def content(step):
    "Two groups of tensors and some numbers that all tell the step."
    return dict(model=dict(a=torch.full((300,), float(step)), b=torch.tensor(step)), ema=dict(a=torch.full((7, 3), float(step)))), dict(step=step, best=step / 7)


def put(folder, step): return save_checkpoint(folder / f'step-{step:08}', *content(step))


def is_content(groups, numbers):
    "Whether a checkpoint that was read is the one that was written, to the last bit."
    wanted, told = content(numbers['step'])
    return numbers == told and groups.keys() == wanted.keys() and all(torch.equal(groups[g][n], t) for g in wanted for n, t in wanted[g].items())


def sentence(error, path=None):
    "The message, after a look at its form."
    text = str(error.value)
    assert '\n' not in text and len(text) < 400 and (path is None or str(path) in text)
    return text


@pytest.fixture
def one(tmp_path): return put(tmp_path / 'run' / 'checkpoints', 5)


def refused(folder):
    "Why a checkpoint is refused; every way in says the same."
    with pytest.raises(ValueError) as error: load_checkpoint(folder)
    with pytest.raises(ValueError) as direct: find_checkpoint(folder)
    assert str(error.value) == str(direct.value)
    found, skipped = newest_intact(folder.parent)
    why = sentence(error, folder).partition(' is not an intact checkpoint: ')[2]
    assert found is None and why and skipped == [f'{folder.name}: {why}']
    return why


# damage

def test_every_length_of_every_file(one):
    for path in sorted(one.iterdir()):
        whole = path.read_bytes()
        for length in {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1 - (path.name == 'state.json')}:
            path.write_bytes(whole[:length])
            assert path.name in refused(one)
            assert path.name == 'state.json' or checkpoints(one.parent) == []
        path.write_bytes(whole)
    assert is_content(*load_checkpoint(one))


def test_a_bit_anywhere(one):
    rng = random.Random(0)
    for path in sorted(one.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 1 if path.name == 'state.json' else 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try: assert is_content(*load_checkpoint(one)) and path.name == 'state.json'  # an E for an e in a number is the same number
            except ValueError as e: assert path.name in str(e)
        path.write_bytes(whole)
    assert is_content(*load_checkpoint(one))


@pytest.mark.parametrize('name', ['model.safetensors', 'ema.safetensors', 'state.json'])
def test_missing_in_every_way(one, name, tmp_path):
    path, kept = one / name, tmp_path / 'kept'
    path.rename(kept)
    assert name in refused(one)
    path.mkdir()
    assert name in refused(one)
    path.rmdir()
    path.symlink_to(one / 'nowhere')
    assert name in refused(one)
    path.unlink()
    path.symlink_to('/dev/zero')
    assert name in refused(one)
    path.unlink()
    if hasattr(os, 'mkfifo'):
        os.mkfifo(path)  # reading it would wait for ever
        assert name in refused(one)
        path.unlink()
    path.symlink_to(kept)  # as a download cache does: the bytes are right
    assert is_content(*load_checkpoint(one))


def test_foreign_files_are_refused_but_not_named(one):
    for make in (lambda p: p.write_bytes(b'x'), Path.mkdir, os.mkfifo, lambda p: p.symlink_to('/dev/zero')):
        make(one / 'doe_jane.safetensors')
        why = refused(one)
        assert why == 'file 1 of 4 in the order of their names does not belong to it' and checkpoints(one.parent) == []
        (one / 'doe_jane.safetensors').rmdir() if (one / 'doe_jane.safetensors').is_dir() else (one / 'doe_jane.safetensors').unlink()
    (one / '._model.safetensors').write_bytes(b'left by an archive')
    assert is_content(*load_checkpoint(one))


def test_files_of_another_checkpoint(one):
    other = put(one.parent, 6)
    shutil.copy(other / 'ema.safetensors', one)
    with pytest.raises(ValueError, match='ema.safetensors is damaged'): load_checkpoint(one)
    shutil.copy(other / 'state.json', one)
    with pytest.raises(ValueError, match='model.safetensors is damaged'): load_checkpoint(one)
    shutil.copy(other / 'model.safetensors', one)
    assert load_checkpoint(one)[1]['step'] == 6  # a whole copy is a copy


# tampering: somebody seals what he has changed

def seal(folder, state):
    (folder / 'state.json').write_text(json.dumps(dict(state, sha256=_seal(state))))


def state_of(folder): return {k: v for k, v in json.loads((folder / 'state.json').read_text()).items() if k != 'sha256'}


def test_any_value_of_any_entry(one):
    state, harmless = state_of(one), 0
    for key, value in itertools.product(['format', 'numbers', 'files'], [None, True, 0, -1, 10**30, 1e308, '', 'x' * 100_000, [], [state], {}, {'a': []}]):
        seal(one, state | {key: value})
        if key == 'numbers' and isinstance(value, dict): harmless += load_checkpoint(one)[1] == value
        else: refused(one)
    for name, value in itertools.product(['size', 'sha256'], [None, True, -1, 10**30, 1.5, float('1e308'), 'x', [], {}]):
        files = dict(state['files'], **{'ema.safetensors': dict(state['files']['ema.safetensors'], **{name: value})})
        seal(one, state | dict(files=files))
        refused(one)
    assert harmless == 2


@pytest.mark.parametrize('name', ['../../secret.safetensors', '/secret.safetensors', 'a/b.safetensors', '.safetensors', '.hidden.safetensors', 'model.pt', 'a\n.safetensors', 'ö.safetensors', '..'])
def test_no_name_leads_out(one, name):
    secret = one.parent.parent / 'secret.safetensors'
    save_file(dict(a=torch.ones(1)), secret)
    state = state_of(one)
    state['files'][name] = dict(size=secret.stat().st_size, sha256=_digest(secret))
    seal(one, state)
    assert refused(one) == 'its state.json does not list its numbers and files in the way it should'


def test_unsealed_json_of_every_kind(one):
    raw = (one / 'state.json').read_text()
    texts = [raw.replace('"step": 5', f'"step": {v}') for v in ('NaN', 'Infinity', '-5', '5e300', '"5"', 'null', '6', '9' * 5000)]
    texts += [raw.replace('"numbers"', '"files"'), raw * 2, raw[:-3], '[' * 200_000, '{"a":' * 50_000, '"x"', '', '\0' * 100, json.dumps(None), '{"format": "sbldm_nb.checkpoint 1"}']
    for text in texts:
        (one / 'state.json').write_text(text)
        assert 'state.json' in refused(one)
    (one / 'state.json').write_bytes(raw.encode('utf-16'))
    assert 'state.json' in refused(one)
    with open(one / 'state.json', 'wb') as f: f.truncate(1 << 33)  # no memory is spent on it
    assert refused(one) == 'its state.json is longer than 64 MiB'


def test_programs_in_place_of_tensors_are_never_run(one, tmp_path):
    class Bomb:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/exploded',)
    torch.save(dict(a=Bomb()), one / 'model.safetensors')
    state = state_of(one)
    state['files']['model.safetensors'] = dict(size=(one / 'model.safetensors').stat().st_size, sha256=_digest(one / 'model.safetensors'))
    seal(one, state)
    with pytest.raises(ValueError, match='a file of it holds no safetensors'): load_checkpoint(one)
    assert not (tmp_path / 'exploded').exists()


def test_earlier_and_later_formats_are_told_apart(one):
    (one / 'state.json').write_text(json.dumps(dict(step=5, files={'model.safetensors': 100})))
    assert "of another kind, 'sbldm_nb.checkpoint 1' is wanted" in refused(one)


# what goes in comes out

def test_numbers_and_tensors_of_every_kind(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {f'net/{k}.weight': torch.randn(3, 5).to(kind).t() for k, kind in enumerate(kinds)} | {'scalar': torch.tensor(2.), 'empty': torch.zeros(0, 4)}
    tensors['slice'] = torch.arange(20.).view(4, 5)[1:3, ::2]
    tensors['nan'] = torch.tensor([float('nan'), float('inf'), -0.])
    numbers = {'a': [1, -2.5, 1e-310, 2**70, None, True, 'é\n"\u2028'], 'b': {'c': {'d': []}}, 'third': 1 / 3}
    save_checkpoint(tmp_path / 'x', dict(a=tensors, **{'rng-0': {}}), numbers)
    groups, told = load_checkpoint(tmp_path / 'x')
    assert told == numbers and list(groups) == ['a', 'rng-0'] and groups['rng-0'] == {} and groups['a'].keys() == tensors.keys()
    for name, t in tensors.items():
        assert groups['a'][name].dtype == t.dtype and torch.equal(groups['a'][name].nan_to_num(7), t.nan_to_num(7))
    assert torch.signbit(groups['a']['nan'])[2]


def test_the_group_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try: save_average(tmp_path / 'averages', 1, (.1,), 1, [dict(a=torch.ones(1))]), put(tmp_path, 1)
    finally: os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob('*') if p.is_file()} == {0o640}


def test_a_parameter_that_trains_can_be_saved(tmp_path):
    save_checkpoint(tmp_path / 'x', dict(a=dict(nn.Linear(2, 2).named_parameters())), {})
    assert load_checkpoint(tmp_path / 'x')[0]['a']['weight'].requires_grad is False


@pytest.mark.parametrize('numbers', [dict(a=float('nan')), dict(a=torch.tensor(1.)), dict(a={1, 2}), dict(a=Path('x'))])
def test_numbers_that_json_cannot_hold_write_nothing(tmp_path, numbers):
    with pytest.raises(ValueError, match='what JSON can hold') as error: save_checkpoint(tmp_path / 'x', {}, numbers)
    sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_whatever_goes_wrong_leaves_no_trace(tmp_path, monkeypatch):
    tensor = torch.ones(3)
    with pytest.raises(RuntimeError, match='share memory'): save_checkpoint(tmp_path / 'x', dict(first=dict(a=torch.ones(1)), a=dict(a=tensor, b=tensor)), {})
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as m:
        m.setattr(checkpoints_module, 'sync', lambda path: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): put(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_again_replaces_what_was_damaged(one):
    (one / 'ema.safetensors').write_bytes(b'')
    (one / 'stranger').write_text('x')
    put(one.parent, 5)
    assert is_content(*load_checkpoint(one)) and [p.name for p in one.parent.iterdir()] == [one.name]


def test_the_order_is_that_of_numbers(tmp_path):
    for step in (99999999, 100000000, 5): put(tmp_path, step)
    for name in ('step-7', 'step-0000000x', 'step-00000009', 'other'): (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000005', 'step-99999999', 'step-100000000']
    assert newest_intact(tmp_path)[0].name == 'step-100000000'
    prune(tmp_path, keep=1, best='step-00000005')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other', 'step-00000005', 'step-0000000x', 'step-100000000', 'step-7']


def test_newest_intact_tells_what_it_passed_over(tmp_path):
    run = tmp_path / 'run'
    for step in range(1, 6): put(run / 'checkpoints', step)
    (run / 'checkpoints/step-00000005/state.json').unlink()
    (run / 'checkpoints/step-00000003/model.safetensors').write_bytes(bytes((run / 'checkpoints/step-00000003/model.safetensors').stat().st_size))
    (run / 'checkpoints/step-00000004/ema.safetensors').unlink()
    for given in (run, run / 'checkpoints', str(run)):
        found, skipped = find_checkpoint(given)
        assert found == run / 'checkpoints/step-00000002'
        assert skipped == ['step-00000005: it has no state.json', 'step-00000004: ema.safetensors is missing',
                           'step-00000003: model.safetensors is damaged, its bytes are not those that were written']
    assert newest_intact(tmp_path / 'nothing') == (None, []) and checkpoints(tmp_path / 'nothing') == []
    shutil.copytree(found, tmp_path / 'best')  # under another name it is a checkpoint still
    assert find_checkpoint(tmp_path / 'best') == (tmp_path / 'best', [])


def test_prune_leaves_what_is_not_its_own(tmp_path):
    for step in range(1, 5): put(tmp_path, step)
    for name in ('.step-00000009.partial', '.step-00000001.old.partial', '.git', 'notes'): (tmp_path / name).mkdir()
    (tmp_path / 'step-00000002/state.json').unlink()
    prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.git', 'notes', 'step-00000003', 'step-00000004']
    prune(tmp_path / 'nothing', keep=1)


def test_who_goes_back_keeps_what_comes_next(tmp_path):
    "Newer checkpoints, intact or damaged where no size tells, would count as the newest and push out what a run that begins before them writes."
    for step in (1, 2, 8, 9): put(tmp_path, step)
    path = tmp_path / 'step-00000009/model.safetensors'
    path.write_bytes(bytes(path.stat().st_size))
    (tmp_path / 'notes').mkdir()
    drop_after(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['notes', 'step-00000001', 'step-00000002']
    put(tmp_path, 3)
    prune(tmp_path, keep=1)
    assert newest_intact(tmp_path) == (tmp_path / 'step-00000003', [])
    drop_after(tmp_path / 'nothing', 0)


# real processes

def process(work):
    "Run `work` in a process of its own and return its id."
    if pid := os.fork(): return pid
    try:
        work()
        os._exit(0)
    except BaseException as e:
        print(type(e).__name__, e, file=sys.stderr, flush=True)
        os._exit(1)


def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def go_on(folder, last, announce=None):
    "A run: from the newest checkpoint to `last`, a checkpoint each step, the best and the last two stay."
    found, skipped = newest_intact(folder)
    assert not skipped, skipped
    step = load_checkpoint(found)[1]['step'] if found else 0
    while step < last:
        put(folder, step := step + 1)
        if announce: os.write(announce, bytes([step]))
        prune(folder, 2, 'step-00000001')


def left(folder, at_least):
    "The step of what a killed process left, after a look at all of it."
    found, skipped = newest_intact(folder)
    assert not skipped, skipped
    if found is None: return 0
    for path in checkpoints(folder): assert is_content(*load_checkpoint(path))
    step = load_checkpoint(found)[1]['step']
    assert step >= at_least
    return step


def scenario_every_call(home):
    "Kill before every single system call that changes the disk, in a run that also replaces a checkpoint."
    killed = 0
    for name in ('fsync', 'replace', 'mkdir', 'unlink', 'rmdir'):
        for n in itertools.count(1):
            folder = home / f'{name}-{n}'
            reader, writer = os.pipe()

            def work():
                original, calls = getattr(os, name), itertools.count(1)

                def killer(*args, **kwargs):
                    if next(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)
                setattr(os, name, killer)
                go_on(folder, 2, writer)
                put(folder, 2)  # replaces one: killed between two renames, it is the one before that is left
                go_on(folder, 4, writer)
            code = wait(process(work))
            os.close(writer)
            told = os.read(reader, 100)
            os.close(reader)
            if code == 0: break
            assert code == -signal.SIGKILL
            killed += 1
            left(folder, {0: 0, 2: 1}.get(last := told[-1] if told else 0, last))
            assert wait(process(lambda: go_on(folder, 5))) == 0
            assert left(folder, 5) == 5 and {p.name for p in folder.iterdir()} == {f'step-{k:08}' for k in (1, 4, 5)}
            shutil.rmtree(folder)
    print('killed', killed)
    assert killed > 50


def scenario_random(home):
    "Kill at thirty random moments of one run."
    folder, step, rng = home / 'run', 0, random.Random(0)
    for trial in range(30):
        reader, writer = os.pipe()
        pid = process(lambda: go_on(folder, 255, writer))
        os.close(writer)
        told = os.read(reader, 1)
        time.sleep(rng.uniform(0, .02))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        told += os.read(reader, 1000)
        os.close(reader)
        now = left(folder, told[-1] if told else step)
        if code == 0: break
        step = now
    print('killed', trial + 1, 'at the end', step)
    assert trial > 10


def scenario_in_a_file(home):
    "Kill when a part of a tensor file is written."
    for n, share in itertools.product([3, 4, 5, 6], [0, .3, .99]):
        folder = home / f'{n}-{share}'

        def work():
            original, calls = checkpoints_module.save_file, itertools.count(1)

            def killer(tensors, path, *args):
                original(tensors, path, *args)
                if next(calls) == n:
                    os.truncate(path, int(Path(path).stat().st_size * share))
                    os.kill(os.getpid(), signal.SIGKILL)
            checkpoints_module.save_file = killer
            go_on(folder, 5)
        assert wait(process(work)) == -signal.SIGKILL
        assert left(folder, 1) == (n - 1) // 2
        assert wait(process(lambda: go_on(folder, 5))) == 0 and left(folder, 5) == 5


def scenario_limit(home):
    "A file system that takes no more bytes, from the first byte to the last: one sentence, no trace, the older ones intact, and on it goes with room."
    folder = home / 'run'
    go_on(folder, 3)
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    largest = max(map(len, before.values()))
    refusals = 0
    for limit in [0, 1, 100, largest // 2, largest - 1]:
        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try: put(folder, 4)
            except OSError as e:
                assert str(e).startswith(f'the checkpoint {folder}/step-00000004 could not be written (') and str(e).endswith('; those before it are untouched')
                assert '\n' not in str(e)
                os._exit(7)
        assert wait(process(work)) == 7
        refusals += 1
        assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before and len(list(folder.iterdir())) == 3
    go_on(folder, 5)
    assert left(folder, 5) == 5
    print('refused', refusals)


def scenario_reader(home):
    "While one process writes and prunes, another reads; what it finds is always whole."
    folder = home / 'run'
    go_on(folder, 2)
    pid, seen = process(lambda: go_on(folder, 100)), set()
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        checkpoints(folder)
        found, _ = newest_intact(folder)
        if found is None: continue  # all that were listed have been pruned meanwhile
        try: groups, numbers = load_checkpoint(found)
        except (ValueError, FileNotFoundError): continue  # pruned in this very moment
        assert is_content(groups, numbers)
        seen.add(numbers['step'])
    assert os.waitstatus_to_exitcode(done[1]) == 0
    print('different checkpoints read', len(seen))
    assert len(seen) > 5


def scenario_mortal(home):
    "Folders that may not be written and files that may not be read, for somebody who is not root."
    folder = home / 'run'
    go_on(folder, 3)
    os.chmod(home, 0o755)

    def work():
        if os.getuid() == 0: os.setuid(65534)
        with pytest.raises(OSError, match='could not be written .Permission denied.; those before it are untouched'): put(folder, 9)
        with pytest.raises(ValueError, match='it cannot be read .Permission denied.'): load_checkpoint(folder / 'step-00000003')
        found, skipped = find_checkpoint(folder)
        assert found.name == 'step-00000002' and skipped == ['step-00000003: it cannot be read (Permission denied)']
    os.chmod(folder, 0o555)
    os.chmod(folder / 'step-00000003/ema.safetensors', 0)
    code = wait(process(work))
    os.chmod(folder, 0o755)
    assert code == 0


@linux
@pytest.mark.parametrize('scenario', ['every_call', 'random', 'in_a_file', 'limit', 'reader', 'mortal'])
def test_survives(scenario):
    with tempfile.TemporaryDirectory() as home:
        run = subprocess.run([sys.executable, __file__, scenario, home], capture_output=True, text=True, timeout=300)
        print(run.stdout)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def on_small_disk(tmp_path, script):
    "The lines that a script prints which has a tmpfs of one megabyte at `disk`."
    (tmp_path / 'disk').mkdir()
    mount = f'mount -t tmpfs -o size=1m none {tmp_path}/disk'
    if subprocess.run(['unshare', '-m', 'sh', '-c', mount], capture_output=True).returncode: pytest.skip('no tmpfs can be mounted here')
    run = subprocess.run(['unshare', '-m', 'sh', '-c', f'{mount} && exec "$0" -c "$1"', sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()

@linux
def test_a_small_disk(tmp_path):
    "A tmpfs of one megabyte: the third checkpoint does not fit, and after pruning it does."
    script = f'''
import errno, sys, torch
from pathlib import Path
from sbldm_nb.checkpoints import *
home = Path('{tmp_path}/disk')
def put(step): return save_checkpoint(home / f'step-{{step:08}}', dict(a=dict(x=torch.full((100_000,), float(step)))), dict(step=step))
put(1), put(2)
try: put(3)
except OSError as e: print(e)
print(sorted(p.name for p in home.iterdir()))
for step in (1, 2): assert (load_checkpoint(home / f'step-{{step:08}}')[0]['a']['x'] == step).all()
prune(home, 1)
put(3)
print(newest_intact(home)[0].name)
'''
    error, names, last = on_small_disk(tmp_path, script)
    assert 'step-00000003 could not be written' in error and 'No space left on device' in error and error.endswith('untouched')
    assert names == "['step-00000001', 'step-00000002']" and last == 'step-00000003'


@linux
def test_a_training_on_a_small_disk(tmp_path):
    "A tmpfs with room for two checkpoints and not for three: one sentence, those before it are whole; with room again the same call ends in the same bits."
    script = f'''
import os, sys, torch
from pathlib import Path
from torch.utils.data import DataLoader
from sbldm_nb.checkpoints import *
from sbldm_nb.training import Trainer
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10_000))
    def loss(self, batch, generator): return (self.weight - batch + torch.randn(10_000, generator=generator)).square().mean()
def fit(folder): return Trainer(Line(), DataLoader(torch.arange(8.)[:, None], 1), None, folder, max_steps=20, checkpoint_every=5, keep=2, precision='fp32', log=None).fit()
home = Path('{tmp_path}/disk')
(home / 'room').write_bytes(bytes(550_000))
try: fit(home / 'run')
except OSError as e: print(e)
print([p.name for p in checkpoints(home / 'run/checkpoints')], *newest_intact(home / 'run/checkpoints')[1])
(home / 'room').unlink()
print(torch.equal(fit(home / 'run').weight, fit('{tmp_path}/whole').weight))
'''
    error, names, last = on_small_disk(tmp_path, script)
    assert 'could not be written' in error and 'No space left on device' in error and error.endswith('untouched')
    assert names in ("['step-00000005', 'step-00000010']", "['step-00000005']") and last == 'True', names


@linux
def test_a_folder_that_cannot_be_synced_is_no_error_and_a_file_is(tmp_path):
    with pytest.raises(OSError): os.fsync(fd := os.open('/proc/self', os.O_RDONLY))
    os.close(fd)
    sync(Path('/proc/self'))
    with pytest.raises(FileNotFoundError): sync(tmp_path / 'nothing')


# random numbers

def draws(): return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(5).tolist(), torch.nn.functional.dropout(torch.ones(9)).tolist()


@pytest.mark.parametrize('used', range(4))
def test_the_state_of_chance_survives_a_process(tmp_path, used):
    for _ in range(used): random.gauss(0, 1), np.random.randn(), torch.randn(1)
    save_checkpoint(tmp_path / 'x', dict(rng=random_state()), {})
    told = repr(draws())
    script = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_checkpoints as t; t.set_random_state(t.load_checkpoint({str(tmp_path / "x")!r})[0]["rng"]); print(t.draws())'
    if used == 3: assert subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.strip() == told
    set_random_state(load_checkpoint(tmp_path / 'x')[0]['rng'])
    assert repr(draws()) == told


def test_a_refused_state_changes_nothing():
    good, before = random_state(), None
    for name in (n for n in good if not n.startswith('cuda')):
        for bad in ({n: t for n, t in good.items() if n != name}, good | {name: good[name][:-1]}, good | {name: good[name].float() + .5}):
            random.random(), torch.rand(1)
            before = random_state()
            with pytest.raises(ValueError, match=f'{name} is missing or of another kind'): set_random_state(bad)
            assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in random_state().items())
    set_random_state(good | dict(cuda7=torch.zeros(16, dtype=torch.uint8)))  # a card that is not here


@pytest.mark.skipif(not torch.cuda.is_available(), reason='wants a CUDA card')
def test_the_state_of_chance_on_a_card(tmp_path):
    save_checkpoint(tmp_path / 'x', dict(rng=random_state()), {})
    told = torch.randn(5, device='cuda')
    set_random_state(load_checkpoint(tmp_path / 'x')[0]['rng'])
    assert torch.equal(torch.randn(5, device='cuda'), told)


# averages

class Net(nn.Module):
    "Parameters that train and that do not, buffers that float and that count, a part for training only."
    training_only = ('critic',)
    def __init__(self):
        super().__init__()
        self.frozen, self.net, self.critic = nn.Linear(3, 3).requires_grad_(False), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), nn.Linear(2, 2)


def walk(model, generator):
    "One random step of everything that moves."
    with torch.no_grad():
        for t in moving_tensors(model).values(): t.add_(torch.randn(t.shape, generator=generator) * .1 if t.is_floating_point() else 1)


def test_average_equals_diffusers():
    training_utils = pytest.importorskip('diffusers.training_utils')
    torch.manual_seed(0)
    model, generator = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.Generator().manual_seed(1)
    mine, theirs = EMA(model, .95), training_utils.EMAModel(model.parameters(), decay=.95)
    theirs.step(model.parameters())
    for _ in range(300):
        walk(model, generator)
        mine.update()
        theirs.step(model.parameters())
    for a, b in zip(mine.module.parameters(), theirs.shadow_params): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_averages_take_what_moves_and_nothing_else():
    model, generator = Net(), torch.Generator().manual_seed(0)
    ema, power = EMA(model), PowerEMA(model)
    for _ in range(5):
        walk(model, generator)
        ema.update(), power.update()
    assert ema.module.frozen.weight is model.frozen.weight and ema.module.critic is None
    assert ema.module.net[1].num_batches_tracked == 5
    wanted = {f'net.{n}' for n in ('0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var', '2.weight', '2.bias')}
    assert power.tensors(0).keys() == wanted == power.tensors(1).keys()
    given = EMA(model, module=(made := frozen_copy(model)))
    assert given.module is made


def test_interrupted_averages_go_on_bit_for_bit(tmp_path):
    def run(stop=None):
        torch.manual_seed(0)
        model, generator = Net(), torch.Generator().manual_seed(1)
        ema, power = EMA(model, .9), PowerEMA(model, (.05, .2))
        for k in range(40):
            if k == stop:
                groups = dict(ema={n: t.clone() for n, t in moving_tensors(ema.module, model).items()}, **{f'power-{i}': power.tensors(i) for i in range(2)})
                save_checkpoint(tmp_path / 'x', groups, dict(updates=k))
                groups, numbers = load_checkpoint(tmp_path / 'x')
                ema, power = EMA(model, .9), PowerEMA(model, (.05, .2))
                for n, t in moving_tensors(ema.module, model).items(): t.copy_(groups['ema'][n])
                for i in range(2):
                    for n, t in power.tensors(i).items(): t.copy_(groups[f'power-{i}'][n])
                ema.updates = power.updates = numbers['updates']
            walk(model, generator)
            ema.update(), power.update()
        return [*moving_tensors(ema.module, model).values(), *power.tensors(0).values(), *power.tensors(1).values()]
    for a, b in zip(run(), run(17), strict=True): assert torch.equal(a, b)


def test_narrow_weights_are_averaged_in_their_own_kind():
    model = nn.Linear(4, 4).bfloat16()
    ema, power = EMA(model, .5), PowerEMA(model)
    for _ in range(3): ema.update(), power.update()
    for t in (ema.module.weight, *power.tensors(0).values()): assert t.dtype == torch.bfloat16
    assert torch.equal(ema.module.weight, model.weight) and torch.equal(power.tensors(1)['weight'], model.weight)


@pytest.mark.parametrize('seed', range(3))
def test_any_width_of_a_random_walk(tmp_path, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model, widths = nn.Linear(20, 20), [rng.uniform(.04, .2) for _ in range(4)]
    stored, direct = PowerEMA(model), PowerEMA(model, widths)
    for step in range(1, 1601):
        walk(model, generator)
        stored.update(), direct.update()
        if step % 50 == 0: stored.save(tmp_path, step)
    spread = (direct.tensors(0)['weight'] - model.weight).square().mean().sqrt().item()
    for k, width in enumerate(widths):
        made = post_hoc_average(tmp_path, width)
        gap = (made['weight'] - direct.tensors(k)['weight']).square().mean().sqrt().item()
        assert gap < .01 * spread, (width, gap, spread)


def test_weights_of_snapshots_at_uneven_times():
    "Against the profiles themselves, as many numbers: no random weights are nearer."
    rng = np.random.default_rng(0)
    stored = [(w, t) for t in (100, 130, 400, 900, 1000) for w in (.05, .1)]
    from sbldm_nb.averages import width_to_gamma

    def profile(width, t): return np.diff((np.minimum(np.arange(1001), t) / t)**(width_to_gamma(width) + 1))
    known, wanted = np.stack([profile(*s) for s in stored]), profile(.12, 1000)
    x = solve_weights(stored, (.12, 1000))
    best = np.square(x @ known - wanted).sum()
    for _ in range(200):
        step = rng.normal(size=len(x)) * .03
        assert np.square((x + step - step.mean()) @ known - wanted).sum() > best * (1 - 1e-6)
    twice = solve_weights(stored + stored[-2:], (.12, 1000))  # the last snapshot under two names
    np.testing.assert_allclose(twice @ np.vstack([known, known[-2:]]), x @ known, atol=1e-6)


def test_snapshots_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no snapshots'): post_hoc_average(tmp_path, .1)
    for step in (8, 16): save_average(tmp_path, step, (.05,), step, [dict(w=torch.ones(3) * step)])
    with pytest.raises(ValueError, match='above 0 and below 0.289'): post_hoc_average(tmp_path, .3)
    (tmp_path / 'step-00000016-0.safetensors').write_bytes((tmp_path / 'step-00000016-0.safetensors').read_bytes()[:40])
    with pytest.raises(ValueError, match='snapshot 2 of 2 in the order of their names is damaged') as error: post_hoc_average(tmp_path, .1)
    sentence(error, tmp_path)
    (tmp_path / 'step-00000016-0.safetensors').unlink()
    (tmp_path / '.step-00000024-0.safetensors.partial').write_bytes(b'x')
    assert torch.equal(post_hoc_average(tmp_path, .1)['w'], torch.ones(3) * 8)


@linux
def test_a_snapshot_on_a_full_disk(tmp_path):
    save_average(tmp_path, 8, (.05,), 8, [dict(w=torch.ones(3))])
    script = f'''
import resource, signal, torch
from sbldm_nb.averages import save_average
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try: save_average('{tmp_path}', 16, (.05,), 16, [dict(w=torch.ones(3000))])
except OSError as e: print(e)
'''
    told = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120).stdout
    assert 'step-00000016-0.safetensors could not be written' in told and 'untouched' in told
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000008-0.safetensors']


def sharded(rank, store, results):
    "One of two processes that hold half of every weight each."
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    averaged = frozen_copy(model)
    for net in (model, averaged): fully_shard(net, mesh=torch.distributed.init_device_mesh('cpu', (2,)))
    optimizer = torch.optim.SGD(model.parameters(), .5)
    ema, power = EMA(model, .8, module=averaged), PowerEMA(model)
    for k in range(12):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        ema.update(), power.update()
    assert all(isinstance(p, DTensor) and isinstance(a, DTensor) for p, a in zip(model.parameters(), averaged.parameters()))
    whole = {n: p.full_tensor() for n, p in averaged.named_parameters()}
    powers = [{n: t.full_tensor() for n, t in power.tensors(k).items()} for k in range(2)]
    if rank == 0:
        save_checkpoint(results, dict(ema=whole, power=powers[1]), dict(updates=ema.updates))
        save_average(results.parent / 'averages', 12, power.widths, power.updates, powers)
    dist.destroy_process_group()


@linux
def test_sharded_averages_equal_whole_ones(tmp_path):
    pytest.importorskip('torch.distributed.fsdp', reason='wants torch.distributed').__dict__.get('fully_shard') or pytest.skip('wants fully_shard')
    ranks = [subprocess.Popen([sys.executable, __file__, 'sharded', str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for rank in ranks: assert (told := rank.communicate(timeout=200)[1], rank.returncode)[1] == 0, told[-3000:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer, ema, power = torch.optim.SGD(model.parameters(), .5), EMA(model, .8), PowerEMA(model)
    for k in range(12):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        ema.update(), power.update()
    groups, numbers = load_checkpoint(tmp_path / 'x')
    torch.testing.assert_close(groups['ema'], dict(ema.module.state_dict()), rtol=0, atol=1e-6)
    torch.testing.assert_close(groups['power'], power.tensors(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(load_file(tmp_path / 'averages/step-00000012-1.safetensors'), power.tensors(1), rtol=0, atol=1e-6)
    assert numbers == dict(updates=12)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1] == 'sharded': sharded(int(sys.argv[3]), f'{sys.argv[2]}/store', Path(sys.argv[2]) / 'x')
    else: globals()[f'scenario_{sys.argv[1]}'](Path(sys.argv[2]))
