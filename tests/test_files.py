"Keys made by several processes at once, hostile archives, drives that do not answer: what does not fit into the page of `000_files`."
import multiprocessing
import os
import stat
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from sbldm_nb.files import (cache_dir, in_time, is_bomb, key_fingerprint, patient_of, pseudonym, read_member, split_zip,
                            zip_members)

NAME = 'MILLER_ANNA_1961'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SBLDM_CACHE', str(tmp_path/'cache'))
    monkeypatch.delenv('SBLDM_ID_KEY', raising=False)


# pseudonyms

def test_processes_that_start_together_agree_on_one_key(tmp_path):
    code = 'from sbldm_nb.files import *; print(pseudonym("a"), key_fingerprint())'
    running = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = {p.communicate(timeout=60)[0] for p in running}
    assert len(said) == 1 and said == {f'{pseudonym("a")} {key_fingerprint()}\n'}
    assert [p.name for p in cache_dir().iterdir()] == ['pseudonym.key']
    assert stat.S_IMODE((cache_dir()/'pseudonym.key').stat().st_mode) == 0o600


def test_a_damaged_key_is_refused_and_not_replaced():
    pseudonym('a')
    key = cache_dir()/'pseudonym.key'
    key.write_text(key.read_text()[:40])
    with pytest.raises(ValueError, match='the key is damaged'): pseudonym('a')
    assert len(key.read_text()) == 40


def test_key_from_the_environment_leaves_no_file(monkeypatch):
    monkeypatch.setenv('SBLDM_ID_KEY', 'x'*16)
    assert pseudonym('Müller, 7') == pseudonym('Müller, 7') != pseudonym('Muller, 7')
    assert not cache_dir().exists()


def test_time_points_of_one_patient_are_one_patient():
    names = [f'BraTS-GLI-00005-00{t}-{m}.nii.gz' for t in range(3) for m in ('t1n', 'seg', 'mask-healthy', 't1n-voided-0001')]
    assert {patient_of(n) for n in names} == {'BraTS-GLI-00005'}
    assert patient_of('BraTS-GLI-00050-000-t1n.nii.gz') == 'BraTS-GLI-00050'
    assert patient_of('BraTS20_Validation_125_flair.nii') == 'BraTS20_Validation_125'
    assert {patient_of(f'UPENN-GBM-00001_{n}1_{m}.nii.gz') for n in '12' for m in ('T1', 'segm')} == {'UPENN-GBM-00001'}
    assert {patient_of(f'BraTS-MEN-RT-0001-{n}_t1c.nii.gz') for n in '12'} == {'BraTS-MEN-RT-0001'}


def test_a_name_that_is_no_valid_text_has_a_pseudonym():
    assert pseudonym(os.fsdecode(b'DOE\xff')) == pseudonym(os.fsdecode(b'DOE\xff')) != pseudonym(os.fsdecode(b'DOE\xfe'))


# archives

def archive(path, members, mode=0, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', method) as z:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            z.writestr(info, content)
    return path


def refused(path, cause, inside=''):
    with pytest.raises(ValueError) as e: zip_members(path, inside)
    said = str(e.value)
    assert cause in said and said.startswith(str(path)) and '\n' not in said and NAME not in said


@pytest.mark.parametrize('name, cause', [
    (f'/{NAME}', 'absolute'), (f'../{NAME}', "by '..'"), (f'a/../../{NAME}', "by '..'"), (f'..\\{NAME}', 'foreign path'),
    (f'C:{NAME}', 'foreign path')])
def test_names_that_leave_the_archive(tmp_path, name, cause):
    refused(archive(tmp_path/'x.zip', {'a': b'1', name: b'2'}), cause)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.zip']


@pytest.mark.parametrize('kind', [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_links_and_devices(tmp_path, kind): refused(archive(tmp_path/'x.zip', {NAME: b'/etc/passwd'}, kind | 0o777), 'is a link or a device')


def test_encrypted_and_foreign_methods(tmp_path):
    raw = bytearray(archive(tmp_path/'x.zip', {NAME: b'1'*50}).read_bytes())
    at = raw.index(b'PK\1\2')
    raw[at + 8] |= 1
    (tmp_path/'y.zip').write_bytes(raw)
    refused(tmp_path/'y.zip', 'is encrypted')
    refused(archive(tmp_path/'z.zip', {NAME: b'1'*50}, method=zipfile.ZIP_LZMA), 'another method than deflate')


def test_bombs_by_ratio_by_size_and_by_overlap(tmp_path):
    refused(archive(tmp_path/'ratio.zip', {NAME: bytes(110 << 20)}), '200 : 1')
    raw = bytearray(archive(tmp_path/'x.zip', {NAME: b'1'}).read_bytes())
    at = raw.index(b'PK\1\2')
    raw[at + 24:at + 28] = struct.pack('<I', (4 << 30) - 2)
    (tmp_path/'declared.zip').write_bytes(raw)
    refused(tmp_path/'declared.zip', '4095 MiB declared')
    one = archive(tmp_path/'one.zip', {NAME: os.urandom(1 << 20)}).read_bytes()    # 300 table entries that share one body
    at, end = one.index(b'PK\1\2'), one.index(b'PK\5\6')
    entry, n = one[at:end], 300
    named = [bytearray(entry.replace(NAME.encode(), f'{k:016d}'.encode())) for k in range(n)]
    tail = bytearray(one[end:])
    tail[8:12], tail[12:16] = struct.pack('<HH', n, n), struct.pack('<I', n*len(entry))
    (tmp_path/'overlap.zip').write_bytes(one[:at] + b''.join(named) + tail)
    refused(tmp_path/'overlap.zip', '300 MiB declared by 10')
    assert not is_bomb(100 << 20, 1) and not is_bomb(200 << 20, 2 << 20)


def test_a_table_that_is_longer_than_any_honest_one(tmp_path):
    whole = archive(tmp_path/'x.zip', {NAME: b'1'}).read_bytes()
    at, end = whole.index(b'PK\1\2'), whole.index(b'PK\5\6')
    n = (17 << 20)//(end - at)
    tail = bytearray(whole[end:])
    tail[8:12], tail[12:16] = struct.pack('<HH', 65535, 65535), struct.pack('<I', n*(end - at))
    (tmp_path/'long.zip').write_bytes(whole[:at] + whole[at:end]*n + tail)
    refused(tmp_path/'long.zip', 'its table of members is longer than 16 MiB')


def test_not_a_zip_cut_short_empty_and_nested(tmp_path):
    whole = archive(tmp_path/'x.zip', {f'{NAME}/{k}': os.urandom(100) for k in range(9)}).read_bytes()
    for n in (0, 1, 30, len(whole)//2, len(whole) - 1):
        (tmp_path/'cut.zip').write_bytes(whole[:n])
        refused(tmp_path/'cut.zip', 'not a readable zip archive')
    refused(archive(tmp_path/'empty.zip', {}), 'holds no files')
    refused(archive(tmp_path/'nested.zip', {f'{NAME}.zip': whole}), 'only 1 further archives')
    refused(tmp_path/'x.zip', 'no files in the folder', inside='other')
    refused(archive(tmp_path/'nameless.zip', {'': b'1'}), 'has no name')
    with pytest.raises(FileNotFoundError, match='no such file'): zip_members(tmp_path/'gone.zip')


def test_random_damage_is_refused_or_read_right(tmp_path):
    import random
    rng, content = random.Random(0), {f'{NAME}/{k}': os.urandom(60) for k in range(4)}
    whole = archive(tmp_path/'x.zip', content).read_bytes()
    path, kept = tmp_path/'y.zip', 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])): raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            members = zip_members(path)
            with zipfile.ZipFile(path) as z: read = [read_member(z, m) for m in members]
        except ValueError as e: assert NAME not in str(e)
        else:
            kept += 1
            assert set(read) <= set(content.values())
    assert kept


def test_split_zip(tmp_path):
    case = archive(tmp_path/'case.ZIP', {'a': b''})
    (tmp_path/'folder.zip').mkdir()
    assert split_zip(f'{case}/1/2') == (case, '1/2') and split_zip(case) == (case, '')
    assert split_zip(tmp_path/'folder.zip/1') is None and split_zip(tmp_path/'gone.zip/1') is None


# waiting

def test_in_time_keeps_the_order_and_passes_errors_at_their_turn():
    def fail(): raise KeyError('third')
    seen = []
    with pytest.raises(KeyError, match='third'):
        for x in in_time([lambda: 1, lambda: 2, fail, lambda: 4], 5, str): seen.append(x)
    assert seen == [1, 2]
    assert list(in_time([], 5, str)) == []


def test_a_consumer_that_leaves_early_ends_the_thread():
    import threading
    before, started = threading.active_count(), []
    def job(): started.append(1); return bytes(10)
    results = in_time([job]*1000, 5, str)
    next(results)
    results.close()
    deadline = time.time() + 5
    while threading.active_count() > before and time.time() < deadline: time.sleep(.01)
    assert threading.active_count() == before and len(started) < 20


def _reads_a_pipe(path):
    try: list(in_time([path.read_bytes], .2, lambda k: f'{path} (file {k + 1} of 1)'))
    except TimeoutError as e: sys.exit(0 if str(e) == f'{path} (file 1 of 1) could not be read within 0.2 s' else 1)


def test_a_process_with_a_blocked_reader_still_ends(tmp_path):
    os.mkfifo(tmp_path/'asleep')
    p = multiprocessing.get_context('spawn').Process(target=_reads_a_pipe, args=(Path(tmp_path/'asleep'),))
    p.start()
    p.join(30)
    assert p.exitcode == 0
