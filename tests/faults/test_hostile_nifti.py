"Hostile NIfTI: what a disk, a network, a wrong tool or a malicious sender makes of a volume."
import os
import struct

import numpy as np
import pytest

from faults.build import SHAPE, VOXELS, gz, nifti, png, write, zeros_gz
from faults.harness import Table, judge, put, read_image

hostile = Table()


def volume_sum(value): return value['shape'] == list(SHAPE) and value['sum'] == float(VOXELS.sum())


# the unhurt file is read, so that every refusal below is the hurt's doing

@hostile(read_image, reads=volume_sum)
def unhurt_nii(here): return write(here/'t1.nii', nifti())

@hostile(read_image, reads=volume_sum)
def unhurt_nii_gz(here): return write(here/'t1.nii.gz', gz(nifti()))

@hostile(read_image, reads=volume_sum)
def unhurt_nifti_2(here): return write(here/'t1.nii', nifti(version=2))

@hostile(read_image, reads=volume_sum)
def unicode_name(here): return write(here/'Größe 脳 🧠 t1.nii.gz', gz(nifti()))

@hostile(read_image, reads=volume_sum)
def name_of_255_bytes(here): return write(here/('n'*248 + '.nii.gz'), gz(nifti()))

@hostile(read_image, reads=volume_sum)
def name_with_quotes_and_spaces(here): return write(here/'''a 'b' "c" $(d) ; e.nii''', nifti())


# no file, or not a file

@hostile(read_image, 'no such', kinds=(FileNotFoundError,))
def missing(here): return here/'t1.nii.gz'

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def below_a_file(here): return write(here/'t1.nii', nifti())/'t1.nii'

@hostile(read_image, kinds=(FileNotFoundError, ValueError, OSError))
def name_of_300_bytes(here): return here/('n'*300 + '.nii')

@hostile(read_image, kinds=(FileNotFoundError, ValueError), named=False)
def nul_in_the_name(here): return str(here/'t1\0.nii')

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def a_folder_named_nii(here):
    (here/'t1.nii.gz').mkdir()
    return here/'t1.nii.gz'

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def dangling_link(here):
    (here/'t1.nii').symlink_to(here/'nowhere.nii')
    return here/'t1.nii'

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def link_to_itself(here):
    (here/'t1.nii').symlink_to(here/'t1.nii')
    return here/'t1.nii'

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def named_pipe_nobody_writes_to(here):
    os.mkfifo(here/'t1.nii')
    return here/'t1.nii'

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def link_to_an_endless_device(here):
    (here/'t1.nii').symlink_to('/dev/zero')
    return here/'t1.nii'

@hostile(read_image, kinds=(ValueError, PermissionError), mortal=True)
def file_nobody_may_read(here):
    path = write(here/'t1.nii', nifti())
    path.chmod(0)
    return path


# wrong endings

@hostile(read_image, 'nii')
def ending_txt(here): return write(here/'t1.txt', nifti())

@hostile(read_image, 'nii')
def no_ending(here): return write(here/'t1', nifti())

@hostile(read_image)
def plain_bytes_named_gz(here): return write(here/'t1.nii.gz', nifti())

@hostile(read_image)
def gzip_named_nii(here): return write(here/'t1.nii', gz(nifti()))

@hostile(read_image)
def picture_named_nii(here): return write(here/'t1.nii', png())

@hostile(read_image)
def text_named_nii(here): return write(here/'t1.nii', b'DOE^JANE;MRN-4711\n'*100)

@hostile(read_image)
def page_of_a_login_named_nii_gz(here): return write(here/'t1.nii.gz', b'<!doctype html><title>403 JANE</title>')


# cut and damaged

@hostile(read_image, 'empty')
def empty(here): return write(here/'t1.nii', b'')

@hostile(read_image, 'empty')
def empty_gz(here): return write(here/'t1.nii.gz', b'')

@hostile(read_image)
def empty_inside_gz(here): return write(here/'t1.nii.gz', gz(b''))

@hostile(read_image)
def cut_in_the_header(here): return write(here/'t1.nii', nifti()[:200])

@hostile(read_image)
def header_alone(here): return write(here/'t1.nii', nifti()[:352])

@hostile(read_image)
def last_byte_missing(here): return write(here/'t1.nii', nifti()[:-1])

@hostile(read_image)
def gzip_cut_in_half(here):
    raw = gz(nifti(np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)))
    return write(here/'t1.nii.gz', raw[:len(raw)//2])

@hostile(read_image)
def gzip_without_its_last_eight_bytes(here): return write(here/'t1.nii.gz', gz(nifti())[:-8])

@hostile(read_image)
def gzip_with_a_wrong_checksum(here):
    raw = bytearray(gz(nifti()))
    raw[-8] ^= 255
    return write(here/'t1.nii.gz', raw)

@hostile(read_image)
def gzip_damaged_in_the_middle(here):
    raw = bytearray(gz(nifti(np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16))))
    raw[len(raw)//2:len(raw)//2 + 64] = bytes(64)
    return write(here/'t1.nii.gz', raw)

@hostile(read_image)
def bytes_of_nothing(here): return write(here/'t1.nii', bytes(5000))

@hostile(read_image)
def bytes_of_noise(here): return write(here/'t1.nii', np.random.default_rng(0).bytes(5000))


# values

def voxels(value, dtype=np.float32):
    data = VOXELS.astype(dtype)
    data[1, 2, 3] = value
    return nifti(data)

@hostile(read_image, 'nan', '1 of 120')
def one_nan(here): return write(here/'t1.nii', voxels(np.nan))

@hostile(read_image, 'infinit', '1 of 120')
def one_infinity(here): return write(here/'t1.nii.gz', gz(voxels(-np.inf)))

@hostile(read_image, 'nan')
def nothing_but_nan(here): return write(here/'t1.nii', nifti(np.full(SHAPE, np.nan, np.float32)))

@hostile(read_image)
def doubles_beyond_float32(here): return write(here/'t1.nii', voxels(1e300, np.float64))

@hostile(read_image)
def slope_that_overflows(here): return write(here/'t1.nii', nifti(scl_slope=3e38, scl_inter=0))

@hostile(read_image)
def intercept_that_is_not_finite(here): return write(here/'t1.nii', nifti(scl_slope=1, scl_inter=np.nan))

@hostile(read_image, 'complex|real')
def complex_voxels(here): return write(here/'t1.nii', nifti(VOXELS.astype(np.complex64)))

@hostile(read_image, 'rgb|real|colour')
def colour_voxels(here):
    rgb = np.zeros(SHAPE, [('R', 'u1'), ('G', 'u1'), ('B', 'u1')])
    return write(here/'t1.nii', nifti(rgb))

@hostile(read_image)
def type_code_that_does_not_exist(here): return write(here/'t1.nii', nifti(datatype=3471))


# geometry

def sform(**rows): return nifti(sform_code=1, qform_code=0, **rows)

@hostile(read_image, 'affine|spacing|place')
def singular_affine(here): return write(here/'t1.nii', sform(srow_x=[2, 0, 0, 0], srow_y=[4, 0, 0, 0], srow_z=[0, 0, 3, 0]))

@hostile(read_image, 'affine|spacing|place')
def affine_of_zeros(here): return write(here/'t1.nii', sform(srow_x=np.zeros(4), srow_y=np.zeros(4), srow_z=np.zeros(4)))

@hostile(read_image, 'affine|spacing|place')
def affine_with_nan(here): return write(here/'t1.nii', sform(srow_x=[np.nan, 0, 0, 0]))

@hostile(read_image, 'affine|spacing|place')
def affine_so_large_it_overflows(here): return write(here/'t1.nii', sform(srow_x=[3e38, 0, 0, 3e38], srow_y=[0, 3e38, 0, 3e38], srow_z=[0, 0, 3e38, 0]))

@hostile(read_image, 'affine|spacing|place')
def affine_so_small_it_vanishes(here): return write(here/'t1.nii', sform(srow_x=[1e-30, 0, 0, 0], srow_y=[0, 1e-30, 0, 0], srow_z=[0, 0, 1e-30, 0]))

@hostile(read_image, 'affine|spacing|place|orientation|guess')
def zero_spacing(here): return write(here/'t1.nii', nifti(sform_code=0, qform_code=1, pixdim=[1, 0, 0, 0, 0, 0, 0, 0]))

@hostile(read_image, reads='either')
def negative_spacing(here): return write(here/'t1.nii', nifti(sform_code=0, qform_code=1, pixdim=[1, -2, -2, -2, 0, 0, 0, 0]))

@hostile(read_image)
def spacing_that_is_not_a_number(here): return write(here/'t1.nii', nifti(sform_code=0, qform_code=1, pixdim=[1, np.nan, 2, 2, 0, 0, 0, 0]))

@hostile(read_image)
def quaternion_out_of_range(here): return write(here/'t1.nii', nifti(sform_code=0, qform_code=1, quatern_b=5, quatern_c=-7))

@hostile(read_image, 'metre|unit')
def metres(here): return write(here/'t1.nii', nifti(xyzt_units=1))


# shapes

@hostile(read_image, mb=60)
def declares_35_terabytes_in_a_file_of_600_bytes(here):
    return write(here/'t1.nii', nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1], datatype=4, bitpix=16))

@hostile(read_image, mb=60)
def declares_2_to_the_120_voxels_in_nifti_2(here):
    return write(here/'t1.nii', nifti(version=2, dim=[3, 2**40, 2**40, 2**40, 1, 1, 1, 1]))

@hostile(read_image, mb=60)
def declares_two_gigabytes_in_a_gz_of_100_bytes(here):
    return write(here/'t1.nii.gz', gz(nifti(dim=[3, 1024, 1024, 1024, 1, 1, 1, 1], datatype=4, bitpix=16)))

@hostile(read_image)
def axis_of_no_length(here): return write(here/'t1.nii', nifti(dim=[3, 6, 0, 4, 1, 1, 1, 1]))

@hostile(read_image)
def axis_of_negative_length(here): return write(here/'t1.nii', nifti(dim=[3, 6, -5, 4, 1, 1, 1, 1]))

@hostile(read_image)
def no_axes(here): return write(here/'t1.nii', nifti(dim=[0, 6, 5, 4, 1, 1, 1, 1]))

@hostile(read_image)
def eight_axes(here): return write(here/'t1.nii', nifti(dim=[8, 6, 5, 4, 1, 1, 1, 1]))

@hostile(read_image, '2|volume')
def several_volumes_and_none_chosen(here): return write(here/'t1.nii', nifti(np.stack([VOXELS, VOXELS], 3)))

@hostile(read_image, '2|volume', volume=2)
def volume_that_is_not_there(here): return write(here/'t1.nii', nifti(np.stack([VOXELS, VOXELS], 3)))

@hostile(read_image, '2|volume', volume=-1)
def volume_counted_from_the_end(here): return write(here/'t1.nii', nifti(np.stack([VOXELS, VOXELS], 3)))

@hostile(read_image)
def vectors_in_a_fifth_axis(here): return write(here/'t1.nii', nifti(np.stack([VOXELS]*3, 3)[..., None, :]))

@hostile(read_image)
def data_begins_beyond_the_end(here): return write(here/'t1.nii', nifti(vox_offset=1e9))

@hostile(read_image)
def data_begins_before_the_file(here): return write(here/'t1.nii', nifti(vox_offset=-400))

@hostile(read_image)
def data_begins_nowhere(here): return write(here/'t1.nii', nifti(vox_offset=np.nan))

@hostile(read_image)
def data_begins_at_infinity(here): return write(here/'t1.nii', nifti(vox_offset=np.inf))

def extended(size, content=b'DOE^JANE MRN-4711'):
    "A NIfTI file with one extension of a declared size before its voxels."
    raw = nifti(vox_offset=352 + 32)
    return raw[:348] + b'\1\0\0\0' + struct.pack('<ii', size, 6) + content.ljust(24, b'\0')[:24] + raw[352:]

@hostile(read_image, reads=volume_sum)
def extension_that_is_honest(here): return write(here/'t1.nii', extended(32))

@hostile(read_image, reads='either')
def extension_of_no_size(here): return write(here/'t1.nii', extended(0))

@hostile(read_image, reads='either')
def extension_of_negative_size(here): return write(here/'t1.nii', extended(-16))

@hostile(read_image, reads='either', mb=60)
def extension_of_two_gigabytes(here): return write(here/'t1.nii', extended(2**31 - 16))


# bombs

@hostile(read_image, mb=300, seconds=20)
def bomb_behind_a_small_volume(here): return write(here/'t1.nii.gz', gz(nifti()) + zeros_gz(4096))

@hostile(read_image, mb=300, seconds=20)
def bomb_that_declares_what_it_holds(here):
    head = nifti(dim=[3, 1024, 1024, 2048, 1, 1, 1, 1], datatype=4, bitpix=16)[:352]
    return write(here/'t1.nii.gz', gz(head) + zeros_gz(4096))

@hostile(read_image, mb=300, seconds=20)
def bomb_without_a_header(here): return write(here/'t1.nii.gz', zeros_gz(4096))

@hostile(read_image, mb=60)
def gzip_inside_gzip(here): return write(here/'t1.nii.gz', gz(gz(nifti())))


@pytest.mark.parametrize('case', hostile, ids=lambda c: c.name)
def test_nifti(case, ground): judge(case, ground)


def test_a_name_that_is_not_text(ground):
    "A file name from another century: bytes that are no UTF-8. Read, or refused so that the sentence can be printed."
    path = os.fsdecode(os.fsencode(ground/'given') + b'/t1_\xff\xfe.nii')
    write(ground/'given'/'t1.nii', nifti()).rename(path)
    out = put(read_image, path, ground)
    assert out.value is not None or out.error in ('ValueError', 'FileNotFoundError')
