"""Shapley values against the sum over all orders, Captum on the same orders, and a regression written out."""

import itertools
import math

import captum.attr._core.shapley_value as captum
import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import KernelShap, ShapleyValues, ShapleyValueSampling
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
SIX = torch.arange(6).view(2, 3).repeat_interleave(6, 0).repeat_interleave(5, 1)  # of 12 x 15 pixels
TWENTY = torch.arange(20).view(4, 5).repeat_interleave(3, 0).repeat_interleave(3, 1)


@pytest.fixture
def net():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(120, 5)]
    return nn.Sequential(*layers).eval().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 15, dtype=DOUBLE)


def score(net, image, mask, present, target):
    with torch.no_grad():
        return float(net(torch.where(torch.isin(mask, torch.tensor(present)), image, 0.0)[None]).softmax(1)[0, target])


def over_all_orders(net, image, mask, target):
    """What each feature adds on average, one order after the other."""
    count = int(mask.max()) + 1
    known = {
        present: score(net, image, mask, present, target)
        for size in range(count + 1)
        for present in itertools.combinations(range(count), size)
    }
    values = np.zeros(count)
    for order in itertools.permutations(range(count)):
        for i, feature in enumerate(order):
            values[feature] += known[tuple(sorted(order[: i + 1]))] - known[tuple(sorted(order[:i]))]
    return torch.from_numpy(values / math.factorial(count))


@pytest.mark.parametrize("method", [ShapleyValues, KernelShap], ids=lambda method: method.method)
def test_exact_values_are_the_mean_over_all_orders(net, images, method):
    """Kernel SHAP that is asked for as many samples as there are subsets leaves nothing to chance (Theorem 2)."""
    settings = {"n_samples": 62} if method is KernelShap else {}
    result = method(net, feature_mask=SIX, batch_size=9, **settings)(images, [[0, 3], [4, 1]])
    for row, (n, target) in enumerate([(0, 0), (0, 3), (1, 4), (1, 1)]):
        expected = over_all_orders(net, images[n], SIX, target)
        torch.testing.assert_close(result.values[row], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.signed_map[row], expected[SIX], rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", [ShapleyValues, KernelShap, ShapleyValueSampling], ids=lambda method: method.method)
def test_hardly_any_features(net, images, method, count):
    mask = (torch.arange(15) * count // 15).expand(12, 15)
    settings = {"n_samples": 200} if method is not ShapleyValues else {}
    result = method(net, feature_mask=mask, **settings)(images, 2)
    for n in range(2):
        expected = over_all_orders(net, images[n], mask, 2)
        # 200 orders of two and three features are near to all.
        atol = 0.02 if method is ShapleyValueSampling else 1e-12
        torch.testing.assert_close(result.values[n], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("method", [KernelShap, ShapleyValueSampling], ids=lambda method: method.method)
def test_values_add_up_to_the_change_of_the_score(net, images, method):
    result = method(net, feature_mask=TWENTY, n_samples=44)(images, [1, 2])
    with torch.no_grad():
        changes = (net(images).softmax(1) - net(0 * images).softmax(1))[[0, 1], [1, 2]]
    torch.testing.assert_close(result.values.sum(1), changes, rtol=0, atol=1e-12)


def test_sampling_equals_captum_on_the_same_orders(net, images, monkeypatch):
    explain = ShapleyValueSampling(net, feature_mask=TWENTY, n_samples=6, seed=5, batch_size=11)
    result = explain(images, [1, 2])
    orders = explain._joins(20).argsort(1).tolist()
    assert len({tuple(order) for order in orders}) == 6
    theirs = captum.ShapleyValueSampling(lambda x: net(x).softmax(1))
    theirs.permutation_generator = lambda features, samples: iter(orders)
    with torch.no_grad(), monkeypatch.context() as patch:
        # It sums in float32 whatever the model computes in.
        patch.setattr(torch, "float", DOUBLE)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected = theirs.attribute(images, target=torch.tensor([1, 2]), feature_mask=TWENTY[None, None], n_samples=6)
    torch.testing.assert_close(result.attribution, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("count", [40, 41, 150, 400])
def test_samples_of_kernel_shap(net, count):
    """Sizes with large weights are whole, the others come in pairs, and each has the weight of its size on average."""
    subsets, weights = KernelShap(net, n_samples=count, seed=2)._weighted(20)
    assert len(subsets) <= count
    assert len(subsets) >= 0.9 * count
    assert subsets.unique(dim=0).shape == subsets.shape
    actual = {tuple(subset) for subset in subsets.tolist()}
    assert actual == {tuple(not one for one in subset) for subset in actual}
    sizes = subsets.sum(1)
    kernel = {size: 19 / (size * (20 - size)) for size in range(1, 20)}
    whole = [size for size in kernel if (sizes == size).sum() == math.comb(20, size)]
    assert whole == {40: [], 41: [], 150: [1, 19], 400: [1, 19]}[count]
    scale = sum(kernel.values()) / float(weights.sum())
    for size in whole:
        expected = torch.full((math.comb(20, size),), kernel[size] / math.comb(20, size), dtype=DOUBLE)
        torch.testing.assert_close(scale * weights[sizes == size], expected, rtol=0, atol=1e-12)
    rest = sum(kernel[size] for size in kernel if size not in whole)
    drawn = ~torch.isin(sizes, torch.tensor(whole))
    torch.testing.assert_close(scale * float(weights[drawn].sum()), rest, rtol=0, atol=1e-12)


def test_kernel_shap_is_least_squares_with_a_fixed_sum(net, images):
    """As Lundberg and Lee's code does it: the last feature takes what the others leave of the sum."""
    explain = KernelShap(net, feature_mask=TWENTY, n_samples=100)
    result = explain(images[:1], 3)
    subsets, weights = explain._weighted(20)
    present = subsets.double().numpy()
    requests = [score(net, images[0], TWENTY, subset.nonzero()[:, 0].tolist(), 3) for subset in subsets]
    empty, whole = (score(net, images[0], TWENTY, features, 3) for features in ([], list(range(20))))
    left = np.array(requests) - empty - present[:, -1] * (whole - empty)
    root = np.sqrt(weights.numpy())
    first = np.linalg.lstsq(root[:, None] * (present[:, :-1] - present[:, -1:]), root * left, rcond=None)[0]
    expected = torch.from_numpy(np.append(first, whole - empty - first.sum()))
    torch.testing.assert_close(result.values[0], expected, rtol=0, atol=1e-10)


def test_kernel_shap_comes_near_to_the_exact_values(net, images):
    """What an additive model and one with pairs of features are worth is found with few samples."""
    mask = torch.arange(10).repeat_interleave(18).view(12, 15)
    exact = ShapleyValues(net, feature_mask=mask)(images, 1).values
    near, far = (KernelShap(net, feature_mask=mask, n_samples=n)(images, 1).values for n in (300, 20))
    assert (near - exact).abs().amax() < 0.03 * exact.abs().amax()
    assert (near - exact).abs().amax() < (far - exact).abs().amax()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: ShapleyValues(net, feature_mask=5), "at most 20 features for exact Shapley values, got 25"),
        (
            lambda net: KernelShap(net, feature_mask=5, n_samples=49),
            "n_samples must be at least 50, twice the",
        ),
        (lambda net: ShapleyValueSampling(net, n_samples=0), "n_samples must be at least 1, got 0"),
    ],
    ids=["too many features", "too few samples", "none"],
)
def test_bad_settings(net, images, make, message):
    with pytest.raises(InputError, match=message):
        make(net)(images)
