"Images on real files, damaged files and killed processes: what does not fit into the page of `003_images`."
import gzip
import importlib.util
import itertools
import multiprocessing
import os
import signal
import resource
import time
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from sbldm_nb.data import crop_or_pad, read_image, read_volumes, resample, spacing_of, split_patients, to_ras, write_image
from sbldm_nb.files import list_images

SHIPPED = Path(nib.__file__).parent/'tests/data'
ANATOMICAL = SHIPPED/'anatomical.nii'


def icbm_files():
    return sorted((Path(importlib.util.find_spec('nilearn').origin).parent/'datasets/data').glob('mni_icbm152_*.nii.gz'))


@pytest.fixture(scope='module')
def icbm_t1():
    return next(p for p in icbm_files() if '_t1_' in p.name)


def refused(path, *causes, error=ValueError, read=read_image):
    "The message must be one line with the file and every one of `causes`."
    with pytest.raises(error) as e: read(path)
    message = str(e.value)
    assert str(path) in message and '\n' not in message and len(message) < 300
    for cause in causes: assert cause in message


# real input

def test_icbm_and_anatomical_read_as_nibabel_reads_them(icbm_t1):
    for path in [*icbm_files(), ANATOMICAL]:
        img, raw = read_image(path), nib.load(path)
        assert nib.aff2axcodes(img.affine) == ('R', 'A', 'S') and img.get_data_dtype() == np.float32
        values = np.asanyarray(raw.dataobj)
        oracle = nib.as_closest_canonical(raw)
        np.testing.assert_array_equal(np.asanyarray(img.dataobj), np.asanyarray(oracle.dataobj))
        np.testing.assert_allclose(img.affine, oracle.affine)
        rng = np.random.default_rng(0)
        for index in rng.integers(0, raw.shape, (20, 3)):
            there = np.rint(np.linalg.solve(img.affine, raw.affine @ [*index, 1])[:3]).astype(int)
            assert img.dataobj[tuple(there)] == np.float32(values[tuple(index)])


NO_SUFFIX, NOT_ONE = 'expected a file ending in one of', 'expected one 3D volume or a series of them'
TABLE = {  # nibabel's own test images: the volumes in the file, or why it is refused
    'anatomical.nii': 1,                      # int16, big endian, first axis to the left
    'functional.nii': 20,                     # int16 scaled by .075, +3101
    'example4d.nii.gz': 2,                    # oblique
    'example_nifti2.nii.gz': 2,               # NIfTI-2, oblique
    'standard.nii.gz': 1,                     # uint8, 1 x 3 x 2 mm
    'reoriented_anat_moved.nii': 1,           # float32, big endian
    'resampled_anat_moved.nii': '153 of 1071 voxels are NaN',        # what lay outside when SPM resampled it
    'row_major.dconn.nii': NOT_ONE,           # CIFTI: a matrix of connections, no image
    'nifti1.hdr': NO_SUFFIX, 'nifti2.hdr': NO_SUFFIX,                # headers without their .img
    'analyze.hdr': NO_SUFFIX, 'test.mgz': NO_SUFFIX,
    'tiny.mnc': NO_SUFFIX, 'minc2_1_scale.mnc': NO_SUFFIX,
    'example4d+orig.BRIK.gz': NO_SUFFIX, 'example4d+orig.HEAD': NO_SUFFIX, 'scaled+tlrc.BRIK': NO_SUFFIX,
    'phantom_EPI_asc_CLEAR_2_1.PAR': NO_SUFFIX, 'phantom_EPI_asc_CLEAR_2_1.REC': NO_SUFFIX,
    'tinypet.v': NO_SUFFIX, 'standard.trk': NO_SUFFIX, 'simple.tck': NO_SUFFIX, 'README.rst': NO_SUFFIX,
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', TABLE)
def test_what_nibabel_ships(name):
    "Each image is read as nibabel reads it, or refused for the reason in the table."
    if not isinstance(TABLE[name], int): return refused(SHIPPED/name, TABLE[name])
    oracle = nib.as_closest_canonical(nib.load(SHIPPED/name))
    volumes = oracle.get_fdata().reshape(*oracle.shape[:3], -1)
    assert volumes.shape[3] == TABLE[name]
    for k in range(TABLE[name]):
        img = read_image(SHIPPED/name, volume=k)
        np.testing.assert_array_equal(np.asanyarray(img.dataobj), volumes[..., k].astype(np.float32))
        np.testing.assert_allclose(img.affine, oracle.affine, atol=1e-6)
        assert nib.aff2axcodes(img.affine) == ('R', 'A', 'S') and img.get_data_dtype() == np.float32
    refused(SHIPPED/name, f'the file holds 0 to {TABLE[name] - 1}', read=lambda p: read_image(p, volume=TABLE[name]))
    if TABLE[name] > 1: refused(SHIPPED/name, f'choose with volume=0 to {TABLE[name] - 1}')


def test_the_table_leaves_no_image_out():
    there = {p.name for p in SHIPPED.iterdir() if p.name.lower().endswith(('.nii', '.nii.gz'))}
    assert there == {n for n in TABLE if n.endswith(('.nii', '.nii.gz'))}


@pytest.mark.parametrize('name', ['0.dcm', '1.dcm'])
def test_dicom_that_nibabel_ships(name):
    "Siemens mosaics: many slices tiled into one picture, whose pixels have no place of their own."
    refused(SHIPPED/name, 'mosaic')


def test_resampling_icbm_keeps_the_brain_where_it_is(icbm_t1):
    img = read_image(icbm_t1)

    def centre_of_mass(i):
        w = i.get_fdata()
        mean = [(w*g).sum()/w.sum() for g in np.indices(i.shape)]
        return nib.affines.apply_affine(i.affine, mean), w.mean()*np.prod(i.shape)*np.prod(spacing_of(i))
    where, mass = centre_of_mass(img)
    for spacing in (2., 3., (4., 4., 6.)):
        moved, after = centre_of_mass(resample(img, spacing))
        assert np.abs(moved - where).max() < .05 and abs(after/mass - 1) < .01


def test_icbm_is_symmetric_and_stays_so(icbm_t1):
    img = read_image(icbm_t1)
    a = resample(img, 3.).get_fdata()
    mirrored = nib.Nifti1Image(np.ascontiguousarray(np.asanyarray(img.dataobj)[::-1]), img.affine)
    np.testing.assert_allclose(resample(mirrored, 3.).get_fdata()[::-1], a, atol=1e-2)


# damaged input

def test_every_cut_of_a_gz_is_refused(tmp_path):
    whole = write_image(read_image(ANATOMICAL), tmp_path/'whole.nii.gz').read_bytes()
    cut = tmp_path/'cut.nii.gz'
    for part in (1, 2, 5, 200, 1000, len(whole)//2, len(whole) - 9, len(whole) - 1):
        cut.write_bytes(whole[:part])
        refused(cut, 'damaged or cut short')
    cut.write_bytes(b'')
    refused(cut, 'empty (0 bytes)')
    plain = tmp_path/'cut.nii'
    plain.write_bytes(ANATOMICAL.read_bytes()[:20000])
    refused(plain, 'damaged or cut short')


@pytest.mark.filterwarnings('ignore:.*no orientation')
def test_flipped_bytes_never_escape_as_other_errors(tmp_path):
    "A damaged header either still describes one finite 3D image or is a ValueError that names the file."
    good, rng = bytearray(write_image(read_image(ANATOMICAL), tmp_path/'good.nii').read_bytes()), np.random.default_rng(0)
    bad, outcomes = tmp_path/'bad.nii', set()
    for _ in range(200):
        raw = bytearray(good)
        for at in rng.integers(0, 348, rng.integers(1, 4)): raw[at] = rng.integers(256)
        bad.write_bytes(raw)
        try:
            img = read_image(bad)
            assert img.ndim == 3 and np.isfinite(img.get_fdata()).all()
            outcomes.add('read')
        except ValueError as e:
            assert str(bad) in str(e)
            outcomes.add('refused')
    assert outcomes == {'read', 'refused'}
    packed = bytearray(write_image(read_image(ANATOMICAL), tmp_path/'good.nii.gz').read_bytes())
    for at in rng.integers(10, len(packed), 40):
        raw = bytearray(packed)
        raw[at] ^= 0xff
        (tmp_path/'bad.nii.gz').write_bytes(raw)
        refused(tmp_path/'bad.nii.gz', 'damaged or cut short')


@pytest.fixture
def little_memory():
    "No more than half a gigabyte beyond what is there: who believes a lying header, fails with MemoryError or is killed."
    import psutil
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**29, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('version', [nib.Nifti1Image, nib.Nifti2Image])
def test_a_header_cannot_ask_for_memory(suffix, version, tmp_path, little_memory):
    raw, shapes = version(np.zeros((4, 4, 4), np.uint8), np.eye(4)), [(32767,)*3, (1, 1, 1, 32767, 32767), (32767, 32767, 1, 1, 1, 1, 32767), (3000, 3000, 200)]
    for shape in shapes + [(2**40, 2**30, 1)]*(version is nib.Nifti2Image):
        header = raw.header.copy()
        header['dim'][:len(shape) + 1], header['vox_offset'] = (len(shape), *shape), header.single_vox_offset
        content = header.binaryblock + bytes(2**20)
        path = tmp_path/f'lie{suffix}'
        path.write_bytes(gzip.compress(content) if suffix == '.nii.gz' else content)
        refused(path, 'series' if len([n for n in shape[3:] if n > 1]) > 1 else 'more than the file can hold')


def test_a_bomb_is_put_out_early(tmp_path, little_memory):
    "Two gigabytes of nothing: behind a header that is honest about them, and behind one that is not."
    nothing = gzip.compress(bytes(2**24))*128
    honest, sly = (nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.eye(4)).header for _ in range(2))
    honest.set_data_shape((2048, 1024, 1024))
    honest['vox_offset'] = sly['vox_offset'] = 352
    for header, why in ((honest, 'more than the file can hold'), (sly, 'more than its header declares')):
        (tmp_path/'bomb.nii.gz').write_bytes(gzip.compress(header.binaryblock + bytes(4)) + nothing)
        started = time.monotonic()
        refused(tmp_path/'bomb.nii.gz', why)
        assert time.monotonic() - started < 5


def test_a_large_mask_is_no_bomb(tmp_path):
    "A tenth of a gigabyte of zeros with one voxel set packs a thousand to one and is honest."
    header, path = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.eye(4)).header, tmp_path/'mask.nii.gz'
    header.set_data_shape((512, 512, 420))
    header['vox_offset'] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + bytes(512*512*420 - 1) + b'\1'))
    assert 512*512*420/path.stat().st_size > 500
    assert read_image(path).dataobj[511, 511, 419] == 1


@pytest.mark.parametrize('spacing', [0, -1, np.nan, np.inf])
def test_a_spacing_that_is_none(spacing, tmp_path):
    "Without an sform the spacing is all there is; nibabel would read 0 as 1 and -1 as 1."
    img = nib.Nifti1Image(np.ones((3, 4, 5), np.float32), None)
    img.set_qform(np.eye(4), code=1)
    raw = bytearray(img.to_bytes())
    raw[84:88] = np.float32(spacing).tobytes()      # pixdim[2]
    (tmp_path/'a.nii').write_bytes(raw)
    refused(tmp_path/'a.nii', 'expected a spacing above 0 mm')


@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('dtype', ['u1', 'i1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8', 'f4', 'f8'])
def test_scaling_is_done_in_double_precision(order, dtype, tmp_path):
    "stored x slope + intercept in float64, then once to float32, whatever is stored; nibabel is the witness."
    header = nib.Nifti1Header(endianness=order)
    stored = np.random.default_rng(0).integers(0, 100, (5, 4, 3, 2)).astype(dtype)
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype.newbyteorder(order))
    header.set_slope_inter(.1234567, -1024)
    header.set_sform(np.diag([-1, 2, 3, 1]), code=1)
    header['vox_offset'] = 352
    (tmp_path/'a.nii').write_bytes(header.binaryblock + bytes(4) + stored.astype(stored.dtype.newbyteorder(order)).tobytes(order='F'))
    slope = float(np.float32(.1234567))
    for k in range(2):
        values = (stored[..., k].astype(np.float64)*slope - 1024).astype(np.float32)[::-1]
        img = read_image(tmp_path/'a.nii', volume=k)
        np.testing.assert_array_equal(np.asanyarray(img.dataobj), values)
        np.testing.assert_allclose(nib.load(tmp_path/'a.nii').get_fdata()[::-1, ..., k], values, rtol=1e-6)
    refused(tmp_path/'a.nii', '(5, 4, 3, 2)', 'volume=0 to 1')


def test_wrong_content_is_named(tmp_path):
    def save(name, data):
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path/name)
        return tmp_path/name
    ones = np.ones((4, 5, 6), np.float32)
    refused(tmp_path/'none.nii', 'no such file', error=FileNotFoundError)
    refused(tmp_path/'scan.mgz', 'expected a file ending in')
    (tmp_path/'zipped.nii').write_bytes(gzip.compress(nib.Nifti1Image(ones, np.eye(4)).to_bytes()))
    (tmp_path/'plain.nii.gz').write_bytes(nib.Nifti1Image(ones, np.eye(4)).to_bytes())
    refused(tmp_path/'zipped.nii', 'gzip-compressed, against its name')
    refused(tmp_path/'plain.nii.gz', 'not compressed, against its name')
    save('good.nii', ones)
    for offset in (0, 100, -5, np.nan):
        raw = bytearray((tmp_path/'good.nii').read_bytes())
        raw[108:112] = np.float32(offset).tobytes()
        (tmp_path/'offset.nii').write_bytes(raw)
        refused(tmp_path/'offset.nii', 'damaged')
    (tmp_path/'pair.nii').write_bytes((SHIPPED/'nifti1.hdr').read_bytes().ljust(2**21, b'0'))
    refused(tmp_path/'pair.nii', 'a pair of files')
    refused(tmp_path/'scan.nii', 'no such file', error=FileNotFoundError)
    refused(save('good.nii', ones), 'volume 1 is wanted', read=lambda p: read_image(p, volume=1))
    refused(tmp_path/'good.nii', 'series_uid is for DICOM', read=lambda p: read_image(p, series_uid='1.2'))
    assert read_image(tmp_path/'good.nii', volume=0).shape == (4, 5, 6)
    refused(save('series.nii.gz', np.ones((4, 5, 6, 7), np.float32)), '3D', '(4, 5, 6, 7)')
    refused(save('plane.nii', np.ones((4, 5), np.float32)), '3D', '(4, 5)')
    refused(save('nan.nii.gz', np.where(ones.cumsum().reshape(ones.shape) < 4, np.nan, ones)), '3 of 120 voxels are NaN')
    refused(save('inf.nii.gz', ones*np.inf), '120 of 120')
    refused(save('complex.nii', ones.astype(np.complex64)), 'one real number per voxel')
    refused(save('colour.nii', np.zeros((4, 4, 4), [('R', 'u1'), ('G', 'u1'), ('B', 'u1')])), 'one real number per voxel')
    zero = bytearray(save('zero.nii', ones).read_bytes())
    zero[42:44] = bytes(2)                          # dim[1] of the header
    (tmp_path/'zero.nii').write_bytes(zero)
    refused(tmp_path/'zero.nii', str((0, 5, 6)))
    micro = nib.Nifti1Image(ones, np.eye(4))
    micro.header.set_xyzt_units('micron')
    nib.save(micro, tmp_path/'micro.nii')
    refused(tmp_path/'micro.nii', 'micrometres')
    assert read_image(save('last_one.nii', ones[..., None])).shape == (4, 5, 6)


def test_nifti2(tmp_path):
    refused(ANATOMICAL.parent/'example_nifti2.nii.gz', '3D', '(32, 20, 12, 2)', 'volume=0 to 1')
    series = nib.load(ANATOMICAL.parent/'example_nifti2.nii.gz')
    nib.save(series.slicer[..., 0], tmp_path/'one.nii.gz')
    img = read_image(tmp_path/'one.nii.gz')
    assert isinstance(nib.load(tmp_path/'one.nii.gz'), nib.Nifti2Image) and type(img) is nib.Nifti1Image
    np.testing.assert_array_equal(np.asanyarray(img.dataobj), np.asanyarray(series.dataobj)[::-1, ..., 0])


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_several_volumes_are_those_read_one_by_one(tmp_path, suffix):
    series = nib.Nifti1Image(np.random.default_rng(0).normal(size=(5, 6, 7, 9)).astype(np.float32), np.diag([-2, 3, 4, 1]))
    nib.save(series, path := tmp_path/f'series{suffix}')
    for k, img in zip((8, 0, 3, 3), read_volumes(path, [8, 0, 3, 3])):
        one = read_image(path, volume=k)
        np.testing.assert_array_equal(img.get_fdata(), series.get_fdata()[::-1, ..., k])
        np.testing.assert_array_equal(one.get_fdata(), img.get_fdata())
        np.testing.assert_array_equal(one.affine, img.affine)
    for bad in ([0, 9], [-1], ['1'], [.5]): refused(path, 'is wanted, the file holds 0 to 8', read=lambda p: read_volumes(p, bad))
    refused(tmp_path, 'volumes are for NIFTI, this is dicom', read=lambda p: read_volumes(p, [0]))


@pytest.mark.parametrize('s, q, fits', [((2, 3, 4), (2, 3, 4), True), ((-2, 3, 4), (-2, 3, 4), True), ((2, 3, 4), (-2, 3, 4), False), ((-2, 3, 4), (2, 3, 4), False),
                                        ((-2, -3, 4), (2, 3, 4), True)])
def test_two_orientations_that_disagree_on_left_and_right(tmp_path, s, q, fits):
    "A sform wins over a qform, unless one is the mirror image of the other. Turned by 180 degrees is not mirrored."
    img = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.diag([*s, 1]))
    img.set_qform(np.diag([*q, 1]), code=1)
    for image, path in ((img, tmp_path/'a.nii'), (nib.Nifti2Image.from_image(img), tmp_path/'b.nii')):
        nib.save(image, path)
        if fits: np.testing.assert_allclose(read_image(path).affine, to_ras(img).affine)
        else: refused(path, 'disagree on left and right')


def test_missing_orientation_warns(tmp_path):
    img = nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4))
    img.set_sform(np.eye(4), code=0)
    img.set_qform(np.eye(4), code=0)
    nib.save(img, tmp_path/'nowhere.nii')
    with pytest.warns(UserWarning, match='no orientation'): read_image(tmp_path/'nowhere.nii')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16'])
def test_pictures_of_every_mode(mode, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    name = 'a.jpg' if mode == 'CMYK' else 'a.png'
    picture = Image.fromarray(grey.astype(np.uint16)*257) if mode == 'I;16' else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path/name)
    img = read_image(tmp_path/name)
    assert img.shape == (9, 12, 1) and float(img.header['cal_max']) == (65535 if mode == 'I;16' else 255)
    if mode in ('L', 'LA', 'RGB', 'RGBA', 'I;16'):
        np.testing.assert_array_equal(np.asanyarray(img.dataobj)[::-1, ::-1, 0].T, grey*(257. if mode == 'I;16' else 1.))


def test_pictures_that_are_not_what_they_say(tmp_path):
    "The ending promises PNG or JPEG; other decoders of Pillow, some of which run programs, are never asked."
    grey = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12))
    for kind in ('GIF', 'TIFF', 'BMP', 'EPS', 'PPM'):
        grey.save(tmp_path/'a.png', format=kind)
        refused(tmp_path/'a.png', 'not a readable picture')
    grey.save(tmp_path/'b.png', format='JPEG', quality=95)           # a JPEG named .png is a picture all the same
    assert np.abs(np.asanyarray(read_image(tmp_path/'b.png').dataobj)[::-1, ::-1, 0].T - np.asarray(grey)).max() < 10


def test_a_picture_cannot_ask_for_memory(tmp_path, little_memory):
    Image.new('L', (8, 8)).save(tmp_path/'a.png')
    raw = bytearray((tmp_path/'a.png').read_bytes())
    for size, why in (((20000, 20000), 'Bomb'), ((100000, 100), 'at most 32767')):
        raw[16:24] = np.array(size, '>u4').tobytes()
        raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, 'big')
        (tmp_path/'a.png').write_bytes(raw)
        refused(tmp_path/'a.png', 'picture', why)


@pytest.mark.parametrize('name', ['a.png', 'a.jpg'])
def test_flipped_bytes_in_pictures(name, tmp_path):
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40)).save(tmp_path/name)
    good, rng = (tmp_path/name).read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        raw = bytearray(good)
        for at in rng.integers(0, len(raw), rng.integers(1, 4)): raw[at] = rng.integers(256)
        (tmp_path/name).write_bytes(raw)
        try: assert read_image(tmp_path/name).ndim == 3
        except ValueError as e: assert str(tmp_path/name) in str(e)


# writing

def test_header_carries_no_identity(tmp_path):
    img = nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4))
    for field in ('descrip', 'aux_file', 'db_name', 'intent_name'): img.header[field] = b'DOE JANE'
    img.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'DOE JANE 1961'))
    nib.save(img, tmp_path/'in.nii')
    assert b'DOE' in (tmp_path/'in.nii').read_bytes()
    assert b'DOE' not in write_image(read_image(tmp_path/'in.nii'), tmp_path/'out.nii').read_bytes()
    assert b'DOE' not in write_image(img, tmp_path/'out.nii').read_bytes()


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int16', 'uint16', 'int32', 'int64', 'float32', 'float64'])
def test_values_of_every_type_come_back(dtype, tmp_path):
    data = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(dtype)
    img = nib.Nifti1Image(data, np.diag([-2, 3, 4, 1.]), dtype=np.int64 if dtype == 'int64' else None)
    back = read_image(write_image(img, tmp_path/'a.nii.gz'))
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), data[::-1])
    assert nib.load(tmp_path/'a.nii.gz').header.get_slope_inter() in ((None, None), (1., 0.))


def test_numbers_that_are_not_real_are_not_written(tmp_path):
    for dtype in (np.complex64, np.dtype([('R', 'u1'), ('G', 'u1'), ('B', 'u1')])):
        img = nib.Nifti1Image(np.zeros((4, 5, 6), dtype), np.eye(4))
        refused(tmp_path/'a.nii', 'expected one real number per voxel', read=lambda p: write_image(img, p))
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_image(read_image(ANATOMICAL), tmp_path/'a.nii.gz')
    old = path.read_bytes()

    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): write_image(resample(read_image(ANATOMICAL), 4.), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ['a.nii.gz']


def write_for_ever(path, ready):
    noise = np.random.default_rng(0).random((64, 64, 64)).astype(np.float32)
    for k in itertools.count():
        write_image(nib.Nifti1Image(noise + k % 2, np.eye(4)), path)
        ready.set()


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_a_killed_writer_leaves_nothing_half_written(suffix, tmp_path):
    "Real processes, real SIGKILL, at moments all over the write."
    fork, rng, path = multiprocessing.get_context('fork'), np.random.default_rng(0), tmp_path/f'a{suffix}'
    for _ in range(8):
        ready = fork.Event()
        p = fork.Process(target=write_for_ever, args=(path, ready))
        p.start()
        assert ready.wait(60)
        time.sleep(rng.random()*.1)
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL
        assert list_images(tmp_path) == [path]
        assert read_image(path).shape == (64, 64, 64)


# splits and sizes

def test_split_is_the_same_on_every_machine():
    "Written down once: a changed split would move patients from test to training between two versions."
    split = split_patients(f'p{i}' for i in range(20))
    assert (split['valid'], split['test']) == (['p12', 'p19'], ['p10', 'p13'])


def test_split_sizes_for_every_small_n():
    for n in range(3, 60):
        for fractions in ((.8, .1, .1), (.5, .25, .25), (.7, .3, 0.), (0., 0., 1.)):
            s = split_patients(range(n), fractions)
            sizes = np.array([len(s[k]) for k in ('train', 'valid', 'test')])
            assert sizes.sum() == n and ((sizes > 0) == (np.array(fractions) > 0)).all()
            assert (np.abs(sizes - np.array(fractions)*n) < 2).all()


def test_crop_or_pad_round_trip_for_odd_and_even():
    img = to_ras(nib.Nifti1Image(np.random.default_rng(0).random((9, 12, 3)).astype(np.float32), np.eye(4)))
    for size in (13, 14, (9, 15)):
        back = crop_or_pad(crop_or_pad(img, size), img.shape[:2])
        assert np.abs(back.affine - img.affine).max() <= 1
        if tuple((np.broadcast_to(size, 2) - img.shape[:2]) % 2) == (0, 0):
            np.testing.assert_array_equal(back.get_fdata(), img.get_fdata())
            np.testing.assert_array_equal(back.affine, img.affine)


def test_crop_or_pad_in_space():
    img = to_ras(nib.Nifti1Image(np.random.default_rng(0).random((9, 12, 3)).astype(np.float32), np.diag([1, 2, 3, 1])))
    assert crop_or_pad(img, (None, 6, None)).shape == (9, 6, 3) and crop_or_pad(img, (4, 4, 5)).shape == (4, 4, 5)
    np.testing.assert_array_equal(crop_or_pad(img, (9, 12, 7)).get_fdata()[:, :, 2:5], img.get_fdata())
    for bad in (0, (4, -1), (4, 4, 0), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match='expected a size above 0'): crop_or_pad(img, bad)
