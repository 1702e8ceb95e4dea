"""Deep feature factorization as pytorch-grad-cam calls it, beside pytorch-grad-cam."""

import types

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai.compat import grad_cam as ours
from pyfast_xai.errors import InputError

DOUBLE = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 9, 3, 2, 1), nn.ReLU(), nn.Conv2d(9, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 12, 5)
    return nn.Sequential(*layers).to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("pytorch_grad_cam")
    return pytest.importorskip("pytorch_grad_cam.feature_factorization.deep_feature_factorization")


@pytest.mark.filterwarnings("ignore")
def test_dff_is_the_same(theirs):
    activations = np.random.default_rng(3).normal(size=(2, 9, 6, 5))
    activations[0, 1, 2, 3] = np.nan
    before = activations.copy()
    concepts, maps = ours.dff(activations, 4)
    np.testing.assert_array_equal(activations, before)
    expected = theirs.dff(activations, 4)
    np.testing.assert_allclose(concepts, expected[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(maps, expected[1], rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", [None, nn.Linear(9, 5)], ids=["factors", "classes"])
def test_the_class_is_the_same(head, net, images, theirs, unchanged):
    with unchanged(net, images):
        result = ours.DeepFeatureFactorization(net, net[1], None, head)(images, 4)
    expected = theirs.DeepFeatureFactorization(net, net[1], None, head)(images, 4)
    assert len(result) == len(expected) == (2 if head is None else 3)
    np.testing.assert_allclose(result[0], expected[0], rtol=1e-6, atol=1e-8)
    for item, there in zip(result[1], expected[1], strict=True):
        np.testing.assert_allclose(item, there, rtol=0, atol=1e-5)
    if head is not None:
        np.testing.assert_allclose(result[2], expected[2], rtol=1e-5, atol=1e-6)


# The hue of OpenCV has steps of two degrees, the saturation steps of 1/255: a colour is up to six levels off.
ROUNDING = 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 3, 5])
def test_factors_are_drawn_as_there(count, theirs, monkeypatch):
    image = pytest.importorskip("pytorch_grad_cam.utils.image")
    from matplotlib import colormaps

    monkeypatch.setattr(image.plt.cm, "get_cmap", colormaps.get_cmap, raising=False)  # removed from matplotlib
    random = np.random.default_rng(0)
    picture, maps = random.random((12, 16, 3)), random.random((count, 12, 16)).astype(np.float32)
    result = ours.show_factorization_on_image(picture, maps, image_weight=0.3)
    expected = image.show_factorization_on_image(picture, maps.copy(), image_weight=0.3)
    assert np.abs(result.astype(int) - expected).max() <= ROUNDING
    scores = random.random((count, 7))
    names = {i: f"class {i}, also {i}, or {i}, not {i}" for i in range(7)}
    labels = ours.create_labels_legend(scores, names, 2)
    assert labels == image.create_labels_legend(scores, names, 2)
    shown = ours.show_factorization_on_image(picture, maps, image_weight=0.3, concept_labels=labels)
    assert shown.shape == (12, 32, 3)
    np.testing.assert_array_equal(shown[:, :16], result)
    stacks = random.random((2, 3, 4, 5))
    np.testing.assert_allclose(
        ours.scale_accross_batch_and_channels(stacks, (9, 7)), image.scale_accross_batch_and_channels(stacks, (9, 7)),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_a_whole_picture(net):
    from PIL import Image

    net.config = types.SimpleNamespace(id2label={i: f"digit {i}" for i in range(5)})
    image = torch.rand(3, 16, 12, dtype=DOUBLE)
    head = nn.Linear(9, 5)
    result = ours.run_dff_on_image(net, net[1], head, Image.new("RGB", (12, 16)), image, n_components=3)
    assert result.shape == (16, 36, 3)
    del net.config
    with pytest.raises(InputError, match="model must have the names of its classes"):
        ours.run_dff_on_image(net, net[1], head, Image.new("RGB", (12, 16)), image)
    with pytest.raises(InputError, match="colors must be one for each of 2 maps, got 1"):
        ours.show_factorization_on_image(np.zeros((4, 4, 3)), np.zeros((2, 4, 4)), colors=[np.ones(3)])
