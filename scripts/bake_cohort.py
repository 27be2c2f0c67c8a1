"""Bake the template behind `sbldm_nb.cohort` from the ICBM152 2009a files that the nilearn wheel ships.

    python scripts/bake_cohort.py [--out sbldm_nb/assets/icbm152_2mm.npz]

nilearn is needed to bake, never to use the result. Everything is made on 1 mm voxels and stored at 2 mm as uint8,
only the left half: the template is exactly left-right symmetric (asserted), so loading mirrors it.
The maps have no CSF, ventricles or hippocampus of their own; how each is derived is told at its function.
The template is "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University"; its notice stands in sbldm_nb/assets/LICENSE-ICBM152.txt. Cite Fonov 2009, 2011 and Collins 1999.
"""
import argparse
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage as ndi

CENTER = np.array([0, -18, 8])      # MNI mm, the middle of the cube
HALF = 96                           # mm from the middle to a face
MEANS = dict(csf=.27, gm=.65, wm=.875)   # template intensity of each tissue, as a fraction of its maximum

# Centre lines (x to the side, y, z in MNI mm) and radii in mm, from textbook coordinates
HIPPOCAMPUS = [(22, -9, -22, 6.5), (27, -14, -20, 7.), (29, -22, -15, 5.8), (27, -31, -8, 5.2), (21, -37, -2, 4.5)]
TEMPORAL_HORN = [(31, -10, -20, 3.5), (34, -20, -15, 3.5), (34, -30, -9, 4.)]
TEMPORAL_LOBE = [(38, 6, -32, 16.), (42, -8, -28, 15.), (44, -25, -18, 13.)]


def read_template() -> dict:
    "T1, GM and WM in [0, 1] on whole MNI millimetres: 193^3 points, CENTER-96 .. CENTER+96"
    folder = Path(importlib.util.find_spec('nilearn').origin).parent/'datasets'/'data'
    return {k: crop(nib.load(folder/f'mni_icbm152_{k}_tal_nlin_sym_09a_converted.nii.gz')) for k in ('t1', 'gm', 'wm')}


def crop(img: nib.Nifti1Image) -> np.ndarray:
    "The cube's part of a 1 mm image, zero outside it"
    first = (CENTER - HALF - img.affine[:3, 3]).astype(int)
    out = np.zeros((2*HALF + 1,)*3, np.float32)
    source = tuple(slice(max(f, 0), min(f + s, n)) for f, s, n in zip(first, out.shape, img.shape))
    target = tuple(slice(s.start - f, s.stop - f) for s, f in zip(source, first))
    out[target] = np.asanyarray(img.dataobj)[source]
    return out/255


def intracranial(brain: np.ndarray) -> np.ndarray:
    "Brain plus what a ball of 13 mm cannot enter from outside (sulci, cisterns), plus a rim of 1 mm"
    grown = ndi.distance_transform_edt(~np.pad(brain, 16)) <= 13
    closed = ndi.distance_transform_edt(grown)[16:-16, 16:-16, 16:-16] > 13
    return ndi.binary_dilation(ndi.binary_opening(closed, iterations=2) | brain)


def tube(line: list, side: int) -> np.ndarray:
    "Squared distance to a centre line in units of its radius, on the left (-1) or right (+1)"
    x, y, z = (CENTER[i] - HALF + np.arange(2*HALF + 1) for i in range(3))
    knots = np.linspace(0, len(line) - 1, 24)
    dense = [np.interp(knots, range(len(line)), c) for c in zip(*line)]
    d2 = np.full((2*HALF + 1,)*3, np.inf, np.float32)
    for px, py, pz, r in zip(*dense):
        d2 = np.minimum(d2, ((x - side*px)**2)[:, None, None]/r**2 + ((y - py)**2)[:, None]/r**2 + (z - pz)**2/r**2)
    return d2


def ventricles(t1: np.ndarray, wm: np.ndarray, skull: np.ndarray) -> np.ndarray:
    "Dark voxels more than 22 mm under the skull, above the brainstem, in pieces larger than 150 mm^3"
    z = CENTER[2] - HALF + np.arange(2*HALF + 1)
    dark = (t1 > 0) & (t1 < .55) & (wm < .3) & (ndi.distance_transform_edt(skull) > 22) & (z > -18)
    pieces, _ = ndi.label(dark)
    big = np.bincount(pieces.ravel()) > 150
    big[0] = False
    return big[pieces]


def channels(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray) -> dict:
    "All maps of the asset at 1 mm, in [0, 1]; `residual` is what the tissues do not explain of the T1, shifted by .5"
    skull = intracranial(t1 > 0)
    csf = np.clip(ndi.gaussian_filter(skull.astype(np.float32), .7) - gm - wm, 0, 1)*skull
    explained = sum(MEANS[k]*v for k, v in dict(csf=csf, gm=gm, wm=wm).items())/np.maximum(csf + gm + wm, .05)
    residual = ndi.gaussian_filter(np.where(t1 > 0, np.clip(t1 - explained, -.2, .2), 0), .6)
    hippocampus = (np.minimum(tube(HIPPOCAMPUS, -1), tube(HIPPOCAMPUS, 1)) < 1) & (gm > .35)
    horn = np.minimum(tube(TEMPORAL_HORN, -1), tube(TEMPORAL_HORN, 1)) < 1
    lobe = np.clip(1 - np.minimum(tube(TEMPORAL_LOBE, -1), tube(TEMPORAL_LOBE, 1))/2.25, 0, 1)**2
    return dict(csf=csf, gm=gm, wm=wm, residual=residual + .5, hippocampus=ndi.gaussian_filter(hippocampus.astype(np.float32), .6),
                ventricles=ventricles(t1, wm, skull), temporal_horn=horn, temporal_lobe=lobe)


def at_2mm(volume: np.ndarray) -> np.ndarray:
    "Triangle filter of 2 mm half width on every axis, every second point, as uint8: 193^3 -> 96^3"
    v = volume.astype(np.float32)
    for axis in range(3):
        v = ndi.convolve1d(v, [.25, .5, .25], axis=axis)
    return np.clip(np.round(v[1::2, 1::2, 1::2]*255), 0, 255).astype(np.uint8)


def bake(out: Path) -> Path:
    "Write the asset and report its size"
    maps = {k: at_2mm(v) for k, v in channels(**read_template()).items()}
    for name, v in maps.items():
        gap = int(np.abs(v.astype(int) - v[::-1]).max())
        assert gap <= 1, f'{name} is not left-right symmetric: {gap}/255'
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **{k: v[:48] for k, v in maps.items()})
    print(f'{out}: {out.stat().st_size/1e6:.2f} MB, {", ".join(maps)}')
    return out


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'sbldm_nb'/'assets'/'icbm152_2mm.npz')
    bake(parser.parse_args().out)
