"""zennit's rules, composites and attributors: its numbers, on models that stay as they are."""

import inspect

import pytest
import torch
from small_networks import small
from torch import nn
from torch.nn import functional

from pyfast_xai import InputError
from pyfast_xai.compat import zennit as ours

pytest.importorskip("zennit")
DOUBLE = torch.float64


def theirs(module):
    return pytest.importorskip(f"zennit.{module}")


def images():
    return torch.randn(2, 3, 16, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def plain():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=0), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, stride=2), nn.LeakyReLU(0.1), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(32, 7)),
        *(nn.ReLU(), nn.Linear(7, 5)),
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.double().eval()


ONE_HOT = functional.one_hot(torch.tensor([1, 3]), 5).double()
COMPOSITES = {
    "EpsilonPlus": {"epsilon": 0.1},
    "EpsilonPlusFlat": {"zero_params": "bias"},
    "EpsilonAlpha2Beta1": {},
    "EpsilonAlpha2Beta1Flat": {},
    "EpsilonGammaBox": {"low": -3.0, "high": 3.0},
    "ExcitationBackprop": {},
    "DeconvNet": {},
    "GuidedBackprop": {},
    "BetaSmooth": {"beta_smooth": 3.0},
}


def both(find):
    """Returns what a function finds with our modules and with zennit's."""
    result = []
    for name in ("ours", "theirs"):
        torch.manual_seed(0)
        result.append(find(lambda module, name=name: getattr(ours, module) if name == "ours" else theirs(module)))
    return result


def same(result, expected):
    for item, other in zip(result, expected, strict=True):
        torch.testing.assert_close(item, other.detach(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("merged", [False, True], ids=["as it is", "merged"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_have_zennits_numbers(name, merged):
    def find(library):
        canonizers = [library("canonizers").SequentialMergeBatchNorm()] if merged else None
        composite = getattr(library("composites"), name)(**COMPOSITES[name], canonizers=canonizers)
        with library("attribution").Gradient(plain(), composite) as attributor:
            return attributor(images(), ONE_HOT)

    same(*both(find))


@pytest.mark.parametrize("rule", ["Gamma", "Epsilon", "ZPlus", "AlphaBeta", "WSquare"])
def test_rules_without_biases_have_zennits_numbers(rule):
    """Biases large enough to turn signs: Gamma favours by the sign of the result with its bias."""

    def find(library):
        net = plain()
        nn.init.normal_(net[0].bias, std=2.0)
        layer_map = [(nn.Conv2d, getattr(library("rules"), rule)(zero_params="bias"))]
        composite = library("composites").LayerMapComposite(layer_map)
        with library("attribution").Gradient(net, composite) as attributor:
            return attributor(images(), ONE_HOT)

    same(*both(find))


@pytest.mark.parametrize("merged", [False, True], ids=["as it is", "merged"])
def test_a_resnet_has_zennits_numbers_with_and_without_its_canonizer(merged):
    net = small("resnet")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0

    def find(library):
        canonizers = [library("torchvision").ResNetCanonizer()] if merged else None
        composite = library("composites").EpsilonPlusFlat(canonizers=canonizers)
        return library("attribution").Gradient(net, composite)(images(), ONE_HOT)

    same(*both(find))


@pytest.mark.parametrize("name", ["Gradient", "SmoothGrad", "IntegratedGradients"])
def test_attributors_have_zennits_numbers(name):
    more = {} if name == "Gradient" else {"n_iter": 3}

    def find(library):
        composite = library("composites").EpsilonPlus()
        attributor = getattr(library("attribution"), name)
        return [
            *attributor(plain(), composite, lambda output: ONE_HOT * output, **more)(images()),
            *attributor(plain(), **more)(images(), ONE_HOT),
            *attributor(plain(), **more)(images()),
        ]

    same(*both(find))


@pytest.mark.parametrize(
    "more", [{"window": (8, 8), "stride": (8, 4)}, {"window": (3, 9, 8), "stride": (3, 8, 8)}], ids=["two", "three"]
)
def test_occlusion_has_zennits_numbers(more):
    def find(library):
        hidden = library("attribution").occlude_independent
        return [
            *library("attribution").Occlusion(plain(), **more)(images(), lambda output: ONE_HOT * output),
            *library("attribution").Occlusion(plain(), occlusion_fn=hidden, **more)(images()),
        ]

    same(*both(find))


def test_composites_by_name_and_mixed_ones_have_zennits_numbers():
    def find(library):
        rules, composites = library("rules"), library("composites")
        by_name = composites.NameMapComposite([(["0"], rules.WSquare()), (["4", "8"], rules.Gamma(0.1))])
        first = composites.SpecialFirstLayerMapComposite([], [(nn.Conv2d, rules.Flat())])
        stabilizer = library("core").Stabilizer(0.1, clip=True, norm_scale=True)
        mixed = [
            composites.MixedComposite([by_name, composites.EpsilonPlus()]),
            composites.MixedComposite([first, composites.EpsilonAlpha2Beta1()]),
            composites.NameLayerMapComposite([(["10"], rules.Epsilon(stabilizer))], [(nn.Linear, rules.Epsilon(0.2))]),
            library("core").Composite(lambda ctx, name, module: rules.Pass() if name == "2" else None),
        ]
        return [library("attribution").Gradient(plain(), item)(images(), ONE_HOT)[1] for item in mixed]

    same(*both(find))


def test_gradients_inside_a_context_are_relevance():
    def find(library):
        composite = library("composites").EpsilonPlusFlat()
        x = images().requires_grad_()
        with composite.context(plain()) as modified:
            output = modified(x)
            (result,) = torch.autograd.grad(output, x, ONE_HOT, retain_graph=True)
        return [output.detach(), result]

    same(*both(find))


def test_an_inactive_composite_gives_the_gradient():
    net = plain()
    attributor = ours.attribution.Gradient(net, ours.composites.EpsilonPlus())
    with attributor.inactive():
        result = attributor(images(), ONE_HOT)[1]
    torch.testing.assert_close(result, ours.attribution.Gradient(net)(images(), ONE_HOT)[1])
    assert not torch.allclose(result, attributor(images(), ONE_HOT)[1])


def test_nothing_of_the_model_is_changed():
    net = plain()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    composite = ours.composites.EpsilonPlus(canonizers=[ours.canonizers.SequentialMergeBatchNorm()])
    with composite.context(net) as modified, ours.attribution.Gradient(net, composite) as attributor:
        modified(images())
        attributor(images(), ONE_HOT)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


SIGNATURES = {
    "rules": ("Epsilon", "Gamma", "ZPlus", "AlphaBeta", "ZBox", "WSquare", "Flat", "Norm", "Pass", "ReLUBetaSmooth"),
    "composites": (
        *(*COMPOSITES, "LayerMapComposite", "SpecialFirstLayerMapComposite", "NameMapComposite", "MixedComposite"),
        *("NameLayerMapComposite", "layer_map_base", "register_composite"),
    ),
    "attribution": ("Gradient", "SmoothGrad", "IntegratedGradients", "Occlusion", "occlude_independent"),
    "core": ("Composite", "Stabilizer"),
    "canonizers": ("NamedMergeBatchNorm", "CompositeCanonizer"),
    "layer": ("Sum",),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SIGNATURES.items() for name in names])
def test_signatures_are_zennits(module, name):
    actual, other = (inspect.signature(getattr(library, name)) for library in (getattr(ours, module), theirs(module)))
    described = [[(p.name, p.default, p.kind) for p in one.parameters.values()] for one in (actual, other)]
    assert described[0] == described[1]


# What zennit's modules have that is not here, and docs/migration/zennit.md gives the reason for.
ABSENT = {
    "rules": {"ClampMod", "GammaMod", "NoMod", "zero_bias"},
    "composites": set(),
    "attribution": {"constant", "identity"},
    "canonizers": {"AttributeCanonizer"},
    "types": {"SubclassMeta"},
    "torchvision": set(),
}


@pytest.mark.parametrize("module", ABSENT)
def test_names_are_zennits(module):
    other = theirs(module)
    names = {
        name
        for name, value in vars(other).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == other.__name__
    }
    missing = {name for name in names if not hasattr(getattr(ours, module), name)}
    assert missing == ABSENT[module]


def test_types_know_what_zennits_know():
    kinds = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    # Attention is no elementwise function, though PyTorch has it in the same file.
    kinds = [kind for kind in kinds if "Lazy" not in kind.__name__ and kind is not nn.MultiheadAttention]
    names = ("Convolution", "ConvolutionStandard", "ConvolutionTranspose", "Linear", "BatchNorm", "AvgPool")
    for name in (*names, "Activation"):
        actual, other = (getattr(library, name) for library in (ours.types, theirs("types")))
        result, expected = ([kind for kind in kinds if issubclass(kind, each)] for each in (actual, other))
        assert result == expected, name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ours.rules.Epsilon(zero_params="weight"),
            ValueError,
            "zero_params must be None or 'bias', got 'weight'",
        ),
        (lambda: ours.rules.AlphaBeta(2, 2), ValueError, "alpha and beta must not be negative and differ by 1"),
        (lambda: ours.attribution.Gradient(plain(), create_graph=True), InputError, "create_graph must be False"),
        (
            lambda: ours.attribution.Occlusion(plain(), window=2.5),
            TypeError,
            "window must be an int or a tuple of ints",
        ),
        (lambda: ours.attribution.Gradient(plain()).inactive(), InputError, "composite must be given for inactive"),
        (
            lambda: ours.attribution.Gradient(plain(), ours.core.Composite(lambda *_: ours.rules.Pass()))(images()),
            InputError,
            "module_map must give rules to modules without others inside, got one for 'the model'",
        ),
    ],
    ids=["weights", "alpha", "graph", "window", "inactive", "container"],
)
def test_what_does_not_fit_is_said_so(call, error, message):
    with pytest.raises(error, match=message):
        call()
