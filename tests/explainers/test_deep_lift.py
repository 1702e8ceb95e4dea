"""DeepLIFT: it adds up on any network, and equals Captum where Captum's does."""

import warnings

import pytest
import torch
from case_ids import case_id
from small_networks import FAMILIES, small
from torch import nn
from torch.nn import functional

from pyfast_xai import DeepLift, DeepLiftShap, GradientShap, InputError, IntegratedGradients

DOUBLE = torch.float64
TARGET = torch.tensor([1, 3])


def drawn(seed):
    return torch.randn(2, 3, 16, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    return drawn(1)


def change(net, images, baseline, target=TARGET):
    with torch.no_grad():
        return (net(images) - net(torch.as_tensor(baseline, dtype=DOUBLE).expand(images.shape)))[range(2), target]


@pytest.mark.parametrize("baseline", [0.5, drawn(2)[:1], drawn(2)], ids=["number", "one", "each"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_adds_up_to_the_change_of_the_score(family, baseline, images):
    net = small(family)
    result = DeepLift(net, baseline=baseline)(images, TARGET).attribution
    torch.testing.assert_close(result.sum((1, 2, 3)), change(net, images, baseline), rtol=1e-9, atol=1e-11)


def peer(name):
    return getattr(pytest.importorskip("captum.attr"), name)


ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.ELU(),
    nn.Softplus(),
    nn.LeakyReLU(0.2),
    nn.MaxPool2d(2),
]


def layers(activation):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), activation, nn.Flatten(), nn.LazyLinear(5)).double().eval()
    net(drawn(1))
    return net


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=case_id)
def test_equals_captum(activation, images):
    net, baseline = layers(activation), drawn(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peer("DeepLift")(net).attribute(images, baselines=baseline, target=TARGET)
    result = DeepLift(net, baseline=baseline)(images, TARGET).attribution
    torch.testing.assert_close(result, expected.detach(), rtol=1e-10, atol=1e-13)


def test_averages_over_baselines_as_captum(images):
    net, baselines = layers(nn.Softplus()), torch.cat([drawn(2), drawn(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peer("DeepLiftShap")(net).attribute(images, baselines=baselines, target=TARGET)
    result = DeepLiftShap(net, baselines=baselines)(images, TARGET).attribution
    torch.testing.assert_close(result, expected.detach(), rtol=1e-10, atol=1e-13)


class Written(nn.Module):
    """Operations of all kinds, each of which gives a few scores."""

    def forward(self, x):
        y = functional.relu(x)
        y *= x.square() - 0.5
        left, right = x[:, :, :4, :4].flatten(2), x[:, :, 4:8, :4].flatten(2)
        heads = x.flatten(2).view(-1, 3, 16, 16)
        parts = {
            "in place": y.sum((2, 3)),
            "extremes": torch.cat([x.amax((2, 3)), x.max(-1).values.min(-1).values, x.amin((1, 2, 3))[:, None]], 1),
            "larger": torch.maximum(x.mean((2, 3)), x[:, :, 0, 0]) - torch.minimum(x[:, :, 1, 1], x[:, :, 2, 2]),
            "quotient": x.mean((2, 3)) / (1 + x[:, :, 3, 3].square()) - 1 / (2 + x[:, :, 3, 4].abs()),
            "length": functional.normalize(x.flatten(1), dim=1)[:, :3],
            "deviation": x.std((2, 3)),
            "matrices": (left @ right.mT).flatten(1),
            "softmax": (left @ right.mT).softmax(1).flatten(1),
            "log-softmax": (left @ right.mT).log_softmax(-1).flatten(1),
            "attention": functional.scaled_dot_product_attention(heads, heads[:, 1:2], x[:, :1], is_causal=True)[
                :, 0, 3
            ],
            "pools": functional.max_pool2d(x, 3, 2, 1).flatten(1)[:, :8],
            "pools of lines": functional.max_pool1d(x[:, 0], 3, ceil_mode=True).flatten(1)[:, :8],
            "adaptive": functional.adaptive_max_pool2d(x, (3, 2)).flatten(1),
            "norms": functional.group_norm(x, 3).flatten(1)[:, :4] + functional.instance_norm(x).flatten(1)[:, -4:],
            "powers": torch.sigmoid(x.flatten(1)[:, :4]) ** 2.5,
            "product": (x[:, :, :3, :3] * 0.5).prod(-1).flatten(1),
            "selected": torch.where(torch.eye(16, dtype=torch.bool), x, -x.exp()).sum((2, 3)),
        }
        return torch.cat([parts[name] for name in self.wanted], 1)


KINDS = (
    *("in place", "extremes", "larger", "quotient", "length", "deviation", "matrices", "softmax", "log-softmax"),
    *("attention", "pools", "pools of lines", "adaptive", "norms", "powers", "product", "selected"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_every_kind_add_up(kind, images):
    net = Written().eval()
    net.wanted = [kind]
    baseline = drawn(2)
    count = net(images).shape[1]
    result = DeepLift(net, baseline=baseline)(images, [[*range(count)]] * 2).attribution.sum((1, 2, 3)).view(2, count)
    # The quadrature of an operation without a rule is exact to about ten digits here.
    torch.testing.assert_close(result, net(images) - net(baseline), rtol=1e-8, atol=1e-9)


def test_where_image_and_baseline_are_equal_it_is_the_gradient(images):
    class Sum(nn.Module):
        def forward(self, x):
            return functional.softplus(x[:, 0] + x[:, 1]).flatten(1)[:, :4]

    baseline = images.clone()
    baseline[:, 0] += 0.5
    baseline[:, 1] -= 0.5  # the sum is the same
    result = DeepLift(Sum().eval(), baseline=baseline)(images, TARGET).attribution
    path = IntegratedGradients(Sum().eval(), baseline=baseline)(images, TARGET).attribution
    assert path.abs().sum() > 0.1
    torch.testing.assert_close(result, path, rtol=1e-9, atol=1e-12)


def test_very_different_scores_leave_a_softmax_finite(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.Softmax(1)).double().eval()
    net[1].weight.data *= 500
    result = DeepLift(net, outputs="probabilities")(images, TARGET).attribution
    torch.testing.assert_close(result.sum((1, 2, 3)), change(net, images, 0.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["resnet", "vit", "swin"])
def test_a_row_depends_neither_on_the_batch_nor_on_the_other_targets(family, images):
    explain = DeepLift(small(family), baseline=0.2)
    both = explain(images, [[1, 3], [3, 0]]).attribution
    torch.testing.assert_close(both[2:3], explain(images[1:], 3).attribution, rtol=1e-7, atol=1e-10)


def test_an_accelerated_model_gives_the_same(images):
    net = small("resnet").float()
    expected = DeepLift(net)(images.float(), TARGET).attribution
    explain = DeepLift(net).accelerate()
    for _ in range(3):
        result = explain(images.float(), TARGET).attribution
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-3)


def test_gradient_shap_is_a_loop_over_random_places(images):
    net, baselines = small("resnet"), torch.cat([drawn(2), drawn(3)])
    result = GradientShap(net, baselines=baselines, n_samples=3, noise=0.1, seed=5)(images, TARGET).attribution
    generator, total = torch.Generator().manual_seed(5), 0
    for _ in range(3):
        alpha = float(torch.rand((), generator=generator))
        baseline = baselines[int(torch.randint(4, (), generator=generator))]
        noisy = images + 0.1 * torch.randn(1, 3, 16, 16, generator=generator).double()
        place = (baseline + alpha * (noisy - baseline)).requires_grad_()
        score = net(place)[range(2), TARGET].sum()
        total = total + torch.autograd.grad(score, place)[0] * (noisy - baseline)
    torch.testing.assert_close(result, total / 3, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda net: DeepLift(net, baseline=torch.zeros(5, 5)),
            r"baseline must broadcast to the images, .*got \[5, 5\]",
        ),
        (lambda net: DeepLiftShap(net, baselines=0.0), r"baselines must be images \[B, C, H, W\], got float"),
        (
            lambda net: DeepLiftShap(net, baselines=torch.zeros(2, 3, 8, 8)),
            "baselines must have the size of the images",
        ),
        (lambda net: GradientShap(net, noise=-1), "noise must not be negative, got -1"),
    ],
    ids=["baseline", "number", "size", "noise"],
)
def test_what_does_not_fit_is_said_so(make, message, images):
    with pytest.raises(InputError, match=message):
        make(layers(nn.Tanh()))(images, TARGET)


def test_a_model_that_runs_otherwise_on_the_baseline_is_said_so(images):
    class Decides(nn.Module):
        def forward(self, x):
            return (x.relu() if x.any() else x.tanh()).mean((2, 3))

    with pytest.raises(InputError, match="model must run the same operations on images and baselines, got others from"):
        DeepLift(Decides().eval())(images, 1)
