"Small valid files, built with nibabel, pydicom, zipfile and PIL alone; hostile cases start from them."
import functools
import gzip
import io
import struct
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag

from faults.harness import BORN, NAME, RECORD

SHAPE = (6, 5, 4)
VOXELS = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 97 + 3).astype(np.int16)


def write(path, content):
    "Real bytes in a real file."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# NIfTI

def nifti(data=VOXELS, affine=None, version=1, **header):
    "The bytes of a NIfTI file with an identity planted; `header` overwrites fields after nibabel has filled them."
    cls = {1: nib.Nifti1Image, 2: nib.Nifti2Image}[version]
    img = cls(data, np.diag([2., 2., 3., 1.]) if affine is None else affine)
    img.header.set_xyzt_units('mm')
    img.header['descrip'] = NAME.encode()
    if version == 1: img.header['db_name'] = RECORD.encode()
    raw = bytearray(img.to_bytes())
    head = cls.header_class.from_fileobj(io.BytesIO(raw), check=False)
    for key, value in header.items(): head[key] = value
    size = {1: 348, 2: 540}[version]
    raw[:size] = head.binaryblock[:size]
    return bytes(raw)


def gz(raw): return gzip.compress(raw, 6, mtime=0)


@functools.cache
def zeros_gz(mib):
    "`mib` MiB of zeros in about a thousandth of that: gzip members one after the other are one stream."
    return gz(bytes(2**26))*(mib//64) + gz(bytes((mib % 64)*2**20))


# pictures

def png(mode='L', size=(12, 9), **save):
    "The bytes of a picture."
    w, h = size
    grey = (np.arange(w*h).reshape(h, w)*7 % 251).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert(mode).save(buffer, **{'format': 'PNG', **save})
    return buffer.getvalue()


def png_chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png_of(width, height, body, depth=8, colour=0):
    "A PNG whose header declares any size and whose one IDAT chunk holds `body`."
    return (b'\x89PNG\r\n\x1a\n' + png_chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0))
            + png_chunk(b'IDAT', body) + png_chunk(b'IEND', b''))


# zip

def archive(path, members, compression=zipfile.ZIP_DEFLATED):
    "A zip file of {name or ZipInfo: bytes}, in that order."
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w', compression) as z:
        for name, content in (members.items() if isinstance(members, dict) else members): z.writestr(name, content, compression)
    return path


# DICOM: written with pydicom, so that the package's own writer cannot hide its reader's faults

UID = '1.2.826.0.1.3680043.8.498.'
ROWS, COLS, SLICES = 10, 12, 6


def dataset(k=0, series=1, **tags):
    "One axial CT slice at z = 3k mm with an identity in its tags; a tag set to None is left out, bytes go into the file as they are."
    ds = Dataset()
    ds.verbatim, ds.file_meta = {}, FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f'{UID}{series}.{k + 1}'
    pixels = (np.arange(ROWS*COLS).reshape(ROWS, COLS)*3 + 100*k).astype(np.int16)
    values = dict(
        SpecificCharacterSet='ISO_IR 100', ImageType=['ORIGINAL', 'PRIMARY', 'AXIAL'], Modality='CT', PatientName=NAME, PatientID=RECORD,
        PatientBirthDate=BORN, StudyDescription='DOE JANE HEAD', SeriesDescription='THIN DOE', InstitutionName='JANE CLINIC',
        StudyInstanceUID=f'{UID}9', SeriesInstanceUID=f'{UID}{series}', FrameOfReferenceUID=f'{UID}8', StudyID='4711', AccessionNumber='4711',
        InstanceNumber=k + 1, ImagePositionPatient=[-11., -9., 3.*k], ImageOrientationPatient=[1., 0., 0., 0., 1., 0.],
        PixelSpacing=[2., 2.], SliceThickness=3., SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2', Rows=ROWS, Columns=COLS,
        BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=1, RescaleIntercept=-1024., RescaleSlope=1., RescaleType='HU',
        PixelData=pixels.tobytes())
    for key, value in {**values, **tags}.items():
        if value is None: continue
        if isinstance(value, bytes) and key != 'PixelData': ds.verbatim[Tag(tag_for_keyword(key))] = dictionary_VR(key)[:2].encode(), value + b' '*(len(value) % 2)
        else: setattr(ds, key, value)
    if 'PixelData' in ds: ds['PixelData'].VR = 'OW'
    return ds


def dicom(ds, syntax=None):
    "The bytes of a DICOM file; pydicom writes every tag but those that it would mend, refuse or stumble over."
    if syntax: ds.file_meta.TransferSyntaxUID = syntax
    verbatim, buffer = getattr(ds, 'verbatim', {}), DicomBytesIO()
    if not verbatim:
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
        return buffer.getvalue()
    empty = Dataset()
    empty.file_meta = ds.file_meta
    pydicom.dcmwrite(buffer, empty, enforce_file_format=True)
    for tag in sorted({*ds.keys(), *verbatim}):
        if tag in verbatim:
            vr, value = verbatim[tag]
            buffer.write(struct.pack('<HH2sH', tag.group, tag.element, vr, len(value)) + value)
        else:
            one = Dataset()
            one[tag] = ds[tag]
            write_dataset(buffer, one)
    return buffer.getvalue()


def inner(k): return f'DOE_JANE_4711_{k:03d}.dcm'


def slices(n=SLICES, **tags): return [dataset(k, **tags) for k in range(n)]


def series(folder, sets=None):
    "A folder of DICOM files with an identity in their names; `sets` are data sets, or bytes."
    for k, ds in enumerate(slices() if sets is None else sets): write(folder/inner(k), ds if isinstance(ds, bytes) else dicom(ds))
    return folder
