"Hostile archives: names that climb out, links, bombs, lies in the table of contents, damage in the members."
import os
import re
import stat
import struct
import zipfile
import zlib

import numpy as np
import pytest

from faults.build import SLICES, archive, dataset, dicom, gz, inner, nifti, write
from faults.harness import Table, judge, read_image, zip_members

names, contents = Table(), Table()  # refused from the table of contents alone; refused when the members are read

HONEST = {f'DOE_JANE/1/{inner(k)}': dicom(dataset(k)) for k in range(SLICES)}


def with_member(here, name, content=b'MRN-4711', **info):
    "An honest archive with one member more."
    member = zipfile.ZipInfo(name)
    for key, value in info.items(): setattr(member, key, value)
    return archive(here/'case.zip', [*HONEST.items(), (member, content)])


def patched(path, local=(), central=(), which=-1):
    "Overwrite fields of one member's local header and of its line in the table of contents: (offset, format, value)."
    raw = bytearray(path.read_bytes())
    for mark, fields in ((b'PK\3\4', local), (b'PK\1\2', central)):
        at = [m.start() for m in re.finditer(re.escape(mark), raw)][which]
        for offset, fmt, value in fields: struct.pack_into('<' + fmt, raw, at + offset, value)
    return write(path, raw)


def table_only(path, members):
    "An archive of (name, declared bytes, stored bytes, where) lines whose members are not there; where >= 2**32 needs the long form."
    lines = []
    for name, size, stored, where in members:
        name, extra = name.encode(), b''
        if size >= 2**32 or stored >= 2**32:
            extra = struct.pack('<HHQQ', 1, 16, size, stored)
            size = stored = 2**32 - 1
        lines.append(struct.pack('<4sHHHHHHIIIHHHHHII', b'PK\1\2', 20, 45, 0, 8, 0, 33, 0, stored, size, len(name), len(extra), 0, 0, 0, 0, where) + name + extra)
    body = b''.join(lines)
    head = b'PK\3\4' + bytes(60)
    n = min(len(lines), 65535)
    return write(path, head + body + struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, n, n, len(body), len(head), 0))


# honest

@names(zip_members, reads=lambda v: v['items'] == SLICES)
def unhurt(here): return archive(here/'case.zip', HONEST)

@contents(read_image, reads=lambda v: v['shape'] == [12, 10, SLICES])
def unhurt_and_read(here): return archive(here/'case.zip', HONEST)

@contents(read_image, reads=lambda v: v['shape'] == [12, 10, SLICES])
def ending_in_capitals(here): return archive(here/'CASE.ZIP', HONEST)

@contents(read_image, reads=lambda v: v['shape'] == [12, 10, SLICES])
def litter_of_a_mac(here):
    litter = {f'__MACOSX/DOE_JANE/1/._{inner(0)}': b'\0\5\x16\7' + bytes(100), 'DOE_JANE/.DS_Store': bytes(50), 'DOE_JANE/1/': b''}
    return archive(here/'case.zip', {**litter, **HONEST})

@contents(read_image, reads=lambda v: v['shape'] == [12, 10, SLICES])
def words_before_the_archive(here): return write(here/'case.zip', b'#!/bin/sh\n' + archive(here/'b.zip', HONEST).read_bytes())

@contents(read_image, reads=lambda v: v['shape'] == [12, 10, SLICES])
def names_in_many_scripts(here):
    return archive(here/'case.zip', {f'Größe/脳 🧠/\u202egpj.{k}': v for k, v in enumerate(HONEST.values())})

@contents(read_image, reads=lambda v: v['shape'] == [12, 10, SLICES])
def names_of_60000_bytes(here): return archive(here/'case.zip', {'DOE'*20000 + str(k): v for k, v in enumerate(HONEST.values())})


# not an archive

@names(zip_members, 'zip')
def empty(here): return write(here/'case.zip', b'')

@names(zip_members, 'zip')
def text_named_zip(here): return write(here/'case.zip', b'DOE^JANE;MRN-4711\n'*50)

@names(zip_members, 'zip')
def gzip_named_zip(here): return write(here/'case.zip', gz(nifti()))

@names(zip_members, kinds=(FileNotFoundError, ValueError))
def missing(here): return here/'case.zip'

@names(zip_members, kinds=(FileNotFoundError, ValueError, OSError))
def name_of_300_bytes(here): return here/('n'*300 + '.zip')

@names(zip_members, kinds=(FileNotFoundError, ValueError))
def named_pipe(here):
    os.mkfifo(here/'case.zip')
    return here/'case.zip'

@names(zip_members, 'zip')
def cut_in_half(here):
    raw = archive(here/'case.zip', HONEST).read_bytes()
    return write(here/'case.zip', raw[:len(raw)//2])

@names(zip_members, 'zip')
def last_byte_missing(here): return write(here/'case.zip', archive(here/'case.zip', HONEST).read_bytes()[:-1])

@names(zip_members, 'zip')
def table_of_contents_damaged(here):
    raw = archive(here/'case.zip', HONEST).read_bytes()
    return write(here/'case.zip', raw.replace(b'PK\1\2', b'PK\7\7'))

@names(zip_members, 'zip')
def table_of_contents_far_beyond_the_end(here):
    raw = bytearray(archive(here/'case.zip', HONEST).read_bytes())
    struct.pack_into('<I', raw, raw.rindex(b'PK\5\6') + 12, 2**31)
    return write(here/'case.zip', raw)

@names(zip_members, 'no file')
def no_members(here): return archive(here/'case.zip', {})

@names(zip_members, 'no file')
def folders_alone(here): return archive(here/'case.zip', {'DOE_JANE/': b'', 'DOE_JANE/1/': b''})

@names(zip_members, 'no file')
def litter_alone(here): return archive(here/'case.zip', {'__MACOSX/._DOE': b'x', '.DS_Store': b'x'})

@names(zip_members, "'2'|folder", inside='2')
def folder_that_is_not_inside(here): return archive(here/'case.zip', HONEST)

@names(zip_members, inside='../1')
def folder_above_the_archive(here): return archive(here/'case.zip', HONEST)


# names that climb out

@names(zip_members, 'absolute|path', r'\b(1|7) of 7')
def absolute_name(here): return with_member(here, str(here.parent/'slipped_DOE_JANE.dcm'))

@names(zip_members, r'\.\.', '7')
def zip_slip(here): return with_member(here, '../../slipped_DOE_JANE.dcm')

@names(zip_members, r'\.\.', '7')
def zip_slip_in_the_middle(here): return with_member(here, 'DOE_JANE/../../../slipped.dcm')

@names(zip_members, '7')
def zip_slip_with_backslashes(here): return with_member(here, '..\\..\\slipped_DOE_JANE.dcm')

@names(zip_members, '7')
def drive_letter(here): return with_member(here, 'C:/slipped_DOE_JANE.dcm')

@names(zip_members, '7')
def share_of_a_network(here): return with_member(here, '//clinic/DOE_JANE/slipped.dcm')

@names(zip_members)
def nul_in_a_name(here):
    path = with_member(here, 'DOE_JANE/evilXdcm')
    return write(path, path.read_bytes().replace(b'evilXdcm', b'evil\0dcm'))

@names(zip_members, reads='either')
def newline_in_a_name(here): return with_member(here, 'DOE\nJANE/Traceback: 1.dcm')

@names(zip_members, 'link', '7')
def symlink_to_a_secret(here):
    write(here/'secret.txt', b'MRN-4711')
    return with_member(here, 'DOE_JANE/link.dcm', str(here/'secret.txt').encode(), external_attr=(stat.S_IFLNK | 0o777) << 16)

@names(zip_members, 'link|device', '7')
def device_as_a_member(here): return with_member(here, 'DOE_JANE/zero.dcm', b'', external_attr=(stat.S_IFCHR | 0o666) << 16)

@names(zip_members, 'same name')
def two_members_of_one_name(here):
    one, other = inner(0), 'x'*len(inner(0))
    path = archive(here/'case.zip', {**HONEST, f'DOE_JANE/1/{other}': b'MRN-4711'})
    return write(path, path.read_bytes().replace(other.encode(), one.encode()))


# members that cannot be read

@names(zip_members, 'encrypted', '6 of 6')
def encrypted(here): return patched(archive(here/'case.zip', HONEST), [(6, 'H', 1)], [(8, 'H', 1)])

@names(zip_members, 'method|compress', '6 of 6')
def unknown_compression(here): return patched(archive(here/'case.zip', HONEST), [(8, 'H', 99)], [(10, 'H', 99)])

@names(zip_members, 'archive|zip')
def nested_zips_alone(here):
    nested = archive(here/'inner.zip', HONEST).read_bytes()
    return archive(here/'case.zip', {'DOE_JANE/1.zip': nested, 'DOE_JANE/2.zip': nested})

@names(zip_members)
def a_zip_within_itself(here):
    "Forty-two archives deep by name alone: nothing is unpacked, so nothing explodes."
    raw = archive(here/'b.zip', {'DOE.zip': bytes(10)}).read_bytes()
    for _ in range(42): raw = archive(here/'b.zip', {'DOE.zip': raw}).read_bytes()
    return write(here/'case.zip', raw)


# bombs

@names(zip_members, 'declare', mb=60)
def bomb_of_4_gib(here):
    "One deflated block of 64 MiB of zeros, named by 64 lines of the table."
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = pack.compress(bytes(2**26)) + pack.flush()
    head = struct.pack('<4sHHHHHIIIHH', b'PK\3\4', 20, 0, 8, 0, 33, zlib.crc32(bytes(2**26)), len(body), 2**26, 4, 0) + b'DOE0'
    lines = b''.join(struct.pack('<4sHHHHHHIIIHHHHHII', b'PK\1\2', 20, 20, 0, 8, 0, 33, zlib.crc32(bytes(2**26)), len(body), 2**26, 4, 0, 0, 0, 0, 0, 0)
                     + f'DO{k:02d}'.encode() for k in range(64))
    return write(here/'case.zip', head + body + lines + struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, 64, 64, len(lines), len(head + body), 0))

@names(zip_members, 'declare', mb=60)
def declares_a_petabyte(here): return table_only(here/'case.zip', [('DOE.dcm', 2**50, 2**49, 0)])

@names(zip_members, 'member', '100')
def two_hundred_thousand_members(here): return table_only(here/'case.zip', [(f'{k:x}', 1, 1, 0) for k in range(200_000)])

@names(zip_members, 'member', mb=150, seconds=20)
def a_million_members_in_a_table_of_50_mb(here):
    line = struct.pack('<4sHHHHHHIIIHHHHHII', b'PK\1\2', 20, 20, 0, 8, 0, 33, 0, 1, 1, 4, 0, 0, 0, 0, 0, 0)
    keys = np.arange(1_000_000, dtype='<u4').view(np.uint8).reshape(-1, 4)
    body = np.concatenate([np.broadcast_to(np.frombuffer(line, np.uint8), (len(keys), len(line))), 1 + keys % 100], 1).tobytes()
    return write(here/'case.zip', body + struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, 65535, 65535, len(body), 0, 0))


# damage that shows when members are read: the same sentence, nothing read

@contents(read_image)
def member_with_a_wrong_checksum(here): return patched(archive(here/'case.zip', HONEST), [(14, 'I', 1)], [(16, 'I', 1)])

@contents(read_image)
def member_with_damaged_bytes(here):
    path = archive(here/'case.zip', HONEST)
    raw = bytearray(path.read_bytes())
    at = raw.index(b'PK\3\4', len(raw)//2) + 120
    raw[at:at + 40] = bytes(40)
    return write(path, raw)

@contents(read_image)
def member_longer_than_declared(here): return patched(archive(here/'case.zip', HONEST), [(22, 'I', 200)], [(24, 'I', 200)])

@contents(read_image)
def member_shorter_than_declared(here): return patched(archive(here/'case.zip', HONEST), [(22, 'I', 90000)], [(24, 'I', 90000)])

@contents(read_image)
def member_whose_place_is_another(here): return patched(archive(here/'case.zip', HONEST), (), [(42, 'I', 7)])

@contents(read_image)
def member_beyond_the_end(here): return patched(archive(here/'case.zip', HONEST), (), [(42, 'I', 2**31)])

@contents(read_image, mb=150)
def bomb_that_declares_little(here):
    "The table says 5000 bytes, the stream goes on for 256 MiB."
    path = archive(here/'case.zip', {**HONEST, 'DOE_JANE/1/zz.dcm': bytes(2**28)})
    return patched(path, [(22, 'I', 5000)], [(24, 'I', 5000)])

@contents(read_image, mb=200)
def member_of_90_mib_of_zeros(here): return archive(here/'case.zip', {'DOE_JANE/1/zz.dcm': bytes(90 << 20)})

@contents(read_image)
def members_that_are_no_images(here): return archive(here/'case.zip', {'DOE_JANE/report.txt': b'MRN-4711', 'JANE.pdf': b'%PDF-1.4'})

@contents(read_image)
def members_of_no_bytes(here): return archive(here/'case.zip', dict.fromkeys(HONEST, b''))

@contents(read_image, 'series|folder|1', named=False)
def folder_inside_that_is_missing(here): return archive(here/'case.zip', HONEST)/'2'

@contents(read_image, named=False)
def folder_inside_that_climbs_out(here): return f'{archive(here/"case.zip", HONEST)}/../../etc'

@contents(read_image)
def a_folder_named_zip(here):
    (here/'case.zip').mkdir()
    return here/'case.zip'


@pytest.mark.parametrize('case', names, ids=lambda c: c.name)
def test_table_of_contents(case, ground): judge(case, ground)


@pytest.mark.parametrize('case', contents, ids=lambda c: c.name)
def test_members(case, ground): judge(case, ground)
