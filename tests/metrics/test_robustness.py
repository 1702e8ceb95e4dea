"""Metrics that explain again: after a perturbation, with other weights, another class or a shifted input."""

import numpy as np
import pytest
import torch
from oracles import metrics as slow
from skimage.metrics import structural_similarity
from torch import nn

from pyfast_xai import GradCAM, InputError, InputXGradient, Saliency, metrics
from pyfast_xai.metrics.similarity import cosine_similarity


def network(classes=4):
    torch.manual_seed(12)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, classes)
    return nn.Sequential(*layers).eval()


MODEL = network()
IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))
RADIUS = 0.3


def explain(images, target):
    return torch.stack([image.square() * (1 + int(one)) for image, one in zip(images, target, strict=True)])


def perturbed(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [IMAGES + (2 * torch.rand(1, 3, 12, 12, generator=generator) - 1) * RADIUS for _ in range(samples)]


TARGET = [0, 1, 2]


def test_sensitivities_are_those_of_the_same_perturbations():
    settings = {"radius": RADIUS, "samples": 4}
    moves = [
        [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(*pair, strict=True)]
        for pair in ((explain(IMAGES, TARGET).numpy(), explain(moved, TARGET).numpy()) for moved in perturbed(4))
    ]
    got = metrics.average_sensitivity(explain, IMAGES, TARGET, **settings)
    np.testing.assert_allclose(got, np.mean(moves, 0), rtol=1e-5)
    np.testing.assert_allclose(
        metrics.max_sensitivity(explain, IMAGES, TARGET, **settings), np.max(moves, 0), rtol=1e-5
    )


def test_local_lipschitz():
    got = metrics.local_lipschitz(explain, IMAGES, TARGET, radius=RADIUS, samples=4)
    for row in range(3):
        ratios = []
        for moved in perturbed(4):
            change = explain(moved, TARGET)[row] - explain(IMAGES, TARGET)[row]
            ratios.append(float(change.norm() / (moved[row] - IMAGES[row]).norm()))
        np.testing.assert_allclose(got[row], max(ratios), rtol=1e-5)


@pytest.mark.parametrize("beside", ["input", "output"])
def test_relative_stability(beside):
    settings = {"radius": RADIUS, "samples": 5, "beside": beside}
    got = metrics.relative_stability(MODEL, explain, IMAGES, TARGET, **settings)
    with torch.no_grad():
        before = MODEL(IMAGES)
    for row in range(3):
        ratios = []
        for moved in perturbed(5):
            with torch.no_grad():
                after = MODEL(moved)
            if after[row].argmax() != before[row].argmax():
                continue
            one, other = explain(IMAGES, TARGET)[row], explain(moved, TARGET)[row]
            change = ((one - other) / one).norm()
            by_input = ((IMAGES[row] - moved[row]) / IMAGES[row]).norm()
            ratios.append(float(change / (by_input if beside == "input" else (after[row] - before[row]).norm())))
        np.testing.assert_allclose(got[row], max(ratios), rtol=1e-4)


def test_stability_is_nan_where_the_class_always_changes():
    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            same = ((x - IMAGES[: len(x)]).abs().flatten(1).amax(1) < 1e-6).float() * self.weight
            return torch.stack([same, 1 - same], 1)

    got = metrics.relative_stability(Coin().eval(), explain, IMAGES, [0, 1, 1], samples=2)
    assert got.isnan().all()


def test_continuity():
    got = metrics.continuity(explain, IMAGES, TARGET, steps=4, baseline=0.5)
    stretched = lambda maps: maps.abs() / maps.abs().flatten(1).amax(1).view(-1, 1, 1, 1)  # noqa: E731
    expected = np.zeros(3)
    for shift in (-6, 0, 6, 12):
        moved = torch.full_like(IMAGES, 0.5)
        for column in range(12):
            if 0 <= column - shift < 12:
                moved[..., column] = IMAGES[..., column - shift]
        change = (stretched(explain(IMAGES, TARGET)) - stretched(explain(moved, TARGET))).abs().sum((1, 2, 3))
        expected = np.maximum(expected, (change / ((moved - IMAGES).flatten(1).norm(dim=1) + 1e-9)).numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_agreement_of_explanations_and_classes():
    signs = torch.tensor([[1.0, -1], [3, -2], [5, -1], [1, 1], [2, 3]])
    assert metrics.consistency(signs, torch.tensor([0, 0, 1, 2, 2])).tolist() == [0.5, 0.5, 0, 1, 1]
    near = torch.tensor([[0.0, 0], [0, 0.1], [0.1, 0], [10, 10]])
    assert metrics.sufficiency(near, torch.tensor([3, 3, 4, 4]), threshold=0.1).tolist() == [0.5, 0.5, 0, 0]


def test_another_class_has_another_map():
    got = metrics.random_logit(MODEL, Saliency(MODEL), IMAGES, [0, 1, 2])
    step = torch.randint(1, 4, (3,), generator=torch.Generator().manual_seed(0)).tolist()
    for row in range(3):
        maps = [Saliency(MODEL)(IMAGES[row : row + 1], c).heatmap[0] for c in (row, (row + step[row]) % 4)]
        one, other = ((a - a.min()) / (a.max() - a.min()) for a in maps)
        expected = structural_similarity(
            one.numpy(), other.numpy(), data_range=1, gaussian_weights=True, use_sample_covariance=False
        )
        np.testing.assert_allclose(got[row], expected, atol=1e-4)
    blind = metrics.random_logit(MODEL, lambda images, target: images[:, 0], IMAGES, similarity="cosine")
    torch.testing.assert_close(blind, torch.ones(3))


def test_entropy_of_a_forgetful_model():
    made = []

    def method(model):
        made.append(model)
        return lambda images, target: images[:, 0] if len(made) == 1 else images[:, 0].round(decimals=1)

    got = metrics.efficient_parameter_randomization(MODEL, method, IMAGES, bins=20)
    for row, image in enumerate(IMAGES[:, 0]):
        before, after = (slow.histogram_entropy(one.double().numpy(), 20) for one in (image, image.round(decimals=1)))
        np.testing.assert_allclose(got[row], (after - before) / before, rtol=1e-5)
    assert made[0] is MODEL
    weights = [next(model.parameters()) for model in made]
    assert not torch.equal(*weights)


def test_smooth_randomization_averages_maps():
    settings = {"layers": ["4"], "similarities": ("cosine",), "seed": 3}
    got = metrics.smooth_parameter_randomization(MODEL, Saliency, IMAGES, 1, noise=0.2, samples=3, **settings)
    made = []

    def remembered(model):
        made.append(model)
        return Saliency(model)

    metrics.parameter_randomization(MODEL, remembered, IMAGES, 1, **settings)
    generator, spread = torch.Generator().manual_seed(3), IMAGES.flatten(1).aminmax(dim=1)
    size = 0.2 * (spread.max - spread.min).view(-1, 1, 1, 1)
    noise = [torch.zeros_like(IMAGES), *(size * torch.randn(IMAGES.shape, generator=generator) for _ in range(2))]
    means = [torch.stack([Saliency(m)(IMAGES + one, 1).heatmap for one in noise]).mean(0) for m in made]
    torch.testing.assert_close(got.similarity["cosine"][0], cosine_similarity(*means))


def test_a_shift_that_the_model_takes_off_changes_no_gradient():
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    assert float(metrics.input_invariance(MODEL, Saliency, IMAGES, 1, shift=0.5).max()) < 1e-4
    assert float(metrics.input_invariance(MODEL, lambda m: GradCAM(m, layer="1"), IMAGES, 1).max()) < 1e-4
    moved = metrics.input_invariance(MODEL, InputXGradient, IMAGES, 1, shift=0.5)
    for row in range(3):
        one = InputXGradient(MODEL)(IMAGES[row : row + 1], 1).attribution
        gradient = one / IMAGES[row : row + 1]
        np.testing.assert_allclose(moved[row], float((0.5 * gradient).norm() / one.norm()), rtol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in MODEL.state_dict().items())
    assert not MODEL._forward_pre_hooks


@pytest.mark.parametrize("percentiles", [(), (30, 60)], ids=["adcc", "arcc"])
def test_arcc(percentiles):
    cam = GradCAM(MODEL, layer="1")
    maps = cam(IMAGES, 1).heatmap
    got = metrics.arcc(MODEL, cam, IMAGES, maps, 1, percentiles=percentiles)
    for row in range(3):
        image, one = IMAGES[row : row + 1], maps[row]
        one = (one - one.min()) / (one.max() - one.min())
        mixed = cam(image * one, 1).heatmap[0]
        coherency = (np.corrcoef(one.flatten(), mixed.flatten())[0, 1] + 1) / 2
        if percentiles:
            faith = (2 * metrics.road(MODEL, image, one[None], 1, percentiles=percentiles).combined[0]).clamp(0, 1)
        else:
            before, after = (MODEL(x).softmax(1)[0, 1].item() for x in (image, image * one))
            faith = 1 - max(0, before - after) / before
        parts = np.array([coherency, 1 - float(one.mean()), float(faith)])
        np.testing.assert_allclose(
            [got.coherency[row], 1 - got.complexity[row], got.faithfulness[row]], parts, atol=1e-5
        )
        np.testing.assert_allclose(got.score[row], 3 / (1 / parts).sum() if parts.min() > 0 else 0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.average_sensitivity(explain, IMAGES, TARGET, samples=0),
            "radius and samples must be",
        ),
        (lambda: metrics.continuity(explain, IMAGES, TARGET, steps=0), "steps must be at least 1, got 0"),
        (lambda: metrics.relative_stability(MODEL, explain, IMAGES, beside="x"), "beside must be 'input' or 'output'"),
        (
            lambda: metrics.random_logit(network(1), explain, IMAGES),
            "model must tell at least two classes apart",
        ),
        (lambda: metrics.random_logit(MODEL, explain, IMAGES, similarity="x"), "similarities must be among 'cosine'"),
        (lambda: metrics.efficient_parameter_randomization(MODEL, Saliency, IMAGES, bins=1), "bins must be at least 2"),
        (lambda: metrics.smooth_parameter_randomization(MODEL, Saliency, IMAGES, noise=0), "noise and samples must be"),
        (lambda: metrics.input_invariance(MODEL, Saliency, IMAGES, shift=torch.ones(2)), "shift must broadcast to"),
        (lambda: metrics.input_invariance(MODEL, Saliency, IMAGES, shift=IMAGES), "shift must be the same for all im"),
    ],
)
def test_wrong_settings_are_told(call, message):
    with pytest.raises(InputError, match=message):
        call()
