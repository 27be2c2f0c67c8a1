"Our metrics against monai, scikit-image, scipy and torchmetrics."
import numpy as np
import pytest
import torch
from monai.metrics.regression import SSIMMetric
from scipy import linalg, stats
from skimage.filters import threshold_otsu
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sbldm_nb.metrics import (compute_psnr, compute_ssim, frechet_distance, gradient_histogram, gradient_w1, kernel_distance,
                              otsu_separability)


def pair(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    return x, (x + .1*torch.randn(shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize('shape', [(3, 1, 32, 41), (2, 1, 17, 20, 15)])
def test_ssim_equals_monai(shape):
    x, y = pair(*shape)
    oracle = SSIMMetric(spatial_dims=len(shape) - 2, data_range=1., kernel_type='gaussian', win_size=11, kernel_sigma=1.5)(x, y)
    torch.testing.assert_close(compute_ssim(x, y, per_image=True).float(), oracle.flatten(), atol=1e-5, rtol=0)


@pytest.mark.parametrize('shape', [(3, 1, 32, 41), (2, 1, 17, 20, 15)])
def test_ssim_and_psnr_equal_scikit_image(shape):
    x, y = pair(*shape, seed=1)
    options = dict(data_range=1., gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    oracle = [structural_similarity(a, b, **options) for a, b in zip(x[:, 0].double().numpy(), y[:, 0].double().numpy())]
    np.testing.assert_allclose(compute_ssim(x, y, per_image=True), oracle, atol=1e-5)
    oracle = [peak_signal_noise_ratio(a, b, data_range=1.) for a, b in zip(x.double().numpy(), y.double().numpy())]
    np.testing.assert_allclose(compute_psnr(x, y, per_image=True), oracle, atol=1e-9)


def test_fid_of_two_gaussians():
    "N(0, I8) against N(1, 1.5^2 I8), 2000 draws: 9.943 where the law says 10"
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2000, 8))
    b = 1 + 1.5*b
    ours = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(s1 @ s2).real
    assert ours == pytest.approx(((a.mean(0) - b.mean(0))**2).sum() + np.trace(s1 + s2 - 2*root), abs=1e-6)
    assert ours == pytest.approx(9.943, abs=1e-3)


def test_fid_of_few_images():
    "Fewer images than features: covariances without full rank, where the matrix root of scipy needs a push"
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 20, 50))
    values = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))
    oracle = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2*np.sqrt(np.clip(values.real, 0, None)).sum()
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(oracle, rel=1e-5)


def test_kid_equals_torchmetrics():
    from torchmetrics.image.kid import poly_mmd
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 16, generator=g).double(), .5 + torch.randn(30, 16, generator=g).double()
    torch.testing.assert_close(kernel_distance(a, b), poly_mmd(a, b), atol=1e-9, rtol=1e-9)


def test_gradient_w1_equals_scipy():
    "Against the exact distance of the raw values; ours has bins of .01"
    def lengths(x):
        v = []
        for im in x[:, 0].double().numpy():
            inside = im > .1
            used = inside[:-1, :-1] & inside[1:, :-1] & inside[:-1, 1:]
            v.append((np.hypot(im[1:, :-1] - im[:-1, :-1], im[:-1, 1:] - im[:-1, :-1])/im[inside].std())[used])
        return np.concatenate(v)
    x, y = pair(4, 1, 24, 30, seed=2)
    y = .2 + .5*y**2
    oracle = stats.wasserstein_distance(lengths(x), lengths(y))
    assert gradient_w1(x, y) == pytest.approx(oracle, abs=.01)
    assert gradient_histogram(x).sum() == pytest.approx(1)


def test_otsu_equals_scikit_image():
    "On whole grey levels the exact cut and the histogram's are one"
    g = torch.Generator().manual_seed(3)
    levels = torch.randint(90, 256, (1, 1, 32, 32), generator=g)
    levels[..., 10:] = levels[..., 10:]//4 + 190
    v = levels.numpy().ravel()
    low, high = v[v <= threshold_otsu(v)], v[v > threshold_otsu(v)]
    between = len(low)*len(high)/len(v)**2*(low.mean() - high.mean())**2
    assert otsu_separability(levels/255) == pytest.approx(between/v.var(), rel=1e-6)
