import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from oracles import clear as slow_clear
from torch import nn

from pyfast_xai import CLEAR, EigenCAM, render
from pyfast_xai.errors import InputError

DOUBLE, CLASSES = torch.float64, 6


class AllConvolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)
        self.last, self.relu = nn.Conv2d(7, CLASSES, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.relu(self.conv1(x)), 2)
        return self.last(self.relu(self.conv2(x))).mean((2, 3))

    def layers(self):
        def conv(layer):
            return ("conv", layer.weight.detach(), layer.bias.detach())

        relu, pool = ("relu", None, None), ("pool", None, None)
        return [conv(self.conv1), relu, pool, conv(self.conv2), relu, conv(self.last)]


@pytest.fixture
def net():
    return AllConvolutional().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, dtype=DOUBLE)


def slow(net, images, variant="guided", nearest=False):
    """R of every class, `[N, classes, C, H, W]`."""
    return torch.stack(
        [
            torch.stack([slow_clear.respond(net.layers(), image, c, variant, nearest) for c in range(CLASSES)])
            for image in images
        ]
    )


@pytest.mark.parametrize("unpooling", ["switches", "nearest"])
@pytest.mark.parametrize("variant", ["linear", "deconvnet", "guided"])
def test_responses_are_those_of_the_paper(net, images, variant, unpooling):
    expected = slow(net, images, variant, unpooling == "nearest")
    explain = CLEAR(net, candidates=None, variant=variant, unpooling=unpooling)
    torch.testing.assert_close(explain.responses(images, range(CLASSES)), expected.sum(2), rtol=0, atol=1e-12)
    result = explain(images, 4)
    assert torch.equal(result.dominant_class, expected.sum(2).argmax(1))
    torch.testing.assert_close(result.signed_map, expected.sum(2).amax(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.attribution, expected[:, 4], rtol=0, atol=1e-12)
    assert torch.equal(result.heatmap, result.signed_map.clamp(min=0))


@pytest.mark.parametrize("reduction", ["sum", "norm", "max"])
@pytest.mark.parametrize("scale", ["joint", "class"])
def test_how_responses_compete(net, images, reduction, scale):
    one = {"sum": lambda r: r.sum(2), "norm": lambda r: r.square().sum(2).sqrt(), "max": lambda r: r.amax(2)}
    expected = one[reduction](slow(net, images))
    if scale == "class":
        expected = expected / expected.abs().amax((2, 3), keepdim=True)
    result = CLEAR(net, candidates=None, reduction=reduction, scale=scale)(images)
    torch.testing.assert_close(result.signed_map, expected.amax(1), rtol=0, atol=1e-12)
    assert torch.equal(result.dominant_class, expected.argmax(1))


@pytest.mark.parametrize(("kept", "walks"), [(False, [2, 2, 2]), (True, [3, 3])])
def test_more_classes_at_once_where_freed_memory_is_kept(net, images, monkeypatch, kept, walks):
    monkeypatch.setattr("pyfast_xai.memory._enabled", kept)
    result = []
    monkeypatch.setattr(CLEAR, "_reduced", lambda self, response: result.append(len(response)) or response)
    CLEAR(net, candidates=None)(torch.cat([images] * 4))
    assert result == walks


@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_classes_stream_through(net, images, chunk):
    together, streamed = (
        CLEAR(net, candidates=None, chunk_size=99)(images),
        CLEAR(net, candidates=None, chunk_size=chunk)(images),
    )
    assert torch.equal(together.dominant_class, streamed.dominant_class)
    torch.testing.assert_close(together.signed_map, streamed.signed_map, rtol=0, atol=1e-13)


def test_the_top_classes_compete(net, images):
    top = net(images).topk(2).indices
    result, every = CLEAR(net, candidates=2)(images), slow(net, images).sum(2)
    for n in range(2):
        actual = every[n, top[n]]
        assert torch.equal(result.dominant_class[n], top[n][actual.argmax(0)])
        torch.testing.assert_close(result.signed_map[n], actual.amax(0), rtol=0, atol=1e-12)


def test_chosen_classes_compete(net, images):
    result, every = CLEAR(net, candidates=[5, 1])(images), slow(net, images).sum(2)
    expected = torch.tensor([1, 5])[every[:, [1, 5]].argmax(1)]
    assert torch.equal(result.dominant_class, expected)
    assert (CLEAR(net, candidates=[3])(images).dominant_class == 3).all()


def test_a_target_that_does_not_compete_has_its_response(net, images):
    result = CLEAR(net, candidates=[0, 1])(images, [[1, 5], [4, 0]])
    expected = slow(net, images)
    for row, (n, c) in enumerate([(0, 1), (0, 5), (1, 4), (1, 0)]):
        torch.testing.assert_close(result.attribution[row], expected[n, c], rtol=0, atol=1e-12)
    assert result.target.tolist() == [1, 5, 4, 0]
    assert result.dominant_class.unique().tolist() == [0, 1]


def test_classes_have_no_order(net, images):
    """The same network with its classes in another order has the same picture."""
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    other = AllConvolutional().to(DOUBLE).eval()
    state = net.state_dict()
    other.load_state_dict(state | {"last.weight": state["last.weight"][order], "last.bias": state["last.bias"][order]})
    one, two = CLEAR(net, candidates=None)(images), CLEAR(other, candidates=None)(images)
    torch.testing.assert_close(one.signed_map, two.signed_map, rtol=0, atol=1e-13)
    assert torch.equal(one.dominant_class, order[two.dominant_class])


def strongest(actual):
    return torch.where(actual == actual.max(), actual, 0)


@pytest.mark.parametrize(
    ("activations", "take"), [("positive", lambda actual: actual.clamp(min=0)), ("strongest", strongest)]
)
def test_what_of_a_map_is_projected(net, images, activations, take):
    expected = [
        slow_clear.respond(net.layers(), image, c, "linear", False, take).sum(0)
        for image, c in itertools.product(images, range(CLASSES))
    ]
    result = CLEAR(net, candidates=None, variant="linear", activations=activations).responses(images, range(CLASSES))
    torch.testing.assert_close(result.flatten(0, 1), torch.stack(expected), rtol=0, atol=1e-12)
    assert not torch.allclose(result, CLEAR(net, candidates=None, variant="linear").responses(images, range(CLASSES)))


def test_the_first_of_equals_wins(net, images):
    """Small integers, so that no sum rounds."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((8 * parameter).round())
        for c in (4, 2):
            net.last.weight[c], net.last.bias[c] = net.last.weight[0], net.last.bias[0]
    images = (4 * images).round()
    for chunk in (1, 2, 3):
        assert (CLEAR(net, candidates=[4, 2, 0], chunk_size=chunk)(images).dominant_class == 4).all()
        assert (CLEAR(net, candidates=[0, 4], chunk_size=chunk)(images).dominant_class == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(net, images, dtype):
    result, expected = (
        CLEAR(copy.deepcopy(net).to(dtype), candidates=None)(images.to(dtype)),
        CLEAR(net, candidates=None)(images),
    )
    assert result.signed_map.dtype == torch.float32
    assert result.attribution.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] * expected.signed_map.abs().max()
    assert (result.signed_map - expected.signed_map).abs().max() < tolerance


class Classifier(nn.Module):
    """No map of classes: the average comes before the last layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 7, 3, padding=1), nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_any_classifier_through_its_outputs(images, caplog):
    model = Classifier().to(DOUBLE).eval()
    logits = model(images).detach()
    weight = model.fc.weight.detach()
    expected = []
    for n, c in itertools.product(range(2), range(CLASSES)):
        signal = (logits[n, c] * weight[c] / 64)[:, None, None].expand(-1, 8, 8)
        expected.append(nn.functional.conv_transpose2d(signal[None], model.conv.weight, padding=1)[0].sum(0).detach())
    explain = CLEAR(model, candidates=None, variant="linear", project_from="logit")
    with caplog.at_level(logging.INFO, "pyfast_xai"):
        result = explain.responses(images, range(CLASSES))
        explain(images)
    torch.testing.assert_close(result.flatten(0, 1), torch.stack(expected), rtol=0, atol=1e-13)
    assert [r.getMessage() for r in caplog.records] == ["clear starts from the outputs"]


def test_a_linear_layer_on_averaged_features_has_maps_too(images):
    """The average of W f is W times the average: the classifier is the all-convolutional net with a 1x1 layer."""
    model = Classifier().to(DOUBLE).eval()
    layer = nn.Conv2d(7, CLASSES, 1, dtype=DOUBLE)
    with torch.no_grad():
        layer.weight.copy_(model.fc.weight[:, :, None, None])
        layer.bias.copy_(model.fc.bias)
    same = nn.Sequential(model.conv, nn.ReLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    one, two = CLEAR(model, candidates=None)(images), CLEAR(same, candidates=None)(images)
    torch.testing.assert_close(one.signed_map, two.signed_map, rtol=0, atol=1e-12)
    assert torch.equal(one.dominant_class, two.dominant_class)


def test_the_last_layers_it_knows(images, caplog):
    """Heads of common networks, and one that has no class maps."""
    conv, pool = nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1)
    heads = {
        "linear": [pool, nn.Flatten(), nn.Dropout(), nn.Linear(7, CLASSES)],
        "no bias": [pool, nn.Flatten(), nn.Linear(7, CLASSES, bias=False)],
        "convolution of one position": [pool, nn.Conv2d(7, CLASSES, 1), nn.Flatten()],
        "window": [nn.Conv2d(7, CLASSES, 1), nn.AvgPool2d(6), nn.Flatten(), nn.Softmax(1)],
        "rectified": [nn.Conv2d(7, CLASSES, 1), nn.ReLU(), pool, nn.Flatten()],
        "hidden layer": [pool, nn.Flatten(), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, CLASSES)],
        "flattened": [nn.Flatten(), nn.Linear(7 * 36, CLASSES)],
    }
    for name, head in heads.items():
        model = nn.Sequential(conv, nn.ReLU(), *head).to(DOUBLE).eval()
        caplog.clear()
        with caplog.at_level(logging.INFO, "pyfast_xai"):
            result = CLEAR(model)(images)
        assert ("class maps" in caplog.text) == (name not in ("hidden layer", "flattened")), name
        assert result.dominant_class.shape == (2, 8, 8)
        assert result.signed_map.isfinite().all()


def test_the_start_is_found_again_on_other_sizes(net, images):
    explain = CLEAR(net, candidates=None)
    explain(images)
    larger = torch.randn(1, 3, 12, 10, dtype=DOUBLE)
    torch.testing.assert_close(
        explain(larger).signed_map, CLEAR(net, candidates=None)(larger).signed_map, rtol=0, atol=0
    )


def test_nothing_to_rewrite_is_said(images, caplog):
    model = nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(DOUBLE).eval()
    CLEAR(model, unpooling="nearest")(images)
    assert "no rectifier" in caplog.text
    assert "no max-pool" in caplog.text


def test_colour_is_the_class_and_brightness_the_response():
    winner = torch.tensor([[[3, 7], [3, -1]]])
    best = torch.tensor([[[4.0, 1.0], [-2.0, 9.0]]])
    shown = render.dominance(winner, best, [{3: (0.2, 1, 0.5), 7: (1, 0.4, 0)}], saturated=0)
    expected = [[0.2, 1, 0.5], [0.25, 0.1, 0], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(shown[0].flatten(1).T, torch.tensor(expected))


def test_classes_get_colours_in_the_order_of_their_responses():
    winner = torch.tensor([[[3, 7], [7, 5]], [[3, 3], [7, 9]]])
    best = torch.tensor([[[4.0, 1.0], [2.0, -1.0]], [[0.5, 1.0], [9.0, 0.0]]])
    expected = {7: render.CLASS_COLORS[0], 3: render.CLASS_COLORS[1]}  # 5 and 9 are seen nowhere
    assert render.class_colors(winner, best) == [expected, expected]
    many = torch.arange(2 * len(render.CLASS_COLORS)).view(2, 1, -1)
    actual = render.class_colors(many, torch.ones(many.shape))
    assert [list(each) for each in actual] == many[:, 0].tolist()
    assert all(tuple(each.values()) == render.CLASS_COLORS for each in actual)


# What people see who lack one kind of cone, of linear red, green and blue (Machado et al., 2009, table 1).
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_classes_lie_apart_for_everybody(sight):
    color = pytest.importorskip("skimage.color")
    codes = np.array(render.CLASS_COLORS)
    linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    recorded = (linear @ np.transpose(SIGHT[sight])).clip(0, 1)
    recorded = np.where(recorded <= 0.0031308, recorded * 12.92, 1.055 * recorded ** (1 / 2.4) - 0.055)
    lab = color.rgb2lab(recorded[None])[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e3 * np.eye(len(lab))
    assert apart.min() > 26
    assert codes.max(1).tolist() == [1] * len(codes)  # the brightness is that of the response alone


def test_for_and_against():
    target, others = torch.tensor([[[3.0, 1.0], [2.0, -1.0]]]), torch.tensor([[[1.0, 2.0], [2.0, -2.0]]])
    hot = render.binary(target, others, saturated=0)[0]
    assert hot[:, 0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(hot[:, 0, 1], torch.tensor([0, 2 / 3, 0]))
    assert hot[1, 1, 0] > 0.9  # a tie is the target's: red and yellow, no green alone
    assert hot[0, 1, 0] == 1
    assert (hot[:, 1, 1] == 0).all()
    plain = render.binary(target, others, constant=True, saturated=0)[0]
    assert plain.flatten(1).T.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_grey_images_show_where_nothing_responds():
    images = torch.rand(1, 3, 4, 4)
    shown = render.overlay_dominance(images, torch.zeros(1, 4, 4, dtype=torch.long), -torch.ones(1, 4, 4), alpha=0.25)
    torch.testing.assert_close(shown, 0.75 * images.mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_legend_has_a_patch_for_each_name():
    names = ["zebra", "a name far too long for any legend to hold it in one line"]
    picture = render.legend(names, [(1, 0, 0), (0, 1, 1)], 120)
    assert picture.width == 120
    line = picture.height // 2
    assert [picture.getpixel((3, line // 2 + i * line)) for i in range(2)] == [(255, 0, 0), (0, 255, 255)]


def test_pictures(net, images):
    result = CLEAR(net, candidates=None, labels=list("abcdef"))(images)
    assert result.overlay().shape == (2, 3, 8, 8)
    assert result.binary().shape == result.binary(constant=True).shape == (2, 3, 8, 8)
    assert len(result.legends()) == 2
    assert result[1].dominant_class.shape == (1, 8, 8)
    without = EigenCAM(net)(images)
    assert result.plot().height > without.plot().height
    constant = result.binary(constant=True)
    assert ((constant[:, 0] == 0) | (constant[:, 2] == 0)).all()
    assert not hasattr(without, "binary")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"candidates": "cat"}, "candidates must be None, an int or a sequence of ints"),
        ({"candidates": []}, "candidates must be None, an int or a sequence of ints"),
        ({"variant": "lrp"}, "variant must be one of"),
        ({"unpooling": "zero"}, "unpooling must be one of"),
        ({"project_from": "end"}, "project_from must be one of"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"scale": "none"}, "scale must be one of"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_settings(net, settings, message):
    with pytest.raises(InputError, match=message):
        CLEAR(net, **settings)


def test_settings_that_do_not_fit_the_model(net, images):
    with pytest.raises(InputError, match=r"candidates must lie in \[0, 6\), got 6"):
        CLEAR(net, candidates=[0, 6])(images)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).to(DOUBLE).eval()
    with pytest.raises(InputError, match="project_from must be 'logit' or None"):
        CLEAR(model, project_from="map")(images)
