"Every DICOM file that pydicom ships, damaged and hostile series, planted identities: what does not fit into the page of `001_dicom`."
import io
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

from sbldm_nb.dicom import deidentify, read_dicom, series_of, write_dicom

SHIPPED = Path(pydicom.__file__).parent/'data/test_files'
COLOUR, OTHER, NO_IMAGE, NO_MARK = 'a colour image', '1 x not DICOM', '1 x DICOM but no image', 'the mark DICM is missing'
READ = ['693_J2KI.dcm', 'CT_small.dcm', 'J2K_pixelrep_mismatch.dcm', 'JPEG2000.dcm', 'JPEGLSNearLossless_08.dcm', 'JPEGLSNearLossless_16.dcm',
        'MR_small.dcm', 'MR_small_RLE.dcm', 'MR_small_bigendian.dcm', 'MR_small_expb.dcm', 'MR_small_implicit.dcm',
        'MR_small_jp2klossless.dcm', 'MR_small_jpeg_ls_lossless.dcm', 'MR_small_padded.dcm', 'examples_overlay.dcm', 'image_dfl.dcm']
REFUSED = {
    'JPEG-lossy.dcm': 'stored as JPEG Extended (Process 2 and 4), cannot be decoded', 'JPGExtended.dcm': 'stored as JPEG Extended (Process 2 and 4)',
    'JPEG2000-embedded-sequence-delimiter.dcm': 'stored as JPEG 2000 Image Compression, cannot be decoded',
    'MR_truncated.dcm': 'cut short, 8192 bytes of pixels declared and 8130 in the file',
    'meta_missing_tsyntax.dcm': 'does not name its transfer syntax',
    **dict.fromkeys(['ExplVR_BigEndNoMeta.dcm', 'ExplVR_LitEndNoMeta.dcm', 'no_meta.dcm', 'rtstruct.dcm'], NO_MARK),
    **dict.fromkeys(['README.txt', 'crayons.icc', 'rtplan.dump', 'rtstruct.dump', 'test1.json', 'test_PN.json', 'zipMR.gz'], OTHER),
    **dict.fromkeys(['UN_sequence.dcm', 'empty_charset_LEI.dcm', 'no_meta_group_length.dcm', 'priv_SQ.dcm'], 'an image without pixels'),
    'nested_priv_SQ.dcm': '1 frames of 0 x 0 pixels',
    **dict.fromkeys(['badVR.dcm', 'liver_1frame.dcm', 'liver_expb_1frame.dcm', 'reportsi.dcm', 'reportsi_with_empty_number_tags.dcm', 'rtdose.dcm',
                     'rtdose_1frame.dcm', 'rtdose_expb.dcm', 'rtdose_expb_1frame.dcm', 'rtdose_rle.dcm', 'rtdose_rle_1frame.dcm', 'rtplan.dcm',
                     'rtplan_truncated.dcm', 'test-SR.dcm', 'waveform_ecg.dcm'], NO_IMAGE),
    **dict.fromkeys(['SC_rgb_rle_16bit_2frame.dcm', 'SC_rgb_rle_2frame.dcm', 'SC_rgb_rle_32bit_2frame.dcm', 'examples_ybr_color.dcm'],
                    'nothing says where each frame lies'),
    **dict.fromkeys(['ExplVR_BigEnd.dcm', 'GDCMJ2K_TextGBR.dcm', 'examples_jpeg2k.dcm', 'examples_palette.dcm', 'examples_rgb_color.dcm',
                     'SC_jpeg_no_color_transform.dcm', 'SC_jpeg_no_color_transform_2.dcm', 'SC_rgb_dcmtk_+eb+cr.dcm',
                     'SC_rgb_dcmtk_+eb+cy+n1.dcm', 'SC_rgb_dcmtk_+eb+cy+n2.dcm', 'SC_rgb_dcmtk_+eb+cy+np.dcm', 'SC_rgb_dcmtk_+eb+cy+s2.dcm',
                     'SC_rgb_dcmtk_+eb+cy+s4.dcm', 'SC_rgb_gdcm_KY.dcm', 'SC_rgb_jls_lossy_line.dcm', 'SC_rgb_jls_lossy_sample.dcm',
                     'SC_rgb_jpeg.dcm', 'SC_rgb_jpeg_app14_dcmd.dcm', 'SC_rgb_jpeg_dcmd.dcm', 'SC_rgb_jpeg_dcmtk.dcm', 'SC_rgb_jpeg_gdcm.dcm',
                     'SC_rgb_jpeg_lossy_gdcm.dcm', 'SC_rgb_rle.dcm', 'SC_rgb_rle_16bit.dcm', 'SC_rgb_rle_32bit.dcm', 'SC_rgb_small_odd.dcm',
                     'SC_rgb_small_odd_big_endian.dcm', 'SC_rgb_small_odd_jpeg.dcm', 'SC_ybr_full_422_uncompressed.dcm'], COLOUR)}


def refused(source, *causes, error=ValueError, secret='MILLER', **kwargs):
    "One line with what the caller wrote and every cause, and nothing that was found inside."
    with pytest.raises(error) as e: read_dicom(source, **kwargs)
    said = str(e.value)
    assert '\n' not in said and len(said) < 900 and e.value.__cause__ is None and (e.value.__suppress_context__ or e.value.__context__ is None)
    assert secret not in said.replace(str(source), '')
    for cause in causes: assert cause in said, said


# the files that pydicom ships

def test_the_table_knows_every_shipped_file():
    assert {p.name for p in SHIPPED.iterdir() if p.is_file()} == {*READ, *REFUSED}


@pytest.mark.parametrize('name', READ)
def test_shipped_file_is_read_right(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        img = read_dicom(SHIPPED/name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(SHIPPED/name)
        stored = ds.pixel_array
        expected = stored*float(ds.get('RescaleSlope', 1)) + float(ds.get('RescaleIntercept', 0))
    if ds.get('PixelPaddingValue') is not None: expected[stored == ds.PixelPaddingValue] = -1024
    rows, columns = np.indices(stored.shape)
    if ds.get('ImagePositionPatient'):                       # where the standard says each pixel lies, in RAS
        u, v = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        lps = (np.array(ds.ImagePositionPatient, float) + columns[..., None]*float(ds.PixelSpacing[1])*u + rows[..., None]*float(ds.PixelSpacing[0])*v)
        mm = lps*[-1, -1, 1]
        np.testing.assert_allclose(max(nib.affines.voxel_sizes(img.affine)), max(*map(float, ds.PixelSpacing), float(ds.SliceThickness)))
    else: mm = np.stack([stored.shape[1] - 1 - columns, stored.shape[0] - 1 - rows, 0*rows], -1)      # a picture
    index = nib.affines.apply_affine(np.linalg.inv(img.affine), mm)
    np.testing.assert_allclose(index, index.round(), atol=1e-4)
    assert np.prod(img.shape) == stored.size and nib.aff2axcodes(img.affine) == ('R', 'A', 'S')
    np.testing.assert_array_equal(np.asarray(img.dataobj)[tuple(index.round().astype(int).reshape(-1, 3).T)], expected.ravel())
    assert img.get_data_dtype() == (np.float32 if expected.max() > 32767 else np.int16)


@pytest.mark.parametrize('name', REFUSED)
def test_shipped_file_is_refused_with_the_reason(name): refused(SHIPPED/name, REFUSED[name])


def test_shipped_series():
    folder = SHIPPED/'dicomdirtests'
    refused(folder, 'file 41 of 91 in the order of their names: an image without pixels')
    refused(folder/'98892003/MR2', '3 series, choose one by series_uid', '(3 images of 16 x 16), 1.3')
    refused(folder/'98892003/MR700', '7 orientations in one series, up to 49.1 degrees apart')
    refused(folder/'77654033/CT2', '202.50 mm between slices 1 and 2 of 4, expected 1.25 mm')
    refused(folder/'98892001/CT2N', '2 x localizer')
    refused([folder/'DICOMDIR', folder/'README.txt'], '1 x DICOM but no image, 1 x not DICOM')
    assert sorted(s['images'] for s in series_of(folder/'98892003/MR2').values()) == [1, 3, 3]


def test_shipped_stack_as_highdicom_reads_it():
    import highdicom as hd
    files = [p for p in (SHIPPED/'dicomdirtests/98892001/CT5N').iterdir()]
    img, volume = read_dicom(files), hd.get_volume_from_series([pydicom.dcmread(p) for p in files])
    theirs = nib.as_closest_canonical(nib.Nifti1Image(volume.array, np.diag([-1., -1, 1, 1]) @ volume.affine))
    np.testing.assert_array_equal(np.asarray(img.dataobj), theirs.dataobj)
    np.testing.assert_allclose(img.affine, theirs.affine, atol=1e-4)


# series that we make

def ct_slice(k, tilt=0., syntax=uids.ExplicitVRLittleEndian, **tags):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.ImageType = uids.CTImageStorage, f'1.2.3.{k + 1}', 'CT', ['ORIGINAL', 'PRIMARY', 'AXIAL']
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = '1.2.3', '1.2', '1.2.9'
    ds.PatientName, ds.PatientID, ds.SeriesDescription = 'MILLER^ANNA', 'MILLER-0048213', 'CT of MILLER'
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [-3., -4 + k*tilt, 2.5*k], [1, 0, 0, 0, 1, 0], [1.5, 1.]
    ds.RescaleSlope, ds.RescaleIntercept, ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, -1024, 8, 6, 1, 'MONOCHROME2'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = (np.arange(48) + 100*k).astype('<u2').tobytes()
    for tag, value in tags.items(): setattr(ds, tag, value)
    return ds


def content(ds):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def save(folder, slices, name='MILLER_{:03d}.dcm'):
    folder.mkdir(parents=True, exist_ok=True)
    for k, ds in enumerate(slices): (folder/name.format(k)).write_bytes(ds if isinstance(ds, bytes) else content(ds))
    return folder


@pytest.fixture(autouse=True)
def forgiving_pydicom(monkeypatch):
    "Odd values are written on purpose here; only the library's reading is under test."
    monkeypatch.setattr(pydicom.config.settings, 'writing_validation_mode', pydicom.config.IGNORE)
    monkeypatch.setenv('SBLDM_ID_KEY', 'a key for these tests only')


def test_names_and_numbers_of_instances_are_no_geometry(tmp_path):
    whole = read_dicom(save(tmp_path/'a', [ct_slice(k) for k in range(9)]))
    order = random.Random(0).sample(range(9), 9)
    shuffled = read_dicom(save(tmp_path/'b', [ct_slice(k, InstanceNumber=100 - k, SliceLocation=-k, SliceThickness=9) for k in order], '{:03d}'))
    np.testing.assert_array_equal(whole.dataobj, shuffled.dataobj)
    np.testing.assert_array_equal(whole.affine, shuffled.affine)
    np.testing.assert_allclose(nib.affines.voxel_sizes(whole.affine), [1, 1.5, 2.5], rtol=1e-12)


@pytest.mark.parametrize('tilt, degrees', [(.5, 11.3), (-.05, 1.1)])
def test_gantry_tilt_tells_its_angle(tmp_path, tilt, degrees): refused(save(tmp_path/'c', [ct_slice(k, tilt) for k in range(9)]), f'gantry tilt of {degrees} degrees')


def test_a_slice_that_moved_aside_is_seen_in_the_middle_too(tmp_path):
    refused(save(tmp_path/'c', [ct_slice(k, .8 if k == 4 else 0) for k in range(9)]), 'slices lie up to 3.2 mm aside of the first')


@pytest.mark.parametrize('extra, even', [(.05, True), (.1, True), (.2, False), (.3, False), (-.3, False)])
def test_one_step_that_is_not_like_the_others(tmp_path, extra, even):
    places = np.cumsum([0, *[3.]*5, 3. + extra, *[3.]*5])
    folder = save(tmp_path/'c', [ct_slice(k, ImagePositionPatient=[-3., -4., z]) for k, z in enumerate(places)])
    if even: assert read_dicom(folder).shape[2] == 12
    else: refused(folder, f'{3 + extra:.2f} mm between slices 6 and 7 of 12, expected 3.00 mm')


def test_random_directions_as_highdicom_sees_them(tmp_path):
    import highdicom as hd
    rng = np.random.default_rng(0)
    for k in range(12):
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        img = nib.Nifti1Image(rng.integers(-1024, 3000, (5, 6, 7)).astype(np.int16),
                              nib.affines.from_matvec(turn*rng.uniform(.3, 3, 3), rng.uniform(-200, 200, 3)))
        back, ras = read_dicom(write_dicom(img, tmp_path/f'{k}')), nib.as_closest_canonical(img)
        volume = hd.get_volume_from_series([pydicom.dcmread(p) for p in (tmp_path/f'{k}').iterdir()])
        theirs = nib.as_closest_canonical(nib.Nifti1Image(volume.array.astype(np.int16), np.diag([-1., -1, 1, 1]) @ volume.affine))
        for other in (ras, theirs):
            np.testing.assert_array_equal(back.dataobj, other.dataobj)
            np.testing.assert_allclose(back.affine, other.affine, atol=1e-5)


def test_positions_rounded_by_the_scanner_are_a_stack(tmp_path):
    slices = [ct_slice(k, ImagePositionPatient=[-3., -4., round(.625*k, 1)]) for k in range(40)]
    img = read_dicom(save(tmp_path/'c', slices))
    assert abs(nib.affines.voxel_sizes(img.affine)[2] - .625) < 2e-3


@pytest.mark.parametrize('missing', range(1, 8))
def test_any_inner_slice_that_is_missing_is_seen(tmp_path, missing):
    refused(save(tmp_path/'c', [ct_slice(k) for k in range(9) if k != missing]), f'5.00 mm between slices {missing} and {missing + 1} of 8, expected 2.50')


@pytest.mark.parametrize('cause, tags', [
    ('a pixel spacing of 0 mm', dict(PixelSpacing=[0, 1])), ('a pixel spacing of -1 mm', dict(PixelSpacing=[1, -1])),
    ('is not made of finite numbers', dict(ImagePositionPatient=['nan', '0', '1'])), ('is not made of finite numbers', dict(PixelSpacing=[1, 1, 1])),
    ('is not made of finite numbers', dict(RescaleSlope='inf')), ('not at right angles', dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])),
    ('not at right angles', dict(ImageOrientationPatient=[2, 0, 0, 0, 1, 0])), ('lack a position', dict(ImageOrientationPatient=None)),
    ('pixels hold 0..47, its bits can hold 0..31', dict(BitsStored=5, HighBit=4)), ('expected 8, 16 or 32 bits', dict(HighBit=15)),
    ('expected 8, 16 or 32 bits', dict(BitsAllocated=1, BitsStored=1, HighBit=0)), ('in another unit than HU', dict(RescaleType='MILLER')),
    ('without RescaleIntercept', dict(RescaleIntercept=None)), ('Modality LUT', dict(ModalityLUTSequence=[Dataset()])),
    ('frames of 6 x 8 pixels, expected at least one', dict(NumberOfFrames=-5)), ('expected at least one', dict(Rows=0)), ('damaged or cut short', dict(NumberOfFrames='1' + '0'*300)),
    ('cut short', dict(Rows=65535, Columns=65535)), ('2000000000 frames and 0 functional groups', dict(NumberOfFrames=2000000000, PixelData=b'\0\0')),
    ('is not a UID', dict(SeriesInstanceUID='MILLER')), ('a mosaic, many slices tiled', dict(Modality='MR', ImageType=['ORIGINAL', 'PRIMARY', 'M', 'MOSAIC'])),
    ('its RescaleSlope is 0', dict(RescaleSlope=0)), ('without RescaleIntercept', dict(Modality='', RescaleIntercept=None))])
def test_one_slice_with_one_wrong_fact(tmp_path, cause, tags):
    if cause.startswith('2000000000'): cause = 'cut short'
    refused(save(tmp_path/'c', [ct_slice(0, **tags)]), cause)


def test_a_slope_of_its_own_for_each_slice(tmp_path):
    slopes = [.5, 1.25, 3.]
    img = read_dicom(save(tmp_path/'c', [ct_slice(k, Modality='PT', RescaleSlope=s, RescaleIntercept=0) for k, s in enumerate(slopes)]))
    assert img.get_data_dtype() == np.float32
    for k, s in enumerate(slopes): np.testing.assert_array_equal(np.sort(np.asarray(img.dataobj)[:, :, k].ravel()), (np.arange(48) + 100*k)*np.float32(s))


def test_a_late_slice_that_does_not_fit_turns_all_to_float32_and_loses_nothing(tmp_path):
    big = dict(Modality='MR', BitsStored=16, HighBit=15, RescaleIntercept=0)
    slices = [ct_slice(0, **big), ct_slice(1, **big), ct_slice(2, **big, PixelData=(np.arange(48) + 65000).astype('<u2').tobytes())]
    img = read_dicom(save(tmp_path/'c', slices))
    assert img.get_data_dtype() == np.float32
    for k, low in enumerate((0, 100, 65000)): np.testing.assert_array_equal(np.sort(np.asarray(img.dataobj)[:, :, k].ravel()), np.arange(48) + low)


def test_padding_that_has_lost_its_sign(tmp_path):
    data = np.where(np.arange(48) < 5, -2000, 500)
    ds = ct_slice(0, PixelRepresentation=1, PixelPaddingValue=-2000, PixelData=(data % 4096).astype('<u2').tobytes())
    assert np.unique(read_dicom(save(tmp_path/'c', [ds])).dataobj).tolist() == [-1024, 500 - 1024]


def test_a_file_whose_class_alone_says_that_it_is_ct(tmp_path):
    img = read_dicom(save(tmp_path/'c', [ct_slice(0, Modality='', PixelPaddingValue=3, PhotometricInterpretation='MONOCHROME1')]))
    np.testing.assert_array_equal(np.sort(np.asarray(img.dataobj).ravel()), [-1024, *(k - 1024 for k in range(48) if k != 3)])


def item(**tags):
    ds = Dataset()
    for tag, value in tags.items(): setattr(ds, tag, value)
    return ds


@pytest.mark.parametrize('units, cause', [(['HU']*3, ''), (['Z_EFF']*3, 'in another unit than HU'), (['HU', 'HU', 'Z_EFF'], 'several units')])
def test_the_unit_of_an_enhanced_file_stands_in_its_groups(tmp_path, units, cause):
    ds, parts = ct_slice(0), [ct_slice(k) for k in range(3)]
    for tag in 'ImagePositionPatient ImageOrientationPatient PixelSpacing RescaleSlope RescaleIntercept'.split(): delattr(ds, tag)
    ds.SOPClassUID, ds.NumberOfFrames, ds.PixelData = uids.EnhancedCTImageStorage, 3, b''.join(p.PixelData for p in parts)
    ds.SharedFunctionalGroupsSequence = [item(PixelMeasuresSequence=[item(PixelSpacing=[1.5, 1.], SliceThickness=2.5)],
                                              PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])]
    ds.PerFrameFunctionalGroupsSequence = [item(
        PlanePositionSequence=[item(ImagePositionPatient=p.ImagePositionPatient)],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType=u)]) for p, u in zip(parts, units)]
    if cause: return refused(save(tmp_path/'c', [ds]), cause)
    np.testing.assert_array_equal(read_dicom(save(tmp_path/'c', [ds])).dataobj, read_dicom(save(tmp_path/'d', parts)).dataobj)


def test_padding_that_is_written_with_the_other_sign(tmp_path):
    data = np.full(48, 500, '<i2')
    data[:5] = -2000
    ds = ct_slice(0, PixelRepresentation=1, BitsStored=16, HighBit=15, PixelData=data.tobytes())
    ds.add_new('PixelPaddingValue', 'US', 63536)
    assert np.unique(read_dicom(save(tmp_path/'c', [ds])).dataobj, return_counts=True)[1].tolist() == [5, 43]
    assert read_dicom(tmp_path/'c').dataobj.min() == -1024
    implicit = pydicom.dcmread(io.BytesIO(content(ds)))
    implicit.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian
    buffer = io.BytesIO()
    implicit.save_as(buffer, implicit_vr=True, little_endian=True, enforce_file_format=True)
    np.testing.assert_array_equal(read_dicom(save(tmp_path/'d', [buffer.getvalue()])).dataobj, read_dicom(tmp_path/'c').dataobj)


@pytest.mark.parametrize('syntax', [uids.RLELossless, uids.JPEGLSLossless])
def test_compressed_slices_are_the_same_slices(tmp_path, syntax):
    plain, packed = [ct_slice(k) for k in range(4)], [pydicom.dcmread(io.BytesIO(content(ct_slice(k)))) for k in range(4)]
    for ds in packed: ds.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read_dicom(save(tmp_path/'a', plain)).dataobj, read_dicom(save(tmp_path/'b', packed)).dataobj)


# sources

def test_slices_among_other_things(tmp_path):
    case = save(tmp_path/'c', [ct_slice(k) for k in range(5)])
    expected = np.asarray(read_dicom(case).dataobj)
    save(case/'sub', [ct_slice(5)], 'IM{}')
    for name, raw in {'notes.txt': b'MILLER', 'run.exe': b'MZ\0\0', 'LICENSE': b'all rights', '.DS_Store': b'\0\1', 'thumb.jpg': b'\xff\xd8\0',
                      'DICOMDIR': (SHIPPED/'dicomdirtests/DICOMDIR').read_bytes()}.items(): (case/name).write_bytes(raw)
    assert read_dicom(case).shape == (6, 8, 6)
    np.testing.assert_array_equal(np.asarray(read_dicom(case).dataobj)[:, :, :5], expected)


@pytest.mark.parametrize('name, raw, cause', [
    ('MILLER_9.dcm', b'', 'the file is empty (0 bytes)'), ('MILLER_9', b'', 'the file is empty'), ('MILLER_9', bytes(5000), NO_MARK),
    ('MILLER_9.55', b'\0\1\2', NO_MARK), ('MILLER.ima', b'MILLER, a text', NO_MARK)])
def test_a_file_that_may_be_a_damaged_slice_is_never_passed_over(tmp_path, name, raw, cause):
    case = save(tmp_path/'c', [ct_slice(k) for k in range(3)])
    (case/name).write_bytes(raw)
    if name == 'MILLER.ima':
        case = save(tmp_path/'d', [ct_slice(k) for k in range(3)], 'IM{}')
        (case/name).write_bytes(b'\0' + raw)
    refused(case, cause, 'in the order of their names')


def test_links_pipes_and_missing_things(tmp_path):
    case = save(tmp_path/'c', [ct_slice(k) for k in range(3)])
    (case/'again').symlink_to(case/'MILLER_000.dcm')
    assert read_dicom(case).shape[2] == 3                       # a link that stays inside shows what is there anyway
    (case/'out').symlink_to(save(tmp_path/'d', [ct_slice(3)])/'MILLER_000.dcm')
    refused(case, 'a link that leads out of the folder')
    (case/'out').unlink()
    os.mkfifo(case/'pipe')
    refused(case, 'neither a file nor a folder')
    refused(tmp_path/'gone', 'no such file or folder', error=FileNotFoundError)
    (tmp_path/'empty').mkdir()
    refused(tmp_path/'empty', 'no DICOM image')
    refused([], 'no DICOM image')
    refused([tmp_path/'c'], 'a folder in a list of files')


def test_files_that_the_system_will_not_give(tmp_path):
    refused(['/proc/self/mem'], '/proc/self/mem (file 1 of 1): the file cannot be read (Input/output error)')
    refused(tmp_path/('x'*300), 'no such file or folder', error=FileNotFoundError)
    refused([tmp_path/('x'*300)], 'no such file', error=FileNotFoundError)
    refused(tmp_path/('x'*300 + '.zip'), 'no such file or folder', error=FileNotFoundError)
    long = save(tmp_path/('f'*200)/'Пациент', [ct_slice(k) for k in range(3)], 'снимок {}' + 'x'*200)
    assert read_dicom(long).shape[2] == 3


def test_a_file_that_never_answers(tmp_path):
    case = save(tmp_path/'c', [ct_slice(k) for k in range(3)])
    os.mkfifo(tmp_path/'pipe')
    files, started = [*sorted(case.iterdir()), tmp_path/'pipe'], time.time()
    with pytest.raises(TimeoutError, match=r'pipe \(file 4 of 4\) could not be read within 0.3 s'): read_dicom(files, time_limit=.3)
    assert time.time() - started < 5


def test_archives(tmp_path):
    slices, path = [content(ct_slice(k)) for k in range(4)], tmp_path/'case.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, raw in enumerate(slices): z.writestr(f'MILLER/1/{k}', raw)
        z.writestr('MILLER/2/x', content(ct_slice(0, SeriesInstanceUID='1.2.4')))
        z.writestr('MILLER/notes.txt', 'MILLER')
    assert read_dicom(f'{path}/MILLER/1').shape == (6, 8, 4)
    assert series_of(path) == {'1.2.3': dict(images=4, matrix=(6, 8), spacing=(1., 1.5)), '1.2.4': dict(images=1, matrix=(6, 8), spacing=(1., 1.5))}
    refused(path, '2 series, choose one by series_uid: 1.2.3 (4 images of 6 x 8), 1.2.4 (1 image of 6 x 8)')
    with zipfile.ZipFile(path, 'a') as z: z.writestr('MILLER/1/9', slices[0][:500])
    refused(path, 'file 5 of 7 in the order of their names')
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as z: at = z.infolist()[2].header_offset + 80
    raw[at:at + 20] = os.urandom(20)
    (tmp_path/'bad.zip').write_bytes(raw)
    refused(tmp_path/'bad.zip', 'file 3 of 7 in the order of their names')


def test_a_long_list_is_not_repeated(tmp_path):
    case = save(tmp_path/'c', [ct_slice(k) for k in range(40) if k != 20])
    refused(sorted(case.iterdir()), 'the list of 39 files: 5.00 mm between slices 20 and 21')


def test_a_folder_that_shows_names_and_nothing_else():
    "Names may be listed and files not be looked at; root gives itself up to see that."
    with tempfile.TemporaryDirectory() as top:
        case = save(Path(top)/'c', [ct_slice(k) for k in range(3)])
        for p, mode in ((Path(top), 0o755), (case, 0o444)): p.chmod(mode)
        code = f'import os; from sbldm_nb.dicom import read_dicom; os.geteuid() or os.setuid(65534); read_dicom({str(case)!r})'
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
        case.chmod(0o755)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f'ValueError: {case}: entry 1: it cannot be looked at (Permission denied)'
    assert 'MILLER' not in done.stderr


def test_threads_that_read_at_once_leave_warnings_and_logs_as_they_were(tmp_path):
    case, filters, level = save(tmp_path/'c', [ct_slice(k) for k in range(20)]), list(warnings.filters), logging.getLogger('pydicom').level
    threads = [threading.Thread(target=lambda: [read_dicom(case) for _ in range(5)]) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert list(warnings.filters) == filters and logging.getLogger('pydicom').level == level


def test_a_deflated_data_set_that_swells(tmp_path):
    ds = ct_slice(0, syntax=uids.DeflatedExplicitVRLittleEndian, PixelData=bytes(130 << 20))
    raw = content(ds)
    assert len(raw) < 1 << 20
    refused(save(tmp_path/'c', [raw]), 'deflated by more than 200 : 1')


def test_compressed_pixels_that_declare_a_huge_image(tmp_path):
    ds = pydicom.dcmread(io.BytesIO(content(ct_slice(0))))
    ds.compress(uids.RLELossless, generate_instance_uid=False)
    ds.Rows = ds.Columns = 60000
    refused(save(tmp_path/'c', [ds]), '200 : 1')


# damage and identity

def test_random_damage_is_one_sentence(tmp_path):
    rng, kinds, path = random.Random(1), set(), tmp_path/'x.dcm'
    sources = [content(ct_slice(0)), *((SHIPPED/n).read_bytes() for n in ('MR_small_RLE.dcm', 'MR_small_implicit.dcm', 'MR_small_bigendian.dcm', 'MR_small_jp2klossless.dcm',
                                                                          'image_dfl.dcm', 'MR_small_jpeg_ls_lossless.dcm'))]
    for round_ in range(350):
        raw = bytearray(sources[round_ % len(sources)])
        span = min(len(raw), rng.choice([600, 2500, len(raw)]))
        for _ in range(rng.choice([1, 3, 20])): raw[rng.randrange(132 if rng.random() < .8 else 0, span)] = rng.randrange(256)
        if rng.random() < .2: raw = raw[:rng.randrange(len(raw))]
        path.write_bytes(raw)
        try: kinds.add(read_dicom(path, time_limit=20).get_data_dtype().name)
        except ValueError as e:
            assert str(e).startswith(str(path)) and '\n' not in str(e) and 'MILLER' not in str(e)
            kinds.add('refused')
    assert 'refused' in kinds and 'int16' in kinds


TEXT_VRS = ('LO', 'SH', 'PN', 'CS', 'UI', 'DS', 'IS', 'US', 'LT', 'UN', 'SQ', 'OB', 'DA')

@pytest.mark.parametrize('keyword', ['Rows', 'Columns', 'NumberOfFrames', 'ImagePositionPatient', 'PixelSpacing', 'RescaleSlope', 'RescaleType', 'Modality', 'ImageType',
                                     'SeriesInstanceUID', 'SOPClassUID', 'SOPInstanceUID', 'FrameOfReferenceUID', 'BitsAllocated', 'BitsStored', 'PixelPaddingValue',
                                     'PhotometricInterpretation', 'SliceThickness', 'PerFrameFunctionalGroupsSequence', 'SyntheticData', 'StudyDate'])
def test_a_name_in_the_place_of_any_fact_is_never_repeated(tmp_path, keyword, capfd, caplog):
    "The tag holds MILLER, in each encoding a writer may have chosen, and logs are as loud as they can be."
    caplog.set_level(logging.DEBUG)
    tag = pydicom.tag.Tag(keyword)
    for k, vr in enumerate(TEXT_VRS):
        ds = ct_slice(0)
        raw = content(ds)
        def place(tag): return raw.index(tag.group.to_bytes(2, 'little') + tag.element.to_bytes(2, 'little') + ds[tag].VR.encode(), 132)
        element = tag.group.to_bytes(2, 'little') + tag.element.to_bytes(2, 'little') + vr.encode()
        element += (b'\0\0' + (8).to_bytes(4, 'little') if vr in ('UN', 'SQ', 'OB') else (8).to_bytes(2, 'little')) + b'MILLER^A'
        at = place(tag if tag in ds else min(t for t in ds.keys() if t > tag))           # where its number belongs
        after = at + 8 + int.from_bytes(raw[at + 6:at + 8], 'little') if tag in ds else at
        folder = save(tmp_path/f'{k}', [raw[:at] + element + raw[after:]])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            try: read_dicom(folder)
            except ValueError as e: assert 'MILLER' not in str(e) and e.__suppress_context__ | (e.__context__ is None)
        assert not warned
    out = capfd.readouterr()
    assert 'MILLER' not in out.out + out.err + caplog.text


# writing

def test_every_hu_of_16_bits_comes_back(tmp_path):
    values = np.arange(-32768, 31744, dtype=np.int32)[:64*1008].reshape(64, 84, 12).astype(np.int16)
    img = nib.Nifti1Image(values, np.diag([.488281, .488281, 1.25, 1]))
    for path in (tmp_path/'c', tmp_path/'c.zip'):
        back = read_dicom(write_dicom(img, path))
        np.testing.assert_array_equal(back.dataobj, values)
        np.testing.assert_allclose(back.affine, img.affine, atol=1e-9)
        assert back.get_data_dtype() == np.int16
    with pytest.raises(ValueError, match='do not fit into 16 bits'): write_dicom(nib.Nifti1Image(np.full((2, 2, 2), 31744, np.int32), np.eye(4)), tmp_path/'d')
    np.testing.assert_array_equal(read_dicom(write_dicom(nib.Nifti1Image(np.abs(values//2), np.eye(4)), tmp_path/'mr.zip', modality='MR')).dataobj, np.abs(values//2))


def test_a_written_file_says_that_it_is_simulated_and_nothing_else(tmp_path):
    img, seen = nib.Nifti1Image(np.zeros((4, 5, 3), np.int16), np.eye(4)), []
    for name in 'ab':
        for p in sorted(write_dicom(img, tmp_path/name).iterdir()):
            ds = pydicom.dcmread(p)
            assert (ds.SyntheticData, ds.ContentQualification, ds.ImageType[:2], ds.PatientID) == ('YES', 'RESEARCH', ['DERIVED', 'SECONDARY'], 'SIMULATED')
            assert 'SIMULATED' in ds.DerivationDescription and not any(e.value for e in ds if e.VR in ('DA', 'TM', 'DT'))
            assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
            seen += [ds.SOPInstanceUID]
            assert pydicom.dataset.validate_file_meta(ds.file_meta) is None
        seen += [ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID]
    assert len(set(seen)) == len(seen) == 12 and all(re.fullmatch(r'2\.25\.\d{20,39}', u) for u in seen)
    with zipfile.ZipFile(write_dicom(img, tmp_path/'c.zip')) as z: assert {m.date_time for m in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize('data, affine, cause', [
    (np.full((2, 2, 2), np.nan), np.eye(4), 'NaN'), (np.zeros((2, 2)), np.eye(4), 'one 3D volume'), (np.zeros((2, 0, 2)), np.eye(4), 'one 3D volume'),
    (np.zeros((2, 2, 2)), np.array([[1, .01, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), 'right angles'),
    (np.zeros((2, 2, 2)), np.diag([1., 1, 0, 1]), 'the affine'), (np.zeros((2, 2, 2)), np.diag([1., np.nan, 1, 1]), 'the affine')])
def test_what_dicom_cannot_say_is_not_written(tmp_path, data, affine, cause):
    img = nib.Nifti1Image(data, np.eye(4))
    img._affine = affine
    for path in (tmp_path/'x', tmp_path/'x.zip'):
        with pytest.raises(ValueError, match=cause): write_dicom(img, path)
    with pytest.raises(ValueError, match='no images to write'): write_dicom({}, tmp_path/'x')
    with pytest.raises(ValueError, match="modality 'PET' is unknown"): write_dicom(img, tmp_path/'x', modality='PET')
    with pytest.raises(ValueError, match='expected letters'): write_dicom({'../up': img}, tmp_path/'x')
    assert not list(tmp_path.iterdir())


def test_a_writer_that_is_killed_leaves_nothing_that_looks_like_a_scan(tmp_path):
    code = ('import nibabel as nib, numpy as np; from sbldm_nb.dicom import write_dicom; print("go", flush=True); '
            f'write_dicom(nib.Nifti1Image(np.zeros((64, 64, 2000), np.int16), np.eye(4)), {str(tmp_path/"case")!r})')
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    p.stdout.readline()
    deadline = time.time() + 30
    while not list(tmp_path.rglob('*.dcm')) and time.time() < deadline: time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    left = [q.name for q in tmp_path.iterdir()]
    assert len(left) == 1 and re.fullmatch(r'\.case\.\w+\.partial', left[0])
    refused(tmp_path, 'no DICOM image')


# de-identification

def test_deidentified_series_stays_a_series_and_equal_patients_stay_equal(tmp_path):
    def clean(name, **tags): return save(tmp_path/name, [deidentify(pydicom.dcmread(io.BytesIO(content(ct_slice(k, **tags))))) for k in range(4)])
    a, b, c = clean('a'), clean('b', SeriesInstanceUID='1.2.5'), clean('c', PatientID='SMITH')
    ids = [pydicom.dcmread(next(f.iterdir())) for f in (a, b, c)]
    assert ids[0].PatientID == ids[1].PatientID != ids[2].PatientID and ids[0].SeriesInstanceUID != ids[1].SeriesInstanceUID
    original = save(tmp_path/'o', [ct_slice(k) for k in range(4)])
    np.testing.assert_array_equal(read_dicom(a).dataobj, read_dicom(original).dataobj)
    np.testing.assert_array_equal(read_dicom(a).affine, read_dicom(original).affine)


@pytest.mark.parametrize('name', ['MR_small_RLE.dcm', 'MR_small_bigendian.dcm', 'MR_small_implicit.dcm', 'MR_small_jpeg_ls_lossless.dcm', 'CT_small.dcm'])
def test_deidentified_shipped_files_hold_the_same_pixels(tmp_path, name):
    ds = pydicom.dcmread(SHIPPED/name)
    if 'SECONDARY' in ds.ImageType: ds.BurnedInAnnotation = 'NO'
    raw = content(deidentify(ds))
    for word in (str(ds.PatientName), str(ds.PatientID), str(ds.SOPInstanceUID), str(ds.StudyDate)): assert word.encode() not in raw
    (tmp_path/'x.dcm').write_bytes(raw)
    np.testing.assert_array_equal(read_dicom(tmp_path/'x.dcm').dataobj, read_dicom(SHIPPED/name).dataobj)


def test_a_name_in_a_kept_tag_or_in_the_spare_bits_is_refused_or_dropped():
    for tag in ('ImageType', 'Modality', 'PatientPosition', 'RescaleType', 'SeriesInstanceUID', 'SOPInstanceUID', 'SOPClassUID'):
        assert b'MILLER' not in content(deidentify(ct_slice(0, BurnedInAnnotation='NO', **{tag: 'MILLER'})))
    broken = ct_slice(0)
    broken[0x00281052] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(0x00281052), 'DS', 6, b'MILLER', 0, False, True)
    with pytest.raises(ValueError) as e: deidentify(broken)
    assert 'MILLER' not in str(e.value) and e.value.__suppress_context__
    hidden = (np.arange(48) | 0x8000).astype('<u2').tobytes()
    assert (np.frombuffer(deidentify(pydicom.dcmread(io.BytesIO(content(ct_slice(0, PixelData=hidden))))).PixelData, '<u2') == np.arange(48)).all()
    longer = pydicom.dcmread(io.BytesIO(content(ct_slice(0, PixelData=np.arange(48).astype('<u2').tobytes() + b'MILLER'))))
    assert b'MILLER' not in content(deidentify(longer))


@pytest.mark.parametrize('cause, tags', [
    ('it says so', dict(BurnedInAnnotation='yes')), ('does not say', dict(SOPClassUID=uids.SecondaryCaptureImageStorage)), ('does not say', dict(ImageType=None)),
    ('a grey image', dict(PhotometricInterpretation='PALETTE COLOR')), ('a grey image', dict(PixelData=None)), ('Modality LUT', dict(ModalityLUTSequence=[Dataset()])),
    ('lacks its SeriesInstanceUID', dict(SeriesInstanceUID=None))])
def test_what_may_not_leave(cause, tags):
    ds = ct_slice(0, **tags)
    for tag, value in tags.items():
        if value is None: delattr(ds, tag)
    with pytest.raises(ValueError, match=cause): deidentify(ds)


def test_two_series_of_one_study_stay_together_and_odd_uids_are_not_told(capfd, recwarn, caplog):
    raw = [content(ct_slice(0, SeriesInstanceUID=s, StudyInstanceUID='MILLER')) for s in ('1.2.3', 'MILLER.1')]
    recwarn.clear()
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    a, b = (deidentify(pydicom.dcmread(io.BytesIO(r))) for r in raw)
    assert (a.StudyInstanceUID, a.FrameOfReferenceUID) == (b.StudyInstanceUID, b.FrameOfReferenceUID) and a.SeriesInstanceUID != b.SeriesInstanceUID
    out = capfd.readouterr()
    assert not recwarn.list and 'MILLER' not in out.out + out.err + caplog.text


def test_padding_with_the_other_sign_is_kept():
    ds = ct_slice(0, PixelRepresentation=1, BitsStored=16, HighBit=15)
    ds.add_new('PixelPaddingValue', 'US', 63536)
    assert pydicom.dcmread(io.BytesIO(content(deidentify(ds)))).PixelPaddingValue in (63536, -2000)


def test_a_name_in_every_text_of_the_dictionary_and_in_overlays_and_curves():
    ds, planted, texts = ct_slice(0), 0, dict.fromkeys(('AE', 'CS', 'LO', 'LT', 'PN', 'SH', 'ST', 'UC', 'UR', 'UT'), 'MILLER')
    texts |= dict(UI='1.2.4711', OB=b'MILLER', SQ=[item(PatientName='MILLER', ImageComments='MILLER')])
    needed = {pydicom.tag.Tag(k) for k in ('BurnedInAnnotation', 'ModalityLUTSequence', 'SpecificCharacterSet')} | ds.keys()
    for tag in map(pydicom.tag.Tag, pydicom.datadict.DicomDictionary):
        vr = pydicom.datadict.dictionary_VR(tag)
        if vr not in texts or tag in needed or tag.group in (0, 2, 4, 6): continue          # the last are of messages and of DICOMDIR
        ds.add_new(tag, vr, texts[vr])
        planted += 1
    for group in (0x5000, 0x6000, 0x6002):
        ds.add_new((group, 0x3000), 'OW', b'MILLER')
        ds.add_new((group, 0x1500), 'LO', 'MILLER')
    ds.private_block(0x7FE1, 'MILLER', create=True).add_new(1, 'UN', b'MILLER')
    ds.add_new(0xFFFCFFFC, 'OB', b'MILLER')
    raw = content(ds)
    assert planted > 2900 and raw.count(b'MILLER') > 2500
    clean = content(deidentify(pydicom.dcmread(io.BytesIO(raw))))
    assert b'MILLER' not in clean and b'4711' not in clean and len(clean) < 3000
