"Data on real files, damaged files and killed processes: what does not fit into the page of `00_data`."
import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from sbldm_nb.data import (Intensity, SliceDataset, crop_or_pad, list_images, loaders, read_image, resample, spacing_of,
                           split_patients, to_ras, write_image)

ANATOMICAL = Path(nib.__file__).parent/'tests/data/anatomical.nii'


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


@pytest.mark.parametrize('which', ['icbm', 'anatomical'])
def test_whole_way_and_back(which, tmp_path, request):
    "File -> RAS -> resample -> Intensity -> slices -> file: the place and the units survive."
    path = request.getfixturevalue('icbm_t1') if which == 'icbm' else ANATOMICAL
    levels, size = ((3.5, 24.5), 64) if which == 'icbm' else ((-6, 15), 24)
    data = SliceDataset.from_nifti([path], levels=levels, size=size, slices=8)
    assert data.images.shape == (8, 1, size, size) and data.images.dtype == torch.float32
    assert data.images.min() == -1 and data.images.max() > .9 and data.images.std() > .2
    assert torch.isfinite(data.images).all() and (data.positions.diff() - .03).abs().max() < 1e-6

    coarse = resample(read_image(path), 3.)
    line = Intensity.from_dict(json.loads(json.dumps(data.intensities[0].to_dict())))
    for i in range(8):
        back = read_image(write_image(data.to_image(i), tmp_path/f'{i}.nii.gz'))
        np.testing.assert_array_equal(back.affine, data.to_image(i).affine)
        np.testing.assert_allclose(spacing_of(back), 3., rtol=1e-6)
        index = nib.affines.apply_affine(np.linalg.inv(coarse.affine) @ back.affine, np.argwhere(np.ones(back.shape)))
        u = np.rint(index).astype(int)
        np.testing.assert_allclose(u, index, atol=1e-4)
        seen = ((u >= 0) & (u < coarse.shape)).all(1)
        expected = np.asanyarray(coarse.dataobj)[tuple(u[seen].T)].clip(line.low, line.high)
        np.testing.assert_allclose(back.get_fdata().ravel()[seen], expected, atol=1e-4*(line.high - line.low))


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
    for part in (1, 5, 200, 1000, len(whole)//2, len(whole) - 9, len(whole) - 1):
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


def test_wrong_content_is_named(tmp_path):
    def save(name, data):
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path/name)
        return tmp_path/name
    ones = np.ones((4, 5, 6), np.float32)
    refused(tmp_path/'none.nii', 'no such file', error=FileNotFoundError)
    refused(tmp_path/'scan.mgz', 'expected a file ending in')
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
    refused(ANATOMICAL.parent/'example_nifti2.nii.gz', '3D', '(32, 20, 12, 2)')
    series = nib.load(ANATOMICAL.parent/'example_nifti2.nii.gz')
    nib.save(series.slicer[..., 0], tmp_path/'one.nii.gz')
    img = read_image(tmp_path/'one.nii.gz')
    assert isinstance(nib.load(tmp_path/'one.nii.gz'), nib.Nifti2Image) and type(img) is nib.Nifti1Image
    np.testing.assert_array_equal(np.asanyarray(img.dataobj), np.asanyarray(series.dataobj)[::-1, ..., 0])


def test_missing_orientation_warns(tmp_path):
    img = nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4))
    img.set_sform(np.eye(4), code=0)
    img.set_qform(np.eye(4), code=0)
    nib.save(img, tmp_path/'nowhere.nii')
    with pytest.warns(UserWarning, match='no orientation'): read_image(tmp_path/'nowhere.nii')


def test_bad_folders_and_flat_images(tmp_path):
    ones = np.ones((20, 20, 20), np.float32)
    volumes, from_folder = tmp_path/'volumes', lambda p: SliceDataset.from_nifti(p)
    refused(volumes, 'no such folder', error=FileNotFoundError, read=from_folder)
    volumes.mkdir()
    refused(volumes, 'no file matches', read=from_folder)
    with pytest.raises(ValueError, match='empty list'): SliceDataset.from_nifti([])
    write_image(nib.Nifti1Image(ones*5, np.eye(4)), volumes/'constant.nii.gz')
    with pytest.raises(ValueError, match='constant.nii.gz.*constant'): from_folder(volumes)
    write_image(nib.Nifti1Image(ones*0, np.eye(4)), volumes/'constant.nii.gz')
    with pytest.raises(ValueError, match='constant.nii.gz: no voxel above 0'): from_folder(volumes)
    half = ones*np.arange(1, 21)[:, None, None]
    half[:, :, 10:] = 0
    write_image(nib.Nifti1Image(half, np.eye(4)), volumes/'constant.nii.gz')
    with pytest.raises(ValueError, match='constant.nii.gz: the slice at 18 mm is constant'):
        SliceDataset.from_nifti(volumes, levels=(1, 18), slices=3, spacing=1., size=20)

    pictures = tmp_path/'pictures'
    refused(pictures/'train', 'no such folder', error=FileNotFoundError, read=lambda p: SliceDataset.from_pictures(p.parent))
    (pictures/'train').mkdir(parents=True)
    refused(pictures/'train', 'no file matches', read=lambda p: SliceDataset.from_pictures(p.parent))
    Image.fromarray(np.full((9, 9), 3, np.uint8)).save(pictures/'train/a.png')
    refused(pictures/'train/a.png', 'constant', read=lambda p: SliceDataset.from_pictures(p.parents[1]))
    (pictures/'train/a.png').write_bytes(b'\x89PNG\r\n')
    refused(pictures/'train/a.png', 'damaged or cut short', read=lambda p: SliceDataset.from_pictures(p.parents[1]))
    (pictures/'train/a.png').write_bytes(b'')
    refused(pictures/'train/a.png', '0 bytes', read=lambda p: SliceDataset.from_pictures(p.parents[1]))


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


# splits and loaders

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


@pytest.fixture
def data():
    images = torch.rand(22, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    return SliceDataset(images, torch.arange(22)/100, [i // 2 for i in range(22)], augment=True, seed=5)


def passes(loader, epochs, set_epoch=None):
    out = []
    for e in epochs:
        if set_epoch: set_epoch(e)
        out.append([(b['position'].tolist(), b['image'].sum((1, 3)).flatten().tolist()) for b in loader])
    return out


def test_workers_and_accelerate_see_the_same_epochs(data):
    from accelerate import Accelerator
    plain = loaders(data, data, 4, seed=1)[0]
    by_hand = passes(plain, range(3), plain.sampler.set_epoch)
    assert by_hand[0] != by_hand[1]
    assert passes(loaders(data, data, 4, seed=1)[0], range(3)) == by_hand
    workers = torch.utils.data.DataLoader(data, 4, sampler=loaders(data, data, 4, seed=1)[0].sampler, drop_last=True,
                                          num_workers=2, persistent_workers=True)
    assert passes(workers, range(3)) == by_hand
    prepared = Accelerator(cpu=True).prepare(loaders(data, data, 4, seed=1)[0])
    assert passes(prepared, range(3)) == by_hand
    assert passes(prepared, [2, 0], prepared.set_epoch) == [by_hand[2], by_hand[0]]


def test_two_ranks_share_an_epoch_without_overlap(data):
    from accelerate.data_loader import prepare_data_loader
    seen = []
    for rank in range(2):
        shard = prepare_data_loader(loaders(data, data, 4, seed=1)[0], num_processes=2, process_index=rank, put_on_device=False,
                                    split_batches=False, dispatch_batches=False)
        shard.set_epoch(3)
        assert int(data._epoch) == 3
        seen.append({p for positions, _ in passes(shard, [0])[0] for p in positions})
    assert not seen[0] & seen[1] and len(seen[0]) == len(seen[1])


def test_crop_or_pad_round_trip_for_odd_and_even():
    img = to_ras(nib.Nifti1Image(np.random.default_rng(0).random((9, 12, 3)).astype(np.float32), np.eye(4)))
    for size in (13, 14, (9, 15)):
        back = crop_or_pad(crop_or_pad(img, size), img.shape[:2])
        assert np.abs(back.affine - img.affine).max() <= 1
        if tuple((np.broadcast_to(size, 2) - img.shape[:2]) % 2) == (0, 0):
            np.testing.assert_array_equal(back.get_fdata(), img.get_fdata())
            np.testing.assert_array_equal(back.affine, img.affine)
