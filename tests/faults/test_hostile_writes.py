"""Hostile places to write to: full, limited, locked, taken. What was there before stays, nothing half written is left, the error is one sentence."""
import os
import resource
import subprocess

import nibabel as nib
import numpy as np
import pytest

from faults.build import VOXELS, write
from faults.harness import one_sentence, put, snapshot
from sbldm_nb.data import write_image
from sbldm_nb.dicom import write_dicom

KINDS = ('ValueError', 'FileNotFoundError', 'NotADirectoryError', 'FileExistsError', 'IsADirectoryError', 'PermissionError', 'OSError')


def volume(size=64):
    "A simulated CT of noise, which does not shrink."
    img = nib.Nifti1Image(np.random.default_rng(0).integers(-1000, 2000, (size, size, 8)).astype(np.int16), np.diag([2., 2., 3., 1.]))
    img.header['descrip'] = b'SIMULATED'
    return img

def flat():
    "A picture of noise."
    return nib.Nifti1Image(np.random.default_rng(0).integers(0, 255, (300, 300, 1)).astype(np.float32), np.eye(4))

WRITERS = {'nii': (lambda p: write_image(volume(), p), 'a.nii'), 'nii.gz': (lambda p: write_image(volume(), p), 'a.nii.gz'),
           'png': (lambda p: write_image(flat(), p), 'a.png'), 'dicom zip': (lambda p: write_dicom(volume(), p), 'a.zip'),
           'dicom folder': (lambda p: write_dicom(volume(256), p), 'a')}
writers = pytest.mark.parametrize('what', WRITERS)


def limited(door):
    "No file above 10 kB, as a quota has it."
    def open_it(given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return door(given)
    return open_it

def fails(ground, door, path, says=(), mortal=False):
    "The door must fail in one sentence and leave everything as it was."
    before = snapshot(ground)
    out = put(door, path, ground, 20, mortal)
    assert out.error in KINDS, out
    one_sentence(out.message, path, says, named=False)
    assert snapshot(ground) == before


@writers
def test_quota(what, ground):
    door, name = WRITERS[what]
    fails(ground, limited(door), ground/'given'/name, ['large'])

@writers
def test_quota_keeps_what_was_there(what, ground):
    door, name = WRITERS[what]
    path = ground/'given'/name
    write(path if what != 'dicom folder' else path/'mine', b'old')
    fails(ground, limited(door), path)

@writers
def test_full_disk(what, ground):
    door, name = WRITERS[what]
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'none', ground/'given'], capture_output=True).returncode: pytest.skip('mount is not allowed here')
    try: fails(ground, door, ground/'given'/name, ['space'])
    finally: subprocess.run(['umount', '-l', ground/'given'], check=True)

@writers
def test_locked_folder(what, ground):
    door, name = WRITERS[what]
    (ground/'given').chmod(0o555)
    fails(ground, door, ground/'given'/name, ['permission'], mortal=True)

@writers
def test_below_a_file(what, ground):
    door, name = WRITERS[what]
    fails(ground, door, write(ground/'given'/'file', b'mine')/name)

@writers
def test_place_is_a_folder(what, ground):
    door, name = WRITERS[what]
    write(ground/'given'/name/'mine', b'mine')
    fails(ground, door, ground/'given'/name)

@writers
def test_name_of_300_bytes(what, ground):
    door, name = WRITERS[what]
    fails(ground, door, ground/'given'/('n'*300 + name))

@writers
def test_link_is_replaced_not_followed(what, ground):
    "A link in the place of the output: what it points to stays as it was."
    door, name = WRITERS[what]
    target = write(ground/'work'/'mine', b'mine')
    (ground/'given'/name).symlink_to(target)
    put(door, ground/'given'/name, ground, 20)
    assert target.read_bytes() == b'mine' and os.listdir(ground/'work') == ['mine']

def wrong_volumes():
    x = VOXELS.astype(np.float32)
    nan, inf = x.copy(), x.copy()
    nan[0, 0, 0], inf[0, 0, 0] = np.nan, np.inf
    shear = np.array([[2., .5, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    return {'nan': (nan, np.eye(4)), 'infinity': (inf, np.eye(4)), 'fractions': (x + .5, np.eye(4)), 'beyond int16': (x*1e4, np.eye(4)), 'sheared': (VOXELS, shear),
            'singular': (VOXELS, np.diag([1., 1., 0., 1.])), 'no voxels': (VOXELS[:0], np.eye(4)), 'two axes': (VOXELS[0], np.eye(4)), 'four axes': (VOXELS[..., None], np.eye(4)),
            'complex': (VOXELS.astype(np.complex64), np.eye(4)), 'affine of nan': (VOXELS, np.full((4, 4), np.nan))}

@pytest.mark.parametrize('what', wrong_volumes())
@pytest.mark.parametrize('name', ['a', 'a.zip'])
def test_volumes_that_dicom_cannot_hold(what, name, ground):
    data, affine = wrong_volumes()[what]
    def door(path):
        img = nib.Nifti1Image(data, np.eye(4))
        img._affine = affine  # nibabel itself refuses to be given some of these
        img.header['descrip'] = b'SIMULATED'
        return write_dicom(img, path)
    fails(ground, door, ground/'given'/name)
