"CT: thick slices against a slow loop in millimetres, geometries, real pairs, and the simulated head."
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage

from sbldm_nb.anatomy import CENTER, head_at
from sbldm_nb.ct import GEOMETRIES, Geometry, average_slices, pseudo_ct, registered_pair, slice_weights, thick_slices
from sbldm_nb.data import read_image, write_image


def turned(seed, spacing):
    "A right-handed affine at an angle."
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return from_matvec(q * np.sign(np.linalg.det(q)) * spacing, [3, -40, 12])


def overlap(a, b, c, d):
    "Length of what two intervals share."
    return max(0., min(b, d) - max(a, c))


@pytest.mark.parametrize('n, step, thickness, increment', [(40, 1.25, 5., None), (37, 1., 5., None), (33, .625, 2.1, 3.), (24, 2.5, 4., 1.7), (9, 1., 9., None), (1, 3., 3., None)])
def test_a_thick_slice_is_the_mean_over_its_millimetres(n, step, thickness, increment):
    data = np.random.default_rng(n).normal(size=(3, 2, n))
    thick = thick_slices(nib.Nifti1Image(data, turned(n, [1, 2, step])), thickness, increment)
    gap = increment or thickness
    count = sum(k * gap + thickness <= n * step + 1e-6 for k in range(200))
    assert thick.shape == (3, 2, count)
    for k in range(count):
        share = [overlap(j * step, (j + 1) * step, k * gap, k * gap + thickness) / thickness for j in range(n)]
        np.testing.assert_allclose(thick.get_fdata()[:, :, k], data @ share, atol=1e-9)


@pytest.mark.parametrize('step, thickness, increment', [(1.25, 5., None), (1., 3., 2.), (.7, 2.8, 4.2)])
@pytest.mark.parametrize('seed', range(3))
def test_millimetres_stay_where_they_are(step, thickness, increment, seed):
    affine, shape = turned(seed, [2, 1, step]), (3, 4, 31)
    places = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    for axis in range(3):
        thick = thick_slices(nib.Nifti1Image(places[..., axis], affine), thickness, increment)
        now = apply_affine(thick.affine, np.moveaxis(np.indices(thick.shape), 0, -1))[..., axis]
        np.testing.assert_allclose(thick.get_fdata(), now, atol=1e-5)


@pytest.mark.parametrize('dtype', [np.int16, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize('profile', ['slab', 'gaussian'])
def test_constants_and_types_are_kept(dtype, profile):
    img = nib.Nifti1Image(np.full((2, 3, 20), 117, dtype), np.eye(4))
    img.header['descrip'] = b'SIMULATED'
    thick = thick_slices(img, 4., profile=profile)
    assert thick.get_data_dtype() == dtype and thick.shape == (2, 3, 5) and thick.header['descrip'].item() == b'SIMULATED'
    np.testing.assert_allclose(thick.get_fdata(), 117, rtol=1e-6)


def test_gaussian_has_its_full_width_at_half_maximum():
    thin = np.arange(-200, 201) * .05
    row = slice_weights(thin, np.zeros(1), 5., 'gaussian')[0]
    wide = thin[row >= row.max() / 2]
    assert row.sum() == pytest.approx(1) and wide[-1] - wide[0] == pytest.approx(5, abs=.06)


@pytest.mark.parametrize('thickness, increment', [(.5, None), (21., None), (0., None), (-5., None), (float('nan'), None), (5., 0.), (5., -1.)])
def test_impossible_slices_are_refused(thickness, increment):
    with pytest.raises(ValueError, match='expected slices of 1 to 20 mm at an increment above 0'): thick_slices(nib.Nifti1Image(np.zeros((2, 2, 20)), np.eye(4)), thickness, increment)


@pytest.mark.parametrize('name', GEOMETRIES)
@pytest.mark.parametrize('profile', ['slab', 'gaussian'])
def test_geometries_keep_places_and_weights(name, profile):
    g = GEOMETRIES[name]
    affine = turned(5, [1, 1, g.spacing])
    ramp = apply_affine(affine, np.moveaxis(np.indices((2, 2, 60)), 0, -1))[..., 2]
    thick, thin = g.cut(nib.Nifti1Image(ramp, affine), 3, profile)
    assert (thick.shape[2], thin.shape[2]) == (g.thick, g.thin) and bool(g.warning) == (name == 'origin')
    inner = slice(None) if profile == 'slab' else slice(3, -3)                # the tails of the profile stay inside
    for img, part in ((thick, inner), (thin, slice(None))):
        places = apply_affine(img.affine, np.moveaxis(np.indices(img.shape), 0, -1))[..., 2]
        np.testing.assert_allclose(img.get_fdata()[:, :, part], places[:, :, part], atol=1e-3)
    np.testing.assert_allclose(g.weights(profile).sum(1), 1)
    assert g.weights(profile).shape == (g.thick, g.thin + sum(g.margin))


@pytest.mark.parametrize('name', ['slab5', 'slab6', 'origin'])
def test_slab_geometries_agree_with_thick_slices(name):
    g = GEOMETRIES[name]
    img = nib.Nifti1Image(np.random.default_rng(1).normal(size=(3, 3, g.thin)), turned(2, [1, 1, g.spacing]))
    thick, thin = g.cut(img, 0)
    whole = thick_slices(img, g.thickness)
    np.testing.assert_allclose(thick.get_fdata(), whole.get_fdata(), atol=1e-9)
    np.testing.assert_allclose(thick.affine, whole.affine, atol=1e-5)
    np.testing.assert_allclose(average_slices(thin.get_fdata(), g.weights()), thick.get_fdata(), atol=1e-12)


@pytest.mark.parametrize('seed', range(5))
def test_real_pairs_are_found_by_place(seed, tmp_path):
    rng = np.random.default_rng(seed)
    affine, data = turned(seed, [1, 1, 1.25]), rng.normal(size=(4, 3, 80)).astype(np.float32)
    first, last, gap = rng.integers(0, 20), rng.integers(60, 80), rng.uniform(0, 6)
    lower = from_matvec(np.eye(3), [0, 0, int(first)])
    write_image(nib.Nifti1Image(data[:, :, first:last], affine @ lower), tmp_path / 'thin.nii.gz')
    write_image(thick_slices(nib.Nifti1Image(data[:, :, 4:], affine @ from_matvec(np.eye(3), [0, 0, 4])), 5.), tmp_path / 'thick.nii.gz')
    thick, thin = (nib.load(tmp_path / f'{k}.nii.gz') for k in ('thick', 'thin'))
    pair = registered_pair(thick, thin)
    for i, (a, b) in enumerate(pair.under):
        assert pair.covered[i] == (first <= 4 + 4 * i and 8 + 4 * i <= last)
        if pair.covered[i]:
            assert (a, b) == (4 + 4 * i - first, 8 + 4 * i - first)
            np.testing.assert_allclose(thin.get_fdata()[:, :, a:b].mean(-1), thick.get_fdata()[:, :, i], atol=1e-5)
    for i, k in pair.starts(Geometry(3, 5., 12, 1.25, 1.875)): assert k == 4 + 4 * i - first
    moved = nib.Nifti1Image(thick.get_fdata(), from_matvec(np.eye(3), affine[:3, 0] * (1 + gap)) @ thick.affine)
    with pytest.raises(ValueError, match=rf'got {1 + gap:.2f} mm between them in the plane'): registered_pair(moved, thin)


def test_a_flipped_or_foreign_stack_is_refused():
    thin = nib.Nifti1Image(np.zeros((4, 4, 40)), np.eye(4))
    with pytest.raises(ValueError, match='180.00 degrees'): registered_pair(nib.Nifti1Image(np.zeros((4, 4, 8)), from_matvec(np.diag([1, 1, -5]), [0, 0, 40])), thin)
    with pytest.raises(ValueError, match='4 x 5 pixels of 1 x 1 mm and 4 x 4 pixels'): registered_pair(nib.Nifti1Image(np.zeros((4, 5, 8)), np.diag([1, 1, 5, 1])), thin)
    with pytest.raises(ValueError, match='two slices or more'): registered_pair(nib.Nifti1Image(np.zeros((4, 4, 1)), np.diag([1, 1, 5, 1])), thin)
    with pytest.raises(ValueError, match='no thick slice lies within'): registered_pair(nib.Nifti1Image(np.zeros((4, 4, 8)), from_matvec(np.diag([1, 1, 5]), [0, 0, 90])), thin)
    with pytest.raises(ValueError, match='expected slices 5 and 0.833 mm apart, got 5 and 1 mm'):
        registered_pair(nib.Nifti1Image(np.zeros((4, 4, 8)), from_matvec(np.diag([1, 1, 5]), [0, 0, 2])), thin).starts(GEOMETRIES['origin'])


@pytest.fixture(scope='module')
def head(): return pseudo_ct(12, shape=(96, 96, 90), spacing=(2.4, 2.4, 5/3))


def test_hounsfield_units(head):
    hu = head.get_fdata()
    tissue = head_at(12, 'HC', np.moveaxis(apply_affine(head.affine, np.moveaxis(np.indices(head.shape), 0, -1)) - CENTER, -1, 0).astype(np.float32))
    values, place = hu[tissue.inside], tissue.where + CENTER[:, None]
    for p, mean in zip(tissue.p, (8, 38, 29)): np.testing.assert_allclose(np.median(values[(p > .97) & (abs(place[0]) > 8)]), mean, atol=1.5)
    assert head.get_data_dtype() == np.int16 and -1024 <= hu.min() and 1200 < hu.max() <= 3071
    np.testing.assert_allclose(hu[:8, :8].mean(), -1000, atol=1)
    body = ndimage.binary_fill_holes(hu > -300)
    assert .02 < (hu[body] > 400).mean() < .2 and .01 < ((hu < -60) & (hu > -130))[body].mean() < .2     # bone; fat


def test_a_file_holds_what_the_array_held(head, tmp_path):
    write_image(head, tmp_path / 'ct.nii.gz')
    back = read_image(tmp_path / 'ct.nii.gz')
    np.testing.assert_array_equal(back.get_fdata(), head.get_fdata())
    np.testing.assert_allclose(back.affine, head.affine, atol=1e-4)
    assert back.header['descrip'].item() == b'SIMULATED'


def test_another_spacing_is_the_same_head(head):
    fine = pseudo_ct(12, shape=(64, 64, 45), spacing=(3.6, 3.6, 10/3))
    places = apply_affine(fine.affine, np.moveaxis(np.indices(fine.shape), 0, -1))
    there = np.moveaxis(apply_affine(np.linalg.inv(head.affine), places), -1, 0)
    smooth = [ndimage.gaussian_filter(i.get_fdata(), s) for i, s in ((head, 2.), (fine, (4/3, 4/3, 1)))]
    again = ndimage.map_coordinates(smooth[0], there, order=1, mode='nearest')
    inner = np.s_[2:-2, 2:-2, 2:-2]
    assert np.corrcoef(again[inner].ravel(), smooth[1][inner].ravel())[0, 1] > .995


@pytest.mark.parametrize('seed', [0, 5, 11, 16, 26, 38, 43, 50])
def test_the_head_is_whole_and_in_the_field(seed):
    hu = pseudo_ct(seed, shape=(64, 64, 50), spacing=(3.6, 3.6, 3.)).get_fdata()
    for side in (hu[0], hu[-1], hu[:, 0], hu[:, -1], hu[:, :, -1]): assert side.max() < -900
    assert (hu[:, :, -6:] > -500).any()                                       # the vertex is near the top
    bone = hu[:, :, 30] > 120                                                 # with partial volume: a closed ring
    assert ndimage.binary_fill_holes(bone).sum() > 2.5 * bone.sum()


def test_groups_share_bone_and_skin(head):
    ill = pseudo_ct(12, 'TLE-R', shape=(96, 96, 90), spacing=(2.4, 2.4, 5/3)).get_fdata()
    differs = np.argwhere(ill != head.get_fdata())
    x = apply_affine(head.affine, differs)[:, 0]
    assert 0 < len(differs) < .05 * ill.size and np.mean(x > 0) > .95         # on the right
    hard = head.get_fdata() > 700
    assert (ill[hard] > 400).mean() > .998


@pytest.mark.parametrize('shape, spacing', [((0, 9, 9), (2, 2, 2)), ((9, 9), (2, 2, 2)), ((9, 9, 9), (2, 2, -1)), ((9, 9, 9), (2, 2, float('nan'))), ((9, 9, 9), (2, 2))])
def test_impossible_scans_are_refused(shape, spacing):
    with pytest.raises(ValueError, match='expected three sizes'): pseudo_ct(1, 'HC', shape, spacing)


def test_threads_do_not_change_a_bit():
    code = ('import hashlib, sys, torch; torch.set_num_threads(int(sys.argv[1])); from sbldm_nb.ct import pseudo_ct; import numpy as np; '
            'print(hashlib.sha256(np.asarray(pseudo_ct(4, "TLE-L", (70, 64, 41), (3., 3.3, 3.1)).dataobj).tobytes()).hexdigest())')
    hashes = {subprocess.run([sys.executable, '-c', code, n], env=os.environ | {'OMP_NUM_THREADS': n, 'OPENBLAS_NUM_THREADS': n}, capture_output=True, text=True, check=True).stdout for n in '124'}
    assert len(hashes) == 1
