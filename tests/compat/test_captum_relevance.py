"""DeepLift, GradientShap, LRP, layers and neurons with Captum's signatures: Captum's numbers where it is right."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import InputError
from pyfast_xai.compat import captum as ours
from pyfast_xai.compat.captum import lrp_rules

theirs = pytest.importorskip("captum.attr")
DOUBLE = torch.float64


class Net(nn.Module):
    """Modules that Captum's rules know, each used one time."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, stride=2), nn.Sigmoid()
        self.flat, self.fc = nn.Flatten(), nn.Linear(72, 5)

    def forward(self, x, scale=1.0):
        return self.fc(self.flat(self.relu2(self.conv2(self.relu1(self.conv1(x)))))) * scale


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to(DOUBLE).eval()


def images(seed=1):
    return torch.randn(2, 3, 8, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


TARGET = [1, 3]
SPATIAL = {"baselines": images(2), "target": TARGET}
DRAWN = {"baselines": images(3), "target": TARGET, "n_samples": 3, "stdevs": 0.1}
NEURON = {"neuron_selector": (2, 1, 1)}
# Name of the class, which layer it takes (None for none), and the arguments of `attribute` beside the inputs.
CALLS = {
    "DeepLift": (None, SPATIAL),
    "DeepLiftShap": (None, SPATIAL),
    "GradientShap": (None, DRAWN),
    "LayerActivation": ("conv2", {}),
    "LayerGradientXActivation": ("relu1", {"target": TARGET}),
    "InternalInfluence": ("conv2", {**SPATIAL, "n_steps": 6}),
    "LayerConductance": ("conv2", {**SPATIAL, "n_steps": 6}),
    "LayerIntegratedGradients": ("conv2", {**SPATIAL, "n_steps": 6}),
    "LayerDeepLift": ("conv2", SPATIAL),
    "LayerDeepLiftShap": ("conv2", SPATIAL),
    "LayerGradientShap": ("conv2", DRAWN),
    "NeuronGradient": ("conv2", NEURON),
    "NeuronConductance": ("conv2", {**NEURON, **SPATIAL, "n_steps": 6}),
    "NeuronIntegratedGradients": ("conv2", {**NEURON, "n_steps": 6}),
    "NeuronDeepLift": ("conv2", {**NEURON, "baselines": images(2)}),
    "NeuronDeepLiftShap": ("conv2", {**NEURON, "baselines": images(2)}),
    "NeuronGradientShap": ("conv2", {**NEURON, "baselines": images(2), "n_samples": 3}),
    "NeuronGuidedBackprop": ("conv2", NEURON),
    "NeuronDeconvolution": ("conv2", NEURON),
}


def attributed(library, name, net, **more):
    layer, settings = CALLS[name]
    arguments = [net] if layer is None else [net, getattr(net, layer)]
    np.random.seed(0)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(library, name)(*arguments).attribute(images(), **settings, **more)


def same(result, expected, rtol=1e-8, atol=1e-11):
    if isinstance(expected, tuple):
        assert isinstance(result, tuple)
        assert len(result) == len(expected)
        for item, other in zip(result, expected, strict=True):
            same(item, other, rtol, atol)
    else:
        torch.testing.assert_close(result, expected.detach(), rtol=rtol, atol=atol)


# Captum holds the places of integrals in single precision, and adds 1e-9 to the denominators of max-pools, too.
LOOSE = {"rtol": 1e-5, "atol": 1e-8}


@pytest.mark.parametrize("name", CALLS)
def test_equals_captum(name, net):
    result = attributed(ours, name, net)
    same(result, attributed(theirs, name, net), **LOOSE if "Integrated" in name or name == "NeuronConductance" else {})


DELTAS = ["DeepLift", "DeepLiftShap", "GradientShap", "LayerConductance", "LayerIntegratedGradients", "LayerDeepLift"]


@pytest.mark.parametrize("name", [*DELTAS, "LayerGradientShap"])
def test_deltas_equal_captum(name, net):
    more = {"return_convergence_delta": True, "additional_forward_args": (2.0,)}
    same(attributed(ours, name, net, **more), attributed(theirs, name, net, **more))


INPUTS = [name for name, (layer, _) in CALLS.items() if layer is not None and not name.startswith("Neuron")]


@pytest.mark.parametrize("name", INPUTS)
def test_what_goes_into_a_layer_equals_captum(name, net):
    more = {"attribute_to_layer_input": True}
    same(attributed(ours, name, net, **more), attributed(theirs, name, net, **more))


@pytest.mark.parametrize("selector", [(2, slice(0, 2), 1), lambda a: a.flatten(1).sum(1)], ids=["slice", "function"])
def test_neurons_are_selected_as_by_captum(selector, net):
    result = ours.NeuronGradient(net, net.conv2).attribute(images(), selector)
    expected = theirs.NeuronGradient(net, net.conv2).attribute(images().requires_grad_(), selector)
    same(result, expected)


SELECTORS = {
    "slices": (slice(1, 4), slice(0, 2), 1),
    "function": lambda a: a[:, 3].flatten(1).sum(1),
}


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    "more",
    [{"internal_batch_size": 4}, {"attribute_to_neuron_input": True}, {"method": "gausslegendre"}],
    ids=["batches", "input", "quadrature"],
)
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.filterwarnings("ignore:The neuron_selector provided is a callable")
def test_conductance_of_neurons_equals_captum(selector, more, multiply, net):
    call = {"target": 3, "n_steps": 5, "additional_forward_args": (2.0,), **more}
    result, expected = (
        library.NeuronConductance(net, net.conv2, multiply_by_inputs=multiply).attribute(
            images(), SELECTORS[selector], **call
        )
        for library in (ours, theirs)
    )
    assert expected.abs().max() > 1e-6
    same(result, expected, **LOOSE)


def test_conductance_of_all_neurons_adds_up_to_integrated_gradients(net):
    """The chain rule, summed over a layer that all of the output passes."""
    whole = ours.IntegratedGradients(net).attribute(images(), target=2, n_steps=8, method="riemann_trapezoid")
    explain = ours.NeuronConductance(net, net.fc)
    result = explain.attribute(images(), 2, target=2, n_steps=8)
    same(result, whole)
    assert explain.attribute(images(), 1, target=2, n_steps=8).abs().max() == 0


def test_no_layer_of_the_user_gets_a_hook(net, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", refuse)
        patch.setattr(nn.Module, "register_forward_pre_hook", refuse)
        result = {name: attributed(ours, name, net) for name in CALLS}
        options = ours.LayerIntegratedGradients(net, net.conv2).attribute(
            images(), target=3, n_steps=4, attribute_to_layer_input=True
        )
    same(result["LayerIntegratedGradients"], attributed(theirs, "LayerIntegratedGradients", net), **LOOSE)
    expected = theirs.LayerIntegratedGradients(net, net.conv2).attribute(
        images(), target=3, n_steps=4, attribute_to_layer_input=True
    )
    same(options, expected, **LOOSE)


@pytest.mark.parametrize("name", [*CALLS, "LRP", "LayerLRP"])
def test_signatures_are_captums(name):
    for method in ("__init__", "attribute"):
        actual, other = (
            list(inspect.signature(getattr(getattr(one, name), method)).parameters) for one in (ours, theirs)
        )
        assert actual == other, method


# LRP


def rectified():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)),
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.to(DOUBLE).eval()


def attach(net, library):
    """Attaches rules to the modules of `rectified`, anew: Captum takes them away."""
    net[0].rule, net[4].rule = library.GammaRule(), library.Alpha1_Beta0_Rule(set_bias_to_zero=True)
    net[1].rule, net[7].rule, net[9].rule = library.IdentityRule(), library.EpsilonRule(), library.EpsilonRule(0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rules", ["none", "own", "captum's"])
def test_relevance_equals_captum(rules):
    captums = pytest.importorskip("captum.attr._utils.lrp_rules")
    net = rectified()
    net[7].rule = captums.EpsilonRule()  # Captum knows no rule of its own for this module
    if rules != "none":
        attach(net, captums)
    expected, expected_delta = theirs.LRP(net).attribute(images(), target=TARGET, return_convergence_delta=True)
    if rules != "none":
        attach(net, captums if rules == "captum's" else lrp_rules)
    result, delta = ours.LRP(net).attribute(images(), target=TARGET, return_convergence_delta=True)
    same((result, delta), (expected, expected_delta), **LOOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at_input", [False, True], ids=["output", "input"])
def test_relevance_of_layers_equals_captum(at_input):
    captums = pytest.importorskip("captum.attr._utils.lrp_rules")
    net = rectified()
    net[7].rule = captums.EpsilonRule()
    expected = theirs.LayerLRP(net, net[4]).attribute(images(), target=TARGET, attribute_to_layer_input=at_input)
    result = ours.LayerLRP(net, net[4]).attribute(images(), target=TARGET, attribute_to_layer_input=at_input)
    same(result, expected, **LOOSE)
    several = ours.LayerLRP(net, [net[4], net[0]]).attribute(images(), target=TARGET, attribute_to_layer_input=at_input)
    assert [item.shape[1] for item in several] == ([6, 3] if at_input else [8, 6])
    same(several[0], result)


class Functions(nn.Module):
    """A network that Captum gets wrong or refuses: functions, a module that runs twice, SiLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.SiLU(), nn.Linear(3, 5)

    def forward(self, x):
        for _ in range(2):
            x = x + self.act(self.conv(x))
        return self.fc(functional.gelu(x).mean((2, 3)))


def test_deep_lift_adds_up_where_captums_does_not():
    net = Functions().to(DOUBLE).eval()
    _, delta = ours.DeepLift(net).attribute(images(), target=TARGET, return_convergence_delta=True)
    torch.testing.assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-12)


def test_custom_attributions_get_what_they_name(net):
    for function in (lambda m: m, lambda m, x: [a * b for a, b in zip(m, x, strict=True)], lambda m, x, b: m):
        result = ours.DeepLift(net).attribute(images(), **SPATIAL, custom_attribution_func=function)
        assert result.shape == images().shape


def test_several_inputs_share_the_output():
    class Two(nn.Module):
        def forward(self, a, b):
            return torch.stack([(a * b).sum((1, 2, 3)), (a.tanh() - b).sum((1, 2, 3))], 1)

    net, options, starts = Two().eval(), (images(1), images(2)), (images(3), 0.5)
    result, delta = ours.DeepLift(net).attribute(options, starts, [0, 1], return_convergence_delta=True)
    assert [item.shape for item in result] == [item.shape for item in options]
    torch.testing.assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-11)


def test_nothing_of_the_model_is_changed(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name in CALLS:
        attributed(ours, name, net)
    ours.LRP(net).attribute(images(), target=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "rule") for m in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: ours.DeepLift(len), "model must be a torch.nn.Module, got builtin_function_or_method"),
        (
            lambda net: ours.DeepLiftShap(net).attribute(images(), images()[:1], 1),
            "baselines must have at least 2 rows, got 1",
        ),
        (
            lambda net: ours.GradientShap(net).attribute(images(), 0.0, target=1),
            "baselines must be a tensor for each of 1",
        ),
        (
            lambda net: ours.NeuronGradient(net, net.conv2).attribute(images(), 3),
            "neuron_selector must choose one number",
        ),
        (lambda net: ours.LayerActivation(net, "conv2"), "layer must be a torch.nn.Module, got str"),
        (
            lambda net: ours.LayerActivation(net, nn.ReLU()).attribute(images()),
            "layer must run in the forward pass, got ReLU",
        ),
        (lambda net: ours.NeuronGradient(net, nn.ReLU()).attribute(images(), 3), "layer must run in the forward pass"),
    ],
    ids=["function", "one", "number", "selector", "name", "other", "neuron"],
)
def test_what_does_not_fit_is_said_so(call, message, net):
    with pytest.raises(InputError, match=message):
        call(net)


def test_a_rule_that_is_none_is_said_so(net):
    net.conv1.rule = 3
    for error in (InputError, TypeError):  # the latter is Captum's
        with pytest.raises(error, match=r"rule of a module must be one of EpsilonRule, .* got int"):
            ours.LRP(net)
    with pytest.raises(TypeError, match="got int"):
        ours.LayerLRP(net, net.conv2)


class Branches(nn.Module):
    """A layer of two tensors, which the output reads unevenly, and two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.pair = nn.Linear(4, 3), nn.Linear(6, 3), Pair()

    def forward(self, x, y):
        one, other = self.pair(self.first(x), self.second(y))
        return one * 2 + other


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, one, other):
        return self.relu1(one), self.relu2(other)


@pytest.fixture
def branches():
    torch.manual_seed(4)
    draw = torch.Generator().manual_seed(5)
    x, y = (torch.randn(3, size, dtype=DOUBLE, generator=draw) for size in (4, 6))
    return Branches().to(DOUBLE).eval(), (x, y)


@pytest.mark.parametrize("layer", ["first", "pair"], ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("name", ["LayerConductance", "LayerDeepLift", "LayerGradientShap", "LayerIntegratedGradients"])
def test_deltas_of_a_layer_of_any_number_of_tensors(name, layer, branches):
    """Of two inputs. What passes `first` alone is not all of the change, so that its delta is not zero."""
    net, inputs = branches
    starts = tuple(torch.zeros_like(tensor) for tensor in inputs)
    results = []
    for library in (ours, theirs):
        np.random.seed(0)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explainer = getattr(library, name)(net, getattr(net, layer))
            results.append(explainer.attribute(inputs, starts, target=1, return_convergence_delta=True))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    if layer == "pair" and name == "LayerDeepLift":
        torch.testing.assert_close(results[0][1], torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Multiple layers provided")  # Captum's
def test_the_way_of_several_layers(branches):
    net, inputs = branches
    results = []
    for library in (ours, theirs):
        explainer = library.LayerIntegratedGradients(net, [net.first, net.second])
        results.append(explainer.attribute(inputs, target=1, n_steps=6, return_convergence_delta=True))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert isinstance(results[0][0], list)


def test_a_selector_may_leave_out_dimensions_of_length_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(6), nn.Flatten(), nn.Linear(1, 2)).to(DOUBLE)
    rows = torch.randn(2, 6, dtype=DOUBLE)
    result = ours.NeuronGradient(net, net[1]).attribute(rows, 0)
    torch.testing.assert_close(result, theirs.NeuronGradient(net, net[1]).attribute(rows.requires_grad_(), 0))
    assert (result.detach().sum(1) == 1).all()


NO_METHODS = ("LayerAttribution", "LimeBase", "NoiseTunnel", "metrics", "visualization")


@pytest.mark.parametrize("name", sorted(set(ours.__all__).difference(NO_METHODS)))
def test_what_attributions_are_units_of_is_captums(name, net):
    """Whether they multiply by inputs, and can tell their delta."""
    layered = name.startswith(("Layer", "Neuron", "Internal", "GuidedGrad"))
    arguments = [net, net.conv2] if layered else [net]
    result, expected = (getattr(library, name)(*arguments) for library in (ours, theirs))
    assert result.multiplies_by_inputs == expected.multiplies_by_inputs
    assert result.has_convergence_delta() == expected.has_convergence_delta()
