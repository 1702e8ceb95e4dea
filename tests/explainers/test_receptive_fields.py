"""The centres of receptive fields, against those that a perturbation of every pixel shows."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai.explainers.common.receptive_fields import offset_of_cells, period_of_cells, without_dots
from pyfast_xai.tape import record

NETWORKS = {
    "resnet": [nn.Conv2d(1, 1, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 1, 2)],
    "same-padding": [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 1, 3, 2), nn.Conv2d(1, 1, 5, padding="same")],
    "valid": [nn.Conv2d(1, 1, 3, 2, padding="valid"), nn.MaxPool2d(3, 2, ceil_mode=True)],
    "dilated": [nn.Conv2d(1, 1, (3, 5), (2, 1), (1, 2), dilation=(2, 1)), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1)],
    "patches": [nn.Conv2d(1, 1, 8, 8), nn.ReLU()],
    "padded-twice": [nn.ZeroPad2d((3, 0, 1, 2)), nn.Conv2d(1, 1, 3, 2, 1)],
}


def middle_seen(model, size):
    """Returns the middle of the centres of all receptive fields, from those of two neighbours far from the border."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    x = torch.rand(1, 1, *size, dtype=torch.float64).requires_grad_()
    # A mean sees all of the window that a maximum takes one of.
    layers = [nn.AvgPool2d(m.kernel_size, m.stride, m.padding) if isinstance(m, nn.MaxPool2d) else m for m in model]
    out = nn.Sequential(*layers)(x)[0, 0]
    cells = model(x).shape[2:]
    middles = []
    for axis, count in enumerate(cells):
        at = [side // 2 for side in cells]
        centres = []
        for cell in (count // 2, count // 2 + 1):
            at[axis] = cell
            (gradient,) = torch.autograd.grad(out[at[0], at[1]], x, retain_graph=True)
            seen = gradient[0, 0].sum(1 - axis).nonzero()
            centres.append((seen.min() + seen.max()).item() / 2)
        middles.append(centres[0] + (centres[1] - centres[0]) * ((count - 1) / 2 - count // 2))
    return middles


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(96, 112), (97, 81)], ids=["even", "odd"])
def test_offset_equals_what_the_pixels_show(name, size):
    model = nn.Sequential(*NETWORKS[name]).double().eval()
    seen = middle_seen(model, size)
    offset = offset_of_cells(record(model, torch.rand(1, 1, *size, dtype=torch.float64)))
    assert offset == pytest.approx([(side - 1) / 2 - middle for side, middle in zip(size, seen, strict=True)])


def test_residual_networks_are_half_a_stride_off():
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3, 2, 1) for _ in range(5))).eval()
    assert offset_of_cells(record(model, torch.rand(1, 1, 224, 224))) == (15.5, 15.5)


def test_the_last_map_counts_and_what_comes_behind_does_not():
    class Classifier(nn.Module):
        def forward(self, x):
            x = functional.conv2d(x, torch.ones(2, 1, 3, 3), stride=2, padding=1)
            return functional.adaptive_avg_pool2d(x + x.relu(), 1).flatten(1)

    assert offset_of_cells(record(Classifier(), torch.rand(1, 1, 32, 64))) == (0.5, 0.5)
    assert offset_of_cells(record(nn.Flatten(), torch.rand(1, 1, 32, 64))) == (0.0, 0.0)


READERS = {
    "pixel": ([nn.Conv2d(1, 1, 1, 2)], (2, 2)),
    "pixel-of-pool": ([nn.MaxPool2d(1, 3)], (3, 3)),
    "one-axis": ([nn.Conv2d(1, 1, (1, 3), (2, 2))], (2, 1)),
    "window": ([nn.Conv2d(1, 1, 3, 2, 1), nn.AvgPool2d(2)], (1, 1)),
    "narrow": ([nn.Conv2d(1, 1, 2, 3)], (3, 3)),
    "dilated": ([nn.Conv2d(1, 1, 3, 2, 2, dilation=2)], (2, 2)),
    "dilated-oddly": ([nn.Conv2d(1, 1, 3, 2, dilation=3)], (1, 1)),
    "behind-a-pixel": ([nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1, 2)], (2, 2)),
}


@pytest.mark.parametrize("name", READERS)
def test_period_is_that_of_the_gradient(name):
    layers, expected = READERS[name]
    model = nn.Sequential(*layers).double().eval()
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    x = torch.rand(1, 1, 24, 24, dtype=torch.float64)
    tape = record(model, x)
    assert period_of_cells(tape, tape.inputs[0]) == expected
    averages = [nn.AvgPool2d(m.kernel_size, m.stride) if isinstance(m, nn.MaxPool2d) else m for m in model]
    (gradient,) = torch.autograd.grad(nn.Sequential(*averages)(x.requires_grad_()).sum(), x)
    inside = gradient[0, 0, 6:18, 6:18] != 0
    for axis, period in enumerate(expected):
        rows = inside.any(1 - axis)
        # A window of two with a stride of three reads two rows of three.
        shares = 2 / 3 if name == "narrow" else 1 / period
        assert rows.double().mean() == pytest.approx(shares)


def test_period_of_a_residual_block_is_that_of_its_shortcut():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 1, 2)

        def forward(self, x):
            return (self.conv(x) + self.shortcut(x)).relu()

    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return (x + self.conv(x)).relu()

    blocks = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), Block(), Identity(), Block()).eval()
    tape = record(blocks, torch.rand(1, 1, 32, 32))
    assert period_of_cells(tape, tape.find("0")) == (2, 2)
    assert period_of_cells(tape, tape.find("1")) == (1, 1)  # the convolution of nine pixels spreads what arrives
    assert period_of_cells(tape, tape.find("2")) == (2, 2)
    assert period_of_cells(tape, tape.find("3")) == (1, 1)
    assert period_of_cells(tape, tape.inputs[0]) == (1, 1)  # windows of nine pixels lie in front
    volumes = record(nn.Conv3d(1, 1, 1, 2).eval(), torch.rand(1, 1, 4, 4, 4))
    assert period_of_cells(volumes, volumes.inputs[0]) == (1, 1)


@pytest.mark.parametrize("period", [(2, 2), (1, 3), (4, 2)])
def test_dots_are_averaged_over_the_nearer_neighbours(period):
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 9, dtype=torch.float64)
    expected = np.zeros(maps.shape)
    for row, y, x in np.ndindex(maps.shape):
        weights = sum_ = 0.0
        for v, u in np.ndindex(maps.shape[1:]):
            weight = max(period[0] - abs(v - y), 0) * max(period[1] - abs(u - x), 0)
            weights, sum_ = weights + weight, sum_ + weight * maps[row, v, u].item()
        expected[row, y, x] = sum_ / weights
    torch.testing.assert_close(without_dots(maps, period), torch.from_numpy(expected))
    assert without_dots(maps, (1, 1)) is maps


def test_a_lattice_becomes_flat():
    lattice = torch.zeros(1, 13, 13, dtype=torch.float64)
    lattice[:, ::3, ::2] = 6
    flat = without_dots(lattice, (3, 2))[0, 2:-2, 1:-1]
    torch.testing.assert_close(flat, torch.ones_like(flat))


@pytest.mark.parametrize("layer", [2, 3])
def test_stages_of_a_residual_network_are_dotted_at_their_end(layer):
    models = pytest.importorskip("torchvision.models")
    tape = record(models.resnet50(weights=None).eval(), torch.rand(1, 3, 64, 64))
    first, last = (tape.find(f"layer{layer}.{block}") for block in (0, {2: 3, 3: 5}[layer]))
    assert [period_of_cells(tape, value) for value in (first, last)] == [(1, 1), (2, 2)]
