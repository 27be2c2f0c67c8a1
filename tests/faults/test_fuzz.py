"""Bytes, headers, tags and tables changed at random: an image with finite values comes out, or one of three exceptions with one sentence.

Hypothesis draws the changes; `derandomize` makes every run the same. What is marked slow draws thirty times as many."""
import io
import json
import resource
import struct
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults.build import VOXELS, dataset, dicom, gz, inner, nifti, png, slices, write
from faults.harness import ALLOWED, CEILING, IDENTITY, chain, discover, memory, one_sentence, private, read_dicom, read_image, zip_members
from sbldm_nb.dicom import deidentify

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')  # pydicom's, while the input is built


# what is changed

def archived():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, ds in enumerate(slices(3)): z.writestr(zipfile.ZipInfo(inner(k)), dicom(ds), zipfile.ZIP_DEFLATED)  # dated 1980, not today
    return buffer.getvalue()

NII, DCM, ZIP, PNG, JPG = nifti(VOXELS.astype(np.float32)), dicom(dataset(0)), archived(), png(), png(format='JPEG')
NASTY = [b'\0\0', b'\xff\xff', b'\0\0\0\x80', b'\xff\xff\xff\x7f', b'\xff\xff\xff\xff', struct.pack('<f', np.nan), struct.pack('<f', np.inf), struct.pack('<f', 1e-40),
         struct.pack('<q', 2**62), b'\\', b'\n', b'DOE^JANE', b'PK\1\2', b'PK\5\6', b'\xfe\xff\0\xe0\xff\xff\xff\xff', b'SQ\0\0\xff\xff\xff\xff', b'1e400', b'-1', b'NaN']


@st.composite
def hurt(draw, raw, head=None):
    "Bytes with a few wounds, most of them in the first `head` ones."
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, max(0, len(raw) - 1))) if draw(st.integers(0, 3)) == 0 or head is None else draw(st.integers(0, min(head, max(1, len(raw))) - 1))
        match draw(st.sampled_from(['byte', 'byte', 'nasty', 'nasty', 'cut', 'drop', 'insert', 'repeat'])):
            case 'byte': raw[place:place + 1] = bytes([draw(st.integers(0, 255))])
            case 'nasty':
                new = draw(st.sampled_from(NASTY))
                raw[place:place + len(new)] = new
            case 'cut': del raw[place:]
            case 'drop': del raw[place:place + draw(st.integers(1, 40))]
            case 'insert': raw[place:place] = draw(st.binary(min_size=1, max_size=16))
            case 'repeat': raw[place:place] = raw[place:place + draw(st.integers(1, 200))]
    return bytes(raw)


@st.composite
def fields(draw):
    "A NIfTI file with a few header fields of any value."
    head = nib.Nifti1Header(NII[:348], check=False)
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from(['dim', 'datatype', 'bitpix', 'pixdim', 'vox_offset', 'scl_slope', 'scl_inter', 'xyzt_units', 'qform_code', 'sform_code', 'quatern_b',
                                    'quatern_c', 'qoffset_x', 'srow_x', 'srow_y', 'srow_z', 'sizeof_hdr', 'magic', 'cal_max', 'intent_code', 'slice_end']))
        size = head[key].nbytes
        head._structarr[key] = np.frombuffer(draw(st.binary(min_size=size, max_size=size) | st.sampled_from([(n*size)[:size] for n in NASTY])), head[key].dtype).reshape(head[key].shape)
    return head.binaryblock + NII[348:]


KEYWORDS = ['ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing', 'Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation',
            'RescaleSlope', 'RescaleIntercept', 'RescaleType', 'SamplesPerPixel', 'PhotometricInterpretation', 'PlanarConfiguration', 'NumberOfFrames', 'InstanceNumber',
            'SeriesInstanceUID', 'SOPInstanceUID', 'SOPClassUID', 'ImageType', 'Modality', 'FrameOfReferenceUID', 'SpecificCharacterSet', 'PatientName', 'PixelPaddingValue',
            'SliceThickness', 'SpacingBetweenSlices', 'WindowCenter', 'PatientPosition', 'BurnedInAnnotation', 'EchoTime', 'LossyImageCompression', 'PatientID', 'PixelData']
words = (st.binary(max_size=24) | st.sampled_from([b'', b'0', b'0\\0', b'0\\0\\0', b'NaN\\1', b'1e400\\1\\1', b'-1', b'65535', b'\xff\xff', b'\0\0', b'2147483647', b'DOE^JANE',
                                                   b'1\\0\\0\\0\\1\\0', b'1\\1\\1\\1\\1\\1', b'..\\..', b'1.2.3', b'\\\\\\\\', b'1_000', b'0x10', b' ', b'inf\\inf\\inf', b'1,5']))
tags = st.dictionaries(st.sampled_from(KEYWORDS), words | st.none(), min_size=1, max_size=3)

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(['../DOE.nii.gz', '/etc/passwd', '', '.', '\0', './imagesTr']),
                        lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=10) | st.sampled_from(['image', 'label']), inside, max_size=4), max_leaves=12)
lines = st.lists(st.lists(st.text(max_size=12) | st.sampled_from(['a.png', '../a.png', '/a.png', 'a.png\0', '.', '..', 'HC', 'p1', '"', 'sub/a.png']), max_size=5), max_size=6)


# what is owed

def owed(door, given):
    "Open a door; a value must be finite, an exception one of three with one sentence."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: value = door(given)
        except ALLOWED as e:
            assert type(e) in ALLOWED, f'{type(e).__name__} came out: {e}'
            one_sentence(str(e), given, named=False)
            private(chain(e), given)
            return
    if hasattr(value, 'dataobj'): assert np.isfinite(np.asanyarray(value.dataobj)).all() and np.isfinite(value.affine).all()
    else: str(value)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A folder that is used again and again, in a process that cannot take the machine's memory."
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory('VmSize')*2**20) + CEILING, hard))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SBLDM_ID_KEY', 'the key of the fuzz')  # and not the user's own
        yield tmp_path_factory.mktemp('fuzz')
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def file_of(name, door=read_image):
    def use(here, raw): owed(door, write(here/name, raw))
    return use

def list_of(here, changed):
    "Three slices, one of them with other tags."
    sets = slices(3)
    sets[1] = dataset(1, **changed)
    for k, ds in enumerate(sets): write(here/'tags'/inner(k), dicom(ds))
    owed(read_dicom, here/'tags')

def stranger_of(here, changed):
    "A header after `deidentify` tells nothing, whatever is in its tags."
    raw = dicom(dataset(0, **changed))
    def door(_):
        buffer = io.BytesIO()
        deidentify(pydicom.dcmread(io.BytesIO(raw))).save_as(buffer, enforce_file_format=True)
        assert not IDENTITY.search(buffer.getvalue().decode('latin-1')), changed
    owed(door, '')

def task_of(here, text):
    if not (here/'task'/'imagesTr').exists():
        for k in range(2): write(here/'task'/'imagesTr'/f'DOE_{k}.nii.gz', gz(NII))
    write(here/'task'/'dataset.json', text if isinstance(text, bytes) else json.dumps(text).encode('utf-8', 'surrogatepass'))
    owed(discover, here/'task')

def table_of(here, rows):
    if not (here/'table').exists():
        for name in ('a.png', 'b.png', 'sub/a.png'): write(here/'table'/name, PNG)
    text = rows if isinstance(rows, bytes) else '\n'.join(['path,label,patient', *map(','.join, rows)]).encode('utf-8', 'surrogatepass')
    write(here/'table'/'labels.csv', text)
    owed(discover, here/'table')

TASK = {'name': 'DOE', 'modality': {'0': 'MRI'}, 'labels': {'0': 'b'}, 'training': [{'image': f'./imagesTr/DOE_{k}.nii.gz'} for k in range(2)], 'test': []}
TABLE = b'path,label,patient\na.png,HC,MRN-4711\nsub/a.png,TLE,"DOE, JANE"\n'
FUZZ = {  # what: (how it is changed, how it is used, how often)
    'nii': (hurt(NII, 352), file_of('a.nii'), 300),
    'nii header fields': (fields(), file_of('b.nii'), 400),
    'nii.gz': (hurt(gz(NII)), file_of('a.nii.gz'), 200),
    'nii inside gz': (hurt(NII, 352).map(gz), file_of('b.nii.gz'), 200),
    'png': (hurt(PNG, 60), file_of('a.png'), 250),
    'jpg': (hurt(JPG), file_of('a.jpg'), 250),
    'dcm': (hurt(DCM, len(DCM) - 240), file_of('a.dcm'), 250),
    'dcm after its preamble': (hurt(DCM[132:], 700).map(lambda raw: DCM[:132] + raw), file_of('b.dcm'), 250),
    'dicom tags': (tags, list_of, 200),
    'deidentify': (st.dictionaries(st.sampled_from(KEYWORDS[:-1]), words | st.just(b'DOE^JANE') | st.just(b'MRN-4711'), max_size=4), stranger_of, 200),
    'zip': (hurt(ZIP), file_of('a.zip'), 150),
    'zip table': (hurt(ZIP[ZIP.index(b'PK\1\2'):]).map(lambda raw: ZIP[:ZIP.index(b'PK\1\2')] + raw), file_of('b.zip', zip_members), 250),
    'dataset.json': (hurt(json.dumps(TASK).encode()), task_of, 150),
    'dataset.json values': (st.fixed_dictionaries({}, optional=dict.fromkeys(TASK, anything)).map(lambda d: {**TASK, **d}), task_of, 200),
    'csv': (hurt(TABLE), table_of, 150),
    'csv cells': (lines, table_of, 200),
}


def fuzz(change, use, times, here):
    @settings(max_examples=times, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(change)
    def run(changed): use(here, changed)
    run()


@pytest.mark.parametrize('what', FUZZ)
def test_fuzz(what, here): fuzz(*FUZZ[what], here)


@pytest.mark.slow
@pytest.mark.parametrize('what', FUZZ)
def test_fuzz_for_long(what, here):
    change, use, times = FUZZ[what]
    fuzz(change, use, 30*times, here)
