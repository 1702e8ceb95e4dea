"""Consensus: the geometric mean of three heat maps, two of them written out here."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import excitation as slow
from torch import nn
from torch.nn import functional

from pyfast_xai import CNNFixations, Consensus, ExcitationBackprop, LayerCAM
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.receptive_fields import without_dots
from pyfast_xai.tape import record

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


def moved_density(points, size, down, right):
    """Returns the density of points that are moved within the image, `[H, W]`, Gaussian by Gaussian."""
    sigma = 0.08 * math.hypot(*size)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in size)
    density = torch.zeros(size, dtype=torch.float64)
    for y, x in points.tolist():
        y, x = min(max(y + down, 0), size[0] - 1), min(max(x + right, 0), size[1] - 1)
        density += torch.exp(-((rows[:, None] - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2))
    return density


def test_heat_map_is_the_geometric_mean_of_three(model, images):
    explanation = Consensus(model)(images, TARGETS)
    density = CNNFixations(model)(images, TARGETS)
    assert explanation.target.tolist() == [0, 3, 2, 2]
    for row, target in enumerate(explanation.target.tolist()):
        # Four strides of 2 put the centres of the cells at 0, 16, ...: 7.5 pixels off the middle of either axis.
        maps = [moved_density(density.points[row], images.shape[2:], 7, 7)]
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


class Mixed(nn.Module):
    """A batch norm, branches that are added and concatenated, a max-pool, dropout and composite operations."""

    def __init__(self, forwards):
        super().__init__()
        self.ran = forwards.append
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.down, self.fc = nn.Conv2d(12, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        self.ran(len(x))
        x = self.stem(x)
        x = torch.concat([x + self.left(x).relu(), self.right(x).relu()], 1)
        x = self.down(x / 2).relu().mean((2, 3))
        return torch.matmul(functional.dropout(x, training=False), self.fc.weight.T) + self.fc.bias


def test_one_recording_says_what_three_say(images):
    torch.manual_seed(0)
    forwards = []
    model, images = Mixed(forwards).eval(), images.float()
    layer = "left"
    explain = Consensus(model, layer=layer, accelerate=False)
    explain(images, TARGETS)  # the first call also looks for the layer
    forwards.clear()
    explanation = explain(images, TARGETS)
    assert forwards == [2]
    density = CNNFixations(model)(images, TARGETS)
    maps = [kind(model, layer=layer)(images, TARGETS).heatmap for kind in (ExcitationBackprop, LayerCAM)]
    # Strides of 4 and 2 put the centres of the cells at 1, 9, ...: 2.5 pixels off the middle.
    moved = torch.stack([moved_density(points, images.shape[2:], 2, 2).float() for points in density.points])
    scaled = [each / each.amax((1, 2), keepdim=True) for each in (moved, *maps)]
    expected = torch.stack(scaled).prod(0)
    assert expected.any()
    torch.testing.assert_close(explanation.heatmap**3, expected, rtol=1e-4, atol=1e-6)
    for points, alone in zip(explanation.points, density.points, strict=True):
        assert torch.equal(points, alone)


class Shortcut(nn.Module):
    """A layer of stride 8 whose every second cell alone is read, as in a residual network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU())
        self.next = nn.Conv2d(6, 8, 1, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.next(self.stem(x)).relu().mean((2, 3)))


def test_cells_that_nothing_reads_are_filled_in():
    torch.manual_seed(0)
    model, images = Shortcut().eval(), torch.randn(2, 3, 96, 96)
    explanation = Consensus(model)(images, TARGETS)
    layers = [
        ExcitationBackprop(model, layer="stem.1")(images, TARGETS),
        LayerCAM(model, layer="stem.1")(images, TARGETS),
    ]
    heatmaps = []
    for each in layers:
        cells = each.signed_map.clamp_min(0)
        assert cells.any()
        assert not cells[:, 1::2].any()
        assert not cells[:, :, 1::2].any()
        heatmaps.append(functional.interpolate(without_dots(cells, (2, 2))[:, None], (96, 96), mode="bilinear")[:, 0])
    torch.testing.assert_close(layers[0].heatmap, heatmaps[0])
    density = CNNFixations(model)(images, TARGETS)
    moved = torch.stack([moved_density(points, (96, 96), 4, 4).float() for points in density.points])
    scaled = [each / each.amax((1, 2), keepdim=True) for each in (moved, *heatmaps)]
    torch.testing.assert_close(explanation.heatmap**3, torch.stack(scaled).prod(0), rtol=1e-4, atol=1e-6)


class Gated(Strided):
    """Rectifiers that are spelled out as a gate, `x sigmoid(1.7 x)`, and a sigmoid above the layer."""

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
            x = x * (1.7 * x).sigmoid()
        return self.fc(x.mean((2, 3)).tanh())


def test_gates_that_save_their_result(images):
    torch.manual_seed(0)
    model = Gated().double().eval()
    layer = Consensus(model).names(record(model, images))
    result = Consensus(model, accelerate=False)(images, [0, 2])
    maps = [
        kind(model, layer=layer, accelerate=False)(images, [0, 2]).heatmap for kind in (ExcitationBackprop, LayerCAM)
    ]
    for n in range(2):
        shown = result.heatmap[n] > 0
        assert shown.any()
        assert all((one[n][shown] > 0).all() for one in maps)  # a product has no place that one of them leaves out
        top = [one[n] / one[n].max() for one in maps]
        density = result.heatmap[n].double() ** 3 / (top[0] * top[1]).clamp_min(1e-30)
        assert density[shown].max() <= 1 + 1e-4  # what is left is the third map, scaled to a maximum of one
