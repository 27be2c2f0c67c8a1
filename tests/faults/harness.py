"""The ground on which hostile input is put to a door of the package, and what is demanded of every refusal.

A case is a function that builds its input with real bytes in an empty folder and returns what the door is given. The door is opened in
a process of its own, with its own home, temporary folder and working folder, a time limit and a ceiling on memory."""
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import re
import resource
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
import warnings

import nibabel as nib
import numpy as np
import pytest

from sbldm_nb.data import Cache, preprocess, read_image  # before any fork, so that a child's growth is the door's doing
from sbldm_nb.dicom import read_dicom, series_of
from sbldm_nb.files import zip_members
from sbldm_nb.layouts import discover

IDENTITY = re.compile(r'doe(?!s\b)|jane|4711|19700101', re.IGNORECASE)  # planted in tags and inner names: must come out nowhere
NAME, RECORD, BORN = 'DOE^JANE', 'MRN-4711', '19700101'
ALLOWED = (ValueError, FileNotFoundError, TimeoutError)
CEILING = 3 << 30  # bytes of address space a child may add: an honest refusal needs none of it, a runaway must not take the machine


def cache(given):
    "A door: the sums of every array of a preprocessed cache."
    c = Cache(given)
    return [float(np.asarray(c.image(case, role).dataobj).sum()) for case in c.cases() for role in case['roles']]


# the table

@dataclasses.dataclass(frozen=True)
class Case:
    "One hostile input: how it is built, the door it is put to, and what the one sentence must say."
    name: str
    build: object  # ground/given -> what the door is given
    door: object
    says: tuple[str, ...]  # words of the sentence, in any case
    kinds: tuple[type, ...] = ALLOWED  # the exact types that may come out
    options: dict = dataclasses.field(default_factory=dict)  # handed to the door
    mb: int = 200  # how much the process may grow
    seconds: int = 10  # how long it may take
    reads: object = None  # None: must be refused; a function of the value: must be read, and right; 'either': refused, or read finite
    chars: int = 400  # how long the sentence may be
    named: bool = True  # the sentence repeats the path that was passed in
    mortal: bool = False  # permission bits hold, for root too


class Table(list):
    "Cases in the order they are written; calling it gives the decorator that adds one."
    def __call__(self, door, *says, **more):
        fields = {f.name for f in dataclasses.fields(Case)}
        case = {k: v for k, v in more.items() if k in fields}
        options = {k: v for k, v in more.items() if k not in fields}
        def add(build):
            self.append(Case(build.__name__, build, door, says, options=options, **case))
            return build
        return add


# a process of its own

@dataclasses.dataclass(frozen=True)
class Outcome:
    "What came out of the door."
    error: str | None = None  # the type's name
    message: str = ''
    told: str = ''  # everything a user would see: the chain of messages, warnings, standard output and error
    value: dict | None = None
    grown_mb: float = 0.
    largest_child_mb: float = 0.
    seconds: float = 0.
    died: str = ''


def memory(key):
    "MB of this process: VmRSS now, VmHWM at most, VmSize of address space."
    with open('/proc/self/status') as f: return next(int(line.split()[1]) for line in f if line.startswith(key + ':'))/1024


def described(value):
    "What of a door's value a test may ask for."
    if isinstance(value, nib.spatialimages.SpatialImage):
        data = np.asanyarray(value.dataobj)
        return {'shape': list(value.shape), 'finite': bool(np.isfinite(data).all() and np.isfinite(value.affine).all()),
                'sum': float(data.astype(np.float64).sum()), 'spacing': [float(s) for s in nib.affines.voxel_sizes(value.affine)],
                'hash': hashlib.sha256(np.ascontiguousarray(data)).hexdigest(), 'corner': float(data[0, 0, 0])}
    if isinstance(value, (list, tuple)): return {'items': len(value), 'text': repr(value), 'finite': True}
    if hasattr(value, 'exit_code'): return {'text': str(value), 'finite': True, 'exit_code': value.exit_code, 'done': len(value.done), 'failed': value.failed}
    return {'text': str(value), 'finite': True, 'cases': len(getattr(value, 'cases', ()))}


def chain(e):
    "The messages a traceback prints, first cause first; source lines and file paths of frames are not the package's words."
    said = []
    while e is not None:
        said += [line for line in traceback.format_exception_only(type(e), e)]
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return ''.join(reversed(said))


def become_mortal():
    "Root passes by permission bits: give that right up, for this process and all it starts (Linux capabilities 1 and 2)."
    if os.geteuid(): return
    libc, head, caps = ctypes.CDLL(None, use_errno=True), struct.pack('=Ii', 0x20080522, 0), (ctypes.c_uint32*6)()
    done = [libc.prctl(24, right, 0, 0, 0) for right in (1, 2)] + [libc.capget(head, caps)]  # 24: out of the bounding set
    for k in range(3): caps[k] &= ~0b110
    if any(done) or libc.capset(head, caps): raise OSError(ctypes.get_errno(), 'the rights of root cannot be given up')


@functools.cache
def may_become_mortal():
    "Whether this machine lets go of root's rights; some containers do not."
    pid = os.fork()
    if not pid:
        try: become_mortal()
        except OSError: os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def open_door(door, given, options, mortal=False):
    "In the child: open, and say what happened."
    if mortal: become_mortal()
    start, clock = memory('VmRSS'), time.perf_counter()
    try: said = {'value': described(door(given, **options))}
    except BaseException as e: said = {'error': type(e).__name__, 'message': str(e), 'told': chain(e)}
    return {**said, 'grown_mb': memory('VmHWM') - start, 'seconds': time.perf_counter() - clock,
            'largest_child_mb': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024}


def put(door, given, ground, seconds=10, mortal=False, options={}):
    "Open a door in a child process; `ground` holds its home, temporary and working folders."
    if mortal and not may_become_mortal(): pytest.skip("root's rights cannot be given up here")
    read, write = os.pipe()
    log = tempfile.TemporaryFile()
    sys.stdout.flush(); sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # Python 3.12 dislikes a fork beside threads; none of ours holds a lock
        pid = os.fork()
    if not pid:
        try:
            os.setsid()
            signal.alarm(seconds)
            for fd in (1, 2): os.dup2(log.fileno(), fd)
            sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False, errors='backslashreplace')
            warnings.resetwarnings()
            warnings.simplefilter('always')
            warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
            os.environ.update(SBLDM_CACHE=str(ground/'home'), HOME=str(ground/'home'), TMPDIR=str(ground/'tmp'), PATH=f'{ground}/bin:{os.environ["PATH"]}')
            tempfile.tempdir = None
            os.chdir(ground/'work')
            room = int(memory('VmSize')*2**20) + CEILING
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            said = json.dumps(open_door(door, given, options, mortal)).encode('utf-8', 'backslashreplace')
            sys.stdout.flush(); sys.stderr.flush()
            with open(write, 'wb') as f: f.write(said)
        finally: os._exit(0)
    os.close(write)
    with open(read, 'rb') as f: said = f.read()
    status = os.waitpid(pid, 0)[1]
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass
    log.seek(0)
    printed = log.read().decode('utf-8', 'backslashreplace')
    if not said: return Outcome(died=f'signal {os.WTERMSIG(status)}' if os.WIFSIGNALED(status) else f'exit {status}', told=printed)
    outcome = Outcome(**json.loads(said))
    return dataclasses.replace(outcome, told=outcome.told + printed)


def level(folder):
    "An empty ground: `given` for the input, and the child's home, temporary and working folders."
    for name in ('given', 'home', 'tmp', 'work', 'bin'): (folder/name).mkdir()
    folder.chmod(0o755)
    for name in ('home', 'tmp', 'work'): (folder/name).chmod(0o777)
    return folder


def snapshot(folder):
    "Every name below a folder with its kind, size, time and content; links are not followed."
    seen = {}
    for top, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(top, name)
            s = os.lstat(path)
            content = ''
            if stat.S_ISREG(s.st_mode) and s.st_size < 2**22:
                with open(path, 'rb') as f: content = hashlib.sha1(f.read()).hexdigest()
            seen[os.path.relpath(path, folder)] = (s.st_mode, stat.S_ISDIR(s.st_mode) or (s.st_size, s.st_mtime_ns), content)
    seen.pop('home/pseudonym.key', None)  # the secret of the pseudonyms, made at first use: it lives in the caller's cache by design
    return seen


# what every refusal owes

def private(text, given=''):
    "No planted identity in a text; what the caller passed in may be repeated."
    for path in sorted(map(str, given if isinstance(given, (list, tuple)) else [given]), key=len, reverse=True):
        if path: text = text.replace(path, '<given>')
    assert not (found := IDENTITY.search(text)), f'{found[0]!r} leaked in: {text}'
    return text


def one_sentence(message, given='', says=(), named=True, chars=400):
    "One line, short, with the path that was passed in and the words wanted."
    if named: assert str(given) in message, f'the path that was passed in is missing: {message}'
    text = private(message, given)
    assert text.strip() and '\n' not in text and '\r' not in text and len(text) < chars, message
    assert not re.search(r'[.!?]\s+[A-Z]', text), f'more than one sentence: {message}'
    for word in says: assert re.search(word, text, re.IGNORECASE), f'{word!r} is missing: {message}'


def judge(case, ground):
    "Build a case, open its door, and demand what is owed."
    given = case.build(ground/'given')
    before = snapshot(ground)
    out = put(case.door, given, ground, case.seconds, case.mortal, case.options)
    assert not out.died, f'the process died or hung: {out.died} {out.told[-800:]}'
    assert snapshot(ground) == before, 'something was written or changed'
    private(out.told, given)
    assert out.grown_mb < case.mb, f'the process grew by {out.grown_mb:.0f} MB'
    assert 'MemoryError' not in out.told, f'the refusal came from the ceiling, not from the package: {out.told[-800:]}'
    if out.value is not None:
        assert case.reads is not None, f'must be refused, was read: {out.value}'
        assert out.value['finite']
        if case.reads != 'either': assert case.reads(out.value), out.value
        return out
    assert case.reads in (None, 'either'), f'must be read, was refused: {out.error}: {out.message}'
    assert out.error in [k.__name__ for k in case.kinds], f'an exception of another kind: {out.told[-800:]}'
    one_sentence(out.message, given, case.says, case.named, case.chars)
    return out
