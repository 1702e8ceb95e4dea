"""Consensus: the geometric mean of three heat maps, two of them written out here."""

import itertools

import numpy as np
import pytest
import torch
from oracles import excitation as slow
from torch import nn
from torch.nn import functional

from pyfast_xai import CNNFixations, Consensus, ExcitationBackprop
from pyfast_xai.errors import InputError

TARGETS = [[0, 3], [2, 2]]


class Strided(nn.Module):
    """Four convolutions of stride 2: the third map has stride 8, the last stride 16."""

    def __init__(self):
        super().__init__()
        sides = [3, 4, 6, 8, 8]
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1) for before, after in itertools.pairwise(sides))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Strided().double().eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 48, dtype=torch.float64)


def written_out(model, image, target):
    """Returns the maps of excitation backprop and LayerCAM at the third convolution, `[h, w]`, neuron by neuron."""
    x = image.numpy()
    activations = []
    for conv in model.convs:
        x = np.maximum(slow.convolve(x, conv.weight.detach().numpy(), conv.bias.detach().numpy(), 2, 1), 0)
        activations.append(x)
    third, last = activations[2:]
    weight = model.fc.weight.detach().numpy()
    wins = np.zeros(5)
    wins[target] = 1
    wins = slow.average(slow.linear(wins, last.mean((1, 2)), weight), last)
    wins = slow.convolution(wins, third, model.convs[3].weight.detach().numpy(), 2, 1).sum(0)

    def score(channel, y, z, step):
        moved = third.copy()
        moved[channel, y, z] += step
        conv = model.convs[3]
        out = slow.convolve(moved, conv.weight.detach().numpy(), conv.bias.detach().numpy(), 2, 1)
        return weight[target] @ np.maximum(out, 0).mean((1, 2))

    cam = np.zeros(third.shape[1:])
    for channel, y, z in np.ndindex(third.shape):
        slope = (score(channel, y, z, 1e-6) - score(channel, y, z, -1e-6)) / 2e-6
        cam[y, z] += max(slope, 0) * third[channel, y, z]
    return wins, cam


def test_heat_map_is_the_geometric_mean_of_three(model, images):
    explanation = Consensus(model)(images, TARGETS)
    density = CNNFixations(model)(images, TARGETS)
    assert explanation.target.tolist() == [0, 3, 2, 2]
    for row, target in enumerate(explanation.target.tolist()):
        maps = [density.heatmap[row].double()]
        for own in written_out(model, images[row // 2], target):
            map_ = torch.from_numpy(own)[None, None]
            maps.append(functional.interpolate(map_, images.shape[2:], mode="bilinear")[0, 0])
        expected = torch.stack([own / own.max() for own in maps]).prod(0) ** (1 / 3)
        assert expected.any()
        # Cubes, as a cube root blows up the rounding of what is next to nothing.
        torch.testing.assert_close(explanation.heatmap[row].double() ** 3, expected**3, rtol=1e-5, atol=1e-7)
        assert torch.equal(explanation.points[row], density.points[row])
    torch.testing.assert_close(explanation.score, density.score)


def test_the_rule_of_boxes_is_that_of_the_method_unless_named(model, images):
    explanation = Consensus(model)(images)
    assert str(explanation.box_rule) == "mass:0.01:3"
    assert torch.equal(explanation.boxes(), explanation.boxes("mass:0.01:3"))
    named = Consensus(model, box_rule="segment:0.4")(images)
    assert torch.equal(named.boxes(), explanation.boxes("segment:0.4"))


def test_the_layer_is_that_of_both_maps(model, images):
    found = Consensus(model, layer="convs.1")(images, TARGETS)
    assert not torch.equal(found.heatmap, Consensus(model)(images, TARGETS).heatmap)
    wins = ExcitationBackprop(model, layer="convs.1")(images, TARGETS).heatmap
    assert not found.heatmap[wins == 0].any()
    with pytest.raises(InputError, match="layer"):
        Consensus(model, layer="convs.9")(images)


def test_a_replayed_model_gives_the_same(model, images):
    images, model = images.float(), model.float()
    expected = Consensus(model)(images, TARGETS).heatmap
    explain = Consensus(model).accelerate()
    for _ in range(2):
        torch.testing.assert_close(explain(images, TARGETS).heatmap, expected, rtol=1e-3, atol=1e-4)
