"""The metrics of pytorch-grad-cam here and there."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai.compat import grad_cam
from pyfast_xai.compat.grad_cam import metrics as ours
from pyfast_xai.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # pytorch-grad-cam's own

MODULES = ("arcc", "cam_mult_image", "perturbation_confidence", "road")


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("pytorch_grad_cam")
    modules = [importlib.import_module(f"pytorch_grad_cam.metrics.{name}") for name in MODULES]

    class Names:
        def __getattr__(self, name):
            return next(getattr(module, name) for module in modules if hasattr(module, name))

    return Names()


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 80, 5)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cams():
    return np.random.default_rng(0).random((2, 20, 16)).astype(np.float32)


TARGETS = [grad_cam.ClassifierOutputSoftmaxTarget(1), grad_cam.ClassifierOutputTarget(4)]

# Solved to 3e-6 of the largest magnitude, where the peer factorizes; values are right to about ten times as much.
SOLVED = 3e-5


@pytest.mark.parametrize("name", ["CamMultImageConfidenceChange", "DropInConfidence", "IncreaseInConfidence"])
def test_images_times_maps(name, model, images, cams, theirs, unchanged):
    with unchanged(model, images):
        result = getattr(ours, name)()(images, cams, TARGETS, model)
    expected = getattr(theirs, name)()(images, cams, TARGETS, model)
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


ROAD = {
    "most": lambda library: library.ROADMostRelevantFirst(70),
    "least": lambda library: library.ROADLeastRelevantFirst(30),
    "most-mean": lambda library: library.ROADMostRelevantFirstAverage([20, 60]),
    "least-mean": lambda library: library.ROADLeastRelevantFirstAverage([20, 60]),
    "combined": lambda library: library.ROADCombined([30, 80]),
}


@pytest.mark.parametrize("kind", ROAD)
def test_road_with_the_same_random_numbers(kind, model, images, cams, theirs, unchanged):
    torch.manual_seed(5)
    expected = ROAD[kind](theirs)(images, cams, TARGETS, model)
    torch.manual_seed(5)
    result = ROAD[kind](ours)(images, cams, TARGETS, model)
    np.testing.assert_allclose(result, expected, rtol=0, atol=SOLVED)


def test_pictures_of_what_is_left(model, images, cams, theirs):
    torch.manual_seed(5)
    expected = theirs.ROADMostRelevantFirst("auto")(
        images, cams, TARGETS, model, return_visualization=True, return_diff=False
    )
    torch.manual_seed(5)
    result = ours.ROADMostRelevantFirst("auto")(
        images, cams, TARGETS, model, return_visualization=True, return_diff=False
    )
    for item, there in zip(result, expected, strict=True):
        np.testing.assert_allclose(item, there, rtol=0, atol=SOLVED)


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_otsu_s(seed, theirs):
    random = np.random.default_rng(seed)
    cam = torch.from_numpy(random.beta(0.5 + seed, 2, size=(9, 7)).astype(np.float32))

    def kept(image, mask):
        return mask.float() > 0

    result, expected = (library.RemoveMostRelevantFirst("auto", kept)(cam, cam) for library in (ours, theirs))
    assert torch.equal(result, expected)


def test_arcc(model, images, cams, theirs):
    method, maps = grad_cam.GradCAM(model, [model[2]]), cams
    torch.manual_seed(5)
    expected = theirs.ARCC(method, [20, 60])(images, maps, TARGETS, model)
    torch.manual_seed(5)
    result = ours.ARCC(method, [20, 60])(images, maps, TARGETS, model)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(ours.Complexity()(maps), theirs.Complexity()(maps), rtol=1e-6)
    np.testing.assert_allclose(
        ours.Coherency()(images, maps, TARGETS, model, method),
        theirs.Coherency()(images, maps, TARGETS, model, method),
        rtol=1e-5,
    )


def test_an_image_of_which_nothing_is_left_becomes_its_mean_colour(images):
    """A map that is zero in many places has zero as its percentile; there the linear system is singular."""
    result = ours.NoisyLinearImputer(noise=0.0)(images[0], torch.zeros(20, 16))
    torch.testing.assert_close(result, images[0].mean((1, 2), keepdim=True).expand_as(result))


def test_maps_and_targets_are_one_an_image(model, images, cams):
    with pytest.raises(InputError, match="cams must be one for each of 2 images, got 1"):
        ours.DropInConfidence()(images, cams[:1], TARGETS, model)
    with pytest.raises(InputError, match="targets must be one for each of 2 images, got 1"):
        ours.DropInConfidence()(images, cams, TARGETS[:1], model)


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name, theirs):
    actual, there = (list(inspect.signature(getattr(library, name)).parameters) for library in (ours, theirs))
    assert actual == there
