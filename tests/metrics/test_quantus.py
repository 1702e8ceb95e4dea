"""The metrics against Quantus, where it does what its papers say."""

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import metrics

quantus = pytest.importorskip("quantus")

DRAWN = torch.Generator().manual_seed(5)
IMAGES = torch.rand(3, 3, 8, 8, generator=DRAWN)
NUMBERS = torch.randn(3, 3, 8, 8, generator=DRAWN)
MAPS = torch.rand(3, 8, 8, generator=DRAWN)
MASKS = torch.rand(3, 8, 8, generator=DRAWN) > 0.5
TARGETS = torch.tensor([0, 3, 2])
PLAIN = {"abs": False, "normalise": False, "disable_warnings": True}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(384, 4)).eval()


MODEL = network()


def ask(kind, attributions=NUMBERS, **settings):
    """What a metric of Quantus gives; one row an image."""
    metric = getattr(quantus, kind)(**{**PLAIN, "return_aggregate": False, **settings})
    maps = attributions if attributions.dim() == 4 else attributions[:, None]
    options = {"x_batch": IMAGES.numpy(), "y_batch": TARGETS.numpy(), "a_batch": maps.numpy().copy()}
    return np.array(
        metric(model=MODEL, s_batch=MASKS[:, None].numpy(), device="cpu", softmax=False, **options), np.float64
    )


def test_complexity():
    np.testing.assert_allclose(metrics.sparseness(MAPS), ask("Sparseness", MAPS), rtol=1e-4)
    np.testing.assert_allclose(metrics.complexity(MAPS), ask("Complexity", MAPS), rtol=1e-4)
    count = ask("EffectiveComplexity", MAPS / MAPS.amax((1, 2), keepdim=True), eps=0.3)
    assert metrics.effective_complexity(MAPS, threshold=0.3).tolist() == count.tolist()


def test_masks():
    np.testing.assert_allclose(metrics.relevance_mass(MAPS, MASKS), ask("RelevanceMassAccuracy", MAPS), rtol=1e-4)
    np.testing.assert_allclose(metrics.relevance_rank(MAPS, MASKS), ask("RelevanceRankAccuracy", MAPS), rtol=1e-5)
    np.testing.assert_allclose(metrics.mask_auc(MAPS, MASKS), ask("AUC", MAPS), rtol=1e-5)
    inside = metrics.attribution_localization(MAPS, MASKS)
    np.testing.assert_allclose(inside, ask("AttributionLocalisation", MAPS), rtol=1e-4)
    for by_size in (False, True):
        got = metrics.top_k_intersection(MAPS, MASKS, k=11, by_size=by_size)
        np.testing.assert_allclose(got, ask("TopKIntersection", MAPS, k=11, concept_influence=by_size), rtol=1e-5)


def test_curves():
    zero = {"perturb_baseline": 0.0}
    got = metrics.pixel_flipping(MODEL, IMAGES, NUMBERS, TARGETS, step=8).scores[:, 1:]
    np.testing.assert_allclose(got, ask("PixelFlipping", features_in_step=8, **zero), atol=1e-5)
    for order in ("morf", "lerf"):
        got = metrics.region_perturbation(MODEL, IMAGES, NUMBERS, TARGETS, patch=4, order=order).drops
        np.testing.assert_allclose(got, ask("RegionPerturbation", patch_size=4, order=order, **zero), atol=1e-5)
    got = metrics.selectivity(MODEL, IMAGES, NUMBERS, TARGETS, patch=4).scores[:, 1:]
    np.testing.assert_allclose(got, ask("Selectivity", patch_size=4, **zero), atol=1e-5)


def test_correlations():
    zero = {"perturb_baseline": 0.0}
    got = metrics.faithfulness_estimate(MODEL, IMAGES, NUMBERS, TARGETS, step=8)
    np.testing.assert_allclose(got, ask("FaithfulnessEstimate", features_in_step=8, **zero), atol=1e-5)
    # The means of many draws of subsets, which are Quantus's own.
    got = metrics.faithfulness_correlation(MODEL, IMAGES, NUMBERS, TARGETS, subset=60, runs=2000)
    np.testing.assert_allclose(got, ask("FaithfulnessCorrelation", subset_size=60, nr_runs=2000, **zero), atol=0.08)


def test_monotonicity_there_is_always_true():
    """Why Quantus is no oracle for it: the score of the baseline is all it asks for."""
    assert ask("Monotonicity", NUMBERS.abs(), perturb_baseline=0.0, features_in_step=8).all()
    assert (metrics.monotonicity(MODEL, IMAGES, NUMBERS, TARGETS, step=8) < 1).all()
