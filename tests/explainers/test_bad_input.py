import re

import pytest
import torch
from case_ids import case_id
from torch import nn

from pyfast_xai import (
    CLEAR,
    LIME,
    RISE,
    CNNFixations,
    EigenCAM,
    ExcitationBackprop,
    Explainer,
    GradCAM,
    GuidedGradCAM,
    MeaningfulPerturbation,
    Occlusion,
    Saliency,
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
def test_a_model_that_is_no_module(explainer, model):
    with refused("model must be a torch.nn.Module", "function"):
        explainer(lambda x: x)
    for given, way in (
        ("torchvision/resnet50", "load_model(name).model"),
        (model.state_dict(), "load_state_dict"),
        (nn.Linear, "an instance of Linear"),
    ):
        with refused("model must be a torch.nn.Module", type(given).__name__, way):
            explainer(given)


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
        pytest.param(lambda output: output, ("target must be", "function"), id="function"),
        ({"a": 1}, ("target must be", "dict")),
        (["cat", "dog", "cow"], ("target must be", "list")),
        (torch.zeros(3, 0, dtype=torch.int64), ("target must", "[3, 0]")),
    ],
    ids=case_id,
)
def test_targets_that_do_not_fit(model, images, target, words):
    with refused(*words):
        CNNFixations(model)(images, target)


@pytest.mark.parametrize("setting", ["neuron", "stop_layer", "layer"])
def test_a_layer_that_is_not_there_gets_the_close_names(model, images, setting):
    with refused("must name a module or operation that ran", "'features.0'", "got 'feature.0'"):
        if setting == "layer":
            EigenCAM(model, layer="feature.0")(images)
        else:
            CNNFixations(model, **{setting: ("feature.0", 0) if setting == "neuron" else "feature.0"})(images)


def test_stop_layer_names_itself(model, images):
    with refused("stop_layer must name"):
        CNNFixations(model, stop_layer="feature.0")(images)


def test_a_neuron_of_a_module_of_another_model(model, images):
    with refused("neuron must name a module of the model", "Linear"):
        CNNFixations(model, neuron=(nn.Linear(2, 2), 0))(images)


@pytest.mark.parametrize("index", [5, -1, (0, 0), (9, 9, 9, 9), "min"])
def test_a_neuron_outside_the_layer(model, images, index):
    with refused("neuron must have an index within [5]", repr(index)):
        CNNFixations(model, neuron=("head", index))(images)


def test_a_neuron_and_a_target(model, images):
    with refused("target must be None where neuron names one", "got 3"):
        CNNFixations(model, neuron=("head", 0))(images, 3)


def test_a_neuron_and_crops(model):
    with refused("crops must be None where neuron names one"):
        CNNFixations(model, neuron=("head", 0), crops=4)


def test_a_stop_layer_without_a_map(model, images):
    with refused("stop_layer must name a layer with a spatial map", "[3, 64]"):
        CNNFixations(model, stop_layer="head.0")(images)


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
        ({"radius_share": -0.1}, ("radius_share must be a share", "-0.1")),
        ({"radius_share": 15}, ("radius_share must be a share", "15")),
        ({"radius_share": float("nan")}, ("radius_share must be a share", "nan")),
        ({"min_neighbour_share": 1.0}, ("min_neighbour_share must be a share", "1.0")),
        ({"sigma_share": -1}, ("sigma_share must be a share", "-1")),
    ],
    ids=case_id,
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
        ({"solver": "qr"}, ("solver must be", "'qr'")),
        ({"layout": "middle"}, ("layout must be", "'middle'")),
    ],
    ids=case_id,
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


# What fits a model, and what only looks as if it did


ALL = [*EXPLAINERS, Saliency, CLEAR]
CLASSES = [explainer for explainer in ALL if explainer is not EigenCAM]
QUICK = {RISE: {"n_masks": 2}, MeaningfulPerturbation: {"n_iterations": 1}, LIME: {"n_samples": 2}}
every = pytest.mark.parametrize("explainer", ALL)
with_classes = pytest.mark.parametrize("explainer", CLASSES)


def made(explainer, model, **settings):
    if explainer is LIME:
        settings["feature_mask"] = torch.zeros(8, 8, dtype=torch.int64)
    return explainer(model, **QUICK.get(explainer, {}), **settings)


@with_classes
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_one_hot_rows_are_no_classes(explainer, model, images, dtype):
    target = torch.eye(5, dtype=dtype)[[1, 4, 0]]
    with refused("target must hold class indices", "one-hot", "target.argmax(1)"):
        made(explainer, model)(images, target)
    result = made(explainer, model)(images, target.argmax(1))
    assert result.target.tolist() == [1, 4, 0]


def test_all_classes_of_a_model_are_no_one_hot_rows(model, images):
    assert Saliency(model)(images, torch.arange(5).expand(3, 5)).target.tolist() == [0, 1, 2, 3, 4] * 3
    two = _named(flat=nn.Flatten(), head=nn.Linear(192, 2))
    assert Saliency(two)(images, [[0, 1], [1, 0], [0, 1]]).target.tolist() == [0, 1, 1, 0, 0, 1]


@with_classes
@pytest.mark.parametrize("count", [1, 4, 6])
def test_labels_of_another_number_than_the_outputs(explainer, model, images, count):
    with refused("labels must be one for each of 5 outputs", f"got {count}"):
        made(explainer, model, labels=list("abcdef"[:count]))(images)


LABELS = ["tench, Tinca tinca", "tabby, tabby cat", "crane", "Crane", "tiger cat"]


@with_classes
@pytest.mark.parametrize(
    ("target", "classes"),
    [
        ("tench, Tinca tinca", [0, 0, 0]),
        ("tabby", [1, 1, 1]),
        ("Tiger Cat", [4, 4, 4]),
        (["tabby", "tinca tinca", "tiger cat"], [1, 0, 4]),
        ([["tabby"], ["tench"], [2]], [1, 0, 2]),
        ([["tabby", "tench"]] * 3, [1, 0] * 3),
        (2, [2, 2, 2]),
        (("tabby", 3, 0), [1, 3, 0]),
    ],
    ids=case_id,
)
def test_targets_by_label(explainer, model, images, target, classes):
    result = made(explainer, model, labels=LABELS)(images, target)
    assert result.target.tolist() == classes


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tabi", ("target must be one of the labels such as 'tabby'", "got 'tabi'")),
        ("zebra", ("target must be one of the labels, got 'zebra'",)),
        ("crane", ("target must name one class", "[2, 3]", "give the index")),
        (["tabby", "zebra", "tench"], ("target must be one of the labels, got 'zebra'",)),
    ],
    ids=case_id,
)
def test_labels_that_name_no_class(model, images, target, words):
    with refused(*words):
        Saliency(model, labels=LABELS)(images, target)


@every
def test_channels_that_come_last(explainer, images):
    model = _named(features=nn.Conv2d(3, 4, 3, padding=1), act=nn.ReLU(), flat=nn.Flatten(), head=nn.Linear(256, 5))
    with refused("images must have shape [N, C, H, W], got [3, 8, 8, 3]", "images.permute(0, 3, 1, 2)"):
        made(explainer, model)(images.permute(0, 2, 3, 1))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_dtype_than_the_model(explainer, model, images, dtype):
    with refused("images must have the dtype of the model, torch.float32", f"got {dtype}"):
        made(explainer, model)(images.to(dtype))


def test_a_model_that_casts_its_images_takes_any_dtype(model, images):
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.float())

    result = Saliency(Casts().eval())(images.double())
    torch.testing.assert_close(result.heatmap, Saliency(model)(images).heatmap)


@every
def test_images_on_another_device_than_the_model(explainer, model, images):
    with refused("images must be on the device of the model, cpu", "got meta", "images.to('cpu')"):
        made(explainer, model)(images.to("meta"))


@every
def test_pixels_that_are_not_scaled_are_warned_of_with_the_first_batch(explainer, model, images, caplog):
    explain = made(explainer, model)
    pixels = (images.abs() * 100).clamp(max=255)
    for _ in range(2):
        explain(pixels)
    output = [record for record in caplog.records if "images hold values up to" in record.message]
    assert len(output) == 1
    assert output[0].levelname == "WARNING"


@every
def test_images_that_are_normalised_are_not_warned_of(explainer, model, images, caplog):
    explain = made(explainer, model)
    explain(images)
    explain(images.abs().clamp(max=1))
    explain(images * 128)  # around zero
    assert not [record for record in caplog.records if "images hold values up to" in record.message]


@every
def test_repr_has_the_model_and_the_settings_that_were_given(explainer, model):
    assert repr(explainer(model)) == f"{explainer.__name__}(Sequential)"
    assert repr(explainer(model, labels=["a"])) == f"{explainer.__name__}(Sequential)"


def test_repr_of_settings(model):
    assert repr(GradCAM(model, layer="head", box_rule="hull")) == "GradCAM(Sequential, layer='head', box_rule='hull')"
    assert repr(CLEAR(model, candidates=3)) == "CLEAR(Sequential, candidates=3)"
    shown = repr(Occlusion(model, baseline=torch.zeros(3, 1, 1), window=[2, 3]))
    assert shown == "Occlusion(Sequential, baseline=Tensor[3, 1, 1], window=[2, 3])"


def test_an_explainer_must_say_how_it_explains(model):
    class Nothing(Explainer):
        method = paper = "nothing"

    with pytest.raises(TypeError, match="_explain"):
        Nothing(model)


@both
def test_a_list_of_images(explainer, model, images):
    with refused("images must be a tensor", "got list", "torch.stack(images)"):
        explainer(model)(list(images))


def test_a_layer_that_is_no_layer(model):
    with refused("layer must be a module of the model", "got int"):
        GradCAM(model, layer=3)


class _Detects(nn.Module):
    """Returns two detections of each image, so that of two images their boxes look like scores `[N, classes]`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, images):
        values = self.layer(images).mean((2, 3))
        return [{"boxes": row.expand(2, 4), "scores": row[:2]} for row in values]


@pytest.mark.parametrize("explainer", [CNNFixations, GradCAM, Saliency, Occlusion, RISE, CLEAR])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_detector_without_a_target(explainer, count):
    with refused("model must return [N, classes]", "got a list of dicts", "DetectionTarget"):
        explainer(_Detects().eval())(torch.rand(count, 3, 8, 8))
