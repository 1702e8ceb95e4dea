"""RISE against the authors' own lines, in NumPy; what it shares with other perturbations is in test_occlusion."""

import math

import numpy as np
import pytest
import torch
from oracles.rise import slow_masks
from torch import nn

from pyfast_xai import RISE
from pyfast_xai.errors import InputError
from pyfast_xai.localize import Segment

DOUBLE = torch.float64


@pytest.fixture
def net():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5)]
    return nn.Sequential(*layers).eval().double()


def slow_rise(net, image, masks, p1, softmax=True):
    """`RISE.forward` of eclique/RISE, `[classes, H, W]`."""
    with torch.no_grad():
        scores = net(torch.from_numpy(masks)[:, None] * image)
        scores = scores.softmax(1) if softmax else scores
    saliency = np.matmul(scores.numpy().T, masks.reshape(len(masks), -1)).reshape(-1, *masks.shape[1:])
    return saliency / len(masks) / p1


@pytest.mark.parametrize(
    ("size", "cells", "p1"), [((14, 21), 7, 0.5), ((16, 13), 5, 0.3), ((9, 9), 2, 0.5), ((6, 10), 8, 0.8)]
)
@pytest.mark.parametrize("softmax", [True, False])
def test_equals_the_authors(net, size, cells, p1, softmax):
    images = torch.randn(2, 3, *size, dtype=DOUBLE)
    score = "probability" if softmax else "logit"
    result = RISE(net, n_masks=37, cells=cells, p1=p1, seed=5, batch_size=10, score=score)(images, [range(5)] * 2)
    masks = slow_masks(37, cells, p1, size, 5)
    expected = np.concatenate([slow_rise(net, image, masks, p1, softmax) for image in images])
    torch.testing.assert_close(result.signed_map, torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.heatmap, torch.from_numpy(expected).clamp_min(0).float())


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_masks_one_by_one_and_all_at_once_are_the_same(net, batch):
    images = torch.randn(2, 3, 12, 12, dtype=DOUBLE)
    recorded = []
    handle = net.register_forward_pre_hook(lambda actual, inputs: recorded.append(inputs[0][:1].clone()))
    whole = RISE(net, n_masks=50, batch_size=500)(images[:1]).signed_map
    handle.remove()
    torch.testing.assert_close(
        RISE(net, n_masks=50, batch_size=batch)(images).signed_map[:1], whole, rtol=0, atol=1e-13
    )
    masks = torch.from_numpy(slow_masks(50, 7, 0.5, (12, 12), 0))
    # Twice the image itself, recorded and asked, then the masked ones.
    torch.testing.assert_close(torch.cat(recorded), torch.cat([images[:1]] * 2 + [images[:1] * masks[0]]))


def test_a_mean_over_open_masks_is_the_score_itself(net):
    images = torch.randn(2, 3, 12, 12, dtype=DOUBLE)
    result = RISE(net, n_masks=3, p1=1)(images)
    expected = result.score[:, None, None].expand_as(result.signed_map)
    torch.testing.assert_close(result.signed_map.float(), expected)


def test_masks_are_open_as_often_as_they_should(net):
    """A model that always says the same leaves the mean mask, divided by p1, which is one."""

    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2) + 0 * x.mean((1, 2, 3))[:, None]

    result = RISE(Sure().eval(), n_masks=2000, batch_size=500, p1=0.3)(torch.randn(1, 3, 14, 14, dtype=DOUBLE), 0)
    mean = result.signed_map / result.score[:, None, None]
    # The mean of 2000 draws that are 0 or 1/0.3 has a standard error of 0.034; 196 pixels stay within five.
    assert (mean - 1).abs().max() < 0.17


def test_boxes_are_cut_in_the_middle_of_the_range(net):
    assert RISE(net, n_masks=4)(torch.randn(2, 3, 12, 12, dtype=DOUBLE)).box_rule == Segment(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_masks": 0}, "n_masks must be at least 1, got 0"),
        ({"cells": 1}, "cells must be at least 2, got 1"),
        ({"p1": 0}, "p1 must lie between 0 and 1, got 0"),
        ({"p1": math.nan}, "p1 must lie between 0 and 1, got nan"),
    ],
)
def test_bad_settings(net, settings, message):
    with pytest.raises(InputError, match=message):
        RISE(net, **settings)
