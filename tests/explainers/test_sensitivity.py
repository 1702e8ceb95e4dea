"""HSIC and Sobol attribution against the papers' formulas written out, and against functions with known indices."""

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import HSIC, Sobol
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
GRID = torch.arange(12).view(3, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)  # of 12 x 16 pixels


@pytest.fixture
def net():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(72, 5)]
    return nn.Sequential(*layers).eval().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 16, dtype=DOUBLE)


def scores(net, image, masks, target):
    """The scores behind masks `[m, F]`, one after the other."""
    with torch.no_grad():
        return np.array([float(net((mask[GRID] * image)[None]).softmax(1)[0, target]) for mask in masks.double()])


def samples_of(explain):
    plan = explain._coalitions(12)
    return plan.rows(torch.arange(plan.samples))


def test_hsic_is_the_trace_of_the_paper(net, images):
    explain = HSIC(net, feature_mask=GRID, n_samples=40, seed=3, batch_size=7)
    found = explain(images, [[0, 3], [4, 1]])
    masks = samples_of(explain)
    centre = np.eye(40) - np.ones((40, 40)) / 40
    for row, (n, target) in enumerate([(0, 0), (0, 3), (1, 4), (1, 1)]):
        y = scores(net, images[n], masks, target)
        output_kernel = np.exp(-((y[:, None] - y) ** 2) / (2 * np.median(y) ** 2))
        for feature in range(12):
            x = masks[:, feature].numpy()
            input_kernel = (x[:, None] == x).astype(float)
            expected = np.trace(input_kernel @ centre @ output_kernel @ centre) / 39**2
            assert abs(float(found.values[row, feature]) - expected) < 1e-15 + 1e-9 * expected
    assert (found.values >= 0).all()


def test_each_feature_is_present_in_half_of_the_samples(net):
    masks = samples_of(HSIC(net, n_samples=40))
    assert masks.sum(0).tolist() == [20] * 12
    assert len({tuple(column) for column in masks.T.tolist()}) == 12


def test_sobol_is_jansens_estimator(net, images):
    explain = Sobol(net, feature_mask=GRID, n_designs=8, seed=3, batch_size=7)
    found = explain(images, [[0, 3], [4, 1]])
    masks = samples_of(explain)
    for row, (n, target) in enumerate([(0, 0), (0, 3), (1, 4), (1, 1)]):
        y = scores(net, images[n], masks, target)
        for feature in range(12):
            behind = y[8 * (feature + 1) : 8 * (feature + 2)]
            expected = ((y[:8] - behind) ** 2).sum() / (2 * 8 * y[:8].var(ddof=1))
            assert abs(float(found.values[row, feature]) - expected) < 1e-9


def test_designs_of_sobol_differ_in_one_feature(net):
    masks = samples_of(Sobol(net, n_designs=8)).view(13, 8, 12)
    for feature in range(12):
        differ = (masks[feature + 1] != masks[0]).any(0)
        assert differ.nonzero().flatten().tolist() == [feature]
    assert masks.min() >= 0
    assert masks.max() <= 1


class Interaction(nn.Module):
    """Of three features: the first, and the product of the other two, from images of ones."""

    def forward(self, x):
        one, two, three = (x[..., part * 2 : part * 2 + 2].mean((1, 2, 3)) for part in range(3))
        return torch.stack([one + 4 * (two - 0.5) * (three - 0.5), 0 * one], 1)


def test_sobol_finds_known_indices():
    """Var(u) is 1/12 and that of 4 (u - 1/2)(v - 1/2) 1/9: total indices are 3/7, 4/7 and 4/7."""
    mask = torch.arange(3).repeat_interleave(2).expand(4, 6)
    explain = Sobol(Interaction().eval(), feature_mask=mask, n_designs=4096, score="logit", batch_size=4096)
    found = explain(torch.ones(1, 3, 4, 6, dtype=DOUBLE), 0).values[0]
    torch.testing.assert_close(found, torch.tensor([3 / 7, 4 / 7, 4 / 7], dtype=DOUBLE), rtol=0, atol=0.02)


@pytest.mark.parametrize(("method", "settings"), [(HSIC, {"n_samples": 400}), (Sobol, {})], ids=["hsic", "sobol"])
def test_only_what_the_model_reads_matters(method, settings):
    class Corner(nn.Module):
        def forward(self, x):
            bright = x[..., :4, :4].mean((1, 2, 3))
            return torch.stack([bright, -bright], 1)

    found = method(Corner().eval(), feature_mask=GRID, **settings)(torch.ones(1, 3, 12, 16, dtype=DOUBLE), 0).values[0]
    assert found[0] > 20 * found[1:].max()
    if method is Sobol:
        assert found[1:].max() == 0


def test_a_score_that_never_changes(images):
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.mean((2, 3))

    for method in (HSIC(Constant().eval(), score="logit"), Sobol(Constant().eval())):
        assert (method(images).values == 0).all()


def test_too_many_features():
    explain = Sobol(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), feature_mask=200)
    with pytest.raises(InputError, match="feature_mask must have at most 10600 features, got 40000"):
        explain(torch.zeros(1, 3, 200, 200, dtype=DOUBLE))
