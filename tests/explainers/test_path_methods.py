"""Gradients on a path: slow loops of the papers, and the change of the score that they add up to."""

import copy

import numpy as np
import pytest
import torch
from oracles import path_methods as oracle
from small_networks import small
from torch import nn

from pyfast_xai import BlurIG, GuidedIG, InputError, IntegratedGradients
from pyfast_xai.explainers.path_methods import in_scale_space

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(),
        nn.LazyLinear(5),
    ).double().eval()  # fmt: skip


@pytest.fixture
def images(net):
    drawn = torch.randn(2, 3, 10, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    net(drawn)
    return drawn


def change(net, images, baseline, target):
    with torch.no_grad():
        return (net(images) - net(baseline))[range(len(images)), target]


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.7, 20.0])
def test_the_blur_is_scipys(images, sigma):
    result = in_scale_space(images, torch.tensor([sigma], dtype=DOUBLE))[0].numpy()
    expected = np.stack([oracle.blurred(image, sigma) for image in images.numpy()])
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14)


def test_volumes_and_signals_are_blurred_in_all_their_dimensions():
    volume = torch.randn(1, 1, 4, 5, 6, dtype=DOUBLE)
    expected = oracle.ndimage.gaussian_filter(volume.numpy(), (0, 0, 2, 2, 2), mode="constant")
    np.testing.assert_allclose(in_scale_space(volume, torch.tensor([2.0]))[0].numpy(), expected, rtol=0, atol=1e-7)
    assert BlurIG(nn.Flatten().eval(), n_steps=2)(torch.rand(2, 1, 7), 3).attribution.shape == (2, 1, 7)


@pytest.mark.parametrize("batch_size", [1, 2, 6, 16])
def test_blur_ig_is_the_sum_over_scales(net, images, batch_size):
    result = BlurIG(net, n_steps=7, max_sigma=6, batch_size=batch_size)(images, [[1, 3], [4, 0]]).attribution
    for row, target in enumerate([1, 3, 4, 0]):
        expected = oracle.blur_ig(oracle.gradient_of(net, target), images[row // 2].numpy(), 7, 6)
        np.testing.assert_allclose(result[row].numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("fraction", "max_distance"), [(0.25, 0.02), (0.1, 0.3), (0.6, 1.0), (1.0, 0.0)])
def test_guided_ig_is_the_papers_algorithm(net, images, fraction, max_distance):
    baseline = torch.randn(1, 3, 10, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    baseline[0, 0] = images[1, 0]  # pixels that do not move
    explain = GuidedIG(net, n_steps=9, baseline=baseline, fraction=fraction, max_distance=max_distance)
    result = explain(images, [[1, 3], [4, 0]]).attribution
    for row, target in enumerate([1, 3, 4, 0]):
        expected = oracle.guided_ig(
            oracle.gradient_of(net, target), images[row // 2].numpy(), baseline[0].numpy(), 9, fraction, max_distance
        )
        np.testing.assert_allclose(result[row].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_guided_ig_without_a_band_is_the_straight_line(net, images):
    """The sum of the left ends of its steps, that is: pixels are where integrated gradients have them."""
    result = GuidedIG(net, n_steps=6, max_distance=0.0)(images, 2).attribution
    expected = torch.zeros_like(images)
    for step in range(6):
        place = (images * step / 6).requires_grad_()
        expected += torch.autograd.grad(net(place)[:, 2].sum(), place)[0] * images / 6
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def blurred_most(images):
    return in_scale_space(images, torch.tensor([4.0], dtype=DOUBLE))[0]


WAYS = {
    "integrated": (lambda net: IntegratedGradients(net), torch.zeros_like, ["resnet", "convnext", "vit"]),
    # The kinks of a rectifier between two places of the way are what guided IG has no term for.
    "guided": (lambda net: GuidedIG(net, n_steps=100), torch.zeros_like, ["convnext", "vit"]),
    "blur": (lambda net: BlurIG(net, max_sigma=4), blurred_most, ["resnet", "convnext", "vit"]),
}


@pytest.mark.parametrize(("way", "family"), [(way, family) for way in WAYS for family in WAYS[way][2]])
def test_they_add_up_to_the_change_of_the_score(way, family):
    make, baseline, _ = WAYS[way]
    torch.manual_seed(3)
    net, images = small(family), torch.randn(2, 3, 16, 16, dtype=DOUBLE)
    expected = change(net, images, baseline(images), [1, 3])
    result = make(net)(images, [1, 3]).attribution.sum((1, 2, 3))
    assert float((result - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_half_precision_takes_the_places_of_the_way_exactly(net, images):
    images = images.bfloat16()
    expected = IntegratedGradients(net)(images.double(), 1).attribution
    result = IntegratedGradients(copy.deepcopy(net).bfloat16())(images, 1).attribution.double()
    assert float((result - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("explain", [IntegratedGradients, BlurIG, GuidedIG])
def test_places_in_one_pass_are_places_one_by_one(net, images, explain):
    """Also with a target that counts rows, an argument of each image, and a gradient to start from."""
    both = explain(net, n_steps=5)(images, [1, 3]).attribution
    counts = explain(net, n_steps=5)(images, lambda output: output[range(2), [1, 3]]).attribution
    seeds = torch.nn.functional.one_hot(torch.tensor([1, 3]), 5).double()
    started = explain(net, n_steps=5)(images, seeds).attribution
    torch.testing.assert_close(counts, both, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(started, both, rtol=1e-9, atol=1e-12)

    class Scaled(nn.Module):
        def forward(self, x, scale):
            return net(x * scale[:, None, None, None])

    scale = torch.tensor([0.5, 2.0], dtype=DOUBLE)
    options = explain(Scaled().eval(), n_steps=5)(images, [1, 3], scale).attribution
    for row in range(2):
        alone = explain(Scaled().eval(), n_steps=5)(images[row : row + 1], [1, 3][row], scale[row : row + 1])
        torch.testing.assert_close(options[row], alone.attribution[0], rtol=1e-9, atol=1e-12)


def test_where_the_image_is_the_baseline_nothing_is_attributed(net, images):
    assert not GuidedIG(net, n_steps=3, baseline=images)(images, 1).attribution.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: GuidedIG(net, fraction=0), r"fraction must lie in \(0, 1\], got 0"),
        (lambda net: GuidedIG(net, max_distance=1.5), r"max_distance must lie in \[0, 1\], got 1.5"),
        (lambda net: GuidedIG(net, n_steps=0), "n_steps must be at least 1, got 0"),
        (lambda net: BlurIG(net, max_sigma=0), "max_sigma must be positive, got 0"),
        (lambda net: GuidedIG(net, baseline=torch.zeros(7)), r"baseline must broadcast to the images, .*got \[7\]"),
    ],
    ids=["fraction", "distance", "steps", "sigma", "baseline"],
)
def test_what_does_not_fit_is_said_so(net, images, make, message):
    with pytest.raises(InputError, match=message):
        make(net)(images, 1)
