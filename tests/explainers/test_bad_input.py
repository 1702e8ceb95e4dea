import re

import pytest
import torch
from torch import nn

from pyfast_xai import (
    LIME,
    RISE,
    CNNFixations,
    EigenCAM,
    ExcitationBackprop,
    GradCAM,
    GuidedGradCAM,
    MeaningfulPerturbation,
    Occlusion,
)
from pyfast_xai.errors import InputError, UnsupportedOpError

EXPLAINERS = [CNNFixations, EigenCAM, GradCAM, GuidedGradCAM, ExcitationBackprop]
EXPLAINERS += [Occlusion, RISE, LIME, MeaningfulPerturbation]
both = pytest.mark.parametrize("explainer", EXPLAINERS)


@pytest.fixture
def model():
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 4, 5))
    return _named(features=features, head=head)


def _named(**parts):
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8)


class _Raises:
    """One sentence that holds each of some words, from one of our own errors."""

    def __init__(self, *words, error=InputError):
        self.words, self.error = words, error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not None, f"nothing was raised; expected {self.words}"
        if not issubclass(kind, self.error):
            return False
        message = str(error)
        for word in self.words:
            assert word in message
        # One sentence: no line breaks, and no full stop in front of another word.
        assert "\n" not in message
        assert not re.search(r"\. [A-Z]", message)
        return True


refused = _Raises


@both
@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8), (1, 1, 3, 8, 8)])
def test_images_of_another_rank(explainer, model, shape):
    with refused("images must have shape [N, C, H, W]", str(list(shape))):
        explainer(model)(torch.randn(shape))


@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_that_are_no_real_numbers(explainer, model, images, dtype):
    with refused("images must have a floating-point dtype", str(dtype)):
        explainer(model)(torch.ones_like(images, dtype=dtype))


@both
@pytest.mark.parametrize("given", [None, "cat.png", [[1.0]]])
def test_images_that_are_no_tensor(explainer, model, given):
    with refused("images must be a tensor", type(given).__name__):
        explainer(model)(given)


@both
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_no_images(explainer, model, shape):
    with refused("images must hold at least one image", str(list(shape))):
        explainer(model)(torch.zeros(shape))


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_counted_and_the_first_named(explainer, model, images, value):
    images = torch.cat([images, images])
    images[2, 1, 3, 4] = images[5, 0, 0, 0] = value
    with refused("images must be finite", "image 2", "2 of 6"):
        explainer(model)(images)


@both
def test_a_model_that_is_no_module(explainer):
    with refused("model must be a torch.nn.Module", "function"):
        explainer(lambda x: x)


@both
@pytest.mark.parametrize(("path", "named"), [(None, "got it"), ("features.1", "'features.1'"), ("head", "'head'")])
def test_a_model_in_training_mode(explainer, model, images, path, named):
    (model if path is None else model.get_submodule(path)).train()
    with refused("model must be in evaluation mode", "model.eval()", named):
        explainer(model)(images)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (5, ("target must lie in [0, 5)", "got 5")),
        (-1, ("target must lie in [0, 5)", "got -1")),
        ([0, 1, 7], ("target must lie in [0, 5)", "got 7")),
        ([0, 1], ("target must have one entry for each of 3 images", "[2]")),
        (torch.zeros(2, 2, dtype=torch.int64), ("target must have one entry for each of 3 images", "[2, 2]")),
        (torch.zeros(3, 1, 1, dtype=torch.int64), ("target must have one entry for each of 3 images", "[3, 1, 1]")),
        (1.0, ("target must be", "float")),
        ("cat", ("target must be", "str")),
        (torch.zeros(3), ("target must hold integers", "float32")),
        (torch.zeros(3, dtype=torch.bool), ("target must hold integers", "bool")),
        ([0.5, 1.0, 2.0], ("target must hold integers", "float32")),
        (True, ("target must hold integers", "bool")),
        (lambda output: output, ("target must be", "function")),
        ({"a": 1}, ("target must be", "dict")),
        (["cat", "dog", "cow"], ("target must be", "list")),
        (torch.zeros(3, 0, dtype=torch.int64), ("target must", "[3, 0]")),
    ],
    ids=str,
)
def test_targets_that_do_not_fit(model, images, target, words):
    with refused(*words):
        CNNFixations(model)(images, target)


@pytest.mark.parametrize("setting", ["start", "at", "layer"])
def test_a_layer_that_is_not_there_gets_the_close_names(model, images, setting):
    with refused("must name a module or operation that ran", "'features.0'", "got 'feature.0'"):
        if setting == "layer":
            EigenCAM(model, layer="feature.0")(images)
        else:
            CNNFixations(model, **{setting: ("feature.0", 0) if setting == "start" else "feature.0"})(images)


def test_at_names_itself(model, images):
    with refused("at must name"):
        CNNFixations(model, at="feature.0")(images)


def test_a_start_that_is_a_module_of_another_model(model, images):
    with refused("start must name a module of the model", "Linear"):
        CNNFixations(model, start=(nn.Linear(2, 2), 0))(images)


@pytest.mark.parametrize("index", [5, -1, (0, 0), (9, 9, 9, 9), "min"])
def test_a_start_outside_the_layer(model, images, index):
    with refused("start must have an index within [5]", repr(index)):
        CNNFixations(model, start=("head", index))(images)


def test_a_start_and_a_target(model, images):
    with refused("target must be None where start names a neuron", "got 3"):
        CNNFixations(model, start=("head", 0))(images, 3)


def test_a_start_and_crops(model):
    with refused("crops must be None where start names a neuron"):
        CNNFixations(model, start=("head", 0), crops=4)


def test_an_at_layer_without_a_map(model, images):
    with refused("at must name a layer with a spatial map", "[3, 64]"):
        CNNFixations(model, at="head.0")(images)


@pytest.mark.parametrize("crops", [9, 0, -2])
def test_crops_that_do_not_fit_in_the_image(model, images, crops):
    with refused("crops must lie in", str(crops)):
        CNNFixations(model, crops=crops)(images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": "best"}, ("variant must be one of", "'paper'", "'authors'", "'default'", "'best'")),
        ({"location": "corner"}, ("location must be one of", "'product'", "'same'", "'corner'")),
        ({"location": "PRODUCT"}, ("location must be one of", "'PRODUCT'")),
        ({"first_fc": "max"}, ("first_fc must be one of", "'argmax'", "'all'", "'max'")),
        ({"radius": -0.1}, ("radius must be a share", "-0.1")),
        ({"radius": 15}, ("radius must be a share", "15")),
        ({"radius": float("nan")}, ("radius must be a share", "nan")),
        ({"share": 1.0}, ("share must be a share", "1.0")),
        ({"sigma": -1}, ("sigma must be a share", "-1")),
    ],
    ids=str,
)
def test_settings_of_fixations_out_of_range(model, settings, words):
    with refused(*words):
        CNNFixations(model, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"component": 0}, ("component must be 1 or larger", "0")),
        ({"component": []}, ("component must be 1 or larger", "[]")),
        ({"layer": []}, ("layer must name at least one layer",)),
        ({"method": "qr"}, ("method must be", "'qr'")),
        ({"channels": "middle"}, ("channels must be", "'middle'")),
    ],
    ids=str,
)
def test_settings_of_eigen_cam_out_of_range(model, settings, words):
    with refused(*words):
        EigenCAM(model, **settings)


@both
def test_a_model_without_a_tensor_that_depends_on_its_input(explainer, images):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 5)

    with refused("must"):
        explainer(Constant().eval())(images)


def test_a_model_that_returns_a_map(images):
    with refused("model must return [N, classes]", "[3, 4, 8, 8]"):
        CNNFixations(nn.Conv2d(3, 4, 3, padding=1).eval())(images)


class Decoder(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 2, 2)
        self.up = nn.Sequential(transposed)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.up(self.down(x) if self.up[0].weight.dim() == 4 else self.down(x).flatten(2))
        return self.head(x.flatten(2).mean(2))


@pytest.mark.parametrize("transposed", [nn.ConvTranspose2d(4, 4, 2, 2), nn.ConvTranspose1d(4, 4, 3)], ids=str)
def test_a_transposed_convolution_is_named_with_its_module_and_a_remedy(transposed, images):
    with refused(
        "transposed", "aten::convolution", "'up.0'", "pyfast_xai.rules.evidence.rule", error=UnsupportedOpError
    ):
        CNNFixations(Decoder(transposed).eval())(images)


def test_an_op_without_a_rule_is_named_with_its_module_and_a_remedy(images):
    class Sort(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    model = _named(features=nn.Flatten(), odd=Sort(), head=nn.Linear(192, 4))
    with refused("aten::cumsum", "'odd'", "pyfast_xai.rules.evidence.rule", error=UnsupportedOpError):
        CNNFixations(model)(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_of_eigen_cam_that_are_not_finite(images, value):
    class Spoil(nn.Module):
        def forward(self, x):
            x = x.clone()
            x[1, 0, 2, 2] = value
            return x

    model = _named(features=nn.Conv2d(3, 4, 3), spoil=Spoil())
    with refused("activations of layer 'spoil' must be finite", "image 1"):
        EigenCAM(model, layer="spoil")(images)


def test_a_layer_of_eigen_cam_without_a_map(model, images):
    with refused("layer must have a spatial map", "'head.0'", "[3, 64]"):
        EigenCAM(model, layer="head.0")(images)


def test_a_model_of_eigen_cam_without_a_map(images):
    with refused("layer must be named", "'auto'"):
        EigenCAM(_named(flat=nn.Flatten(), fc=nn.Linear(192, 5)))(images)


def test_more_components_of_eigen_cam_than_channels(model, images):
    with refused("component must be at most 4", "'features'", "got 5"):
        EigenCAM(model, layer="features", component=5)(images)


@both
def test_what_the_model_raises_comes_out_as_it_is(explainer, model):
    with pytest.raises(RuntimeError, match="expected input"):
        explainer(model)(torch.randn(2, 7, 8, 8))


@both
def test_a_refusal_leaves_the_explainer_usable(explainer, model, images):
    explain = explainer(model)
    with refused("images must have shape"):
        explain(images[0])
    assert explain(images).heatmap.shape == (3, 8, 8)
