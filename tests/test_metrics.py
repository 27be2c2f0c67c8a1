"The shipped encoder as a file, and what the metrics say of new people."
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sbldm_nb.cohort import make_subject
from sbldm_nb.data import Intensity
from sbldm_nb.encoder import TissueEncoder, load_encoder
from sbldm_nb.metrics import (blobs, blur, check_images, compute_kid, compute_ssim, features, kernel_distance,
                              quality_report)

ASSET = str(files('sbldm_nb')/'assets'/'tissue_encoder.safetensors')


@pytest.fixture(scope='module')
def people():
    "One slice each of 20 people of a population that the encoder was not trained on, with tissue labels"
    images, labels = [], []
    for i in range(20):
        s, k = make_subject(3_000_000 + i, 3.), 26 + i % 8
        v = s.t1.get_fdata(dtype=np.float32)
        images.append((Intensity.fit(v).encode(v)[..., k] + 1)/2)
        labels.append(np.asanyarray(s.tissue.dataobj)[..., k])
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(labels))


def test_encoder_file_is_small_and_says_where_it_comes_from():
    assert (files('sbldm_nb')/'assets'/'tissue_encoder.safetensors').stat().st_size < 1_000_000
    with safe_open(ASSET, 'pt') as f: told = f.metadata()
    assert told['trained_by'] == 'scripts/train_encoder.py' and told['data'] == 'SIMULATED'


def test_encoder_names_tissue_of_new_people(people):
    x, y = people
    with torch.inference_mode(): p = load_encoder().segment(x).argmax(1)
    for c, least in zip(range(4), (.98, .8, .9, .9)):
        assert 2*((p == c) & (y == c)).sum()/((p == c).sum() + (y == c).sum()) > least, c


def test_kid_rises_with_every_fault(people):
    x, _ = people
    a, b = features(x[::2]), x[1::2]
    g = torch.Generator().manual_seed(0)
    dials = ([blur(b, s) for s in (.6, 1., 2.)], [(b + s*torch.randn(b.shape, generator=g)).clamp(0, 1) for s in (.08, .15, .3)],
             [blobs(b, s, generator=torch.Generator().manual_seed(0)) for s in (.3, .7, 1.)])
    clean = kernel_distance(features(b), a)
    for dial in dials:
        v = [kernel_distance(features(q), a) for q in dial]
        assert clean < v[1] < v[2] and v[0] < v[1]


@pytest.mark.parametrize('n', [9, 10])
def test_report_of_unequal_sets(people, n):
    x, _ = people
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        r = quality_report(x[:n], x[n:], repeats=5)
    assert r['kid']['n'] == n and r['kid']['m'] == 20 - n and r['kid']['floor_n'] == 5
    assert set(r) == {'kid', 'fid', 'spectrum_db', 'gradient_w1', 'otsu'}


def test_scores_do_not_depend_on_the_batch_size_or_touch_the_global_generator(people):
    x, _ = people
    torch.testing.assert_close(features(x, batch_size=3), features(x), atol=1e-5, rtol=1e-5)
    before = torch.get_rng_state()
    one, two = compute_kid(x[:10], x[10:]), compute_kid(x[:10], x[10:])
    assert one == two and torch.equal(before, torch.get_rng_state())


def test_half_precision_images(people):
    x, _ = people
    assert compute_ssim(x.half(), x.half()) == pytest.approx(1)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r'\(3, 1, 8\)'): check_images(torch.rand(3, 1, 8))
    with pytest.raises(ValueError, match='two images'): kernel_distance(torch.rand(1, 4), torch.rand(3, 4))
    with pytest.raises(ValueError, match='expected \\(2, D\\)'): features(torch.rand(2, 1, 16, 16), lambda x: x)
    with pytest.raises(ValueError, match='values in'): compute_kid(torch.rand(2, 1, 16, 16)*255, torch.rand(2, 1, 16, 16), TissueEncoder())
