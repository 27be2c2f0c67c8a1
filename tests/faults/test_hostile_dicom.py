"Hostile DICOM: what scanners, archives, copies and senders do to a series. Every file carries an identity in its name and its tags."
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from faults.build import COLS, ROWS, SLICES, UID, archive, dataset, dicom, gz, inner, nifti, png, series, slices, write
from faults.harness import NAME, Table, judge, put, read_dicom, read_image, series_of

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')  # pydicom's, while the input is built; in the child they count
hostile = Table()
JPEG, RLE, MPEG4, DEFLATED, IMPLICIT = (f'1.2.840.10008.1.2{s}' for s in ('.4.50', '.5', '.4.102', '.1.99', ''))


def whole(value):
    "The honest series: 12 x 10 x 6 voxels of 2 x 2 x 3 mm in HU."
    wanted = sum(int((np.arange(ROWS*COLS)*3 + 100*k - 1024).sum()) for k in range(SLICES))
    return value['shape'] == [COLS, ROWS, SLICES] and value['sum'] == wanted and np.allclose(value['spacing'], [2, 2, 3])


def one_bad(here, at=3, **tags):
    "An honest series but for one slice's tags."
    sets = slices()
    sets[at] = dataset(at, **tags)
    return series(here/'DOE_JANE', sets).parent


def all_bad(here, **tags): return series(here/'DOE_JANE', slices(**tags)).parent


# honest, in dishonest company or order

@hostile(read_dicom, reads=whole)
def unhurt(here): return series(here/'s').parent

@hostile(read_image, reads=whole)
def unhurt_by_the_other_door(here): return series(here/'s')

@hostile(read_dicom, reads=whole)
def list_of_files(here): return sorted(series(here/'s').iterdir())

@hostile(read_dicom, reads=whole)
def names_and_instance_numbers_shuffled(here):
    for k, j in enumerate(np.random.default_rng(0).permutation(SLICES)): write(here/inner(k), dicom(dataset(int(j), InstanceNumber=(7*k) % 5)))
    return here

@hostile(read_dicom, reads=whole)
def implicit_little_endian(here): return series(here/'s', [dicom(ds, IMPLICIT) for ds in slices()])

@hostile(read_dicom, reads=whole)
def no_endings_and_many_scripts(here):
    for k, ds in enumerate(slices()): write(here/f'Größe 脳 🧠 {k}', dicom(ds))
    return here

@hostile(read_dicom, reads=whole)
def folders_forty_levels_deep(here): return series(here.joinpath(*(['DOE']*40)), None) and here

@hostile(read_dicom, reads='either')
def company_of_text_and_pictures(here):
    series(here/'s')
    write(here/'s'/'DOE_JANE.txt', b'MRN-4711')
    write(here/'s'/'DOE_JANE.png', png())
    write(here/'s'/'.DS_Store', bytes(50))
    return here/'s'

@hostile(read_dicom, reads=whole)
def a_report_and_a_directory_beside(here):
    series(here/'s')
    report = dataset(0, series=5, SOPClassUID='1.2.840.10008.5.1.4.1.1.88.11', Modality='SR', PixelData=None, Rows=None, Columns=None)
    write(here/'s'/'DOE_REPORT.dcm', dicom(report))
    return here

@hostile(read_dicom, reads=whole)
def a_localizer_beside(here):
    series(here/'s')
    scout = dataset(0, series=6, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'], ImageOrientationPatient=[1., 0., 0., 0., 0., -1.])
    write(here/'s'/'DOE_SCOUT.dcm', dicom(scout))
    return here

@hostile(read_dicom, reads='either')
def a_link_to_an_endless_device_beside(here):
    series(here/'s')
    (here/'s'/'DOE_zero.dcm').symlink_to('/dev/zero')
    return here/'s'

@hostile(read_dicom, reads='either')
def a_named_pipe_beside(here):
    series(here/'s')
    os.mkfifo(here/'s'/'DOE_pipe.dcm')
    return here/'s'

@hostile(read_dicom, reads='either')
def a_folder_that_links_to_its_parent(here):
    series(here/'s')
    (here/'s'/'DOE').symlink_to(here/'s', target_is_directory=True)
    return here/'s'

@hostile(read_dicom, reads='either')
def a_dangling_link_beside(here):
    series(here/'s')
    (here/'s'/'DOE_gone.dcm').symlink_to(here/'nowhere')
    return here/'s'

@hostile(read_dicom, reads='either', mb=100)
def a_sparse_file_of_a_terabyte_beside(here):
    series(here/'s')
    with open(here/'s'/'DOE_huge.dcm', 'wb') as f: f.truncate(2**40)
    return here/'s'

@hostile(read_dicom, reads=whole)
def tags_of_ten_megabytes(here):
    "A private tag as large as a film: read by its header, not into memory again and again."
    sets = slices()
    for ds in sets: ds.add_new(0x00091010, 'OB', bytes(10 << 20))
    return series(here/'s', sets)


# nothing there

@hostile(read_dicom, kinds=(FileNotFoundError,))
def missing(here): return here/'nowhere'

@hostile(read_dicom)
def empty_folder(here): return here

@hostile(read_dicom)
def folder_of_text(here): return write(here/'s'/'DOE_JANE.txt', b'MRN-4711').parent

@hostile(read_dicom)
def folder_of_empty_files(here): return series(here/'s', [b'']*4)

@hostile(read_dicom)
def folder_of_nifti(here): return write(here/'s'/'DOE_JANE.nii.gz', gz(nifti())).parent

@hostile(read_dicom)
def list_of_nothing(here): return []

@hostile(read_dicom, named=False, kinds=(FileNotFoundError, ValueError))
def list_with_a_file_that_is_gone(here): return [*sorted(series(here/'s').iterdir()), here/'s'/inner(99)]

@hostile(read_dicom, kinds=(ValueError, PermissionError, FileNotFoundError), mortal=True)
def a_folder_nobody_may_enter(here):
    series(here/'s').chmod(0)
    return here/'s'

@hostile(read_dicom, mortal=True)
def a_file_nobody_may_read(here):
    (series(here/'s')/inner(2)).chmod(0)
    return here/'s'

@hostile(read_dicom)
def reports_alone(here):
    return series(here/'s', [dataset(k, SOPClassUID='1.2.840.10008.5.1.4.1.1.88.11', Modality='SR', PixelData=None) for k in range(2)])

@hostile(read_dicom)
def localizers_alone(here): return all_bad(here, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])

@hostile(read_image, kinds=(FileNotFoundError, ValueError))
def empty_file(here): return write(here/'a.dcm', b'')

@hostile(read_image)
def text_named_dcm(here): return write(here/'a.dcm', b'DOE^JANE;MRN-4711\n'*50)

@hostile(read_image)
def picture_named_dcm(here): return write(here/'a.dcm', png(size=(100, 100)))


# cut and damaged

def cut(here, keep, at=3):
    raw = dicom(dataset(at))
    return series(here/'s', [dicom(ds) if k != at else raw[:keep(raw)] for k, ds in enumerate(slices())])

@hostile(read_dicom)
def cut_in_the_preamble(here): return cut(here, lambda raw: 100)

@hostile(read_dicom)
def cut_after_the_magic_word(here): return cut(here, lambda raw: 132)

@hostile(read_dicom)
def cut_in_the_file_meta(here): return cut(here, lambda raw: 200)

@hostile(read_dicom)
def cut_in_the_tags(here): return cut(here, lambda raw: raw.index(b'THIN DOE') + 3)

@hostile(read_dicom)
def cut_in_the_pixels(here): return cut(here, lambda raw: len(raw) - 60)

@hostile(read_dicom)
def one_byte_missing(here): return cut(here, lambda raw: len(raw) - 1)

@hostile(read_dicom)
def one_empty_file(here): return cut(here, lambda raw: 0)

# the same to the last slice, where no gap can tell that it is gone

LAST = SLICES - 1

@hostile(read_dicom)
def last_cut_in_the_preamble(here): return cut(here, lambda raw: 100, LAST)

@hostile(read_dicom)
def last_cut_in_the_tags(here): return cut(here, lambda raw: raw.index(b'THIN DOE') + 3, LAST)

@hostile(read_dicom)
def last_cut_between_two_tags(here): return cut(here, lambda raw: raw.index(b'\x28\0\x02\0US'), LAST)

@hostile(read_dicom)
def last_cut_before_the_pixels(here): return cut(here, lambda raw: raw.index(b'\xe0\x7f\x10\0'), LAST)

@hostile(read_dicom)
def last_is_empty(here): return cut(here, lambda raw: 0, LAST)

@hostile(read_dicom)
def last_without_rows(here): return one_bad(here, LAST, Rows=None)

@hostile(read_dicom)
def last_without_its_series(here): return one_bad(here, LAST, SeriesInstanceUID=None)

@hostile(read_dicom)
def last_of_text(here): return series(here/'s', [dicom(ds) if k < LAST else b'404 DOE not found' for k, ds in enumerate(slices())])

@hostile(read_dicom)
def last_overwritten_with_zeros(here): return series(here/'s', [dicom(ds) if k < LAST else bytes(len(dicom(ds))) for k, ds in enumerate(slices())])

@hostile(read_dicom)
def last_with_a_tag_of_four_gigabytes(here):
    raw = dicom(dataset(LAST, PatientComments='DOE JANE'))
    at = raw.index(b'\x10\0\x00\x40LT')
    return series(here/'s', [*slices(LAST), raw[:at + 4] + b'UT\0\0' + struct.pack('<I', 0xFFFFFFF0) + raw[at + 8:]])

@hostile(read_dicom)
def last_is_a_link_to_nowhere(here):
    series(here/'s', slices(LAST))
    (here/'s'/inner(LAST)).symlink_to(here/'nowhere')
    return here/'s'

@hostile(read_dicom, reads='either')
def preambles_lost(here): return series(here/'s', [dicom(ds)[132:] for ds in slices()])

@hostile(read_dicom)
def noise_after_the_preamble(here):
    rng = np.random.default_rng(0)
    return series(here/'s', [bytes(128) + b'DICM' + rng.bytes(600) for _ in range(4)])

@hostile(read_dicom)
def no_transfer_syntax(here):
    raw = dicom(dataset(0))
    at = raw.index(b'\x02\0\x10\0UI')
    cutout = raw[:at] + raw[at + 8 + raw[at + 6]:]
    return series(here/'s', [cutout.replace(raw[132:144], raw[132:140] + struct.pack('<I', struct.unpack('<I', raw[140:144])[0] - 8 - raw[at + 6]))])

@hostile(read_dicom)
def tag_of_four_gigabytes(here):
    raw = dicom(dataset(0, PatientComments='DOE JANE'))
    at = raw.index(b'\x10\0\x00\x40LT')
    return series(here/'s', [raw[:at + 4] + b'UT\0\0' + struct.pack('<I', 0xFFFFFFF0) + raw[at + 8:]])

@hostile(read_dicom, seconds=20, reads='either')
def sequences_nested_three_thousand_deep(here):
    raw = dicom(dataset(0))
    at = raw.index(b'\x08\0\x60\0CS')  # before Modality: ReferencedStudySequence (0008,1110) would be out of order, (0008,0051) is not
    opening = b'\x08\0\x51\0SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff'
    return series(here/'s', [raw[:at] + opening*3000 + raw[at:]])

@hostile(read_dicom, reads='either')
def sequence_that_never_ends(here):
    raw = dicom(dataset(0))
    at = raw.index(b'\x08\0\x60\0CS')
    return series(here/'s', [raw[:at] + b'\x08\0\x51\0SQ\0\0\xff\xff\xff\xff' + raw[at:]])

@hostile(read_dicom, reads='either', mb=450, seconds=20)
def deflated_bomb(here):
    "A deflated transfer syntax: 1 MB of file, 1 GB of tags; 200 : 1 are inflated before it is refused, and zlib holds them twice."
    ds = dataset(0)
    ds.file_meta.TransferSyntaxUID = DEFLATED
    raw = dicom(dataset(0))
    plain = raw[raw.index(b'\x08\0\x05\0CS'):]
    meta = raw[:len(raw) - len(plain)].replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2.1.99')
    at = meta.index(b'\x02\0\x10\0UI') + 6
    meta = meta[:at] + struct.pack('<H', 22) + meta[at + 2:]
    meta = meta[:140] + struct.pack('<I', struct.unpack('<I', meta[140:144])[0] + 2) + meta[144:]
    pixels = plain.index(b'\xe0\x7f\x10\0')
    def pack(raw, mode=zlib.Z_FULL_FLUSH):
        engine = zlib.compressobj(9, zlib.DEFLATED, -15)
        return engine.compress(raw) + engine.flush(mode)
    body = pack(plain[:pixels] + b'\x09\0\x10\x10OB\0\0' + struct.pack('<I', 2**30)) + pack(bytes(2**24))*64 + pack(plain[pixels:], zlib.Z_FINISH)
    return series(here/'s', [meta + body])


# tags that lie

@hostile(read_dicom)
def no_pixels(here): return one_bad(here, PixelData=None)

@hostile(read_dicom)
def no_rows(here): return one_bad(here, Rows=None)

@hostile(read_dicom)
def rows_of_none(here): return all_bad(here, Rows=0)

@hostile(read_dicom, mb=60)
def declares_65535_by_65535(here): return all_bad(here, Rows=65535, Columns=65535)

@hostile(read_dicom, mb=60)
def declares_two_billion_frames(here):
    return series(here/'s', [dataset(0, SOPClassUID='1.2.840.10008.5.1.4.1.1.2.1', NumberOfFrames=b'2147483647')])

@hostile(read_dicom)
def frames_of_a_negative_number(here):
    return series(here/'s', [dataset(0, SOPClassUID='1.2.840.10008.5.1.4.1.1.2.1', NumberOfFrames=b'-4')])

@hostile(read_dicom)
def seven_bits_allocated(here): return all_bad(here, BitsAllocated=7, BitsStored=7, HighBit=6)

@hostile(read_dicom)
def more_bits_stored_than_allocated(here): return all_bad(here, BitsStored=32, HighBit=31)

@hostile(read_dicom, 'colour|samples|rgb')
def colour(here):
    return all_bad(here, SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7,
                   PixelRepresentation=0, PixelData=bytes(ROWS*COLS*3))

@hostile(read_dicom)
def palette(here): return all_bad(here, PhotometricInterpretation='PALETTE COLOR')

@hostile(read_dicom)
def photometric_nobody_knows(here): return all_bad(here, PhotometricInterpretation=NAME)

@hostile(read_dicom)
def slope_that_is_a_name(here): return one_bad(here, RescaleSlope=b'DOE^JANE')

@hostile(read_dicom)
def slope_that_is_not_a_number(here): return one_bad(here, RescaleSlope=b'NaN')

@hostile(read_dicom)
def slope_of_zero(here): return one_bad(here, RescaleSlope=b'0')

@hostile(read_dicom)
def slope_that_overflows(here): return one_bad(here, RescaleSlope=b'1e300')

@hostile(read_dicom)
def intercept_that_is_infinite(here): return one_bad(here, RescaleIntercept=b'inf')

@hostile(read_dicom, reads='either')
def intercept_of_two_values(here): return one_bad(here, RescaleIntercept=b'-1024\\4711')

@hostile(read_dicom, reads='either')
def instance_number_that_is_a_name(here): return all_bad(here, InstanceNumber=b'DOE^JANE')

@hostile(read_dicom, reads='either')
def modality_that_is_a_name(here): return all_bad(here, Modality=b'DOE^JANE ')

@hostile(read_dicom, reads='either')
def character_set_nobody_knows(here): return all_bad(here, SpecificCharacterSet=b'DOE^JANE', PatientName=b'\xff\xfe\xfdDOE')

@hostile(read_dicom, reads='either')
def dates_that_are_names(here): return all_bad(here, PatientBirthDate=b'DOE^JANE', StudyDate=b'4711')

@hostile(read_dicom)
def series_uid_missing(here): return one_bad(here, SeriesInstanceUID=None)

@hostile(read_dicom)
def syntax_of_a_film(here): return series(here/'s', [dicom_raw_syntax(ds, MPEG4) for ds in slices()])

def dicom_raw_syntax(ds, syntax, fragments=(b'\0'*64,)):
    "The bytes of a file with compressed pixels made of any fragments."
    ds.PixelData = encapsulate(list(fragments))
    ds['PixelData'].VR = 'OB'
    ds['PixelData'].is_undefined_length = True
    return dicom(ds, syntax)

@hostile(read_dicom)
def jpeg_of_noise(here): return series(here/'s', [dicom_raw_syntax(ds, JPEG, [np.random.default_rng(0).bytes(300)]) for ds in slices()])

@hostile(read_dicom)
def rle_of_noise(here): return series(here/'s', [dicom_raw_syntax(ds, RLE, [np.random.default_rng(0).bytes(300)]) for ds in slices()])

@hostile(read_dicom)
def rle_of_nothing(here): return series(here/'s', [dicom_raw_syntax(ds, RLE, [b'\0\0']) for ds in slices()])

@hostile(read_dicom, mb=100)
def jpeg_that_is_a_bomb(here):
    "The tags say 10 x 12, the JPEG inside says 60000 x 60000."
    jpeg = bytearray(png(format='JPEG'))
    at = jpeg.index(b'\xff\xc0')
    struct.pack_into('>HH', jpeg, at + 5, 60000, 60000)
    return series(here/'s', [dicom_raw_syntax(dataset(k, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0), JPEG, [bytes(jpeg)]) for k in range(3)])

@hostile(read_dicom)
def jpeg_of_another_matrix(here):
    return series(here/'s', [dicom_raw_syntax(dataset(k, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0), JPEG, [png(format='JPEG', size=(5, 5))])
                             for k in range(3)])


# geometry that lies

@hostile(read_dicom)
def no_position(here): return one_bad(here, ImagePositionPatient=None)

@hostile(read_dicom)
def no_orientation(here): return one_bad(here, ImageOrientationPatient=None)

@hostile(read_dicom)
def no_spacing(here): return one_bad(here, PixelSpacing=None)

@hostile(read_dicom)
def position_that_is_a_name(here): return one_bad(here, ImagePositionPatient=b'DOE\\JANE\\4711')

@hostile(read_dicom)
def position_that_is_not_a_number(here): return one_bad(here, ImagePositionPatient=b'0\\0\\NaN')

@hostile(read_dicom)
def position_of_two_values(here): return one_bad(here, ImagePositionPatient=b'0\\0')

@hostile(read_dicom)
def position_at_infinity(here): return one_bad(here, ImagePositionPatient=b'0\\0\\1e309')

@hostile(read_dicom)
def spacing_of_zero(here): return all_bad(here, PixelSpacing=[0., 0.])

@hostile(read_dicom)
def spacing_below_zero(here): return all_bad(here, PixelSpacing=[-2., 2.])

@hostile(read_dicom)
def spacing_that_is_not_a_number(here): return all_bad(here, PixelSpacing=b'NaN\\2')

@hostile(read_dicom)
def spacing_of_one_value(here): return all_bad(here, PixelSpacing=b'2')

@hostile(read_dicom)
def orientation_of_zeros(here): return all_bad(here, ImageOrientationPatient=[0.]*6)

@hostile(read_dicom)
def orientation_of_two_equal_axes(here): return all_bad(here, ImageOrientationPatient=[1., 0., 0., 1., 0., 0.])

@hostile(read_dicom)
def orientation_of_skew_axes(here): return all_bad(here, ImageOrientationPatient=[1., 0., 0., .5, .8660254, 0.])

@hostile(read_dicom)
def orientation_of_axes_too_long(here): return all_bad(here, ImageOrientationPatient=[5., 0., 0., 0., 5., 0.])

@hostile(read_dicom)
def orientation_of_five_values(here): return all_bad(here, ImageOrientationPatient=b'1\\0\\0\\0\\1')

@hostile(read_dicom)
def orientation_that_is_not_a_number(here): return all_bad(here, ImageOrientationPatient=b'1\\0\\0\\0\\NaN\\0')

@hostile(read_dicom, r'\b6(\.0*)?\b.*mm|mm.*\b6(\.0*)?\b')
def a_slice_is_missing(here): return series(here/'s', [ds for k, ds in enumerate(slices()) if k != 3])

@hostile(read_dicom, 'mm')
def spacing_that_changes_halfway(here):
    return series(here/'s', [dataset(k, ImagePositionPatient=[0., 0., 3.*k if k < 4 else 12. + 5*(k - 4)]) for k in range(7)])

@hostile(read_dicom, 'position|duplicate|twice|same|another')
def two_slices_at_one_position(here): return series(here/'s', [*slices(), dataset(2, SOPInstanceUID=f'{UID}77', InstanceNumber=9)])

@hostile(read_dicom, 'position|duplicate|twice|same|another', reads='either')
def one_slice_copied(here): return series(here/'s', [*slices(), dataset(2)])

@hostile(read_dicom, 'position|duplicate|twice|same|another')
def all_slices_at_one_position(here): return all_bad(here, ImagePositionPatient=[0., 0., 0.])

@hostile(read_dicom, 'orientation')
def orientations_mixed(here): return one_bad(here, ImageOrientationPatient=[0., 1., 0., 0., 0., -1.])

@hostile(read_dicom, 'matri|rows|10')
def matrices_mixed(here): return one_bad(here, Rows=6, Columns=20)

@hostile(read_dicom, 'spacing|mm')
def spacings_mixed(here): return one_bad(here, PixelSpacing=[1., 1.])

@hostile(read_dicom, 'frame')
def frames_of_reference_mixed(here): return one_bad(here, FrameOfReferenceUID=f'{UID}88')

@hostile(read_dicom, 'tilt|shear|drift', r'10(\.0)?|9\.')
def gantry_tilt(here):
    return series(here/'s', [dataset(k, ImagePositionPatient=[0., 3*k*float(np.tan(np.deg2rad(10))), 3.*k]) for k in range(SLICES)])

@hostile(read_dicom, 'series', f'{UID}1', f'{UID}2'.replace('.', r'\.'))
def two_series(here):
    series(here/'a')
    series(here/'b', slices(series=2))
    return here

@hostile(read_dicom, 'series', series_uid=f'{UID}4')
def series_that_is_not_there(here): return series(here/'s')

@hostile(read_dicom, series_uid=f'{UID}2', reads=whole)
def series_that_is_chosen(here):
    series(here/'a', slices(series=1, Rows=5, Columns=24))
    series(here/'b', slices(series=2))
    return here

@hostile(series_of, reads=lambda v: f'{UID}1' in v['text'] and f'{UID}2' in v['text'])
def inventory_of_two_series(here):
    series(here/'a')
    series(here/'b', slices(series=2))
    return here

@hostile(read_dicom, '50 series', seconds=20, chars=900)
def fifty_series_of_one_slice(here): return series(here/'s', [dataset(0, series=100 + k) for k in range(50)])

@hostile(read_dicom, kinds=(TimeoutError,), time_limit=1e-9)
def no_time_at_all(here): return series(here/'s')


# enhanced multi-frame

def enhanced(frames=4, items=None, positions=None, **tags):
    "One file with all frames and functional groups."
    ds = dataset(0, SOPClassUID='1.2.840.10008.5.1.4.1.1.2.1', NumberOfFrames=frames, ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None,
                 RescaleSlope=None, RescaleIntercept=None, RescaleType=None, PixelData=np.arange(frames*ROWS*COLS, dtype=np.int16).tobytes(), **tags)
    def group(name, **values):
        inner = Dataset()
        for k, v in values.items(): setattr(inner, k, v)
        outer = Dataset()
        setattr(outer, name, Sequence([inner]))
        return outer
    shared = Dataset()
    for part in (group('PixelMeasuresSequence', PixelSpacing=[2., 2.], SliceThickness=3.), group('PlaneOrientationSequence', ImageOrientationPatient=[1., 0., 0., 0., 1., 0.]),
                 group('PixelValueTransformationSequence', RescaleSlope=1., RescaleIntercept=-1024., RescaleType='HU')): shared.update(part)
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    z = positions or [3.*k for k in range(frames)]
    ds.PerFrameFunctionalGroupsSequence = Sequence([group('PlanePositionSequence', ImagePositionPatient=[0., 0., z[k % len(z)]]) for k in range(frames if items is None else items)])
    return ds

@hostile(read_dicom, reads=lambda v: v['shape'] == [COLS, ROWS, 4] and np.allclose(v['spacing'], [2, 2, 3]))
def enhanced_unhurt(here): return series(here/'s', [enhanced()])

@hostile(read_dicom)
def enhanced_with_fewer_items_than_frames(here): return series(here/'s', [enhanced(items=2)])

@hostile(read_dicom)
def enhanced_with_more_items_than_frames(here): return series(here/'s', [enhanced(items=9)])

@hostile(read_dicom)
def enhanced_without_frame_items(here): return series(here/'s', [enhanced(items=0)])

@hostile(read_dicom)
def enhanced_without_groups(here):
    ds = enhanced()
    del ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence
    return series(here/'s', [ds])

@hostile(read_dicom)
def enhanced_with_a_gap(here): return series(here/'s', [enhanced(positions=[0., 3., 6., 12.])])

@hostile(read_dicom)
def enhanced_with_frames_at_one_position(here): return series(here/'s', [enhanced(positions=[0., 3., 3., 6.])])

@hostile(read_dicom, mb=60)
def enhanced_with_frames_that_are_not_there(here):
    ds = enhanced(4, items=4)
    ds.NumberOfFrames = 40000
    return series(here/'s', [ds])

@hostile(read_dicom)
def enhanced_cut_in_the_pixels(here): return series(here/'s', [dicom(enhanced())[:-100]])


@pytest.mark.parametrize('case', hostile, ids=lambda c: c.name)
def test_dicom(case, ground): judge(case, ground)


def test_a_disk_that_does_not_answer(ground):
    "A file that hangs when it is read: a named pipe handed over by its own name, in a list, with one second's patience."
    files = sorted(series(ground/'given'/'s').iterdir())
    os.mkfifo(ground/'given'/'s'/'slow.dcm')
    out = put(read_dicom, [*files, ground/'given'/'s'/'slow.dcm'], ground, options={'time_limit': 1.})
    assert not out.died and out.error in ('TimeoutError', 'ValueError', 'FileNotFoundError') and out.seconds < 5


def test_the_same_series_by_every_road(ground):
    "Folder, zip, list, shuffled list: the same bits."
    folder = series(ground/'given'/'s')
    files = sorted(folder.iterdir())
    zipped = archive(ground/'given'/'s.zip', {p.name: p.read_bytes() for p in files})
    shutil.copytree(folder, ground/'given'/'t'/'deep'/'er')
    seen = {put(read_dicom, given, ground).value['hash'] for given in (folder, zipped, files, files[::-1], ground/'given'/'t')}
    assert len(seen) == 1
