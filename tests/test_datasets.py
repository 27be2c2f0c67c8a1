"Data sets on real files, in worker processes and from caches: what does not fit into the page of `00e_datasets`."
import importlib.util
import json
import pickle
import resource
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sbldm_nb.augment import Augment, read_box
from sbldm_nb.cohort import Cohort
from sbldm_nb.ct import GEOMETRIES, Geometry, average_slices, thick_slices
from sbldm_nb.data import Cache, Intensity, preprocess, read_image, resample, spacing_of, write_image
from sbldm_nb.datasets import (BalancedSampler, CachedSlices, CachedVolumes, EpochSampler, GridPatches, InpaintingTriples, RandomPatches,
                               SliceDataset, TensorSlices, ThickThinPairs, loaders)

ANATOMICAL = Path(nib.__file__).parent/'tests/data/anatomical.nii'


def image(data, spacing=(1, 1, 1), origin=(0, 0, 0)): return nib.Nifti1Image(data, nib.affines.from_matvec(np.diag(spacing), origin))


# slices in memory

@pytest.mark.parametrize('which', ['icbm', 'anatomical'])
def test_whole_way_and_back(which, tmp_path):
    "File -> RAS -> resample -> Intensity -> slices -> file: the place and the units survive."
    icbm = (Path(importlib.util.find_spec('nilearn').origin).parent/'datasets/data').glob('mni_icbm152_t1_*.nii.gz')
    path = next(icbm) if which == 'icbm' else ANATOMICAL
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


def refused(read, *causes, error=ValueError, never='DOE'):
    "One line with every one of `causes`, and no name that was found in a folder, neither in the message nor in what led to it."
    with pytest.raises(error) as e: read()
    message, chain = str(e.value), ''
    link = e.value
    while link is not None: chain, link = chain + str(link), None if link.__suppress_context__ else link.__context__
    assert '\n' not in message and len(message) < 300 and never not in chain
    for cause in causes: assert cause in message


def test_bad_folders_and_flat_images(tmp_path):
    ones = np.ones((20, 20, 20), np.float32)
    volumes = tmp_path/'volumes'
    refused(lambda: SliceDataset.from_nifti(volumes), 'no such folder', error=FileNotFoundError)
    volumes.mkdir()
    refused(lambda: SliceDataset.from_nifti(volumes), 'no file matches')
    refused(lambda: SliceDataset.from_nifti([]), 'empty list')
    bad, called = volumes/'DOE_JANE.nii.gz', f'{volumes}: file 1 of 1 in the order of their names: '
    write_image(image(ones*5), bad)
    refused(lambda: SliceDataset.from_nifti(volumes), called, 'is the image constant')
    refused(lambda: SliceDataset.from_nifti([bad]), f'{bad}: ', 'is the image constant', never=bytes.hex(b'nothing'))
    write_image(image(ones*0), bad)
    refused(lambda: SliceDataset.from_nifti(volumes), called + 'no voxel above 0')
    half = ones*np.arange(1, 21)[:, None, None]
    half[:, :, 10:] = 0
    write_image(image(half), bad)
    refused(lambda: SliceDataset.from_nifti(volumes, levels=(1, 18), slices=3, spacing=1., size=20), called + 'the slice at 18 mm is constant')
    bad.write_bytes(bad.read_bytes()[:300])
    refused(lambda: SliceDataset.from_nifti(volumes), called)

    pictures = tmp_path/'pictures'
    (pictures/'train').mkdir(parents=True)
    for content in (b'', b'\x89PNG\r\n'):
        (pictures/'train/DOE.png').write_bytes(content)
        refused(lambda: SliceDataset.from_pictures(pictures), f'{pictures/"train"}: file 1 of 1 in the order of their names: ')
    Image.fromarray(np.full((9, 9), 3, np.uint8)).save(pictures/'train/DOE.png')
    refused(lambda: SliceDataset.from_pictures(pictures), 'the picture is constant')
    refused(lambda: SliceDataset.from_pictures(pictures, 'val'), 'no such folder', error=FileNotFoundError)


def test_warnings_do_not_name_what_was_found(tmp_path):
    nowhere = image(np.random.default_rng(0).random((20, 20, 20)).astype(np.float32))
    for part in ('sform', 'qform'): getattr(nowhere, f'set_{part}')(None, code=0)
    nib.save(nowhere, tmp_path/'DOE_JANE.nii')
    with pytest.warns(UserWarning, match='file 1 of 1.*no orientation') as told: SliceDataset.from_nifti(tmp_path, spacing=1., size=20)
    assert not any('DOE' in str(w.message) for w in told)


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


def test_flips_and_orders_stay_what_they_were(data):
    "Written down once: other flips or another order would make runs of two versions incomparable."
    data.set_epoch(3)
    assert [i for i in range(22) if data.flipped(i)] == [i for i in range(22) if np.random.default_rng((5, 3, i)).random() < .5]
    sampler = EpochSampler(data, seed=1)
    sampler.set_epoch(2)
    assert list(sampler) == np.random.default_rng((1, 2)).permutation(22).tolist()


def test_workers_and_accelerate_see_the_same_epochs(data):
    from accelerate import Accelerator
    plain = loaders(data, data, 4, seed=1)[0]
    by_hand = passes(plain, range(3), plain.sampler.set_epoch)
    assert by_hand[0] != by_hand[1]
    assert passes(loaders(data, data, 4, seed=1)[0], range(3)) == by_hand
    workers = DataLoader(data, 4, sampler=loaders(data, data, 4, seed=1)[0].sampler, drop_last=True, num_workers=2, persistent_workers=True)
    assert passes(workers, range(3)) == by_hand
    prepared = Accelerator(cpu=True).prepare(loaders(data, data, 4, seed=1)[0])
    assert passes(prepared, range(3)) == by_hand
    assert passes(prepared, [2, 0], prepared.set_epoch) == [by_hand[2], by_hand[0]]


@pytest.mark.parametrize('balanced', [False, True])
def test_two_ranks_share_an_epoch_without_overlap(data, balanced):
    from accelerate.data_loader import prepare_data_loader
    seen = []
    for rank in range(2):
        sampler = BalancedSampler(data, 1, [i % 11 == 0 for i in range(22)]) if balanced else None
        shard = prepare_data_loader(loaders(data, data, 4, seed=1, sampler=sampler)[0], num_processes=2, process_index=rank, put_on_device=False,
                                    split_batches=False, dispatch_batches=False)
        shard.set_epoch(3)
        assert int(data._epoch) == 3
        seen.append([p for positions, _ in passes(shard, [0])[0] for p in positions])
    assert len(seen[0]) == len(seen[1])
    if balanced: assert all(sum(round(100*p) % 11 == 0 for p in part) == len(part)/2 for part in seen)
    else: assert not set(seen[0]) & set(seen[1])


def test_mirrors_and_sides_exclude_each_other():
    images, z, who = torch.rand(4, 1, 5, 5), torch.zeros(4), list('abcd')
    for groups in (['HC', 'HC', 'TLE-L', 'TLE-R'], ['left', 'right']*2, ['hc', 'hc', 'tle_r', 'hc']):
        with pytest.raises(ValueError, match='names a side') as e: TensorSlices(images, z, who, augment=True, labels=groups)
        assert not any(g in str(e.value).split() for g in groups if g not in ('left', 'right'))
        assert len(TensorSlices(images, z, who, labels=groups)) == 4
    assert TensorSlices(images, z, who, augment=True, labels=['HC', 'AD', 'AD', 'HC']).labels == [1, 0, 0, 1]
    with pytest.raises(ValueError, match='expected 4 labels, got 3'): TensorSlices(images, z, who, labels=['HC']*3)


@pytest.mark.parametrize('counts', [(14, 3), (1, 1, 40), (5, 5, 5), (2, 3, 4, 5, 6), (100, 1)])
def test_balanced_for_every_number_of_members(counts):
    classes = np.random.default_rng(0).permutation(np.repeat([f'c{k}' for k in range(len(counts))], counts))
    sampler, seen = BalancedSampler(classes, 4, classes), np.zeros(sum(counts), int)
    for epoch in range(12):
        order = list(sampler)
        assert len(order) == len(sampler) >= sum(counts) and sampler.epoch == epoch
        rounds = classes[order].reshape(-1, len(counts))
        assert all(len(set(r)) == len(counts) for r in rounds)
        seen += np.bincount(order, minlength=len(classes))
        for c in set(classes): assert np.ptp(seen[classes == c]) <= 1
    again = BalancedSampler(classes, 4, classes)
    again.set_epoch(11)
    assert list(again) == order != list(BalancedSampler(classes, 5, classes))


# moves

def slow_move(move, array, corner, size, spacing, order):
    "By the definition, voxel by voxel, in millimetres: linear between the eight (four) neighbours, or the nearest."
    d, out = len(size), np.zeros(size)
    middle = (np.array(size) - 1)/2
    for o in np.ndindex(*size):
        at = np.array(corner) + middle + (move.warp @ (spacing*(move.turn @ (o - middle))) + move.shift)/spacing
        if order == 0:
            k = np.rint(at).astype(int)
            out[o] = array[tuple(k)] if ((k >= 0) & (k < array.shape)).all() else 0
            continue
        low = np.floor(at).astype(int)
        for step in np.ndindex(*(2,)*d):
            k, w = low + step, np.prod(np.where(step, at - low, 1 - (at - low)))
            out[o] += w*(array[tuple(k)] if ((k >= 0) & (k < array.shape)).all() else -1)
    return out


@pytest.mark.parametrize('dims', [2, 3])
def test_a_move_does_what_its_definition_says(dims):
    rng = np.random.default_rng(0)
    shape, size, spacing = (14, 15, 11)[:dims], (8, 8, 5)[:dims], np.array([1.5, 1.5, 4.])[:dims]
    smooth = rng.uniform(-1, 1, shape).astype(np.float32)
    labels = rng.integers(0, 4, shape).astype(np.uint8)
    law = Augment(flips='xy' if dims == 2 else 'xyz', rot90=True, affine=(20., .2, 5.))
    for seed in range(12):
        move, corner = law.draw(np.random.default_rng(seed), dims), rng.integers(-3, 6, dims)
        np.testing.assert_allclose(move.take(smooth, corner, size, spacing), slow_move(move, smooth, corner, size, spacing, 1), atol=1e-5)
        np.testing.assert_array_equal(move.take(labels, corner, size, spacing), slow_move(move, labels, corner, size, spacing, 0))


def test_quantised_and_float_arrays_give_the_same():
    y = np.random.default_rng(0).uniform(-1, 1, (9, 9, 9)).astype(np.float32)
    q = np.rint(y*32767).astype(np.int16)
    move = Augment(flips='x', rot90=True, affine=(10., .1, 1.)).draw(np.random.default_rng(1))
    np.testing.assert_allclose(move.take(q, (1, 1, 1), (6, 6, 6), (1, 1, 1)), move.take(y, (1, 1, 1), (6, 6, 6), (1, 1, 1)), atol=1e-4)


def test_lateralised_moves_keep_orientation_and_other_moves_lose_it():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        move = Augment(affine=(20., .2, 10.), intensity=(.3, .3), noise=.2, lateralised=True).draw(rng)
        assert np.linalg.det(move.warp @ move.turn) > 0 and (move.warp @ move.turn)[0, 0] > 0
    for law in (dict(flips=('x',)), dict(flips=('y',)), dict(flips=('z',)), dict(flips=('x', 'y')), dict(rot90=True)):
        turns = [Augment(**law).draw(np.random.default_rng(s)).turn for s in range(40)]
        assert any(np.linalg.det(t) < 0 or t[0, 0] < 1 for t in turns)          # this law can move a side
        with pytest.raises(ValueError, match='left from right'): Augment(**law, lateralised=True)


def test_one_more_change_leaves_the_others_where_they_were():
    a, b = (Augment(flips='xy', affine=(10., 0., 0.), **more).draw(np.random.default_rng(3)) for more in ({}, dict(noise=.1, intensity=(.1, .1))))
    np.testing.assert_array_equal(a.turn, b.turn)
    np.testing.assert_array_equal(a.warp, b.warp)


# on a cache

@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cohort')
    Cohort(10, spacing=4., groups=('HC', 'TLE-L', 'TLE-R')).write(folder/'people')
    preprocess(folder/'people', folder/'cache', modality=['t1', 'tissue', 'hippocampus'], size=(36, 46, 36))
    return Cache(folder/'cache')


@pytest.fixture(scope='module')
def ct_cache(tmp_path_factory):
    "The geometry of RPLHR-CT: thick slice k lies over thin slice 5k."
    folder, g, rng = tmp_path_factory.mktemp('ct'), GEOMETRIES['point'], np.random.default_rng(0)
    for n, part in enumerate(('train', 'train', 'val', 'test')):
        smooth = np.cumsum(rng.normal(0, 40, (40, 36, 50)), 2).clip(-900, 2000).round().astype(np.int16)
        thin = image(smooth[:, :, 2:-2], (2, 2, 1), (-40, -36, 100))
        thick = image(average_slices(smooth[:, :, :40], Geometry(8, 5., 40, 1., 2.).weights()), (2, 2, 5), (-40, -36, 100))
        for name, img in (('1mm', thin), ('5mm', thick)): write_image(img, folder/part/name/f'{n}.nii.gz')
    preprocess(folder, folder.parent/'ct_cache', layout='rplhr', crop=False, intensity=Intensity.window(1024., 4096.))
    return Cache(folder.parent/'ct_cache'), g


def holes(cache):
    "A cache like one for inpainting, on the arrays of the cohort."
    class Holes:
        def cases(self, split=None):
            return [c | dict(label=None, roles={'t1n': c['roles']['t1']} | {f'mask-000{k}': c['roles']['tissue'] for k in range(3)}) for c in cache.cases(split)]
        def array(self, case, role): return cache.array(case['case'], 't1') if role == 't1n' else np.where(cache.array(case['case'], 'tissue') == int(role[-1]) + 1, 1, 0).astype(np.uint8)
    return Holes()


def kinds(cache, ct_cache):
    law = Augment(affine=(10., .1, 4.), intensity=(.1, .1), noise=.05)
    return dict(volumes=CachedVolumes(cache, 'train', ('t1', 'tissue'), law), slices=CachedSlices(cache, 'train', 't1', (-20, 20), law),
                patches=RandomPatches(cache, 'train', ('t1', 'hippocampus'), (16, 16, 12), 2, ('hippocampus', .5), law),
                pairs=ThickThinPairs(ct_cache[0], ct_cache[1], 16, split='train', patches_per_case=4, augment=Augment(flips='xyz', rot90=True)))


def digest(batches): return [{k: v.double().sum().item() if v.dtype.is_floating_point else v.sum().item() for k, v in b.items()} for b in batches]


@pytest.mark.parametrize('kind', ['volumes', 'slices', 'patches', 'pairs'])
def test_every_kind_is_the_same_in_workers_that_outlive_epochs(kind, cache, ct_cache):
    data = kinds(cache, ct_cache)[kind]
    sampler, epochs = EpochSampler(data, 3), []
    for e in range(2):
        sampler.set_epoch(e)
        epochs.append(digest(DataLoader(data, 2, sampler=sampler)))
    assert epochs[0] != epochs[1]
    workers = DataLoader(data, 2, sampler=EpochSampler(data, 3), num_workers=2, persistent_workers=True)
    assert [digest(workers) for _ in range(2)] == epochs
    data.set_epoch(1)
    assert digest([data[i] for i in reversed(range(len(data)))])[::-1] == digest([data[i] for i in range(len(data))])


def test_spawned_workers_open_the_cache_themselves(cache, ct_cache):
    data = kinds(cache, ct_cache)['patches']
    sampler = EpochSampler(data, 3)
    here = [digest(DataLoader(data, 4, sampler=sampler)) for _ in range(2)]
    sampler = EpochSampler(data, 3)
    there = DataLoader(data, 4, sampler=sampler, num_workers=1, persistent_workers=True, multiprocessing_context='spawn')
    assert [digest(there) for _ in range(2)] == here and here[0] != here[1]
    assert len(pickle.dumps(data)) < 100_000


def test_a_patch_of_a_large_volume_reads_little(tmp_path):
    "Two gigabytes on disk (a hole in the file system), patches at random places, and the memory of this process hardly grows."
    big = np.lib.format.open_memmap(tmp_path/'big.npy', 'w+', np.int16, (1000, 1000, 1000))
    del big

    class Big:
        def cases(self, split=None): return [dict(patient='a', label=None, roles=dict(t1=dict(affine=np.eye(4).tolist())))]
        def array(self, case, role): return np.load(tmp_path/'big.npy', mmap_mode='r')
    data, before = RandomPatches(Big(), None, 't1', (48, 48, 48), 4, augment=Augment(affine=(10., 0., 0.))), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for item in data: assert (item['image'] == 0).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000      # KiB; reading it would be 2 million and more


def test_the_share_of_foreground_is_what_was_asked_for(cache):
    counts = {}
    for share in (0., .5, 1.):
        data = RandomPatches(cache, 'train', 'hippocampus', (9, 9, 9), 100, ('hippocampus', share))
        counts[share] = np.mean([bool(item['hippocampus'][0, 4, 4, 4] > 0) for item in data])
    n = len(data)
    assert n == 800 and counts[0.] < .05 and counts[1.] == 1.
    by_chance = counts[0.]
    assert abs(counts[.5] - .5 - .5*by_chance) < 5*.5/n**.5


def test_labels_that_tell_sides_and_classes_that_do(cache):
    for roles, law, cause in ((('t1', 'hippocampus'), Augment(flips='y'), 'names a side'), ('t1', Augment(rot90=True), 'names a side')):
        with pytest.raises(ValueError, match=cause): CachedVolumes(cache, 'train', roles, law)

    class NoGroups:
        def cases(self, split=None): return [c | dict(label=None) for c in cache.cases(split)]
        def array(self, case, role): return cache.array(case['case'], role)
    with pytest.raises(ValueError, match="'hippocampus' have other numbers left than right"): RandomPatches(NoGroups(), 'train', ('t1', 'hippocampus'), (9, 9, 9), augment=Augment(flips='x'))
    free = CachedVolumes(NoGroups(), 'train', 't1', Augment(flips='x'))
    assert 'label' not in free[0]
    with pytest.raises(ValueError, match='8 of 8 items have no class'): free.labels

    careful = CachedVolumes(cache, None, 'hippocampus', Augment(affine=(10., .05, 4.), lateralised=True), seed=9)
    for item in careful:
        left, right = (np.argwhere(item['hippocampus'][0].numpy() == k)[:, 0].mean() for k in (1, 2))
        assert left < right - 5


def test_classes_have_one_number_in_all_splits(cache):
    train, valid = (CachedVolumes(cache, split, 't1') for split in ('train', 'valid'))
    assert train.classes == valid.classes == ['HC', 'TLE-L', 'TLE-R'] and len({c['label'] for c in valid.cases}) < 3
    assert [i['label'].item() for i in valid] == valid.labels == [valid.classes.index(c['label']) for c in valid.cases]
    batch = next(iter(loaders(train, valid, 3, sampler=BalancedSampler(train))[0]))
    assert sorted(batch['label'].tolist()) == [0, 1, 2] and batch['image'].shape == (3, 1, 36, 46, 36)


def test_inpainting_known_voxels_survive_every_move(cache):
    data = InpaintingTriples(holes(cache), 'train', augment=Augment(flips='xyz', affine=(15., .1, 5.), intensity=(.2, .2), noise=.1), seed=1)
    used = np.zeros((len(data), 3), int)
    for epoch in range(3):
        data.set_epoch(epoch)
        for i in range(len(data)):
            item, again = data[i], data[i]
            hole = item['mask'] > 0
            assert hole.any() and torch.equal(item['voided'][~hole], item['image'][~hole]) and (item['voided'][hole] == -1).all()
            assert torch.equal(item['weight'], item['mask']) and torch.equal(item['image'], again['image'])
            used[i, int(data.hole(i)[-1])] += 1
    assert (used == 1).all()
    with pytest.raises(ValueError, match="lack the role 't1n'"): InpaintingTriples(cache, 'train')


def test_nothing_of_a_hole_comes_through_the_interpolation(cache):
    "What is in the holes is replaced; the voided images must stay the same bits, and the nearest mask would not do."
    inside, other = holes(cache), holes(cache)
    other.array = lambda case, role: np.where(inside.array(case, 'mask-000' + number) > 0, -inside.array(case, role), inside.array(case, role)) if role == 't1n' else inside.array(case, role)
    law = Augment(affine=(15., .1, 5.), intensity=(.2, .2), noise=.05)
    a, b = (InpaintingTriples(source, 'train', augment=law, seed=1) for source in (inside, other))
    for i in range(len(a)):
        number, mine = a.hole(i)[-1], a[i]
        assert torch.equal(mine['voided'], b[i]['voided']) and not torch.equal(mine['image'], b[i]['image'])
        mask = inside.array(a.cases[i], a.hole(i))
        nearest = torch.from_numpy(law.draw(a.rng(i)).take(mask, (0, 0, 0), mask.shape, a.spacing(a.cases[i])))[None] > 0
        leak = (mine['mask'] > 0) & ~nearest
        assert (mine['mask'] >= nearest).all() and leak.any() and (mine['image'] != b[i]['image'])[leak].any()


def test_weights_keep_away_from_what_nobody_knows(cache):
    "Half of a hole is healthy: voxels in which the other half has a part weigh nothing, whatever the move."
    class Halves:
        def cases(self, split=None): return [c | dict(label=None, roles={r: c['roles']['t1'] for r in ('t1n', 'mask', 'mask-unhealthy')}) for c in cache.cases(split)]
        def array(self, case, role):
            full = np.zeros(cache.array(case['case'], 't1').shape, np.uint8)
            if role == 't1n': return np.where(self.array(case, 'mask-unhealthy') > 0, 32767, -32767).astype(np.int16)
            full[8:28, 8:28, 8:28] = 1
            if role == 'mask-unhealthy': full[18:] = 0
            return full
    for item in InpaintingTriples(Halves(), 'train', augment=Augment(flips='xyz', affine=(30., .2, 5.)), seed=3):
        assert item['weight'].sum() > 1000 and (item['image'][item['weight'] > 0] == -1).all() and (item['weight'] <= item['mask']).all()


def test_what_cannot_be_is_refused_when_the_data_set_is_made(cache):
    class NoGroups:
        def cases(self, split=None): return [c | dict(label=None) for c in cache.cases(split)]
        def array(self, case, role): return cache.array(case['case'], role)
    turning, uneven = Augment(rot90=True), 'a quarter turn needs equal sides'
    for make in (lambda: CachedVolumes(NoGroups(), None, 't1', turning), lambda: CachedSlices(NoGroups(), None, 't1', augment=turning),
                 lambda: RandomPatches(NoGroups(), None, 't1', (8, 9, 8), augment=turning), lambda: ThickThinPairs([image(np.zeros((30, 30, 60)))], size=(16, 20), augment=turning),
                 lambda: ThickThinPairs([image(np.zeros((30, 30, 60)), (1, 1.1, 1))], size=16, augment=turning)):
        with pytest.raises(ValueError, match=uneven): make()
    assert RandomPatches(NoGroups(), None, 't1', (8, 8, 9), augment=turning)[0]['image'].shape == (1, 8, 8, 9)
    with pytest.raises(ValueError, match="10 of 10 cases lack the role 'seg'"): RandomPatches(cache, None, 't1', (8, 8, 8), foreground=('seg', .5))
    for share in (-.1, 1.5):
        with pytest.raises(ValueError, match='share of foreground from 0 to 1'): RandomPatches(cache, None, 't1', (8, 8, 8), foreground=('t1', share))
    for make in (lambda: RandomPatches(cache, None, 't1', (8, 0, 8)), lambda: RandomPatches(cache, None, 't1', 8, 0), lambda: ThickThinPairs([image(np.zeros((30, 30, 60)))], size=0)):
        with pytest.raises(ValueError, match='sizes and numbers of patches of 1 or more'): make()
    with pytest.raises(ValueError, match='the classes of 10 items, got 9'): BalancedSampler(CachedVolumes(cache, None, 't1'), labels=[0, 1, 2]*3)
    with pytest.raises(ValueError, match='names a side'): CachedVolumes(cache, None, 't1', Augment(affine=(90., 0., 0.)))


def test_patches_larger_than_the_volume_hold_all_of_it(cache):
    data = RandomPatches(cache, 'train', ('t1', 'hippocampus'), (40, 50, 61), foreground=('hippocampus', 1.))
    for item, whole in zip(data, CachedVolumes(cache, 'train', ('t1', 'hippocampus'))):
        assert torch.equal(item['image'][:, 2:38, 2:48, 13:49], whole['image']) and (item['image'] > -1).sum() == (whole['image'] > -1).sum()
        assert torch.equal(item['hippocampus'][:, 2:38, 2:48, 13:49], whole['hippocampus'])


# thick and thin

def test_real_pairs_of_a_cache_agree_with_simulated_ones(ct_cache):
    "What was averaged before it was stored, and what is averaged now, at the places where the millimetres say it."
    cache, g = ct_cache
    wide = Intensity.window(0., 8192.)
    real = ThickThinPairs(cache, 'point', 20, real=True, split='train', intensity=wide, patches_per_case=3)
    assert real.starts == [[(0, 0)]]*2
    simulated = ThickThinPairs(cache, 'point', 20, split='train', intensity=wide)
    assert simulated.starts == [[(0, k) for k in range(2, 9)]]*2
    for i in range(len(real)):
        item = real[i]
        assert item['condition'].shape == (1, 20, 20, 8) and item['target'].shape == (1, 20, 20, 36) and item['spacing'].tolist() == [2, 2, 1]
        inner = item['target'][..., 3:33].unfold(3, 5, 5).mean(-1)                # thick slices 1 to 6 have all their thin ones in the block
        torch.testing.assert_close(item['condition'][..., 1:7], inner, atol=2*(.5 + .07)/8192*2, rtol=0)


def test_moves_of_pairs_commute_with_averaging():
    thin = image(np.random.default_rng(0).integers(-200, 300, (20, 20, 48)).astype(np.int16), (1, 1, 1))
    wide = Intensity.window(0., 2000.)
    for name, weights in ((n, g.weights()) for n, g in GEOMETRIES.items() if g.margin == (0, 0) and not g.warning):
        data = ThickThinPairs([thin]*40, name, 20, intensity=wide, augment=Augment(flips='xyz', rot90=True), seed=2)
        turned = set()
        for item in data:
            expected = average_slices(item['target'][0].double().numpy(), weights)
            np.testing.assert_allclose(item['condition'][0], expected, atol=1e-6)
            turned.add(item['target'].numpy().tobytes())
        assert len(turned) > 8
    with pytest.raises(ValueError, match='not symmetric'): ThickThinPairs([thin], Geometry(8, 5., 40, 1., 3.), 20, augment=Augment(flips='z'))


def test_window_first_would_be_wrong_at_edges():
    "Half air, half bone: averaged in HU it is brighter than water, windowed first it would be grey."
    thin = image(np.repeat(np.array([-1000, 1400], np.int16), [23, 22])[None, None].repeat(8, 0).repeat(8, 1))
    item = ThickThinPairs([thin], 'slab5', 8)[0]
    edge = (item['condition'][0, 0, 0] > -1) & (item['condition'][0, 0, 0] < 1)
    share = item['target'][0, 0, 0].unfold(0, 5, 5).add(1).div(2).mean(-1)
    hu = -1000 + 2400*share
    torch.testing.assert_close(item['condition'][0, 0, 0], Intensity.window(40., 400.).encode(hu), atol=1e-4, rtol=0)
    assert edge.sum() <= 1


def test_a_thin_stack_must_fit_and_says_which_case_does_not(ct_cache):
    good = image(np.zeros((30, 30, 60), np.int16))
    with pytest.raises(ValueError, match='case 2 of 2: 8 thick and 48 thin slices fit nowhere into a stack of 45 thin ones'): ThickThinPairs([good, image(np.zeros((30, 30, 45)))], 'slab6', 16)
    with pytest.raises(ValueError, match='case 1 of 1: .*30 x 30 pixels of 1.1 x 1 mm'): ThickThinPairs([(thick_slices(image(np.zeros((30, 30, 60)), (1.1, 1, 1)), 5.), good)], size=16, real=True)
    with pytest.warns(UserWarning, match='stretch the anatomy'): ThickThinPairs([image(np.zeros((30, 30, 60)), (1, 1, 5/6))], 'origin', 16)
    assert len(ThickThinPairs([good], 'cover', 16)) == 1


# a grid of patches

def test_networks_of_short_sight_are_stitched():
    "A network that looks at one pixel is stitched exactly, one that looks at its neighbours nearly."
    conv = torch.nn.Conv2d(1, 3, 3, padding=1).requires_grad_(False)
    x = torch.rand(40, 33)*2 - 1
    whole = conv(x[None, None])[0]
    grid = GridPatches(x.shape, (16, 12), .5)
    out = grid.stitch(conv(torch.from_numpy(p)[None, None])[0] for p in grid.cut(x.numpy()))
    assert out.shape == whole.shape
    inside = (out - whole)[:, 1:-1, 1:-1].abs()
    assert 0 < inside.max() < .5 and inside.mean() < .05          # a patch's own border counts little
    single = torch.nn.Conv2d(1, 3, 1).requires_grad_(False)
    torch.testing.assert_close(grid.stitch(single(torch.from_numpy(p)[None, None])[0] for p in grid.cut(x.numpy())), single(x[None, None])[0], atol=1e-6, rtol=1e-5)


def test_grids_of_all_shapes_cover_and_give_back():
    rng = np.random.default_rng(0)
    for _ in range(60):
        dims = int(rng.integers(2, 4))
        shape, size, overlap = rng.integers(1, 24, dims), rng.integers(1, 16, dims), float(rng.choice([0, .1, .25, .5, .8]))
        grid, x = GridPatches(shape, size, overlap), rng.uniform(-1, 1, shape).astype(np.float32)
        torch.testing.assert_close(grid.stitch(grid.cut(x)), torch.from_numpy(x), atol=1e-6, rtol=0)
        ones = grid.stitch(torch.ones(tuple(size), dtype=torch.float64) for _ in range(len(grid)))
        torch.testing.assert_close(ones, torch.ones_like(ones), atol=1e-12, rtol=0)
        assert len(set(grid.corners)) == len(grid)
    with pytest.raises(ValueError, match='expected 4 patches, got 5 or more'): GridPatches((2, 2), (1, 1), 0.).stitch(torch.zeros(5, 1, 1))


def test_boxes_far_outside_are_background():
    a = np.ones((4, 4, 4), np.int16)
    assert (read_box(a, (9, 9, 9), (2, 2, 2)) == -1).all() and (read_box(a, (-9, 0, 0), (2, 2, 2)) == -1).all()
    assert (read_box(a.astype(np.uint8), (9, 0, 0), (2, 2, 2)) == 0).all()
