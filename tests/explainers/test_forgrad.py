"""FORGrad: the discrete Fourier transform written out, and the filter of the authors' code."""

import cmath
import math

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import FORGrad, GuidedBackprop, InputError, Saliency
from pyfast_xai.explainers.forgrad import low_pass

DOUBLE = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, 3, 12, 12))
    return net.double().eval()


def signed(frequency, size):
    """The frequency of a place of a spectrum, with those above the middle negative."""
    return frequency if frequency <= size // 2 else frequency - size


def by_sums(array, cutoff):
    """Both transforms as sums over all pixels and all frequencies."""
    height, width = array.shape
    result = np.zeros((height, width))
    for p in range(height):
        for q in range(width):
            if math.hypot(signed(p, height), signed(q, width)) > cutoff:
                continue
            number = sum(
                array[y, x] * cmath.exp(-2j * math.pi * (p * y / height + q * x / width))
                for y in range(height)
                for x in range(width)
            )
            for y in range(height):
                for x in range(width):
                    turned = number * cmath.exp(2j * math.pi * (p * y / height + q * x / width))
                    result[y, x] += turned.real / (height * width)
    return result


@pytest.mark.parametrize("cutoff", [1, 2.5, 4])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 9)])
def test_the_filter_is_the_sum_of_low_waves(size, cutoff):
    array = np.random.default_rng(0).standard_normal(size)
    result = low_pass(torch.from_numpy(array), cutoff, 2).numpy()
    np.testing.assert_allclose(result, by_sums(array, cutoff), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("base", "of"), [("saliency", Saliency), ("guided-backprop", GuidedBackprop)])
def test_the_heat_map_is_that_of_the_authors_code(net, base, of):
    images = torch.randn(2, 3, 12, 12, dtype=DOUBLE)
    explanation = FORGrad(net, base=base, cutoff=3)(images, [[1, 3], [0, 2]])
    plain = of(net)(images, [[1, 3], [0, 2]])
    y, x = np.ogrid[:12, :12]
    disk = np.fft.ifftshift(np.hypot(y - 6, x - 6) <= 3)
    expected = np.fft.ifft2(np.fft.fft2(plain.attribution.abs().amax(1).numpy()) * disk).real
    np.testing.assert_allclose(explanation.heatmap.numpy(), np.abs(expected), rtol=1e-5, atol=1e-7)
    channels = np.fft.ifft2(np.fft.fft2(plain.attribution.numpy()) * disk).real
    np.testing.assert_allclose(explanation.attribution.numpy(), channels, rtol=0, atol=1e-14)
    assert torch.equal(explanation.target, plain.target)


def test_signals_and_volumes():
    model = nn.Flatten().eval()
    assert FORGrad(model, cutoff=2)(torch.rand(2, 1, 9), 3).heatmap.shape == (2, 9)
    assert FORGrad(model, cutoff=2)(torch.rand(2, 1, 4, 5, 6), 3).attribution.shape == (2, 1, 4, 5, 6)


def test_what_does_not_fit_is_said_so(net):
    with pytest.raises(InputError, match="cutoff must be positive, got 0"):
        FORGrad(net, cutoff=0)
    with pytest.raises(InputError, match=r"base must be one of 'saliency', .*got 'lime'"):
        FORGrad(net, base="lime")
