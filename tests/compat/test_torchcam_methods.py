"""The extractors beside Grad-CAM here and in torch-cam 0.5, in float64 with the same random numbers."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from pyfast_xai.compat import torchcam as ours
from pyfast_xai.compat.torchcam import metrics
from pyfast_xai.errors import InputError

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torchcam.methods")


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(5, 4, 3, 2, 1), nn.ReLU()
        self.fc = nn.Linear(4 * 12, 5)

    def forward(self, x):
        return self.fc(self.relu2(self.conv2(self.relu1(self.conv1(x)))).flatten(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Flat().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


LAYERS = {"one": "relu1", "two": ["relu1", "relu2"]}
METHODS = {
    "LayerCAM": {},
    "XGradCAM": {},
    "SmoothGradCAMpp": {"num_samples": 3},
    "ScoreCAM": {"batch_size": 4},
    "SSCAM": {"batch_size": 4, "num_samples": 3},
    "ISCAM": {"batch_size": 7, "num_samples": 3},
}


def maps(library, name, model, layers, images, chosen, settings, **call):
    torch.manual_seed(7)
    with getattr(library, name)(model, layers, **settings) as extractor:
        scores = model(images)
        return extractor, extractor(chosen, scores, **call)


# In torch-cam the map of SmoothGradCAMpp weighs what the last noisy copy made of the layer, not what the image did.
RIGHT_THERE = [name for name in METHODS if name != "SmoothGradCAMpp"]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("chosen", [2, [1, 4, 0]], ids=["class", "classes"])
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("name", RIGHT_THERE)
def test_maps_are_the_same(name, layers, chosen, normalized, model, images, theirs):
    settings = METHODS[name]
    one, result = maps(ours, name, model, LAYERS[layers], images, chosen, settings, normalized=normalized)
    other, expected = maps(theirs, name, model, LAYERS[layers], images, chosen, settings, normalized=normalized)
    for item, there in zip(result, expected, strict=True):
        torch.testing.assert_close(item, there, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.fuse_cams(result), other.fuse_cams(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("chosen", [2, [1, 4, 0]], ids=["class", "classes"])
def test_smooth_grad_cam_weighs_the_activation_of_the_image(layers, chosen, model, images, theirs):
    settings = METHODS["SmoothGradCAMpp"]
    _, result = maps(ours, "SmoothGradCAMpp", model, LAYERS[layers], images, chosen, settings, normalized=False)
    torch.manual_seed(7)
    with theirs.SmoothGradCAMpp(model, LAYERS[layers], **settings) as extractor:
        model(images)
        activations = [item.clone() for item in extractor.hook_a]
        weights = extractor._get_weights(chosen)
    for item, weight, activation in zip(result, weights, activations, strict=True):
        expected = (weight[:, :, None, None] * activation).sum(1).relu()
        torch.testing.assert_close(item, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["LayerCAM", "XGradCAM", "ScoreCAM"])
def test_functions_are_targets(name, model, images, theirs):
    result, expected = (
        maps(library, name, model, "relu1", images, None, METHODS[name], targets=lambda actual: actual[1] - actual[2])[
            1
        ]
        for library in (ours, theirs)
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


def test_the_input_is_that_of_the_last_forward(model, images, theirs):
    for library in (ours, theirs):
        with library.ScoreCAM(model, "relu1") as extractor:
            model(images[:1])
            model(images[1:])
            result = extractor([1, 4])
            assert result[0].shape == (2, 8, 6)
    with pytest.raises(ours.NotForwardedError):
        ours.ScoreCAM(model, "relu1")(3)


def test_volumes(theirs):
    torch.manual_seed(0)

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv3d(1, 4, 3, 2, 1), nn.ReLU(), nn.Linear(4 * 48, 5)

        def forward(self, x):
            return self.fc(self.relu(self.conv(x)).flatten(1))

    model, volume = Volume().to(DOUBLE).eval(), torch.randn(2, 1, 6, 8, 8, dtype=DOUBLE)
    for name in RIGHT_THERE:
        settings = METHODS[name]
        result, expected = (maps(library, name, model, "relu", volume, 1, settings)[1] for library in (ours, theirs))
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("base", ["GradCAM", "LayerCAM"])
def test_refine_cam(base, model, images, theirs):
    result, expected = (
        maps(library, "RefineCAM", model, LAYERS["two"], images, 2, {"base_method": getattr(library, base)})[1]
        for library in (ours, theirs)
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
    with pytest.raises(InputError, match="target_layer must be a list of two layers or more"):
        ours.RefineCAM(model, ["relu1"])


@pytest.mark.parametrize("base", ["GradCAM", "LayerCAM"])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param({}, id="nearest"),
        pytest.param({"comparison_idx": 3}, id="one"),
        pytest.param({"comparison_idx": [3, 2]}, id="several"),
        pytest.param({"comparison_idx": [[0], [1], [2]]}, id="each"),
    ],
)
def test_finer_cam(base, call, model, images, theirs):
    result, expected = (
        maps(library, "FinerCAM", model, "relu1", images, [1, 4, 0], {"base_method": getattr(library, base)}, **call)[1]
        for library in (ours, theirs)
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param({"comparison_idx": [1]}, "other classes than the target", id="target"),
        pytest.param({"comparison_idx": [3, 3]}, "each once", id="twice"),
        pytest.param({"comparison_idx": [9]}, "comparison_idx must be as many of 5 classes", id="range"),
        pytest.param({"comparison_idx": [[0], [1]]}, "comparison_idx must be as many", id="rows"),
    ],
)
def test_comparisons_that_do_not_fit(call, words, model, images):
    with ours.FinerCAM(model, "relu1") as extractor, pytest.raises(InputError, match=words):
        extractor([1, 4, 1], model(images), **call)


# docs/migration/torchcam.md says why.
ABSENT = {"PredictionExplanation", "explain"}


def test_every_name_is_here_with_its_signature(theirs):
    result = {}
    for module in ("methods.activation", "methods.gradient", "methods.core", "metrics", "utils", "explain"):
        peer = importlib.import_module(f"torchcam.{module}")
        for name, value in vars(peer).items():
            actual = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == peer.__name__
            if actual and not name.startswith("_"):
                result[name] = value
    here = {**vars(ours), **{name: getattr(metrics, name) for name in dir(metrics)}}
    assert set(result) - set(here) == ABSENT
    page = (Path(__file__).parents[2] / "docs" / "migration" / "torchcam.md").read_text()
    assert all(f"`{name}`" in page for name in ABSENT)
    for name in set(result) - ABSENT:
        actual, there = (list(inspect.signature(kind).parameters) for kind in (here[name], result[name]))
        named = [parameter for parameter in there if parameter != "kwargs"]
        assert actual[: len(named)] == named, name


def test_hooks_go_with_the_extractor(model, images):
    for name in METHODS:
        extractor = getattr(ours, name)(model, "relu1")
        assert model._forward_hooks or model.relu1._forward_hooks
        del extractor
        assert not model._forward_pre_hooks
        assert not model.relu1._forward_hooks
