"""Meaningful perturbation against the paper written slowly; what perturbations share is in test_occlusion."""

import math

import pytest
import torch
from case_ids import case_id
from oracles import meaningful_perturbation as slow
from torch import nn
from torch.nn import functional

from pyfast_xai import MeaningfulPerturbation
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.meaningful_perturbation import _variation

DOUBLE = torch.float64
SIZE = (17, 22)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = functional.gelu(self.one(x))
        x = functional.adaptive_avg_pool2d(torch.relu(self.two(x)), 3)
        return 5 * self.fc(x.flatten(1))


@pytest.fixture
def net():
    return Net().eval().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE, dtype=DOUBLE)


DEFAULTS = {"lr": 0.1, "l1": 1e-4, "tv": 1e-2, "beta": 3.0, "scale": 8, "smooth": 5.0, "jitter": 4, "noise": 0.0}


def slowly(net, image, target, initial_mask, n_iterations, seed, score="probability", **settings):
    """The enlarged mask after some iterations and its score."""
    settings = {**DEFAULTS, **settings}
    scale, generator = settings["scale"], torch.Generator().manual_seed(seed)
    null = slow.blur(image, 10.0)
    grid = [math.ceil(side / scale) for side in SIZE]
    if initial_mask == "circle":
        with torch.no_grad():
            mask = slow.circle(net, image, null, target, scale)
    elif initial_mask == "random":
        mask = torch.rand(1, 1, *grid, dtype=DOUBLE, generator=generator)[0, 0]
    else:
        mask = torch.full(grid, initial_mask, dtype=DOUBLE)

    def own(logits):
        return logits.softmax(0)[target] if score == "probability" else logits[target]

    masks = slow.optimise(
        net, image, null, target, mask, iterations=n_iterations, generator=generator, score=own, **settings
    )
    whole = slow.enlarge(masks[-1], scale, SIZE, settings["smooth"])
    with torch.no_grad():
        return whole, net((whole * image + (1 - whole) * null)[None]).softmax(1)[0, target]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"initial_mask": "random"},
        {"initial_mask": 0.4, "score": "logit"},
        {"initial_mask": "random", "scale": 3, "smooth": 2.0, "jitter": 7},
        {"initial_mask": "random", "scale": 1, "smooth": 0, "jitter": 0},
        {"initial_mask": "random", "noise": 0.2, "beta": 2.0, "l1": 0.01, "tv": 0.3},
        {"initial_mask": "random", "beta": 1.0, "tv": 0.1, "lr": 0.02},
    ],
    ids=case_id,
)
def test_equals_the_paper_written_slowly(net, images, settings):
    result = MeaningfulPerturbation(net, n_iterations=12, seed=3, **settings)(images, [[0, 4], [2, 1]])
    for row, target in enumerate([0, 4, 2, 1]):
        options = {"initial_mask": "circle", **settings}
        mask, after = slowly(net, images[row // 2], target, n_iterations=12, seed=3, **options)
        # Weights of the Gaussian sum to one but for rounding, and masks are cut at one.
        torch.testing.assert_close(result.mask[row, 0], mask, rtol=0, atol=1e-8)
        torch.testing.assert_close(result.after[row], after.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 3.0])
def test_variation_is_that_of_the_authors(beta):
    """`tv` of optimize_mask.py, with its own derivative where its floor for tiny changes does not bite."""
    mask = torch.rand(5, 6, dtype=DOUBLE)
    leaf = mask.clone().requires_grad_()
    value = _variation(leaf[None, None], beta)
    value.backward()
    d1, d2 = torch.zeros_like(mask), torch.zeros_like(mask)
    d1[:-1], d2[:, :-1] = mask.diff(dim=0), mask.diff(dim=1)
    v = (d1 * d1 + d2 * d2).sqrt() ** beta
    d1_, d2_ = (v.clamp_min(1e-12) ** (2 * (beta / 2 - 1) / beta) * d for d in (d1, d2))
    d11, d22 = -d1_, -d2_
    d11[1:], d22[:, 1:] = -d1_.diff(dim=0), -d2_.diff(dim=1)
    # At the corner nothing changes; its power of the least positive number is left.
    torch.testing.assert_close(value, v.sum(), rtol=0, atol=1e-8)
    torch.testing.assert_close(leaf.grad, beta * (d11 + d22), rtol=1e-9, atol=1e-9)


def test_a_flat_mask_has_no_variation_and_a_finite_derivative():
    for beta in (0.5, 1.0, 2.0, 3.0):
        leaf = torch.full((1, 1, 4, 4), 0.3, dtype=DOUBLE, requires_grad=True)
        value = _variation(leaf, beta)
        value.backward()
        assert value < 1e-70
        assert (leaf.grad == 0).all()


class Spot(nn.Module):
    """Looks for brightness in one place."""

    def forward(self, x):
        there = x[:, :, 16:32, 24:40].amax((1, 2, 3))
        return torch.stack([4 * there - 8, torch.zeros_like(there)], 1)


def test_it_deletes_what_matters_and_little_else():
    images = torch.zeros(2, 3, 64, 64)
    images[:, :, 20:26, 28:34] = 4
    images[1, :, 50:56, 8:14] = 4  # as bright, but nobody looks there
    # The size weighs more than by default: it is summed over a grid a third as large as that of 224 pixels.
    result = MeaningfulPerturbation(Spot().eval(), scale=4, smooth=2, l1=1e-3, n_iterations=150)(images, 0)
    assert (result.score > 0.99).all()
    assert (result.after < 0.05).all()
    peaks = result.peak()
    assert ((peaks >= torch.tensor([16, 24])) & (peaks < torch.tensor([32, 40]))).all()
    assert (result.heatmap[:, 44:].amax((1, 2)) < 0.1).all()
    assert (result.heatmap.mean((1, 2)) < 0.1).all()


def test_what_comes_out(net, images):
    result = MeaningfulPerturbation(net, n_iterations=3)(images, [[0, 1], [2, 3]])
    assert result.method == "meaningful-perturbation"
    assert result.target.tolist() == [0, 1, 2, 3]
    assert result.mask.shape == (4, 1, *SIZE)
    assert ((result.mask >= 0) & (result.mask <= 1)).all()
    torch.testing.assert_close(result.heatmap, 1 - result.mask[:, 0].float())
    torch.testing.assert_close(result.evidence, 1 - result.mask)
    null = slow.blur(images, 10.0).repeat_interleave(2, 0)
    torch.testing.assert_close(result.perturbed, result.mask * result.images + (1 - result.mask) * null)
    torch.testing.assert_close(result.perturbed + result.complement, result.images + null)
    repeated = net(result.perturbed).softmax(1).gather(1, result.target[:, None])[:, 0].detach()
    torch.testing.assert_close(result.after, repeated.float())
    assert result.rgb().shape == (4, 3, *SIZE)
    assert result[1:3].mask.shape == (2, 1, *SIZE)
    assert len(result.rows()) == 4


def test_a_class_that_blurring_does_not_take_away_starts_from_the_whole_image(net, images):
    null = torch.randn(1, 3, *SIZE, dtype=DOUBLE)
    worst = (net(null).softmax(1) - net(images[:1]).softmax(1)).argmax().item()
    result = MeaningfulPerturbation(net, n_iterations=1, lr=1e-9, smooth=0, baseline=null)(images[:1], worst)
    # The least of all circles, a pixel.
    assert result.heatmap.mean() < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_iterations": 0}, "n_iterations must be at least 1, got 0"),
        ({"scale": 0}, "scale must be at least 1, got 0"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"beta": -1}, "beta must be positive, got -1"),
        ({"l1": -1}, "l1 must not be negative, got -1"),
        ({"tv": math.nan}, "tv must not be negative, got nan"),
        ({"jitter": -4}, "jitter must not be negative, got -4"),
        ({"initial_mask": "square"}, "initial_mask must be one of 'circle', 'random', got 'square'"),
        ({"initial_mask": 1.5}, "initial_mask must be 'circle', 'random' or lie in 0..1, got 1.5"),
        ({"baseline": "noise"}, "baseline must be one of 'blur', 'mean', got 'noise'"),
        ({"blur": 0}, "blur must be positive, got 0"),
    ],
)
def test_bad_settings(net, settings, message):
    with pytest.raises(InputError, match=message):
        MeaningfulPerturbation(net, **settings)
