"Real connections to a server with the vices of real ones; processes killed in the middle; the Hub's own client against answers as the Hub gives them."
import hashlib
import io
import json
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sbldm_nb.download import DATASETS, Remote, attached, download, fetch, md5_of, remote_of, shown, unpack

PERSON = 'MILLER_ANNA'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        s = self.server.site
        s.asked.append(self.headers['Range'])
        if s.trouble:
            code, headers = s.trouble.pop(0)
            return self.answer(code, headers, b'no')
        if s.silence: time.sleep(s.silence.pop(0))
        first = int(re.match(r'bytes=(\d+)-', self.headers['Range'] or 'bytes=0-')[1])
        if not s.ranges or (s.heed and self.headers['If-Range'] != s.mark): first = 0
        body, headers = s.content[first:], {'ETag': s.mark} if s.mark else {}
        if first: headers['Content-Range'] = f'bytes {first}-{len(s.content) - 1}/{len(s.content)}'
        self.answer(206 if first else 200, headers, body, s.cut, s.pace)

    def answer(self, code, headers, body, cut=None, pace=0.):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k, v)
        if self.server.site.chunked: self.send_header('Transfer-Encoding', 'chunked')
        else: self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        try:
            for i in range(0, len(body[:cut]), 4096):
                piece = body[:cut][i:i + 4096]
                self.wfile.write(b'%x\r\n%s\r\n' % (len(piece), piece) if self.server.site.chunked else piece)
                self.server.site.sent += len(piece)
                if pace: time.sleep(pace)
            if self.server.site.chunked and cut is None: self.wfile.write(b'0\r\n\r\n')
        except OSError: pass
        if cut is not None: self.close_connection = True

    def log_message(self, *args): pass


class Site:
    def __init__(self):
        self.content, self.mark, self.ranges, self.heed, self.cut, self.pace = random.Random(1).randbytes(300_000), '"one"', True, True, None, 0.
        self.trouble, self.silence, self.asked, self.sent, self.chunked = [], [], [], 0, False
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads, self.server.site = True, self
        self.url = f'http://127.0.0.1:{self.server.server_port}/data.tar'
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()

    @property
    def md5(self): return hashlib.md5(self.content).hexdigest()


@pytest.fixture
def site():
    s = Site()
    yield s
    s.server.shutdown()
    s.server.server_close()


def quiet(line): pass


def tar_of(*members, kind=tarfile.REGTYPE, mode='w'):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as t:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content) if kind == tarfile.REGTYPE else 0, kind
            if kind != tarfile.REGTYPE: info.linkname = content.decode()
            t.addfile(info, io.BytesIO(content))
    return packed.getvalue()


# the table

def test_the_table_says_what_monai_says():
    apps = pytest.importorskip('monai.apps')
    ours = DATASETS['decathlon_brats']
    assert ours.where == apps.DecathlonDataset.resource['Task01_BrainTumour']
    assert ours.md5 == apps.DecathlonDataset.md5['Task01_BrainTumour']


@pytest.mark.parametrize('name', ['hf:../secrets', 'hf:a', 'kaggle:a/b/c', 'hf:.a/b', 'hf:a/../b', '', 'decathlon', 'https://x/y.tar', 'hf:a/b\n'])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match='is unknown'): remote_of(name)


# one file

@pytest.mark.parametrize('cut', [1, 4096, 100_001, 299_999])
def test_a_cut_line_costs_no_byte_twice(site, tmp_path, cut):
    site.content = site.content[:50_000] if cut == 4096 else site.content[:20] if cut == 1 else site.content
    site.cut = cut
    got = fetch(site.url, tmp_path/'f', site.md5, pause=.001, log=quiet)
    assert got.read_bytes() == site.content
    assert site.asked == [None] + [f'bytes={k}-' for k in range(cut, len(site.content), cut)]
    assert [p.name for p in tmp_path.iterdir()] == ['f']


@pytest.mark.parametrize('mark', ['', 'W/"weak"'])
def test_without_a_strong_mark_the_whole_is_asked_for(site, tmp_path, mark):
    site.mark, site.cut = mark, 100_000
    with pytest.raises(ConnectionError, match='2 times in a row'): fetch(site.url, tmp_path/'f', tries=2, pause=.001, log=quiet)
    assert set(site.asked) == {None} and not (tmp_path/'f').exists()
    site.cut = None
    assert fetch(site.url, tmp_path/'f', site.md5, log=quiet).read_bytes() == site.content


@pytest.mark.parametrize('heed', [True, False])
def test_a_file_that_changes_in_between_is_never_mixed(site, tmp_path, heed):
    site.cut, site.heed = 120_000, heed                            # False: a server that sends 206 whatever If-Range says
    with pytest.raises(ConnectionError): fetch(site.url, tmp_path/'f', tries=0, log=quiet)
    site.content, site.mark, site.cut = random.Random(2).randbytes(300_000), '"two"', None
    assert fetch(site.url, tmp_path/'f', pause=.001, log=quiet).read_bytes() == site.content


def test_a_file_that_got_shorter(site, tmp_path):
    site.cut = 200_000
    with pytest.raises(ConnectionError): fetch(site.url, tmp_path/'f', tries=0, log=quiet)
    site.content, site.mark, site.cut, site.trouble = b'short', '"two"', None, [(416, {})]
    assert fetch(site.url, tmp_path/'f', pause=.001, log=quiet).read_bytes() == b'short'


def test_what_lies_about_is_not_believed(site, tmp_path):
    for note in ('', '[]', '{"url": "http://else/x", "mark": "\\"one\\"", "size": 300000}', '{"url": 3}', 'x' * 9):
        (tmp_path/'f.part').write_bytes(b'old stump')
        (tmp_path/'f.part.json').write_text(note)
        assert fetch(site.url, tmp_path/'f', log=quiet).read_bytes() == site.content
        (tmp_path/'f').unlink()
    assert set(site.asked) == {None}


def test_all_came_but_the_process_ended_before_the_name(site, tmp_path):
    (tmp_path/'f.part').write_bytes(site.content)
    (tmp_path/'f.part.json').write_text(json.dumps(dict(url=site.url, mark=site.mark, size=len(site.content))))
    assert fetch(site.url, tmp_path/'f', site.md5, log=quiet).read_bytes() == site.content
    assert site.asked == []


def test_silence_counts_as_a_dead_line(site, tmp_path):
    site.silence, lines, begun = [3.], [], time.monotonic()
    assert fetch(site.url, tmp_path/'f', site.md5, timeout=.2, pause=.001, log=lines.append).read_bytes() == site.content
    assert time.monotonic() - begun < 2 and lines == ['f: nothing came for too long, trying again']


def test_a_slow_line_is_not_a_dead_one(site, tmp_path):
    site.content, site.pace = site.content[:60_000], .05
    assert fetch(site.url, tmp_path/'f', site.md5, timeout=.4, log=quiet).read_bytes() == site.content
    assert len(site.asked) == 1


def test_chunks_without_a_length(site, tmp_path):
    site.chunked, site.mark = True, ''
    assert fetch(site.url, tmp_path/'f', site.md5, log=quiet).read_bytes() == site.content
    site.cut = 100_000
    with pytest.raises(ConnectionError, match='2 times in a row'): fetch(site.url, tmp_path/'g', tries=2, pause=.001, log=quiet)
    assert not (tmp_path/'g').exists()


def test_the_server_says_when(site, tmp_path):
    site.trouble, begun = [(503, {'Retry-After': '1'})], time.monotonic()
    fetch(site.url, tmp_path/'f', pause=.001, log=quiet)
    assert 1 <= time.monotonic() - begun < 3


@pytest.mark.parametrize('code, kind', [(401, PermissionError), (403, PermissionError), (404, FileNotFoundError), (410, FileNotFoundError), (400, ValueError)])
def test_final_answers_are_not_tried_again(site, tmp_path, code, kind):
    site.trouble = [(code, {})]
    with pytest.raises(kind) as e: fetch(site.url + '?token=secret', tmp_path/'f', log=quiet)
    assert len(site.asked) == 1 and 'secret' not in str(e.value) and '\n' not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_nobody_there(tmp_path):
    for url in ('http://127.0.0.1:9/x', 'http://no-such-host.invalid/x'):
        with pytest.raises(ConnectionError, match='2 times in a row'): fetch(url, tmp_path/'f', tries=2, pause=.001, log=quiet)


def test_schemes(site, tmp_path):
    for url in (f'file://{__file__}', 'ftp://example.org/x', 'x', ''):
        with pytest.raises(ValueError, match='expected an address'): fetch(url, tmp_path/'f')
    site.trouble = [(302, {'Location': f'file://{__file__}'})]
    with pytest.raises((ConnectionError, ValueError)): fetch(site.url, tmp_path/'f', tries=1, pause=.001, log=quiet)
    assert not (tmp_path/'f').exists()


def certificate(folder):
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', folder/'key.pem', '-out', folder/'cert.pem', '-days', '2',
                    '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder/'cert.pem', folder/'key.pem')
    return context


def test_https_certificate_and_redirection_to_http(site, tmp_path, monkeypatch):
    try: context = certificate(tmp_path)
    except FileNotFoundError: pytest.skip('no openssl')
    safe = Site()
    safe.server.socket = context.wrap_socket(safe.server.socket, server_side=True)
    url = safe.url.replace('http://127.0.0.1', 'https://localhost')
    with pytest.raises(ConnectionError, match='certificate is not valid'): fetch(url, tmp_path/'f', log=quiet)
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path/'cert.pem'))
    assert fetch(url, tmp_path/'f', safe.md5, log=quiet).read_bytes() == safe.content
    safe.trouble = [(302, {'Location': site.url})]
    with pytest.raises(ValueError, match='not https'): fetch(url, tmp_path/'g', log=quiet)
    assert not (tmp_path/'g').exists()
    safe.server.shutdown()
    safe.server.server_close()


def test_a_full_disk_before_and_in_the_middle(site, tmp_path):
    with pytest.raises(OSError, match='needs 1000000000.30 GB|needs 10000000'): fetch(site.url, tmp_path/'f', room_after=10**18, log=quiet)
    code = ('import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n'
            f'from sbldm_nb.download import fetch; fetch({site.url!r}, {str(tmp_path/"g")!r})')
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert p.returncode and 'OSError' in p.stderr and not (tmp_path/'g').exists()
    assert len(site.asked) == 2                                    # a full disk is no reason to ask again
    assert fetch(site.url, tmp_path/'g', site.md5, log=quiet).read_bytes() == site.content
    assert site.asked[-1] == f'bytes={100_000}-'


def test_killed_again_and_again(site, tmp_path):
    site.pace = .004                                               # 300 kB in about .3 s
    code = f'from sbldm_nb.download import fetch; print("up", flush=True); fetch({site.url!r}, {str(tmp_path/"f")!r}, {site.md5!r})'
    chance, kills = random.Random(0), 0
    for _ in range(20):
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(chance.uniform(0, .15))
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
        if (tmp_path/'f').exists(): break
    assert fetch(site.url, tmp_path/'f', site.md5, log=quiet).read_bytes() == site.content
    assert [x.name for x in tmp_path.iterdir()] == ['f']
    starts = [int(r[6:-1]) if r else 0 for r in site.asked]
    assert kills >= 3 and starts == sorted(starts) and starts[-1] > 0


# archives

@pytest.mark.parametrize('name', ['../x', 'a/../../x', '/x', 'C:/x', 'a\\..\\x'])
def test_climbing_members(tmp_path, name):
    (tmp_path/'a.tar').write_bytes(tar_of((f'{PERSON}/t1', b'1'), (name, b'2')))
    with pytest.raises(ValueError, match='member 2 of the archive') as e: unpack(tmp_path/'a.tar', tmp_path/'in/out')
    assert PERSON not in str(e.value) and [p.name for p in tmp_path.iterdir()] == ['a.tar']


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path, kind):
    (tmp_path/'a.tar').write_bytes(tar_of((PERSON, b'/etc/passwd'), kind=kind))
    with pytest.raises(ValueError, match='member 1 of the archive is a link or a device'): unpack(tmp_path/'a.tar', tmp_path/'out')
    assert [p.name for p in tmp_path.iterdir()] == ['a.tar']


def test_every_truncation_is_noticed(tmp_path):
    whole = tar_of(('a/1', b'x'*2000), ('a/2', b'y'*2000))
    damaged = [whole[:cut] for cut in (0, 1, 511, 512, 513, 2000, 2560, 3000, 3500, 4000, 5000, 5120)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:] for at in (0, 130, 2560, 2700)]
    for content in damaged:
        (tmp_path/'a.tar').write_bytes(content)
        with pytest.raises(ValueError): unpack(tmp_path/'a.tar', tmp_path/'out')
        assert [p.name for p in tmp_path.iterdir()] == ['a.tar']


def test_a_compressed_bomb(tmp_path):
    (tmp_path/'a.tar').write_bytes(tar_of(('a', bytes(120 << 20)), mode='w:gz'))
    with pytest.raises(ValueError, match='swells'): unpack(tmp_path/'a.tar', tmp_path/'out')


def test_files_get_plain_rights(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as t:
        info = tarfile.TarInfo('a')
        info.mode = 0o6777
        t.addfile(info, io.BytesIO())
    (tmp_path/'a.tar').write_bytes(packed.getvalue())
    assert unpack(tmp_path/'a.tar', tmp_path/'out').joinpath('a').stat().st_mode & 0o7111 == 0


# a data set

def remote(site, **kw): return Remote('people', 'http', site.url, 'a test', site.md5, len(site.content), **kw)


def test_a_data_set_whole_or_not_at_all(site, tmp_path):
    site.content = tar_of(*[(f'set/{k}.nii.gz', bytes([k])*5000) for k in range(20)])
    site.cut, lines = 30_000, []
    got = download(remote(site), tmp_path, log=lines.append, pause=.001)
    assert got == tmp_path/'people' and len(list((got/'set').iterdir())) == 20
    assert [p.name for p in tmp_path.iterdir()] == ['people']
    assert all('\n' not in line for line in lines) and lines[0] == 'people: a test'
    asked = len(site.asked)
    assert download(remote(site), tmp_path, offline=True, log=quiet) == got and len(site.asked) == asked


def test_a_damaged_data_set_leaves_nothing_to_believe(site, tmp_path):
    site.content = tar_of(('../x', b'1'))
    for _ in range(2):
        with pytest.raises(ValueError, match='nothing was unpacked'): download(remote(site), tmp_path, log=quiet)
        assert not (tmp_path/'people').exists() and not (tmp_path/'x').exists()
    assert site.asked == [None, None]                              # the bad archive was not kept
    site.content = b'<html>log in</html>'
    wanted = Remote('people', 'http', site.url, 'a test', '0'*32)
    with pytest.raises(ValueError, match='md5'): download(wanted, tmp_path, log=quiet)


def test_killed_while_unpacking(site, tmp_path):
    site.content = tar_of(*[(f'set/{k}', bytes(200)) for k in range(3000)])
    code = ('from sbldm_nb.download import Remote, download\nprint("up", flush=True)\n'
            f'download({remote(site)!r}, {str(tmp_path)!r}, log=lambda line: print(line, flush=True))')
    for wait in (0., .02, .1):
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        for line in p.stdout:
            if 'unpacking' in line: break
        time.sleep(wait)
        p.kill()
        p.wait()
        done = tmp_path/'people'
        assert not done.exists() or len(list((done/'set').iterdir())) == 3000
    assert len(list((download(remote(site), tmp_path, log=quiet)/'set').iterdir())) == 3000
    assert [p.name for p in tmp_path.iterdir()] == ['people'] and len(site.asked) == 1


def test_two_at_once(site, tmp_path):
    site.content = tar_of(('set/a', bytes(100_000)))
    site.pace, results = .02, []
    def run():
        try: results.append(download(remote(site), tmp_path, log=quiet))
        except ValueError as e: results.append(str(e))
    first = threading.Thread(target=run)
    first.start()
    while not site.asked: time.sleep(.01)
    run()
    first.join()
    assert 'another process is fetching' in results[0] and results[1] == tmp_path/'people'


def test_offline_and_no_right_to_write(site, tmp_path):
    with pytest.raises(FileNotFoundError, match='offline was asked for'): download('decathlon_brats', tmp_path, offline=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): download(remote(site), tmp_path/'file', log=quiet)


# hubs

HUB = '''
import sys
from sbldm_nb.download import download
try: print('GOT', sorted(str(p.relative_to(sys.argv[1])) for p in download('hf:someone/brains', sys.argv[1], log=print).rglob('*')))
except Exception as e: print(type(e).__name__, e)
'''


class Hub(BaseHTTPRequestHandler):
    "Answers as the Hugging Face Hub does, as far as a small data set needs."
    files, sha, refuse = {'a.txt': b'first', 'sub/b.txt': b'second'}, 'a'*40, None

    def do_GET(self, body=True):
        if self.refuse: return self.say(self.refuse[0], b'{}', {'X-Error-Code': self.refuse[1], 'X-Error-Message': 'token=secret'}, body)
        path = self.path.partition('?')[0]
        if '/resolve/' in path:
            content = self.files[path.partition(self.sha + '/')[2]]
            return self.say(200, content, {'ETag': f'"{hashlib.sha1(content).hexdigest()}"', 'X-Repo-Commit': self.sha}, body)
        if '/tree/' in path:
            rows = [dict(type='file', path=n, size=len(c), oid=hashlib.sha1(c).hexdigest()) for n, c in self.files.items()]
            return self.say(200, json.dumps(rows).encode(), {}, body)
        info = dict(id='someone/brains', sha=self.sha, private=False, gated=False, disabled=False, downloads=0, likes=0, tags=[], siblings=[dict(rfilename=n) for n in self.files])
        self.say(200, json.dumps(info).encode(), {'X-Repo-Commit': self.sha}, body)

    def do_HEAD(self): self.do_GET(body=False)

    def say(self, code, content, headers, body):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k, v)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if body: self.wfile.write(content)

    def log_message(self, *args): pass


def ask_hub(tmp_path, refuse=None, code=HUB, **env):
    pytest.importorskip('huggingface_hub')
    handler = type('H', (Hub,), dict(refuse=refuse))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    env = {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path/'home'), 'HF_TOKEN': 'hf_secretsecret', **env}
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path/'out')], capture_output=True, text=True, env=env, timeout=100)
    server.shutdown()
    server.server_close()
    assert 'secret' not in p.stdout + p.stderr, p.stdout + p.stderr
    return p.stdout.strip().splitlines()[-1]


def test_hub_data_set_arrives(tmp_path):
    assert ask_hub(tmp_path) == "GOT ['someone_brains/a.txt', 'someone_brains/sub', 'someone_brains/sub/b.txt']"
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['someone_brains']


@pytest.mark.parametrize('refuse, said', [((403, 'GatedRepo'), 'PermissionError someone/brains: its owner wants the terms accepted'),
                                          ((401, ''), 'PermissionError someone/brains: the Hugging Face Hub does not know it, or wants an account'),
                                          ((404, 'RepoNotFound'), 'FileNotFoundError someone/brains: the Hugging Face Hub has no such data set')])
def test_hub_refuses(tmp_path, refuse, said):
    assert ask_hub(tmp_path, refuse).startswith(said)
    assert not (tmp_path/'out/someone_brains').exists()


def test_hub_out_of_reach(tmp_path):
    for env in (dict(HF_ENDPOINT='http://127.0.0.1:9'), dict(HF_HUB_OFFLINE='1')):
        assert ask_hub(tmp_path, **env).startswith('ConnectionError someone/brains: the Hugging Face Hub cannot be reached')


@pytest.mark.parametrize('package, name', [('kagglehub', 'brats2020'), ('huggingface_hub', 'hf:someone/brains')])
def test_a_package_that_is_missing(tmp_path, package, name):
    code = (f'import sys; sys.modules[{package!r}] = None\nfrom sbldm_nb.download import download\n'
            f'try: download({name!r}, sys.argv[1], log=print)\nexcept ValueError as e: print(e)')
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert p.stdout.strip().endswith(f'needs the package {package}; run pip install {package}'), p.stderr


def test_kaggle_without_a_network_or_an_account(tmp_path):
    pytest.importorskip('kagglehub')
    code = 'import sys\nfrom sbldm_nb.download import download\ntry: download("brats2020", sys.argv[1])\nexcept OSError as e: print(type(e).__name__, e)'
    env = {k: v for k, v in os.environ.items() if not k.startswith('KAGGLE')} | {'https_proxy': 'http://127.0.0.1:9', 'HOME': str(tmp_path/'home')}
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path/'out')], capture_output=True, text=True, env=env, timeout=100)
    assert p.stdout.strip().splitlines()[-1].startswith('ConnectionError awsaf49/brats20-dataset-training-validation: Kaggle cannot be reached'), p.stderr


def test_attached_to_a_kaggle_notebook(tmp_path, monkeypatch):
    inputs = tmp_path/'input/brats-2021-task1'
    inputs.mkdir(parents=True)
    (inputs/'BraTS2021_Training_Data.tar').write_bytes(tar_of(('BraTS2021_00000/BraTS2021_00000_t1.nii.gz', b'1')))
    assert attached('someone/brats-2021-task1', tmp_path/'input') == inputs
    monkeypatch.setattr(attached, '__defaults__', (tmp_path/'input',))
    got = download('brats2021', tmp_path/'out', offline=True, log=quiet)      # the tar inside is unpacked, the input stays as it is
    assert [str(p.relative_to(got)) for p in got.rglob('*.gz')] == ['BraTS2021_00000/BraTS2021_00000_t1.nii.gz']
    assert [p.name for p in inputs.iterdir()] == ['BraTS2021_Training_Data.tar'] and [p.name for p in (tmp_path/'out').iterdir()] == ['brats2021']


def test_addresses_without_secrets():
    assert shown('https://ann:pw@h:1/p/q.tar?X-Amz-Signature=1#f') == 'https://h:1/p/q.tar'


def test_md5_of(tmp_path):
    (tmp_path/'f').write_bytes(b'abc')
    assert md5_of(tmp_path/'f') == '900150983cd24fb0d6963f7d28e17f72'         # RFC 1321
