"""XRAI: the greedy order of the paper in a slow loop, integrated gradients, and segments by SciPy and scikit-image."""

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import segmentation, transform
from torch import nn

from pyfast_xai import XRAI, InputError, IntegratedGradients
from pyfast_xai.explainers import xrai

DOUBLE = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, 3, 14, 12))
    return net.double().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 14, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def drawn_regions(seed, count=30, height=14, width=12):
    generator = np.random.default_rng(seed)
    regions = np.zeros((count, height, width), dtype=bool)
    for region in regions:
        top, left = generator.integers(height - 3), generator.integers(width - 3)
        region[top : top + generator.integers(1, 7), left : left + generator.integers(1, 7)] = True
    return regions


def ranked(attribution, regions, min_area):
    """The paper's algorithm: of all regions that are left the one with the largest gain density, again and again."""
    covered, out = np.zeros(attribution.shape, bool), np.full(attribution.shape, -np.inf)
    remaining = dict(enumerate(regions))
    while True:
        remaining = {i: region for i, region in remaining.items() if (region & ~covered).sum() >= min_area}
        if not remaining:
            break
        gains = {i: attribution[region & ~covered].mean() for i, region in remaining.items()}
        best = max(gains, key=gains.get)
        out[remaining[best] & ~covered] = gains[best]
        covered |= remaining.pop(best)
    if not covered.all():
        out[~covered] = attribution[~covered].mean()
    return out


@pytest.mark.parametrize("min_area", [1, 4, 9, 1000])
def test_regions_come_by_the_density_that_they_add(min_area):
    for seed in range(5):
        regions = drawn_regions(seed)
        attribution = np.random.default_rng(seed + 100).standard_normal((14, 12))
        result = xrai.ranked_by_density(torch.from_numpy(attribution), torch.from_numpy(regions), min_area)
        np.testing.assert_allclose(result.numpy(), ranked(attribution, regions, min_area), rtol=0, atol=1e-12)
        np.testing.assert_allclose(float(result.sum()), attribution.sum(), rtol=0, atol=1e-11)


def test_integrated_gradients_of_both_extremes_are_ranked(net, images):
    regions = torch.from_numpy(drawn_regions(3))
    result = XRAI(net, n_steps=20, regions=lambda image: regions, min_area=2)(images, [[1, 3], [4, 0]])
    starts = [images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)]
    expected = sum(
        IntegratedGradients(net, n_steps=20, baseline=b)(images, [[1, 3], [4, 0]]).attribution for b in starts
    )
    torch.testing.assert_close(result.attribution, expected / 2, rtol=1e-10, atol=1e-13)
    for row in range(4):
        pixels = expected[row].numpy().max(0) / 2
        np.testing.assert_allclose(
            result.signed_map[row].numpy(), ranked(pixels, regions.numpy(), 2), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(result.heatmap, result.signed_map.clamp_min(0).float())


def test_segments_are_widened_and_of_the_size_of_the_image():
    image = torch.zeros(3, 90, 70, dtype=DOUBLE)
    image[0, 20:60, 10:50] = 2.0
    image[1, 50:, 30:] = -1.0
    result = xrai.felzenszwalb_regions(image, 5).numpy()
    scaled = (image.permute(1, 2, 0).numpy() + 1) / 3 * 2 - 1
    large = transform.resize(scaled, (224, 224), order=3, mode="constant", preserve_range=True, anti_aliasing=True)
    y, x = np.ogrid[-5:6, -5:6]
    expected = []
    for scale in (50, 100, 150, 250, 500, 1200):
        labels = segmentation.felzenszwalb(large, scale=scale, sigma=0.8, min_size=150)
        labels = transform.resize(labels, (90, 70), order=0, mode="constant", preserve_range=True, anti_aliasing=False)
        expected += [
            ndimage.binary_dilation(labels == label, y**2 + x**2 <= 25) for label in range(int(labels.max()) + 1)
        ]
    expected = [mask for mask in expected if mask.any()]  # a narrow segment may fall between the pixels
    assert result.shape == (len(expected), 90, 70)
    assert (result == np.stack(expected)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"regions": lambda image: torch.zeros(3, 5, 5, dtype=torch.bool)},
            r"return bool \[M, 14, 12\], got torch.bool",
        ),
        ({"regions": lambda image: torch.zeros(3, 14, 12)}, r"must return bool .*got torch.float32 \[3, 14, 12\]"),
        ({"regions": lambda image: None}, "must return bool .*got NoneType"),
        ({"baselines": []}, "baselines must be one or more, got none"),
        ({"baselines": [torch.zeros(7)]}, r"baseline must broadcast to the images, .*got \[7\]"),
        ({"min_area": 0}, "min_area must be at least 1, got 0"),
    ],
    ids=["size", "dtype", "none", "no baselines", "baseline", "area"],
)
def test_what_does_not_fit_is_said_so(net, images, settings, message):
    with pytest.raises(InputError, match=message):
        XRAI(net, n_steps=1, **settings)(images, 1)


def test_without_scikit_image_the_package_is_named(net, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"regions need scikit-image \(pip install scikit-image\), or must be"):
        XRAI(net, n_steps=1)(images, 1)
