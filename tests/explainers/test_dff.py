"""Deep feature factorization against loops and scikit-learn."""

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import DeepFeatureFactorization, InputError, render
from pyfast_xai.explainers.common.nonnegative_factors import nonnegative_factors

DOUBLE = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 9, 3, 2, 1), nn.ReLU(), nn.Conv2d(9, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 12, 5)
    return nn.Sequential(*layers).to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def descent(x, w, h, steps):
    """Coordinate descent, one number after the other."""
    w, h = w.copy(), h.copy()
    for _ in range(steps):
        for target, other, right in ((w, h, False), (h, w, True)):
            data = x.T if right else x
            left = target.T if right else target
            across = other if right else other.T
            gram, cross = across.T @ across, data @ across
            for t in range(left.shape[1]):
                for i in range(len(left)):
                    gradient = left[i] @ gram[:, t] - cross[i, t]
                    left[i, t] = max(left[i, t] - gradient / gram[t, t], 0)
    return w, h


def test_factors_descend_as_in_a_loop():
    random = np.random.default_rng(0)
    x = random.random((2, 7, 11))
    w, h = nonnegative_factors(torch.from_numpy(x), 3, n_iterations=6, tolerance=0.0, seed=4)
    for n in range(2):
        start = np.random.RandomState(4)
        scale = np.sqrt(x[n].mean() / 3)
        first_h = np.abs(scale * start.standard_normal((3, 11)))
        first_w = np.abs(scale * start.standard_normal((7, 3)))
        expected = descent(x[n], first_w, first_h, 6)
        np.testing.assert_allclose(w[n], expected[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(h[n], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")
def test_factors_are_those_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    random = np.random.default_rng(1)
    x = np.stack([random.random((8, 20)), random.random((8, 4)) @ random.random((4, 20)), random.random((8, 20)) ** 3])
    w, h = nonnegative_factors(torch.from_numpy(x), 4)
    for n in range(3):
        model = decomposition.NMF(n_components=4, init="random", random_state=0)
        expected = model.fit_transform(x[n])
        np.testing.assert_allclose(w[n], expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(h[n], model.components_, rtol=1e-6, atol=1e-9)


def test_an_explanation_holds_the_factors_of_each_image(net, images):
    explain = DeepFeatureFactorization(net, layer="1", n_factors=3)
    result = explain(images, 2)
    with torch.no_grad():
        activation = net[:2](images)
    assert (result.heatmap.shape, result.factors.shape, result.concepts.shape) == ((2, 16, 12), (2, 3, 8, 6), (2, 3, 9))
    assert result.target is None
    assert torch.equal(result.signed_map, result.factors[:, 0])
    assert torch.equal(
        DeepFeatureFactorization(net, n_factors=3, factor=2, layer="1")(images).signed_map, result.factors[:, 1]
    )
    for n in range(2):
        maps, concepts = result.factors[n], result.concepts[n]
        assert (maps >= 0).all()
        w, h = nonnegative_factors(activation[n : n + 1].flatten(2), 3)
        product = torch.einsum("khw,kc->chw", maps, concepts)
        torch.testing.assert_close(product.flatten(1), (w @ h)[0], rtol=1e-9, atol=1e-12)
        sizes = maps.flatten(1).norm(dim=1) * concepts.norm(dim=1)
        assert (sizes.diff() <= 0).all()
        alone = explain(images[n : n + 1])
        torch.testing.assert_close(alone.factors[0], maps, rtol=1e-9, atol=1e-12)


def test_together_images_share_their_factors(net, images):
    result = DeepFeatureFactorization(net, layer="1", n_factors=3, together=True)(images)
    assert torch.equal(*result.concepts)
    with torch.no_grad():
        activation = net[:2](images)
    w, h = nonnegative_factors(activation.transpose(0, 1).flatten(1)[None], 3)
    product = torch.einsum("nkhw,kc->cnhw", result.factors, result.concepts[0])
    torch.testing.assert_close(product.flatten(1), (w @ h)[0], rtol=1e-9, atol=1e-12)


def test_signed_activations_are_lifted(net, images):
    explain = DeepFeatureFactorization(net, layer="0", n_factors=9, n_iterations=2000)
    result = explain(images)
    with torch.no_grad():
        activation = net[:1](images)
    least = activation[0].amin((1, 2)).clamp_max(0)
    product = torch.einsum("khw,kc->chw", result.factors[0], result.concepts[0] - least)
    assert ((product + least[:, None, None] - activation[0]).norm() / activation[0].norm()) < 0.1


def test_the_composite_shows_the_strongest_factor(net, images):
    result = DeepFeatureFactorization(net, layer="1", n_factors=3)(images)
    picture = result.composite()
    assert picture.shape == (2, 3, 16, 12)
    assert picture.min() >= 0
    assert picture.max() <= 1
    strongest = (result.factors / result.factors.amax((2, 3), keepdim=True)).flatten(2).argmax(2)
    for n in range(2):
        for k in range(3):  # where a factor is largest its colour is
            y, x = divmod(int(strongest[n, k]), 6)
            color = torch.tensor(render.CLASS_COLORS[k])
            pixels = picture[n, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(1)
            assert float(torch.cosine_similarity(pixels.max(1).values, color, dim=0)) > 0.9
    assert torch.equal(result[1].composite(), picture[1:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda net: DeepFeatureFactorization(net, layer=["0", "1"]), "layer must be one", id="layers"),
        pytest.param(lambda net: DeepFeatureFactorization(net, factor=6), "factor must lie in 1 to 5", id="factor"),
        pytest.param(lambda net: DeepFeatureFactorization(net, n_factors=0), "n_factors must be at least", id="count"),
        pytest.param(
            lambda net: DeepFeatureFactorization(net).factorize(torch.full((1, 2, 3, 3), torch.nan)),
            "activations must be finite",
            id="nan",
        ),
    ],
)
def test_bad_settings(net, make, words):
    with pytest.raises(InputError, match=words):
        make(net)
