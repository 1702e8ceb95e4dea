import copy

import numpy as np
import pytest
import torch
from oracles import excitation as slow
from torch import nn
from torch.nn import functional

from pyfast_xai import ExcitationBackprop
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.layer_search import bottlenecks
from pyfast_xai.rules.gradient import EXCITATION, Contrastive, GradientRules, backward_pass, last_weighted
from pyfast_xai.tape import record

DOUBLE = torch.float64


class Residual(nn.Module):
    """Every rule of the paper and a sum: convolution, max-pool, addition, average, linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.relu, self.fc1, self.fc2 = nn.ReLU(inplace=True), nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.max_pool2d(self.relu(self.conv1(x)), 2)
        x = self.relu(x + self.conv2(x))
        return self.fc2(functional.relu(self.fc1(x.mean((2, 3)))))

    def slow(self, image, target, contrastive=False):
        """Probabilities at the rectified first convolution and behind the pool, and the image, `[C, h, w]` each."""
        actual = {name: parameter.detach().numpy() for name, parameter in self.named_parameters()}
        image = image.numpy()
        a = np.maximum(slow.convolve(image, actual["conv1.weight"], actual["conv1.bias"], 2, 1), 0)
        b = a.reshape(6, a.shape[1] // 2, 2, a.shape[2] // 2, 2).max((2, 4))
        c = slow.convolve(b, actual["conv2.weight"], actual["conv2.bias"], 1, 1)
        d = np.maximum(b + c, 0)
        e = d.mean((1, 2))
        f = np.maximum(actual["fc1.weight"] @ e + actual["fc1.bias"], 0)
        p = np.zeros(5)
        p[target] = 1
        at_f = slow.linear(p, f, actual["fc2.weight"])
        if contrastive:
            at_f = at_f - slow.linear(p, f, -actual["fc2.weight"])
        at_d = slow.average(slow.linear(at_f, e, actual["fc1.weight"]), d)
        skip, branch = slow.add(at_d, b, c)
        at_b = skip + slow.convolution(branch, b, actual["conv2.weight"], 1, 1)
        at_a = slow.max_pool(at_b, a, 2)
        return at_a, at_b, slow.convolution(at_a, image, actual["conv1.weight"], 2, 1)


@pytest.fixture
def net():
    return Residual().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 12, dtype=DOUBLE)


class Identity(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.images, self.inner = nn.Identity(), inner

    def forward(self, x):
        return self.inner(self.images(x))


def unbiased(model):
    """What a bias alone makes fire is excited by nobody, and its probability would end there."""
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


@pytest.mark.parametrize("contrastive", [False, True])
def test_equals_the_paper_neuron_by_neuron(net, images, contrastive):
    model = Identity(net).eval()
    for i, layer in enumerate(["inner.conv1.conv2d", "inner.max_pool2d", "images"]):
        result = ExcitationBackprop(model, contrastive=contrastive, layer=layer)(images, [[1, 4], [0, 2]])
        for row, (n, c) in enumerate([(0, 1), (0, 4), (1, 0), (1, 2)]):
            expected = net.slow(images[n], c, contrastive)[i].sum(0)
            np.testing.assert_allclose(result.signed_map[row].numpy(), expected, rtol=0, atol=1e-14)


def test_what_wins_is_a_probability_at_every_layer(net, images):
    unbiased(net)
    tape = record(net, images, policy=GradientRules(EXCITATION))
    start = torch.zeros(1, 2, 5, dtype=DOUBLE)
    start[0, :, 3] = 1
    recorded = 0
    for node in bottlenecks(tape):
        arrived = backward_pass(GradientRules(EXCITATION), tape, {tape.outputs: start}, node.outputs, retain=True)[0]
        assert (arrived >= 0).all()
        torch.testing.assert_close(arrived.flatten(2).sum(2), torch.ones(1, 2, dtype=DOUBLE), rtol=0, atol=1e-13)
        recorded += 1
    assert recorded > 7


def test_a_contrast_cancels_in_the_sum_and_points_apart(net, images):
    result = ExcitationBackprop(net, contrastive=True, layer="max_pool2d")(images, [[1, 4], [0, 2]])
    torch.testing.assert_close(result.signed_map.sum((1, 2)), torch.zeros(4, dtype=DOUBLE), rtol=0, atol=1e-14)
    assert (result.signed_map.amin((1, 2)) < 0).all()
    assert (result.heatmap >= 0).all()


def test_a_contrast_is_the_difference_to_the_negated_layer(net, images):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc2.weight.neg_()
    one, two, both = (
        ExcitationBackprop(model, contrastive=contrastive, layer="max_pool2d")(images, 1).signed_map
        for model, contrastive in ((net, False), (other, False), (net, True))
    )
    torch.testing.assert_close(both, one - two, rtol=0, atol=1e-14)


def zennit_excitation(model, activation, target):
    """What zennit finds at the input of a rectified network; its own rule counts biases unless told not to."""
    zennit = pytest.importorskip("zennit.composites")
    composite = zennit.ExcitationBackprop(stabilizer=1e-30, zero_params=["bias"])
    leaf = activation.clone().requires_grad_()
    with composite.context(model) as modified:
        output = modified(leaf)
        return torch.autograd.grad(output, leaf, functional.one_hot(target, output.shape[1]).to(output.dtype))[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_zennit_on_a_plain_network(groups):
    pools = nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1, groups=groups), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(8, 8, 3, 1, 2, 2), nn.ReLU(),
        pools[0], nn.Conv2d(8, 6, 1), nn.ReLU(), pools[1], nn.Flatten(), nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3),
    ).to(DOUBLE).eval()  # fmt: skip
    activation, target = torch.rand(3, 4, 15, 14, dtype=DOUBLE), torch.tensor([2, 0, 1])
    explain = ExcitationBackprop(Identity(model).eval(), layer="images")
    expected = zennit_excitation(model, activation, target).sum(1)
    torch.testing.assert_close(explain(activation, target).signed_map, expected, rtol=0, atol=1e-12)


OPS = {
    "batch norm passes": (nn.BatchNorm2d(4), lambda x, p: p),
    "a rectifier passes": (nn.ReLU(), lambda x, p: p),
    "a smooth one passes": (nn.GELU(), lambda x, p: p),
    "a layer norm passes": (nn.LayerNorm(5), lambda x, p: p),
    "interpolation shares": (nn.Upsample(scale_factor=1.0, mode="bilinear"), lambda x, p: torch.where(x > 0, p, 0)),
    "padding moves": (nn.ZeroPad2d(0), lambda x, p: p),
}


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


def excite(function, p, *values):
    tape = record(Applies(function).eval(), *values, policy=GradientRules(EXCITATION))
    return [
        arrived[0] for arrived in backward_pass(GradientRules(EXCITATION), tape, {tape.outputs: p[None]}, tape.inputs)
    ]


@pytest.mark.parametrize("name", OPS)
def test_single_operations(name):
    module, expected = OPS[name]
    x, p = torch.randn(2, 4, 5, 5), torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(excite(module.eval(), p, x)[0], expected(x, p))


def test_a_gate_gets_nothing_and_a_feature_all():
    x, gate, p = torch.randn(2, 4, 5, 5), torch.rand(2, 4, 1, 1), torch.rand(2, 4, 5, 5)
    one, other = excite(lambda x, gate: x * gate.sigmoid(), p, x, gate)
    assert torch.equal(one, p)
    assert not other.any()
    assert torch.equal(excite(lambda x: x * x.sigmoid(), p, x)[0], p)  # both halves
    assert torch.equal(excite(lambda x: x / 3 * -2 + 1, p, x)[0], p)


def test_a_difference_is_excited_by_what_is_negative_below():
    one, two = torch.tensor([2.0, 1.0, -1.0, -1.0]), torch.tensor([-2.0, 3.0, -4.0, 1.0])
    p = torch.ones(4)
    first, second = excite(lambda a, b: a - b, p, one, two)
    assert first.tolist() == [0.5, 1, 0, 0]
    assert second.tolist() == [0.5, 0, 1, 0]
    # A bias excites nobody.
    assert torch.equal(excite(lambda a: a + two, p, one)[0], p)


def test_attention_shares_by_attention_and_value():
    query, key = torch.randn(1, 1, 3, 4, dtype=DOUBLE), torch.randn(1, 1, 3, 4, dtype=DOUBLE)
    value, p = torch.rand(1, 1, 3, 4, dtype=DOUBLE), torch.rand(1, 1, 3, 4, dtype=DOUBLE)
    weights = (query @ key.mT / 2).softmax(-1)[0, 0]
    expected = value * (weights.T @ (p / (weights @ value)))
    for function in (functional.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v):
        *others, actual = excite(function, p, query, key, value)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
        assert not any(other.any() for other in others)


def test_attention_by_a_mask_that_depends_on_the_images():
    """As relative positions make it of the queries (SAM's encoder)."""
    query, key, mask = (torch.randn(1, 1, 3, 4, dtype=DOUBLE) for _ in range(3))
    value, p = torch.rand(1, 1, 3, 4, dtype=DOUBLE), torch.rand(1, 1, 3, 4, dtype=DOUBLE)

    def fused(q, k, v, m):
        return functional.scaled_dot_product_attention(q, k, v, m @ m.mT)

    def spelled_out(q, k, v, m):
        return (q @ k.mT / 2 + m @ m.mT).softmax(-1) @ v

    result, expected = (excite(function, p, query, key, value, mask)[2] for function in (fused, spelled_out))
    assert expected.any()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


def test_products_with_constants_on_either_side():
    x, weight = torch.rand(3, 4, dtype=DOUBLE), torch.randn(4, 5, dtype=DOUBLE)
    p = torch.rand(3, 5, dtype=DOUBLE)
    expected = torch.stack(
        [torch.from_numpy(slow.linear(a.numpy(), b.numpy(), weight.T.numpy())) for a, b in zip(p, x, strict=True)]
    )
    bias = torch.randn(5, dtype=DOUBLE)
    for function in (lambda x: x @ weight, lambda x: torch.addmm(bias, x, weight), lambda x: (weight.T @ x.T).T):
        torch.testing.assert_close(excite(function, p, x)[0], expected, rtol=0, atol=1e-14)


def test_nothing_that_excites_gets_nothing():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(27, 4)).eval()
    result = ExcitationBackprop(model, layer="0")(-torch.rand(1, 2, 3, 3))
    assert not result.signed_map.any()
    assert result.heatmap.isfinite().all()


def test_the_last_layer_with_weights(net, images):
    tape = record(net, images, policy=GradientRules(EXCITATION))
    assert last_weighted(tape, [tape.outputs]) == "fc2.linear"
    averaged = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    tape = record(averaged, images.float(), policy=GradientRules(EXCITATION))
    assert last_weighted(tape, [tape.outputs]) == "0.conv2d"
    assert Contrastive("0.conv2d").rule_of(tape.nodes[0]) != Contrastive("another").rule_of(tape.nodes[0])


def test_no_layer_to_contrast():
    model = nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputError, match="contrastive must be False for a model without a layer with weights"):
        ExcitationBackprop(model, contrastive=True)(torch.rand(1, 3, 8, 8))


# Of ResNet-50 and GoogLeNet the layers of the authors' notebooks (res4a, pool3), of VGG-16 that of TorchRay's benchmark
# (pool4).
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg16", "features.23.max_pool2d"),
        ("resnet50", "layer3.0.add"),
        ("googlenet", "maxpool3.max_pool2d"),
        ("mobilenet_v2", "features.7.conv.1.0.conv2d"),
    ],
)
def test_the_automatic_layer(name, expected):
    models = pytest.importorskip("torchvision.models")
    settings = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **settings)
    model = model.to_empty(device="cpu").eval()  # shapes are all that is looked at
    tape = record(model, torch.zeros(1, 3, 96, 64))
    assert ExcitationBackprop(model).automatic(tape) == [expected]


def test_a_model_that_nothing_passes_as_one():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 5)

        def forward(self, x):
            return self.one(x).mean((2, 3)) + self.other(x).mean((2, 3))

    with pytest.raises(InputError, match="layer must be named for a model without a map that everything passes"):
        ExcitationBackprop(Parallel().eval())(torch.rand(1, 3, 8, 8))
    assert ExcitationBackprop(Parallel().eval(), layer="one")(torch.rand(1, 3, 8, 8)).heatmap.isfinite().all()


def test_residual_networks_of_torchvision_keep_a_probability():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(weights=None, num_classes=10).to(DOUBLE).eval()
    result = ExcitationBackprop(model, layer=["layer2", "layer4"])(
        torch.randn(2, 3, 64, 48, dtype=DOUBLE), [[1, 2]] * 2
    )
    assert result.signed_map is None
    for layer in ("layer2", "layer4"):
        sums = ExcitationBackprop(model, layer=layer)(torch.randn(1, 3, 64, 48, dtype=DOUBLE)).signed_map.sum((1, 2))
        torch.testing.assert_close(sums, torch.ones(1, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_starts_other_than_a_class(net, images):
    explain = ExcitationBackprop(net, layer="max_pool2d")
    one, two = (explain(images, c).signed_map for c in (0, 3))
    mixed = torch.zeros(2, 5, dtype=DOUBLE)
    mixed[:, 0], mixed[:, 3] = 0.25, 0.75
    torch.testing.assert_close(explain(images, mixed).signed_map, 0.25 * one + 0.75 * two, rtol=0, atol=1e-14)
    torch.testing.assert_close(explain(images, lambda y: y[:, 3]).signed_map, two, rtol=0, atol=1e-14)
