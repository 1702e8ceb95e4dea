"""CRP: zennit's relevance, masked at a layer between two backward passes, and sums over all channels."""

import pytest
import torch
from small_networks import FAMILIES, small
from torch import nn
from torch.nn import functional

from pyfast_xai import CRP, LRP, InputError
from pyfast_xai.rules import relevance

DOUBLE = torch.float64


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def by_zennit(net, layer, images, target, condition):
    """The definition: relevance of the layer's output, masked, and its relevance of the image; nothing goes beside."""
    composites, zoo = (pytest.importorskip(f"zennit.{name}") for name in ("composites", "torchvision"))
    seen = []
    composite = composites.EpsilonPlusFlat(canonizers=[zoo.ResNetCanonizer()])
    with composite.context(net) as modified:
        module = dict(modified.named_modules())[layer]
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        x = images.clone().requires_grad_()
        output = modified(x)
        handle.remove()
        start = functional.one_hot(torch.tensor([target] * len(x)), 5) * output.detach()
        (at_layer,) = torch.autograd.grad(output, seen[0], start, retain_graph=True)
        mask = torch.zeros_like(at_layer)
        mask[:, condition] = 1
        (found,) = torch.autograd.grad(seen[0], x, at_layer * mask)
    return found, (at_layer * mask).sum((1, 2, 3))


@pytest.mark.parametrize("layer", ["layer2", "layer3.0.conv1", "layer1"])
def test_conditions_equal_zennit_with_masks(layer, images):
    net = small("resnet")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    found = CRP(net, layer=layer, channels=[5, (0, 2, 7)])(images, [[1, 3], [1, 3]])
    assert found.conditions.sum(1).tolist() == [1, 3] * 4
    for k, target in enumerate([1, 3]):
        for m, condition in enumerate([[5], [0, 2, 7]]):
            expected, through = by_zennit(net, layer, images, target, condition)
            rows = [n * 4 + k * 2 + m for n in range(2)]
            assert found.target[rows].tolist() == [target, target]
            torch.testing.assert_close(found.attribution[rows], expected, rtol=1e-8, atol=1e-11)
            torch.testing.assert_close(found.relevance[rows], through, rtol=1e-8, atol=1e-11)


LAYERS = {
    "resnet": ("layer2", 1), "densenet": ("features.denseblock1", 1), "efficientnet": ("features.1", 1),
    "convnext": ("features.1", 1), "vit": ("encoder.layers.encoder_layer_0", -1), "swin": ("features.1", -1),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_all_channels_add_up_to_lrp(family, images):
    net, (layer, dim) = small(family), LAYERS[family]
    composite = "gamma-attention" if family in ("vit", "swin") else "epsilon-plus-flat"
    channels = CRP(net, layer=layer, channel_dim=dim, composite=composite, n_channels=1000)(images, 2)
    whole = LRP(net, composite=composite)(images, 2).attribution
    summed = channels.attribution.unflatten(0, (2, -1)).sum(1)
    torch.testing.assert_close(summed, whole, rtol=1e-7, atol=1e-9 * float(whole.abs().max()))
    assert channels.conditions.sum(1).eq(1).all()


def test_the_channels_with_the_most_relevance_come_first(images):
    net = small("resnet")
    found = CRP(net, layer="layer2", n_channels=3)(images, [[1, 3], [0, 2]])
    total = CRP(net, layer="layer2", channels=range(128))(images, [[1, 3], [0, 2]])
    assert found.relevance.shape == (12,)
    for row, relevances in enumerate(total.relevance.view(4, 128).tolist()):
        positive = sorted((one for one in relevances if one > 0), reverse=True)
        expected = [*positive, *sorted(one for one in relevances if one < 0), 0, 0, 0][:3]
        torch.testing.assert_close(found.relevance.view(4, 3)[row], torch.tensor(expected, dtype=DOUBLE))
    picked = total.attribution.view(4, 128, 3, 16, 16)[torch.arange(12) // 3, found.conditions.int().argmax(1)]
    torch.testing.assert_close(found.attribution, picked)


class Negated(nn.Module):
    """A score that four channels of positive values lower, by nothing, a little, nothing and a lot."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.fc.weight.copy_(torch.tensor([[0.0, -1.0, 0.0, -2.0]]))

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("composite", ["epsilon-plus-flat", "epsilon-alpha2-beta1"])
def test_channels_with_negative_relevance_come_before_those_with_none(images, composite):
    net = Negated().to(DOUBLE).eval()
    chosen = CRP(net, n_channels=3, composite=composite)(images.abs())
    assert chosen.conditions.int().argmax(1).tolist()[:2] == [3, 1]
    assert chosen.conditions.int().argmax(1).tolist()[3:5] == [3, 1]
    named = CRP(net, layer="conv", channels=[3, 1], composite=composite)(images.abs())
    rows = torch.tensor([0, 1, 3, 4])
    assert bool((named.relevance < 0).all())
    torch.testing.assert_close(chosen.relevance[rows], named.relevance, rtol=0, atol=0)
    torch.testing.assert_close(chosen.attribution[rows], named.attribution, rtol=0, atol=0)


def test_a_function_and_a_start_are_targets(images):
    net = small("resnet")
    expected = CRP(net, layer="layer3", channels=[1, 2])(images, 3)
    function = CRP(net, layer="layer3", channels=[1, 2])(images, lambda output: output[:, 3])
    start = functional.one_hot(torch.tensor([3, 3]), 5) * net(images).detach()
    started = CRP(net, layer="layer3", channels=[1, 2])(images, start)
    for found in (function, started):
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-7, atol=1e-10)
        assert found.target is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "layer9"}, r"layer must name a module or operation that ran such as 'layer4', .*got 'layer9'"),
        ({"layer": "layer1", "channels": [64]}, r"channels must lie in \[0, 64\) of 'layer1', got 64"),
        ({"layer": "layer1", "channels": []}, "channels must be one or more, got none"),
        ({"layer": "layer1", "n_channels": 0}, "n_channels must be at least 1, got 0"),
    ],
    ids=["layer", "channel", "none", "number"],
)
def test_what_does_not_fit_is_said_so(settings, message, images):
    with pytest.raises(InputError, match=message):
        CRP(small("resnet"), **settings)(images, 1)


def test_the_composites_are_those_of_lrp(images):
    net = small("resnet")
    box = relevance.EpsilonGammaBox(-3.0, 3.0)
    summed = CRP(net, layer="layer4", channels=[range(512)], composite=box)(images, 1).attribution
    torch.testing.assert_close(summed, LRP(net, composite=box)(images, 1).attribution, rtol=1e-7, atol=1e-10)


class Gated(nn.Module):
    """Its last convolutions make a gate, at which no relevance arrives."""

    def __init__(self):
        super().__init__()
        self.body, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(x).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc((x * gate).mean((2, 3)))


def test_the_layer_is_the_last_convolution_at_which_relevance_arrives(images, caplog):
    torch.manual_seed(0)
    net = Gated().to(DOUBLE).eval()
    automatic, named = CRP(net)(images, 2), CRP(net, layer="body")(images, 2)
    assert automatic.attribution.flatten(1).any(1).all()
    assert torch.equal(automatic.attribution, named.attribution)
    assert not caplog.records
    assert not CRP(net, layer="excite")(images, 2).attribution.any()
    (record,) = caplog.records
    assert "nothing that flows through its condition arrives at the image; name other channels" in record.getMessage()


class Tokens(nn.Module):
    """Patches without a convolution."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.fc = nn.Linear(48, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = x.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.fc(self.mix(self.embed(x).relu()).relu().mean(1))


def test_without_convolutions_the_layer_is_the_last_map(images):
    torch.manual_seed(0)
    net = Tokens().to(DOUBLE).eval()
    net.fc.weight.data.abs_()
    named = CRP(net, layer="relu_1", channel_dim=-1)(images, 2)
    assert named.conditions.shape == (2, 6)
    assert named.attribution.flatten(1).any(1).all()
    assert torch.equal(CRP(net)(images, 2).attribution, named.attribution)


class Heads(nn.Module):
    """A convolution of images and, behind it, one of the halves of its channels, each a row of the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).relu()
        x = self.pool(x.unflatten(1, (2, 4)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)
        return self.fc(x.mean((2, 3)))


def test_convolutions_of_heads_are_not_the_layer(images):
    torch.manual_seed(0)
    net = Heads().to(DOUBLE).eval()
    named = CRP(net, layer="conv")(images, 2)
    assert named.attribution.flatten(1).any(1).all()
    assert torch.equal(CRP(net)(images, 2).attribution, named.attribution)
