"""The centres of receptive fields, against those that a perturbation of every pixel shows."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai.explainers.common.receptive_fields import offset_of_cells
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
