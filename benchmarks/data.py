"""What reading costs, beside what people use: `python benchmarks/data.py [rounds] [dicom|patches|preprocess ...]`.

- dicom: a zip of 120 slices of 512 x 512 (a simulated CT, deflated) read by us, by pydicom in the naive way (read every member, pixel_array x slope + intercept in float64,
  sort by position, stack), and by MONAI's PydicomReader, which takes folders only, after unpacking. Then the unpacked folder, by us and by MONAI.
- patches: 16 random patches of 64 x 96 x 96 voxels out of a volume of 240 x 240 x 155 int16 that is open: memory-mapped .npy as in our cache, blosc2 (default codec, chunks of its own choice) and zarr
  (default codec, chunks of 64 voxels a side), with the bytes that each takes on disk. The files are in the page cache: this is the cost of the software, not of a disk.
- preprocess: the same cases with one worker process and with two.

One thread a process. Sides take turns, in an order that is reversed every round; given are the medians of the times, and median and lowest of the ratios of neighbouring runs.
Results go to benchmarks/results/data.json.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('BLOSC_NTHREADS', '1')

import functools
import io
import json
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import blosc2
import numpy as np
import pydicom
import zarr
from monai.data import PydicomReader

from sbldm_nb.cohort import Cohort, make_subject
from sbldm_nb.ct import pseudo_ct
from sbldm_nb.data import preprocess, read_image
from sbldm_nb.dicom import write_dicom
from sbldm_nb.kaggle_e2e import cpu_name

RESULTS = Path(__file__).parent / 'results' / 'data.json'


def in_turn(sides: dict, rounds: int) -> dict:
    "Seconds of every side in every round."
    seconds = {name: [] for name in sides}
    for side in sides.values(): side()
    for r in range(rounds):
        for name in list(sides)[::(-1)**r]:
            begin = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(seconds: dict, ours: str, extra: dict) -> dict:
    "Medians, and how many times as long as `ours` the others took."
    rows = {name: dict(seconds=float(np.median(t)), ratio=float(np.median(np.divide(t, seconds[ours]))),
                       lowest=float(np.min(np.divide(t, seconds[ours]))), **extra.get(name, {})) for name, t in seconds.items()}
    for name, row in rows.items():
        print(f'{name:42} {1000*row["seconds"]:10.2f} ms   x{row["ratio"]:.2f} (lowest x{row["lowest"]:.2f})', *(f'{k} {v}' for k, v in extra.get(name, {}).items()))
    return rows


def naive_pydicom(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        slices = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    slices.sort(key=lambda d: d.ImagePositionPatient[2])
    return np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices], -1)


def dicom(work: Path, rounds: int) -> dict:
    thin = pseudo_ct(0, shape=(512, 512, 120), spacing=(.45, .45, 1.25))
    path, folder = write_dicom(thin, work / 'series.zip'), work / 'folder'
    with zipfile.ZipFile(path) as archive: archive.extractall(folder)
    def monai(place):
        reader = PydicomReader()
        return reader.get_data(reader.read(str(next(p.parent for p in place.rglob('*.dcm')))))[0]
    def unpack_and_monai():
        with tempfile.TemporaryDirectory(dir=work) as place, zipfile.ZipFile(path) as archive:
            archive.extractall(place)
            return monai(Path(place))
    hu = np.asarray(thin.dataobj)
    np.testing.assert_array_equal(np.asarray(read_image(path).dataobj), hu)
    np.testing.assert_array_equal(naive_pydicom(path).transpose(1, 0, 2)[::-1, ::-1], hu)
    np.testing.assert_array_equal(np.asarray(read_image(folder).dataobj), hu)
    assert monai(folder).shape == unpack_and_monai().shape == hu.shape
    zips = {'sbldm_nb, zip': lambda: read_image(path), 'pydicom, zip': lambda: naive_pydicom(path), 'unpacked for MONAI PydicomReader': unpack_and_monai}
    folders = {'sbldm_nb, folder': lambda: read_image(folder), 'MONAI PydicomReader, folder': lambda: monai(folder)}
    return dict(zip=report(in_turn(zips, rounds), 'sbldm_nb, zip', {}), folder=report(in_turn(folders, rounds), 'sbldm_nb, folder', {}))


def patches(work: Path, rounds: int, size: tuple = (64, 96, 96)) -> dict:
    "A simulated head at .8 mm, as int16."
    volume = np.asarray(make_subject(3, .8).t1.dataobj).astype(np.int16)[:, :, 40:195]
    rng = np.random.default_rng(0)
    np.save(work / 'v.npy', volume)
    blosc2.asarray(volume, urlpath=str(work / 'v.b2nd'), mode='w')
    zarr.open_array(str(work / 'v.zarr'), mode='w', shape=volume.shape, chunks=(64, 64, 64), dtype=volume.dtype)[:] = volume
    sources = {'memory-mapped .npy': np.load(work / 'v.npy', mmap_mode='r'), 'blosc2': blosc2.open(str(work / 'v.b2nd'), mode='r'), 'zarr': zarr.open_array(str(work / 'v.zarr'), mode='r')}
    def cut(source):
        "16 random patches."
        corners = [[int(rng.integers(0, n - s + 1)) for n, s in zip(volume.shape, size)] for _ in range(16)]
        return [np.array(source[tuple(slice(c, c + s) for c, s in zip(corner, size))]) for corner in corners]
    sides = {name: functools.partial(cut, source) for name, source in sources.items()}
    disk = lambda p: sum(f.stat().st_size for f in ([p] if p.is_file() else p.rglob('*')) if f.is_file()) / 1e6
    extra = {n: {'MB on disk': round(disk(work / f), 1)} for n, f in zip(sides, ('v.npy', 'v.b2nd', 'v.zarr'))}
    return report(in_turn(sides, rounds), 'memory-mapped .npy', extra)


def preprocessing(work: Path, rounds: int) -> dict:
    source = Cohort(12, spacing=1.5).write(work / 'people')
    def run(workers):
        out = work / f'out{workers}'
        shutil.rmtree(out, ignore_errors=True)
        assert preprocess(source, out, modality='t1', spacing=1., workers=workers).exit_code == 0
    sides = {'two workers': lambda: run(2), 'one worker': lambda: run(1)}
    return report(in_turn(sides, rounds), 'two workers', {})


if __name__ == '__main__':
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    tasks = dict(dicom=dicom, patches=patches, preprocess=preprocessing)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[2:] or tasks:
        with tempfile.TemporaryDirectory() as work:
            print(f'-- {name}')
            results[name] = tasks[name](Path(work), rounds)
            results['conditions'] = dict(cpu=cpu_name(), rounds=rounds, pydicom=pydicom.__version__, blosc2=blosc2.__version__, zarr=zarr.__version__)
            RESULTS.write_text(json.dumps(results, indent=1) + '\n')
