"""LRP: zennit's numbers where it is right, the rules written slowly where it has none, and conservation."""

import math

import pytest
import torch
from case_ids import case_id
from small_networks import FAMILIES, small
from torch import nn
from torch.nn import functional

from pyfast_xai import LRP, Composite, InputError, InputXGradient, record
from pyfast_xai.rules import relevance
from pyfast_xai.rules.gradient import backward_pass
from pyfast_xai.rules.relevance import (
    AlphaBeta,
    Bilinear,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    LayerRule,
    Norm,
    Pass,
    Taylor,
    WSquare,
    ZBox,
    ZPlus,
)

DOUBLE = torch.float64
TARGET = torch.tensor([1, 3])


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def plain():
    """Returns a network that zennit reads rightly, with the batch norms that its canonizers merge exactly."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=0), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8, eps=0), nn.LeakyReLU(0.1), nn.AvgPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(32, 7), nn.BatchNorm1d(7, eps=0), nn.ReLU(), nn.Linear(7, 5)),
    )
    for module in net:
        if hasattr(module, "running_var"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net.double().eval()


def zennit_finds(net, images, composite, canonizers, target=TARGET):
    attribution = pytest.importorskip("zennit.attribution")
    with attribution.Gradient(net, composite(canonizers=canonizers)) as attributor:
        one_hot = functional.one_hot(target, 5).to(images)
        return attributor(images.clone(), lambda output: one_hot * output)[1].detach()


def walked(net, x, above, composite):
    """Returns the relevance of the input of a network for that of its output."""
    policy = relevance.RelevanceRules()
    tape = record(net, x, policy=policy)
    start = {tape.outputs: above[None]}
    return backward_pass(policy.by(composite, tape, {}), tape, start, [tape.inputs[0]])[0][0]


PAIRS = {
    "EpsilonPlus": {"epsilon": 0.1},
    "EpsilonPlusFlat": {"stabilizer": 0.01},
    "EpsilonAlpha2Beta1": {},
    "EpsilonAlpha2Beta1Flat": {},
    "EpsilonGammaBox": {"low": -3.0, "high": 3.0, "gamma": 0.5},
}


@pytest.mark.parametrize(("name", "settings"), PAIRS.items(), ids=PAIRS)
def test_composites_equal_zennit_with_its_canonizers(name, settings, images):
    composites, canonizers = (pytest.importorskip(f"zennit.{item}") for item in ("composites", "canonizers"))
    net = plain()
    expected = zennit_finds(
        net,
        images,
        lambda canonizers: getattr(composites, name)(**settings, canonizers=canonizers),
        [canonizers.SequentialMergeBatchNorm()],
    )
    result = LRP(net, composite=getattr(relevance, name)(**settings))(images, TARGET)
    torch.testing.assert_close(result.attribution, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["EpsilonPlusFlat", "EpsilonGammaBox"])
def test_a_resnet_equals_zennit_with_the_canonizer_for_it(name, images):
    composites, zoo = (pytest.importorskip(f"zennit.{item}") for item in ("composites", "torchvision"))
    net = small("resnet")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    settings = PAIRS[name]
    expected = zennit_finds(
        net,
        images,
        lambda canonizers: getattr(composites, name)(**settings, canonizers=canonizers),
        [zoo.ResNetCanonizer()],
    )
    result = LRP(net, composite=getattr(relevance, name)(**settings))(images, TARGET)
    torch.testing.assert_close(result.attribution, expected, rtol=1e-8, atol=1e-11)


RULES = [
    ("Epsilon", Epsilon(0.2)), ("Gamma", Gamma(0.3)), ("ZPlus", ZPlus()), ("AlphaBeta", AlphaBeta(1.5, 0.5)),
    ("ZBox", ZBox(-1.0, 2.0)), ("WSquare", WSquare()), ("Flat", Flat()), ("Norm", Norm()),
]  # fmt: skip
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2), (4, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 4)),
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("name", "rule"), RULES, ids=[name for name, _ in RULES])
def test_a_rule_of_one_layer_equals_zennit(name, rule, layer):
    rules, core = pytest.importorskip("zennit.rules"), pytest.importorskip("zennit.core")
    make, shape = LAYERS[layer]
    net = make().double()
    x = torch.randn(2, *shape, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        above = torch.randn_like(net(x))
    settings = {item: getattr(rule, item) for item in getattr(rule, "__dataclass_fields__", {})}
    settings = {item: value for item, value in settings.items() if name != "ZPlus" or item == "stabilizer"}
    if name == "Norm":
        settings = {"stabilizer": rule.epsilon}
    hook = getattr(rules, name)(**settings)
    with core.Composite(module_map=lambda ctx, path, module: hook).context(net) as modified:
        (expected,) = torch.autograd.grad(modified(x), x, above)
    result = walked(net, x.detach(), above, Composite({"layer": rule}))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


CONSERVING = Composite(
    {
        ("layer", "sum", "pool", "normalization", "other"): Epsilon(1e-13),
        ("attention", "matmul"): Bilinear(first=0, stabilizer=1e-13),
    }
)


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_adds_up_to_the_score_without_biases(family, images):
    net = small(family, biases=False)
    result = LRP(net, composite=CONSERVING)(images, TARGET).attribution
    scores = net(images).detach()[range(2), TARGET]
    torch.testing.assert_close(result.sum((1, 2, 3)), scores, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_neither_on_the_batch_nor_on_the_other_targets(family, images):
    net = small(family)
    explain = LRP(net, composite="gamma-attention" if family in ("vit", "swin") else "epsilon-plus-flat")
    both = explain(images, [[1, 3], [3, 0]]).attribution
    assert both.isfinite().all()
    torch.testing.assert_close(both[2:3], explain(images[1:], 3).attribution, rtol=1e-6, atol=1e-9)


def test_epsilon_alone_is_the_gradient_times_the_input_of_a_rectified_network(images):
    net = small("resnet")
    rules = Composite({("layer", "sum", "pool", "batch_norm"): Epsilon(1e-14)})
    result = LRP(net, composite=rules)(images, TARGET).attribution
    torch.testing.assert_close(result, InputXGradient(net)(images, TARGET).attribution, rtol=1e-6, atol=1e-8)


class Spelled(nn.Module):
    """A residual network of functions, written in place, with one layer used twice."""

    def __init__(self, style):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.norm, self.style = nn.BatchNorm2d(4), style
        self.norm.running_mean.normal_()

    def forward(self, x):
        if self.style == "modules":
            x = functional.relu(self.norm(self.conv1(x)))
            for _ in range(2):
                x = functional.relu(x + self.conv2(x))
            return self.fc(functional.avg_pool2d(x, 16).flatten(1))
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        shift = self.norm.bias - self.norm.running_mean * scale
        weight, bias = self.conv1.weight * scale.view(-1, 1, 1, 1), self.conv1.bias * scale + shift
        x = functional.conv2d(x, weight, bias, padding=1).relu_()
        for _ in range(2):
            y = functional.conv2d(x, self.conv2.weight, self.conv2.bias, padding="same")
            y += x
            x = torch.clamp_min(y, 0)
        return torch.addmm(self.fc.bias, x.mean((2, 3)), self.fc.weight.T)


@pytest.mark.parametrize("composite", ["epsilon-plus-flat", "epsilon-alpha2-beta1", "epsilon"])
def test_the_spelling_of_a_network_does_not_matter(composite, images):
    net = Spelled("modules").double().eval()
    expected = LRP(net, composite=composite)(images, TARGET).attribution
    net.style = "functions"
    result = LRP(net, composite=composite)(images, TARGET).attribution
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


# Attention, softmax and layer norm, written after the equations of AttnLRP


def test_fused_attention_follows_attnlrp():
    class Attention(nn.Module):
        def forward(self, x):
            q, k, v = x.chunk(3, -1)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    torch.manual_seed(3)
    mask = torch.rand(5, 5) > 0.2
    mask.fill_diagonal_(True)
    x, above = torch.randn(2, 5, 9, dtype=DOUBLE), torch.randn(2, 5, 3, dtype=DOUBLE)
    q, k, v = x.chunk(3, -1)
    scores = q @ k.mT / math.sqrt(3)
    a = scores.masked_fill(~mask, -math.inf).softmax(-1)
    o = a @ v
    e = torch.where(o >= 0, 1e-6, -1e-6)
    at_a, at_v = torch.zeros_like(a), torch.zeros_like(v)
    for n in range(2):
        for j in range(5):
            for i in range(5):
                for p in range(3):  # Eq. 14
                    half = a[n, j, i] * v[n, i, p] * above[n, j, p] / (o + e)[n, j, p] / 2
                    at_a[n, j, i] += half
                    at_v[n, i, p] += half
    at_scores = scores * (at_a - a * at_a.sum(-1, keepdim=True))  # Eq. 12
    at_scores = at_scores.masked_fill(~mask, 0)
    share = at_scores / (scores + torch.where(scores >= 0, 1e-6, -1e-6)) / 2 / math.sqrt(3)
    expected = torch.cat([q * (share @ k), k * (share.mT @ q), at_v], -1)
    result = walked(Attention(), x, above, Composite())
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    values = walked(Attention(), x, above, Composite({"attention": Bilinear(first=0)}))
    torch.testing.assert_close(values, torch.cat([q * 0, k * 0, 2 * at_v], -1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "net",
    [
        nn.LayerNorm(6),
        nn.LayerNorm((4, 6), elementwise_affine=False),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4, affine=True),
        nn.RMSNorm(6),
    ],
    ids=case_id,
)
def test_normalization_shares_with_its_spread_as_a_constant(net):
    net = net.double().eval()
    for weight in net.parameters():
        nn.init.normal_(weight)
    x, above = torch.randn(3, 4, 6, dtype=DOUBLE), torch.randn(3, 4, 6, dtype=DOUBLE)
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    share = above / (y + torch.where(y >= 0, 1e-6, -1e-6))
    # The derivative of the spread by itself, taken out of that of the whole.
    grouped = {nn.GroupNorm: (3, 2, -1), nn.InstanceNorm1d: (3, 4, -1), nn.LayerNorm: (3, 4, 6)}
    whole = isinstance(net, nn.LayerNorm) and len(net.normalized_shape) == 2
    shape = (3, -1) if whole else grouped.get(type(net), (3, 4, 6))
    parts = leaf.reshape(shape)
    centered = parts if isinstance(net, nn.RMSNorm) else parts - parts.mean(-1, keepdim=True)
    epsilon = torch.finfo(DOUBLE).eps if isinstance(net, nn.RMSNorm) else net.eps
    spread = (centered.square().mean(-1, keepdim=True) + epsilon).sqrt().detach()
    z = (centered / spread).reshape(x.shape)
    if getattr(net, "weight", None) is not None:
        each = (lambda w: w[:, None]) if isinstance(net, (nn.GroupNorm, nn.InstanceNorm1d)) else (lambda w: w)
        z = z * each(net.weight)
        z = z if getattr(net, "bias", None) is None else z + each(net.bias)
    torch.testing.assert_close(z, y)
    (gradient,) = torch.autograd.grad(z, leaf, share.detach())
    torch.testing.assert_close(walked(net, x, above, Composite()), x * gradient, rtol=1e-9, atol=1e-12)


# Composites


class Named(LayerRule):
    def __init__(self, recorded, name):
        self.seen, self.name = recorded, name

    def relevance(self, layer, above):
        self.seen.append((self.name, layer.name))
        return Epsilon().relevance(layer, above)


def test_rules_are_chosen_by_kind_depth_name_type_and_function(images):
    recorded = []
    rules = {
        "layer1.*": Named(recorded, "pattern"),
        "layer4.0.conv2": Named(recorded, "path"),
        "last layer": Named(recorded, "last"),
        "first convolution": Named(recorded, "first"),
        (nn.MaxPool2d, nn.ReLU): Named(recorded, "type"),
        (lambda node: node.path == "layer2.0.conv1"): Named(recorded, "function"),
        "convolution in layer3": Named(recorded, "both"),
        "convolution": Named(recorded, "kind"),
        "sum": Named(recorded, "sum"),
    }
    net = small("resnet")
    LRP(net, composite=Composite(rules))(images, TARGET)
    chosen = {name: rule for rule, name in recorded}
    expected = {
        **{"conv1.conv2d": "first", "fc.linear": "last", "relu.relu": "type", "layer3.0.add": "sum"},
        **{"layer1.0.conv1.conv2d": "pattern", "layer1.0.relu.relu": "pattern", "layer4.0.conv2.conv2d": "path"},
        **{"layer4.0.conv1.conv2d": "kind", "layer2.0.conv1.conv2d": "function", "layer3.0.conv1.conv2d": "both"},
    }
    assert {name: chosen[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Composite({"first block": Flat()}), "rules must name 'first' or 'last' and one of"),
        (lambda: Composite({"layer": "flat"}), r"rules must hold layer rules, such as Epsilon\(\), got 'flat'"),
        (lambda: Composite({3: Flat()}), "rules must name kinds, paths, types or functions, got 3"),
        (lambda: AlphaBeta(2, 2), "alpha and beta must not be negative and differ by 1, got alpha=2 and beta=2"),
        (lambda: LRP(nn.Flatten(), composite="gamma"), "composite must be a Composite or one of 'epsilon', .*'gamma'"),
    ],
    ids=["depth", "rule", "selector", "alpha", "name"],
)
def test_what_is_no_composite_is_said_so(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("composite", "message"),
    [
        (Composite({"layer9": Flat()}), "composite must name a module or operation that ran such as .*, got 'layer9'"),
        (Composite({"softmax": Flat(), "fc": Pass()}), "composite must give 'fc.linear' another rule than Pass"),
        (Composite({"convolution": ZBox(torch.zeros(7), 1)}), r"low and high must broadcast to the input, .*got \[7\]"),
        (Composite({"last convolution": Flat(), "other": Flat(), "activation": Flat()}), "a rule that leaves weights"),
    ],
    ids=["unknown", "pass", "box", "weights"],
)
def test_a_composite_that_does_not_fit_the_model_is_said_so(composite, message, images):
    with pytest.raises(InputError, match=message):
        LRP(small("resnet"), composite=composite)(images, TARGET)


def test_a_softmax_at_the_end_keeps_what_its_expansion_explains(images):
    net = nn.Sequential(small("resnet"), nn.Softmax(1)).eval()
    result = LRP(net, composite=Composite({"softmax": Taylor()}), outputs="probabilities")(images, TARGET)
    logits = net[0](images)
    one_hot = functional.one_hot(TARGET, 5)
    s = logits.softmax(1) * one_hot
    at_logits = logits * (s - logits.softmax(1) * s.sum(1, keepdim=True))
    below = LRP(net[0], composite=Composite())(images, at_logits.detach()).attribution
    torch.testing.assert_close(result.attribution, below, rtol=1e-6, atol=1e-9)


def test_a_start_is_the_relevance_of_the_output(images):
    net = small("resnet")
    explain = LRP(net)
    start = functional.one_hot(TARGET, 5) * net(images).detach()
    expected = explain(images, TARGET).attribution
    torch.testing.assert_close(explain(images, start).attribution, expected, rtol=1e-12, atol=1e-12)
    by_function = explain(images, lambda output: output[range(2), TARGET]).attribution
    torch.testing.assert_close(by_function, expected, rtol=1e-12, atol=1e-12)


BY_NAME = Composite({"convolution in layer1": Gamma(), "relu": Gradient()})


@pytest.mark.parametrize("composite", ["epsilon-plus-flat", BY_NAME], ids=["kinds", "names"])
def test_an_accelerated_model_gives_the_same(composite, images):
    net = small("resnet").float()
    expected = LRP(net, composite=composite)(images.float(), TARGET).attribution
    explain = LRP(net, composite=composite).accelerate()
    for _ in range(3):
        result = explain(images.float(), TARGET).attribution
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)


def test_half_precision_is_shared_in_single(images):
    net, images = small("convnext").float(), images.float()
    expected = LRP(net)(images, TARGET).attribution
    result = LRP(net.bfloat16())(images.bfloat16(), TARGET).attribution.float()
    cosine = functional.cosine_similarity(result.flatten(1), expected.flatten(1))
    assert result.isfinite().all()
    assert (cosine > 0.9).all()


def test_a_heat_map_of_negative_relevance_alone_is_said_to_be_zero(images, caplog):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2, bias=False)).double()
    net(images)
    with torch.no_grad():
        net[0].weight.abs_()
        net[0].bias.zero_()
        net[3].weight[0] = net[3].weight[0].abs()
        net[3].weight[1] = -net[3].weight[0]
    bright = images.abs()
    for target, negative in ((0, False), (1, True)):
        caplog.clear()
        explain = LRP(net.eval(), composite=Composite())
        result = explain(bright, target)
        explain(bright, target)
        assert result.attribution.any()
        assert bool(result.heatmap.any()) is not negative
        message = (
            "lrp: the attribution of row 0 is nowhere positive, so that its heat map is zero; `attribution` has what "
        )
        assert [record.getMessage() for record in caplog.records] == [f"{message}is negative"] * negative
