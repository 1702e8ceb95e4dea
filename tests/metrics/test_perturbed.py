"""Metrics that remove features, against loops in float64."""

import numpy as np
import pytest
import torch
from oracles import metrics as slow
from scipy.stats import spearmanr
from torch import nn

from pyfast_xai import InputError, metrics
from pyfast_xai.metrics.perturbation import patches, random_subsets


def network(classes=5):
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, classes)
    return nn.Sequential(*layers).double().eval()


MODEL = network()
DRAWN = torch.Generator().manual_seed(8)
IMAGES = torch.rand(2, 3, 9, 8, generator=DRAWN, dtype=torch.float64)
MAPS = torch.randn(2, 9, 8, generator=DRAWN, dtype=torch.float64)
NUMBERS = torch.randn(2, 3, 9, 8, generator=DRAWN, dtype=torch.float64)
TARGETS = [4, 1]


def each(attributions, target=TARGETS):
    return zip(IMAGES.numpy(), attributions.numpy(), target, strict=True)


class Numbers(nn.Module):
    """A model of images as one row of numbers, `[N, 1, C * H * W]`."""

    def forward(self, x):
        return MODEL(x.view(-1, 3, 9, 8))


def asked(attribution, image):
    return (MODEL, image) if attribution.ndim == 2 else (Numbers(), image.reshape(1, -1))


BOTH = pytest.mark.parametrize("attributions", [pytest.param(MAPS, id="maps"), pytest.param(NUMBERS, id="numbers")])


@BOTH
def test_faithfulness_correlation(attributions):
    got = metrics.faithfulness_correlation(MODEL, IMAGES, attributions, TARGETS, subset=11, runs=7, seed=5)
    subsets = random_subsets(7, attributions[0].numel(), 11, torch.Generator().manual_seed(5), "cpu")
    features = [row.nonzero().flatten().tolist() for row in subsets]
    expected = [slow.of_subsets(*asked(a, x), a, t, features, 0.0) for x, a, t in each(attributions)]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_sensitivity_n_is_the_correlation_at_each_size():
    got = metrics.sensitivity_n(MODEL, IMAGES, MAPS, TARGETS, sizes=(0.25, 40), runs=6, seed=2)
    generator = torch.Generator().manual_seed(2)
    for at, size in enumerate((18, 40)):
        features = [row.nonzero().flatten().tolist() for row in random_subsets(6, 72, size, generator, "cpu")]
        expected = [slow.of_subsets(MODEL, x, a, t, features, 0.0) for x, a, t in each(MAPS)]
        np.testing.assert_allclose(got[:, at], expected, atol=1e-6)


def test_a_linear_model_is_sensitive_at_every_size():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(216, 4)).double().eval()
    attributions = IMAGES * model[1].weight[2].detach().view(3, 9, 8)
    torch.testing.assert_close(metrics.sensitivity_n(model, IMAGES, attributions, 2, runs=9), torch.ones(2, 7))
    for measure in (metrics.faithfulness_estimate, metrics.mu_fidelity):
        got = measure(model, IMAGES, attributions, 2, **({"grid": 4} if measure is metrics.mu_fidelity else {}))
        torch.testing.assert_close(got, torch.ones(2))
    assert (
        float(
            metrics.infidelity(model, IMAGES, model[1].weight[2].detach().view(1, 3, 9, 8).repeat(2, 1, 1, 1), 2).max()
        )
        < 1e-12
    )
    torch.testing.assert_close(metrics.completeness(model, IMAGES, attributions, 2), torch.zeros(2), atol=1e-6, rtol=0)


def test_mu_fidelity():
    got = metrics.mu_fidelity(MODEL, IMAGES, MAPS, TARGETS, grid=4, share=0.3, samples=12, baseline="mean", seed=3)
    cells = random_subsets(12, 16, 5, torch.Generator().manual_seed(3), "cpu")
    features = slow.grid_subsets([set(row.nonzero().flatten().tolist()) for row in cells], (9, 8), 4)
    expected = [
        slow.of_subsets(MODEL, x, a, t, features, x.mean((1, 2), keepdims=True), spearmanr) for x, a, t in each(MAPS)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@BOTH
def test_faithfulness_estimate(attributions):
    got = metrics.faithfulness_estimate(MODEL, IMAGES, attributions, TARGETS, step=7)
    expected = [slow.estimate(*asked(a, x), a, t, 7, 0.0) for x, a, t in each(attributions)]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@BOTH
def test_monotonicity(attributions):
    got = metrics.monotonicity(MODEL, IMAGES, attributions, TARGETS, step=7, score="logit")
    expected = [slow.monotone_share(*asked(a, x), a, t, 7, 0.0) for x, a, t in each(attributions)]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert float(got.min()) > 0
    assert float(got.max()) < 1


def test_monotonicity_correlation():
    got = metrics.monotonicity_correlation(MODEL, IMAGES, MAPS, TARGETS, step=7, samples=3, score="logit", seed=6)
    generator = torch.Generator().manual_seed(6)
    draws = [torch.rand(1, 3, 9, 8, generator=generator)[0].double().numpy() for _ in range(3)]
    for row, (image, attribution, target) in enumerate(each(MAPS)):
        order = np.argsort(-abs(attribution).ravel(), kind="stable")
        groups = [order[i : i + 7] for i in range(0, len(order), 7)]
        before, squares = slow.ask(MODEL, image, target), np.zeros(len(groups))
        for drawn in draws:
            filler = image.min() + (image.max() - image.min()) * drawn
            after = [slow.ask(MODEL, slow.without(image, group, filler), target) for group in groups]
            squares += (np.array(after) - before) ** 2
        sums = [abs(attribution).ravel()[group].sum() for group in groups]
        np.testing.assert_allclose(got[row], spearmanr(sums, squares)[0], atol=1e-6)


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_region_perturbation(order):
    got = metrics.region_perturbation(MODEL, IMAGES, MAPS, TARGETS, patch=4, regions=6, order=order)
    groups = slow.patch_features((9, 8), 4)
    for row, (image, attribution, target) in enumerate(each(MAPS)):
        sums = np.array([attribution.ravel()[group].sum() for group in groups])
        ranked = np.argsort(-sums if order == "morf" else sums, kind="stable")[:6]
        scores = slow.flipped(MODEL, image, groups, ranked, target, 0.0)
        np.testing.assert_allclose(got.drops[row], scores[0] - scores[1:], atol=1e-6)
        np.testing.assert_allclose(got.aopc[row], (scores[0] - scores).mean(), atol=1e-6)


def test_random_regions_all_go():
    got = metrics.region_perturbation(MODEL, IMAGES, MAPS, TARGETS, patch=4, order="random")
    last = metrics.region_perturbation(MODEL, IMAGES, MAPS, TARGETS, patch=4).drops[:, -1]
    torch.testing.assert_close(got.drops[:, -1], last)


def test_selectivity():
    got = metrics.selectivity(MODEL, IMAGES, MAPS, TARGETS, patch=4)
    groups = slow.patch_features((9, 8), 4)
    for row, (image, attribution, target) in enumerate(each(MAPS)):
        sums = np.array([attribution.ravel()[group].sum() for group in groups])
        scores = slow.flipped(MODEL, image, groups, np.argsort(-sums, kind="stable"), target, 0.0)
        np.testing.assert_allclose(got.scores[row], scores, atol=1e-6)
    assert float(got.changed[-1]) == 1


@BOTH
def test_pixel_flipping(attributions):
    got = metrics.pixel_flipping(MODEL, IMAGES, attributions, TARGETS, step=7)
    for row, (image, attribution, target) in enumerate(each(attributions)):
        order = np.argsort(-attribution.ravel(), kind="stable")
        groups = [order[i : i + 7] for i in range(0, len(order), 7)]
        scores = slow.flipped(*asked(attribution, image), groups, range(len(groups)), target, 0.0)
        np.testing.assert_allclose(got.scores[row], scores, atol=1e-6)


def test_irof_of_segments_that_differ_in_number():
    segments = torch.stack([torch.arange(72).view(9, 8) // 10, torch.arange(72).view(9, 8) // 30])
    got = metrics.irof(MODEL, IMAGES, MAPS, TARGETS, segments=segments, score="logit")
    expected = [
        slow.irof(MODEL, x, a, t, s, x.mean((1, 2), keepdims=True))
        for (x, a, t), s in zip(each(MAPS), segments.numpy(), strict=True)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    made = metrics.irof(MODEL, IMAGES, MAPS, TARGETS, segments=lambda image: patches(image[None], 3))
    torch.testing.assert_close(made, metrics.irof(MODEL, IMAGES, MAPS, TARGETS, segments=3))


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity(normalize):
    def perturb(image, generator):
        change = torch.randn(image.shape, generator=generator, dtype=image.dtype) / 5
        changes.append(change.numpy())
        return change, image - change

    changes = []
    got = metrics.infidelity(
        MODEL, IMAGES, NUMBERS, TARGETS, perturb=perturb, samples=6, normalize=normalize, batch_size=5
    )
    for row, (image, attribution, target) in enumerate(each(NUMBERS)):
        drawn = changes[6 * row : 6 * row + 6]
        np.testing.assert_array_equal(drawn[0], changes[0])
        expected = slow.infidelity(MODEL, image, attribution, target, drawn, normalize)
        np.testing.assert_allclose(got[row], expected, rtol=1e-5)


def test_non_sensitivity():
    flat = MAPS * (torch.arange(72).view(9, 8) % 3 == 0)
    got = metrics.non_sensitivity(MODEL, IMAGES, flat, TARGETS, patch=1, threshold=1e-3, score="logit")
    pixels = [[pixel] for pixel in range(72)]
    expected = [slow.unequal(MODEL, x, a, t, pixels, 0.0, 1e-3) for x, a, t in each(flat)]
    assert got.tolist() == expected
    assert min(expected) > 0


def test_completeness():
    got = metrics.completeness(MODEL, IMAGES, NUMBERS, TARGETS, baseline="mean")
    for row, (image, attribution, target) in enumerate(each(NUMBERS)):
        filler = np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape).copy()
        lost = slow.ask(MODEL, image, target) - slow.ask(MODEL, filler, target)
        np.testing.assert_allclose(got[row], abs(attribution.sum() - lost), rtol=1e-6)


CALLS = [
    lambda *given: metrics.faithfulness_correlation(*given, subset=9, runs=4),
    lambda *given: metrics.sensitivity_n(*given, sizes=(4, 9), runs=4),
    lambda *given: metrics.mu_fidelity(*given, grid=3, samples=4),
    lambda *given: metrics.faithfulness_estimate(*given, step=20),
    lambda *given: metrics.monotonicity(*given, step=20),
    lambda *given: metrics.monotonicity_correlation(*given, step=20, samples=2),
    lambda *given: metrics.pixel_flipping(*given, step=20).scores,
    lambda *given: metrics.region_perturbation(*given, patch=4, regions=3).drops,
    lambda *given: metrics.selectivity(*given, patch=4).scores,
    lambda *given: metrics.irof(*given, segments=4),
    lambda *given: metrics.infidelity(*given, samples=2),
    lambda *given: metrics.non_sensitivity(*given, patch=4),
    metrics.completeness,
]
NAMES = [
    *("correlation", "sensitivity-n", "mu", "estimate", "monotonicity", "monotonicity-correlation", "flipping"),
    *("regions", "selectivity", "irof", "infidelity", "non-sensitivity", "completeness"),
]


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_several_targets_are_rows(call):
    attributions = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))
    both = call(MODEL, IMAGES, attributions, [[0, 1], [4, 2]])
    for row, target in enumerate((0, 1, 4, 2)):
        image = slice(row // 2, row // 2 + 1)
        torch.testing.assert_close(both[row], call(MODEL, IMAGES[image], attributions[row : row + 1], target)[0])


def test_targets_share_the_forwards():
    rows = []
    handle = MODEL.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        metrics.faithfulness_correlation(MODEL, IMAGES, MAPS.repeat(2, 1, 1), [[0, 1], [4, 2]], subset=9, runs=5)
    finally:
        handle.remove()
    assert sum(rows) == 2 + 2 * 5


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_wrong_attributions_are_told(call):
    with pytest.raises(InputError, match=r"attributions must have the size of the images, \[2, 9, 8\], got"):
        call(MODEL, IMAGES, torch.rand(2, 4, 4), TARGETS)
    with pytest.raises(InputError, match="attributions must be finite, got NaN or infinity in map 0"):
        call(MODEL, IMAGES, MAPS * torch.nan, TARGETS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda *g: metrics.faithfulness_correlation(*g, subset=73),
            r"subset must lie in \[1, 72\], the features",
        ),
        (lambda *g: metrics.faithfulness_correlation(*g, subset=3, runs=1), "runs must be at least 2, got 1"),
        (lambda *g: metrics.sensitivity_n(*g, sizes=()), "sizes must hold at least one, got none"),
        (lambda *g: metrics.mu_fidelity(*g, grid=9), r"grid must lie in \[2, 8\], the shorter side of the images, got"),
        (lambda *g: metrics.mu_fidelity(*g, grid=3, share=0), r"share must lie in \(0, 1\], got 0"),
        (lambda *g: metrics.monotonicity_correlation(*g, samples=0), "samples must be at least 1, got 0"),
        (lambda *g: metrics.pixel_flipping(*g, step=0), "step must be at least 1 pixel, got 0"),
        (lambda *g: metrics.region_perturbation(*g, regions=0), "regions must be at least 1, got 0"),
        (lambda *g: metrics.region_perturbation(*g, order="up"), "order must be one of 'morf', 'lerf', 'random', got"),
        (lambda *g: metrics.selectivity(*g, patch=0), "patch must be at least 1 pixel, got 0"),
        (lambda *g: metrics.irof(*g, segments=torch.ones(3, 3)), r"segments must hold integers from 0 of shape \[9, 8"),
        (lambda *g: metrics.infidelity(*g, samples=0), "samples must be at least 1, got 0"),
        (lambda *g: metrics.infidelity(*g, perturb=0.0), "perturb must be a positive deviation or a function, got 0.0"),
        (lambda *g: metrics.completeness(*g, score="odds"), "score must be one of 'probability', 'logit', got 'odds'"),
    ],
)
def test_wrong_settings_are_told(call, message):
    with pytest.raises(InputError, match=message):
        call(MODEL, IMAGES, MAPS, TARGETS)
