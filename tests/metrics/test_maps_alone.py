"""Metrics of maps and masks, for which no model is asked."""

import math

import numpy as np
import pytest
import torch
from oracles import metrics as slow
from sklearn.metrics import roc_auc_score

from pyfast_xai import InputError, metrics

DRAWN = torch.Generator().manual_seed(4)
MAPS = torch.randn(3, 7, 9, generator=DRAWN, dtype=torch.float64)
MASKS = torch.rand(3, 7, 9, generator=DRAWN) > 0.6


def test_sparseness_is_the_gini_index():
    np.testing.assert_allclose(metrics.sparseness(MAPS), [slow.gini(one) for one in MAPS.numpy()], rtol=1e-12)
    assert metrics.sparseness(torch.zeros(1, 4)).tolist() == [0]


def test_complexity_is_the_entropy():
    np.testing.assert_allclose(metrics.complexity(MAPS), [slow.entropy(one) for one in MAPS.numpy()], rtol=1e-12)
    torch.testing.assert_close(metrics.complexity(torch.ones(1, 8, 8)), torch.tensor([math.log(64)]))
    assert metrics.complexity(torch.zeros(1, 4)).tolist() == [0]


def test_attributions_stay_as_they_were():
    before = MAPS.clone()
    metrics.sparseness(MAPS), metrics.complexity(MAPS), metrics.effective_complexity(MAPS)
    assert torch.equal(before, MAPS)


def test_effective_complexity_counts_what_matters():
    got = metrics.effective_complexity(MAPS, threshold=0.25)
    assert got.tolist() == [int((abs(one) > 0.25 * abs(one).max()).sum()) for one in MAPS.numpy()]


def test_relevance_on_masks():
    maps, masks = MAPS.abs(), MASKS
    for row, (one, inside) in enumerate(zip(maps.numpy(), masks.numpy(), strict=True)):
        hot = np.argsort(-one.ravel())
        size = inside.sum()
        at = lambda k: inside.ravel()[hot[:k]].mean()  # noqa: E731, B023
        np.testing.assert_allclose(metrics.relevance_mass(maps, masks)[row], one[inside].sum() / one.sum())
        np.testing.assert_allclose(metrics.relevance_rank(maps, masks)[row], at(size), rtol=1e-6)
        np.testing.assert_allclose(metrics.top_k_intersection(maps, masks, k=10)[row], at(10), rtol=1e-6)
        by_size = metrics.top_k_intersection(maps, masks, k=10, by_size=True)[row]
        np.testing.assert_allclose(by_size, at(10) * 63 / size, rtol=1e-6)
        positive = MAPS[row].numpy().clip(0)
        share = positive[inside].sum() / positive.sum()
        np.testing.assert_allclose(metrics.attribution_localization(MAPS, masks)[row], share)
        weighted = metrics.attribution_localization(MAPS, masks, weighted=True)[row]
        np.testing.assert_allclose(weighted, share * 63 / size)
        ties = MAPS.mul(2).round()
        auc = roc_auc_score(inside.ravel(), ties[row].numpy().ravel())
        np.testing.assert_allclose(metrics.mask_auc(ties, masks)[row], auc, rtol=1e-12)


@pytest.mark.parametrize(
    "measure",
    [
        *(metrics.relevance_mass, metrics.relevance_rank, metrics.attribution_localization, metrics.mask_auc),
        lambda maps, masks: metrics.top_k_intersection(maps, masks, k=5),
    ],
    ids=["mass", "rank", "localization", "auc", "top-k"],
)
def test_an_image_without_an_object_has_no_value(measure):
    masks = MASKS.clone()
    masks[1] = False
    values = measure(MAPS.abs(), masks)
    assert values.isnan().tolist() == [False, True, False]
    with pytest.raises(InputError, match=r"masks must be a bool tensor, got torch\.float32"):
        measure(MAPS, MASKS.float())


def test_correlation():
    a, b = MAPS.flatten(1), MAPS.flip(1).flatten(1) + MAPS.flatten(1)
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(metrics.correlation(a, b), expected, rtol=1e-12)
    assert metrics.correlation(torch.full((1, 9), 0.1), torch.rand(1, 9)).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.sparseness(torch.rand(3)), r"attributions must have shape \[R, ...\] and hold at least one"),
        (lambda: metrics.complexity(torch.full((1, 2), math.inf)), "attributions must be finite, got NaN or infinity"),
        (lambda: metrics.effective_complexity(MAPS, threshold=1), r"threshold must lie in \[0, 1\), got 1"),
        (lambda: metrics.top_k_intersection(MAPS, MASKS), r"k must lie in \[1, 63\], the pixels of a map, got 1000"),
    ],
)
def test_wrong_input_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call()
