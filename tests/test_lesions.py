"Tumours on real processes and many people: the same bytes with any threads, the healthy counterpart, agreement between spacings"
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import ndimage

from sbldm_nb.anatomy import cube_points, cube_size, fill, head_at, tissue_labels
from sbldm_nb.cohort import make_subject
from sbldm_nb.lesions import LABELS, MODALITIES, add_tumour, grow_tumour, healthy_mask, lesion_mask, modality_images


def tissue_of(seed: int, spacing: float, group: str = 'HC') -> np.ndarray:
    head = head_at(seed, group, cube_points(spacing))
    return fill(head.inside, tissue_labels(head.p))


def test_same_bytes_with_any_number_of_threads():
    code = '''import hashlib, torch
from sbldm_nb.lesions import add_tumour, modality_images
torch.set_num_threads({n}); t = add_tumour(11, "TLE-L", 3.)
arrays = [t.growth, t.labels, t.shares, *modality_images(11, "TLE-L", 3., t).values()]
print(hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest())'''
    runs = [subprocess.Popen([sys.executable, '-c', code.format(n=n)], env={**os.environ, 'OMP_NUM_THREADS': str(n)}, stdout=subprocess.PIPE, text=True)
            for n in (1, 2)]
    one, two = (p.communicate()[0] for p in runs)
    assert one == two and len(one) == 65


@pytest.mark.parametrize('seed, group, spacing', [(0, 'HC', 3.), (1, 'TLE-R', 4.), (2, 'HC', 2.), (1_000_003, 'HC', 6.)])
def test_healthy_t1n_is_the_t1_of_the_person(seed, group, spacing):
    np.testing.assert_array_equal(modality_images(seed, group, spacing)['t1n'], np.asarray(make_subject(seed, spacing, group).t1.dataobj))


@pytest.mark.parametrize('seed', range(9))
def test_ill_and_healthy_differ_only_inside_the_dilated_lesion(seed):
    spacing, group = ((2., 'HC'), (3., 'TLE-L'), (5., 'HC'))[seed % 3]
    tumour, tissue = add_tumour(seed, group, spacing), tissue_of(seed, spacing, group)
    well, ill = modality_images(seed, group, spacing), modality_images(seed, group, spacing, tumour)
    mask = lesion_mask(tumour.labels, spacing)
    assert list(well) == list(ill) == list(MODALITIES) and mask[tumour.labels > 0].all()
    for m in MODALITIES:
        assert ill[m].dtype == np.float32 and ill[m].shape == (cube_size(spacing),)*3
        np.testing.assert_array_equal(ill[m][~mask], well[m][~mask])
        np.testing.assert_array_equal(ill[m] > 0, tissue > 0)
        np.testing.assert_array_equal(ill[m], np.round(ill[m]))
        assert (ill[m] != well[m])[tumour.labels > 0].mean() > .5
    assert (tissue[tumour.labels > 0] > 0).all()
    assert 5 < (tumour.labels > 0).sum()*spacing**3/1000 < 400
    assert tumour.growth.min() >= 0 and tumour.growth.max() <= 1


@pytest.mark.parametrize('seed, fine', [(5, 1.), (9, 2.)])
def test_a_tumour_is_the_same_at_any_spacing(seed, fine):
    a, b, k = add_tumour(seed, spacing=3*fine), add_tumour(seed, spacing=fine), np.s_[1::3, 1::3, 1::3]
    np.testing.assert_array_equal(a.labels, b.labels[k])


@pytest.mark.parametrize('seed', range(4))
def test_anatomy_of_a_tumour(seed):
    t = add_tumour(seed, spacing=2.)
    ncr, ed, et = (t.labels == LABELS[k] for k in ('ncr', 'ed', 'et'))
    u = [t.growth[m].mean() for m in (ed, ncr | et)]
    assert u[0] < u[1]                                                    # the core is denser than the edema
    inner = [ndimage.distance_transform_edt(ncr | et)[m].mean() for m in (et, ncr)]
    assert inner[0] < inner[1]                                            # necrosis is deeper in the core than the wall
    tissue = tissue_of(seed, 2.)
    white, beyond = tissue == 3, lesion_mask(t.labels, 2., 8.) & (t.labels == 0) & (tissue > 1)
    assert white[ed].mean() > white[beyond].mean()                        # it went where white matter is
    image = modality_images(seed, spacing=2., tumour=t)
    assert image['t1c'][et].mean() > 1.3*image['t1n'][et].mean()           # contrast agent shows the wall
    assert image['t2f'][ed].mean() > 1.3*image['t2f'][(t.labels == 0) & white].mean()


def test_no_cell_is_lost_or_made_by_migration_in_a_person():
    head = head_at(3, 'HC', cube_points(4.))
    white, grey = (fill(head.inside, q) for q in (head.p[2], head.p[1]))
    start = np.random.default_rng(0).random(white.shape, dtype=np.float32)*(white + grey > 0)
    moved = grow_tumour(start, white, grey, 4., rho=0., days=300.)
    np.testing.assert_allclose(moved.sum(dtype=float), start.sum(dtype=float), rtol=1e-5)
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-5 and np.abs(moved - start).max() > .1


@pytest.mark.parametrize('spacing', [2.5, 4., 8.])
def test_healthy_masks_keep_away_from_the_lesion(spacing):
    for seed in range(4):
        tissue, lesion = tissue_of(seed, spacing), lesion_mask(add_tumour(seed, spacing=spacing).labels, spacing)
        distance = ndimage.distance_transform_edt(~lesion, sampling=spacing)
        masks = [healthy_mask(seed, k, tissue, lesion, spacing) for k in range(3)]
        for m in masks:
            assert m.dtype == bool and ndimage.label(m)[1] == 1 and distance[m].min() >= 5 and (tissue[m] > 0).all()
            assert .5 < m.sum()*spacing**3/1000 < 60
        assert len({m.tobytes() for m in masks}) == 3
        np.testing.assert_array_equal(healthy_mask(seed, 1, tissue, lesion, spacing), masks[1])


def test_a_healthy_person_has_healthy_masks_too():
    tissue = tissue_of(2, 4.)
    assert healthy_mask(2, 0, tissue, np.zeros(tissue.shape, bool), 4.).any()


def test_lesion_mask_at_the_border_and_with_several_pieces():
    labels = np.zeros((10, 11, 12), np.uint8)
    labels[0, 0, 0], labels[9, 10, 11], labels[4, 5, 6] = 1, 2, 3
    every, ill = np.argwhere(labels == labels), np.argwhere(labels)
    for spacing, mm in ((1., 4.), (3., 4.), (2.5, 0.)):
        slow = (np.linalg.norm(every[:, None] - ill, axis=-1)*spacing <= mm).any(1).reshape(labels.shape)
        np.testing.assert_array_equal(lesion_mask(labels, spacing, mm), slow)


def test_a_tumour_is_fast():
    add_tumour(0, spacing=2.)
    begin = time.process_time()
    for seed in range(2): add_tumour(seed, spacing=2.)
    assert (time.process_time() - begin)/2 < 2.5                          # .7 s on the machine it was written on


@pytest.mark.parametrize('bad, words', [
    (lambda: add_tumour(-1), 'seed'), (lambda: add_tumour(0, 'GBM'), 'TLE-L'), (lambda: add_tumour(0, spacing=-2.), 'spacing'),
    (lambda: modality_images(0, 'XX', 6.), 'TLE-L'), (lambda: modality_images(0, 'HC', 6., add_tumour(0, 'HC', 4.)), 'at 6 mm, got one of 0, HC, at 4 mm'),
    (lambda: healthy_mask(0, 0, np.ones((32,)*3), np.ones((32,)*3, bool), 6.), 'found none'),
    (lambda: healthy_mask(0, 0, np.ones((30,)*3), np.ones((32,)*3, bool), 6.), 'expected tissue and lesion')])
def test_errors_say_what_was_wanted(bad, words):
    with pytest.raises(ValueError, match=words): bad()
