import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import CAM, GradCAM, GradCAMPlusPlus, GuidedBackprop, GuidedGradCAM
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.classifier_head import classifier_head
from pyfast_xai.explainers.common.layer_recorder import Above, LayerRecorder
from pyfast_xai.explainers.common.layer_search import Place, bottlenecks
from pyfast_xai.rules.gradient import GradientRules
from pyfast_xai.tape import record

DOUBLE = torch.float64
FAMILY = [CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM]


class Averages(nn.Module):
    """Ends in an average and a linear layer; functional and in-place rectifiers, a skip."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 5)

    def features(self, x):
        x = functional.relu(self.conv1(x))
        return self.relu(x + self.conv2(x))

    def forward(self, x):
        return self.fc(functional.dropout(self.features(x).mean((2, 3)), training=self.training))


@pytest.fixture
def net():
    return Averages().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 12, dtype=DOUBLE)


def shown(signed, size):
    """The heat map of a signed map `[N, h, w]`."""
    rectified = signed.clamp_min(0)[:, None]
    return functional.interpolate(rectified, size=size, mode="bilinear", align_corners=False)[:, 0]


# CAM


def test_cam_is_weights_times_features(net, images):
    result = CAM(net)(images, [[1, 4], [0, 2]])
    with torch.no_grad():
        features = net.features(images)
    expected = torch.stack(
        [(net.fc.weight[c].detach()[:, None, None] * features[n]).sum(0) for n, c in [(0, 1), (0, 4), (1, 0), (1, 2)]]
    )
    torch.testing.assert_close(result.signed_map, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(result.heatmap, shown(expected, (16, 12)), rtol=0, atol=1e-14)
    assert result.target.tolist() == [1, 4, 0, 2]
    # The mean of a map and the bias are the score.
    scores = net(images).detach()[[0, 0, 1, 1], [1, 4, 0, 2]]
    torch.testing.assert_close(
        result.signed_map.mean((1, 2)) + net.fc.bias.detach()[result.target], scores, rtol=0, atol=1e-14
    )


def test_cam_weighs_classes_as_the_target_says(net, images):
    every = CAM(net)(images, [list(range(5))] * 2).signed_map.view(2, 5, 8, 6)
    weights = torch.randn(2, 5, dtype=DOUBLE)
    expected = torch.einsum("nc,nchw->nhw", weights, every)
    torch.testing.assert_close(CAM(net)(images, weights).signed_map, expected, rtol=0, atol=1e-14)
    difference = CAM(net)(images, lambda y: y[:, 1] - y[:, 0]).signed_map
    torch.testing.assert_close(difference, every[:, 1] - every[:, 0], rtol=0, atol=1e-14)


class Tail(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 6, 3), function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, functional.relu(self.conv(x)))


def _head(**settings):
    return {"head": nn.Linear(6, 5, **settings)}


TAILS = {
    "average": (lambda m, x: m.head(x.mean((-1, -2))), _head()),
    "no bias": (lambda m, x: m.head(x.mean((2, 3))), _head(bias=False)),
    "adaptive": (lambda m, x: m.head(functional.adaptive_avg_pool2d(x, 1).flatten(1)), _head()),
    "window": (lambda m, x: m.head(functional.avg_pool2d(x, x.shape[2:]).view(len(x), -1)), _head()),
    "kept dims": (
        lambda m, x: m.head(functional.dropout(x.mean((2, 3), True).squeeze(3).squeeze(-1), training=False)),
        _head(),
    ),
    "convolution behind": (lambda m, x: m.head(x.mean((2, 3), True)).flatten(1), {"head": nn.Conv2d(6, 5, 1)}),
    "sum": (lambda m, x: m.head(x.sum((2, 3))), _head()),
    "channels last": (lambda m, x: m.head(x.permute(0, 2, 3, 1).mean((1, 2))), _head()),
    "tokens": (lambda m, x: m.head(x.flatten(2).mT.mean(1)), _head()),
    "class maps": (lambda m, x: m.head(x).relu_().mean((2, 3)), {"head": nn.Conv2d(6, 5, 1)}),
    "class maps, probabilities": (lambda m, x: m.head(x).mean((2, 3)).softmax(1), {"head": nn.Conv2d(6, 5, 3)}),
}


@pytest.mark.parametrize("name", TAILS)
def test_cam_finds_the_end_of_a_network(name):
    function, modules = TAILS[name]
    model, images = Tail(function, **modules).to(DOUBLE).eval(), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    with torch.no_grad():
        features = functional.relu(model.conv(images))
        weight, bias = model.head.weight, model.head.bias
        if "class maps" in name:
            expected = functional.conv2d(features, weight, bias)
            expected = expected if "probabilities" in name else expected.relu()
        else:
            expected = functional.conv2d(features, weight.view(5, 6, 1, 1))
    result = CAM(model)(images, [list(range(5))] * 2)
    torch.testing.assert_close(result.signed_map.view(expected.shape), expected, rtol=0, atol=1e-13)


ENDS = {
    "two layers": lambda m, x: m.head(m.between(x.mean((2, 3))).relu()),
    "a rectifier behind the average": lambda m, x: m.head(x.mean((2, 3)).relu()),
    "a flattened map": lambda m, x: m.flat(x.flatten(1)),
    "a partial average": lambda m, x: m.part(functional.avg_pool2d(x, 3).flatten(1)),
    "a maximum": lambda m, x: m.head(x.amax((2, 3))),
    "channels averaged": lambda m, x: m.across(x.mean(1).flatten(1)),
}


@pytest.mark.parametrize("name", ENDS)
def test_cam_says_that_a_network_ends_otherwise(name):
    linear = {
        "between": nn.Linear(6, 6),
        "flat": nn.Linear(216, 5),
        "part": nn.Linear(24, 5),
        "across": nn.Linear(36, 5),
    }
    model = Tail(ENDS[name], **_head(), **linear).eval()
    with pytest.raises(InputError, match=r"model must end in an average .* got one whose scores come from '.*linear'"):
        CAM(model)(torch.randn(2, 3, 8, 8))
    assert classifier_head(record(model, torch.randn(2, 3, 8, 8), policy=GradientRules())) is None
    assert GradCAM(model)(torch.randn(2, 3, 8, 8)).heatmap.isfinite().all()


@pytest.mark.parametrize("method", [GradCAM, CAM])
def test_cam_and_grad_cam_are_one_up_to_the_number_of_positions(net, images, method):
    one, other = CAM(net)(images, 3), GradCAM(net)(images, 3)
    torch.testing.assert_close(one.signed_map, other.signed_map * 48, rtol=0, atol=1e-13)


# Grad-CAM and its peers


def gradients(model, layer, images, target):
    """Activation and gradient of a layer, by autograd."""
    saved = []

    def hook(module, inputs, output):
        saved.append(output.clone())
        return saved[0].clone()  # what comes after may write to it

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.enable_grad():
        output = model(images.clone().requires_grad_())
        grad = torch.autograd.grad(output.gather(1, target[:, None]).sum(), saved[0])[0]
    handle.remove()
    return saved[0].detach(), grad


def test_grad_cam_is_the_paper(net, images):
    target = torch.tensor([1, 4])
    activation, grad = gradients(net, "conv2", images, target)
    expected = torch.zeros(2, 8, 6, dtype=DOUBLE)
    for n in range(2):
        for k in range(6):
            expected[n] += grad[n, k].sum() / 48 * activation[n, k]
    result = GradCAM(net, layer="conv2")(images, target)
    torch.testing.assert_close(result.signed_map, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(result.heatmap, shown(expected, (16, 12)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("epsilon", [0, 1e-6, 1e-3])
def test_grad_cam_plus_plus_is_the_paper(net, images, epsilon):
    target = torch.tensor([1, 4])
    activation, grad = gradients(net, "conv1", images, target)
    expected = torch.zeros(2, 8, 6, dtype=DOUBLE)
    for n in range(2):
        for k in range(6):
            weight = 0.0
            for g in grad[n, k].flatten():
                if g > 0:
                    weight += g * g**2 / (2 * g**2 + activation[n, k].sum() * g**3 + epsilon)
            expected[n] += weight * activation[n, k]
    result = GradCAMPlusPlus(net, layer="conv1", epsilon=epsilon)(images, target)
    torch.testing.assert_close(result.signed_map, expected, rtol=1e-10, atol=1e-12)


def test_the_formula_of_grad_cam_plus_plus_has_no_scale_without_epsilon():
    activation = torch.rand(1, 2, 2, 3)
    weights = GradCAMPlusPlus(nn.Identity(), epsilon=0).weights
    tiny = torch.full((1, 1, 2, 2, 3), 1e-30)
    torch.testing.assert_close(weights(tiny, activation), torch.full((1, 1, 3), 2e-30))
    assert not weights(-tiny, activation).any()
    assert not weights(torch.zeros_like(tiny), activation).any()
    # A denominator of zero.
    assert weights(torch.ones(1, 1, 1, 2, 1), -torch.ones(1, 1, 2, 1)).isfinite().all()


def torchvision(name):
    models = pytest.importorskip("torchvision.models")
    settings = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, num_classes=10, **settings).to(DOUBLE).eval()


NETWORKS = [("resnet18", "layer4"), ("googlenet", "inception5b"), ("densenet121", "features.denseblock4")]


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda actual: actual[0])
def network(request):
    name, layer = request.param
    torch.manual_seed(0)
    return torchvision(name), layer, torch.randn(2, 3, 96, 64, dtype=DOUBLE), torch.tensor([3, 7])


def test_grad_cam_equals_captum(network):
    captum = pytest.importorskip("captum.attr")
    model, layer, images, target = network
    theirs = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(images, target)[:, 0].detach()
    result = GradCAM(model, layer=layer)(images, target)
    torch.testing.assert_close(result.signed_map, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def scaled(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


@pytest.mark.parametrize("method", [GradCAM, GradCAMPlusPlus])
def test_equals_pytorch_grad_cam(network, method):
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layer, images, target = network
    with getattr(peer, method.__name__)(model, [model.get_submodule(layer)]) as cam:
        theirs = cam(images, targets=[ClassifierOutputTarget(int(c)) for c in target])
    result = method(model, layer=layer)(images, target)
    # It scales before it resizes, in float32, and after.
    ours = scaled(shown(scaled(result.signed_map.clamp_min(0)), images.shape[2:]))
    assert np.abs(ours.numpy() - theirs).max() < 1e-6


@pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor 0 did not already")
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_guided_grad_cam_equals_captum(interpolation):
    captum = pytest.importorskip("captum.attr")
    # Captum sees modules only, and is wrong where a rectifier's input has another consumer.
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5),
    ).to(DOUBLE).eval()  # fmt: skip
    images, target = torch.randn(3, 3, 18, 18, dtype=DOUBLE), torch.tensor([4, 0, 2])
    theirs = captum.GuidedGradCam(model, model[3]).attribute(images, target, interpolate_mode=interpolation)
    result = GuidedGradCAM(model, layer="3", interpolation=interpolation)(images, target)
    torch.testing.assert_close(result.attribution, theirs.detach(), rtol=0, atol=1e-14)
    assert torch.equal(result.heatmap, result.attribution.abs().amax(1))


@pytest.mark.parametrize(
    "rectifier", [nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.1), nn.SiLU(), nn.GELU(), nn.ELU(), nn.Hardswish()]
)
def test_guided_grad_cam_is_both_in_one(rectifier):
    """Two readings of one forward, whatever the rectifier keeps."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), rectifier, nn.Conv2d(8, 6, 3, 2), rectifier, nn.Flatten(), nn.Linear(6 * 25, 5)
    ).to(DOUBLE).eval()  # fmt: skip
    images, targets = torch.randn(2, 3, 11, 11, dtype=DOUBLE), [[1, 3], [0, 4]]
    result = GuidedGradCAM(model, layer="0")(images, targets)
    cam, guided = GradCAM(model, layer="0")(images, targets), GuidedBackprop(model)(images, targets)
    assert torch.equal(result.signed_map, cam.signed_map)
    assert torch.equal(result.attribution, guided.attribution * cam.heatmap[:, None])
    assert result.target.tolist() == [1, 3, 0, 4]


def test_guided_grad_cam_says_that_nothing_is_guided(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).eval()
    explain = GuidedGradCAM(model)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        explain(torch.randn(1, 3, 5, 5))
        explain(torch.randn(1, 3, 5, 5))
    assert caplog.text.count("the model has no rectifier") == 1


# What all share


@pytest.mark.parametrize("method", [GradCAM, GradCAMPlusPlus])
def test_several_layers_are_averaged_at_equal_scale(net, images, method):
    one, two = (method(net, layer=name)(images, 1).heatmap for name in ("conv1", "conv2"))
    both = method(net, layer=["conv2", "conv1"])(images, 1)
    expected = (one / one.amax((1, 2), keepdim=True) + two / two.amax((1, 2), keepdim=True)) / 2
    torch.testing.assert_close(both.heatmap, expected, rtol=0, atol=1e-14)
    assert both.signed_map is None


@pytest.mark.parametrize("method", FAMILY)
def test_rows_and_targets(net, images, method):
    explain = method(net)
    together = explain(images, [[1, 4], [0, 2]])
    for row, (n, c) in enumerate([(0, 1), (0, 4), (1, 0), (1, 2)]):
        alone = explain(images[n : n + 1], c)
        for name in ("heatmap", "signed_map", "score"):
            torch.testing.assert_close(getattr(together[row], name), getattr(alone, name), rtol=1e-9, atol=1e-14)
    top = net(images).argmax(1)
    assert torch.equal(explain(images).target, top)
    by_function = explain(images, lambda y: y.gather(1, top[:, None])[:, 0])
    torch.testing.assert_close(by_function.heatmap, explain(images).heatmap, rtol=0, atol=1e-14)
    assert by_function.target is None


@pytest.mark.parametrize("layout", ["last", "tokens", "class token"])
def test_other_layouts(layout):
    class Layout(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.conv, self.layer, self.fc, self.layout = nn.Conv2d(3, 12, 3), nn.Identity(), nn.Linear(12, 5), name

        def forward(self, x):
            x = self.conv(x).relu()
            if self.layout == "first":
                return self.fc((self.layer(x * 1) ** 2).mean((2, 3)))
            x = x.permute(0, 2, 3, 1)
            if self.layout != "last":
                x = x.flatten(1, 2)
            if self.layout == "class token":
                x = torch.cat([x.new_ones(len(x), 1, 12), x], 1)
            x = self.layer(x * 1) ** 2
            x = x[:, 1:] if self.layout == "class token" else x
            return self.fc(x.flatten(1, -2).mean(1))

    images = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    first, other = Layout("first").to(DOUBLE).eval(), Layout(layout).to(DOUBLE).eval()
    other.load_state_dict(first.state_dict())
    for method in (GradCAM, GradCAMPlusPlus):
        expected = method(first, layer="layer")(images, 2)
        torch.testing.assert_close(
            method(other, layer="layer")(images, 2).signed_map, expected.signed_map, rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("reads", ["class token", "mean"])
def test_the_automatic_layer_of_a_transformer_sees_every_patch(reads):
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            self.patches, self.encoder = (
                nn.Conv2d(3, 8, 4, 4),
                nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            )
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).mT
            x = self.norm(self.encoder(torch.cat([x.new_zeros(len(x), 1, 8), x], 1)))
            return self.fc(x[:, 0] if reads == "class token" else x.mean(1))

    model, images = Transformer().to(DOUBLE).eval(), torch.randn(2, 3, 16, 16, dtype=DOUBLE)
    explain = GradCAM(model)
    tape = record(model, images, policy=GradientRules())
    expected = "encoder.layers.0.add_1" if reads == "class token" else "norm.native_layer_norm"
    assert explain.names(tape) == [expected]
    result = explain(images, 1)
    assert result.signed_map.shape == (2, 4, 4)
    assert (result.signed_map != 0).all()


def test_nothing_is_kept_below_the_layer(net, images):
    explain = GradCAM(net, layer="conv2")
    recorded = explain._record(images, (), {})
    maker = recorded.tape.producer(recorded.layers[0])
    assert maker.name == "conv2.conv2d"
    saved = {node.name for node in recorded.tape if node.saved}
    assert saved == {"conv2.conv2d", "relu.relu"}
    assert {node.name for node in record(net, images, policy=GradientRules()) if node.saved} == {"relu_1", "relu.relu"}


def test_an_activation_that_is_overwritten_later_is_kept(images):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.norm(self.conv(x)).relu_().mean((2, 3)))

    model = Overwrites().to(DOUBLE).eval()
    activation, grad = gradients(model, "norm", images, torch.tensor([1, 4]))
    expected = (grad.mean((2, 3), keepdim=True) * activation).sum(1)
    torch.testing.assert_close(GradCAM(model, layer="norm")(images, [1, 4]).signed_map, expected, rtol=0, atol=1e-14)


def test_a_layer_that_is_the_image(images):
    model = (
        nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(560, 3)).to(DOUBLE).eval()
    )
    leaf = images.clone().requires_grad_()
    grad = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0]
    result = GradCAM(model, layer="0")(images, 1)
    torch.testing.assert_close(result.signed_map, (grad.mean((2, 3), keepdim=True) * images).sum(1), rtol=0, atol=1e-14)


def test_a_model_that_runs_otherwise_on_a_batch(images):
    class Branches(Averages):
        def forward(self, x):
            return super().forward(x * 1 if len(x) > 1 else self.relu(x * 1 + 9) - 9)

    model = Branches().to(DOUBLE).eval()
    explain = GradCAM(model, layer="relu")
    plain = GradCAM(Averages().to(DOUBLE).eval(), layer="relu")
    plain.model.load_state_dict(model.state_dict())
    torch.testing.assert_close(explain(images, 2).signed_map, plain(images, 2).signed_map, rtol=0, atol=1e-14)
    torch.testing.assert_close(explain(images + 9, 2).signed_map, plain(images + 9, 2).signed_map, rtol=0, atol=1e-14)


def test_further_arguments_go_with_the_whole_batch(images):
    class Scaled(Averages):
        def forward(self, x, scale):
            return super().forward(x * scale.view(len(x), 1, 1, 1))

    model = Scaled().to(DOUBLE).eval()
    plain = GradCAM(Averages().to(DOUBLE).eval())
    plain.model.load_state_dict(model.state_dict())
    scale = torch.tensor([2.0, 0.5], dtype=DOUBLE)
    expected = plain(images * scale.view(2, 1, 1, 1), 2)
    torch.testing.assert_close(GradCAM(model)(images, 2, scale).signed_map, expected.signed_map, rtol=0, atol=1e-14)


def test_a_layer_that_does_not_lead_to_the_answer(images):
    class Beside(Averages):
        def __init__(self):
            super().__init__()
            self.beside = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return super().forward(x), self.beside(x)

    model = Beside().to(DOUBLE).eval()
    for method in (GradCAM, GradCAMPlusPlus, GuidedGradCAM):
        with pytest.raises(InputError, match=r"layer must lead to what is explained, got 'beside.conv2d'"):
            method(model, layer="beside")(images)
    assert GradCAM(model, layer="beside")(images, lambda out: out[1].sum((1, 2, 3))).heatmap.isfinite().all()
    with pytest.raises(InputError, match="target must be a function of the class scores alone"):
        CAM(model)(images, lambda out: out[1].sum((1, 2, 3)))


def test_a_layer_written_to_through_a_view(images):
    class Writes(nn.Module):
        def forward(self, x):
            x = x * 1
            x[:, 0] = 0
            return x

    model = nn.Sequential(Writes(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(560, 3)).to(DOUBLE).eval()
    with pytest.raises(InputError, match="layer must return the result of an operation"):
        GradCAM(model, layer="0")(images)


def test_reading_from_a_layer_on_is_for_one_recording(net, images):
    policy = Above({}, {"conv2.conv2d"}, set())
    tape = record(net, images, policy=policy)
    assert set(tape.find("conv2") and tape.nodes[tape.find("conv2").producer].saved) == {"activation.0"}
    recorder = LayerRecorder(GradCAM(net), {}, lambda tape, ends: [Place("relu")])
    assert recorder(images, (), {}).activations[0].shape[1] == 6


def test_bottlenecks(net, images):
    names = [node.name for node in bottlenecks(record(net, images, policy=GradientRules()))]
    assert names == ["conv1.conv2d", "relu_1", "add", "relu.relu", "mean", "clone", "fc.linear"]


@pytest.mark.parametrize(
    ("method", "settings", "word"),
    [
        (GradCAM, {"layer": []}, "layer must name"),
        (GradCAM, {"layout": "middle"}, "layout must be"),
        (GradCAMPlusPlus, {"epsilon": -1}, "epsilon must not be negative"),
        (GuidedGradCAM, {"interpolation": "cubic"}, "interpolation must be one of"),
        (GuidedGradCAM, {"reduction": "median"}, "reduction must be one of"),
    ],
)
def test_settings_that_do_not_exist(net, method, settings, word):
    with pytest.raises(InputError, match=word):
        method(net, **settings)


def test_a_layer_that_is_not_there_gets_the_close_names(net, images):
    with pytest.raises(InputError, match="must name a module or operation that ran such as 'conv2'"):
        GradCAM(net, layer="conv3")(images)
    with pytest.raises(InputError, match=r"layer must have a spatial map .* got \[2, 5\]"):
        GradCAM(net, layer="fc")(images)
