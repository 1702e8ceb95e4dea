import math

import pytest
import torch
from case_ids import case_id
from torch.nn import functional as F

from pyfast_xai import ops

# Input, filters, padding: whole tiles and cut ones, one tile and many, few channels and several panels.
SHAPES = {
    "whole tiles": ((2, 16, 8, 8), 16, (1, 1)),
    "cut tiles": ((3, 32, 7, 9), 48, (1, 1)),
    "one pixel": ((1, 16, 1, 1), 16, (1, 1)),
    "one output": ((1, 16, 3, 3), 32, (0, 0)),
    "a row": ((2, 16, 1, 13), 16, (1, 0)),
    "wide padding": ((1, 16, 5, 4), 16, (2, 3)),
    "uneven": ((2, 16, 6, 11), 80, (0, 2)),
    "many tiles": ((8, 16, 30, 30), 32, (1, 1)),
    "large weights": ((2, 512, 7, 7), 528, (1, 1)),
    "no images": ((0, 16, 8, 8), 16, (1, 1)),
}


def maps(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_convolution(backend, name, bias):
    shape, filters, padding = SHAPES[name]
    input, weight = maps(*shape), torch.randn(filters, shape[1], 3, 3)
    bias = torch.randn(filters) if bias else None
    expected = F.conv2d(input.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    result = ops.winograd_conv2d(input, ops.winograd_weight(weight), bias, padding)
    assert result.shape == expected.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    if result.numel():
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rounds_little_more_than_a_direct_convolution():
    input, weight = maps(4, 256, 28, 28).relu(), torch.randn(256, 256, 3, 3)
    exact = F.conv2d(input.double(), weight.double(), padding=1)
    direct = (F.conv2d(input, weight, padding=1) - exact).square().mean().sqrt()
    ours = (ops.winograd_conv2d(input, ops.winograd_weight(weight), None, (1, 1)) - exact).square().mean().sqrt()
    assert ours < 5 * direct


@pytest.mark.parametrize("limits", [(0, math.inf), (0, 6), (-1, 1), (-math.inf, 0)], ids=case_id)
def test_limits(backend, limits):
    input, weight, bias = maps(2, 16, 9, 9), torch.randn(32, 16, 3, 3), torch.randn(32)
    expected = F.conv2d(input, weight, bias, padding=1).clamp(*limits)
    result = ops.winograd_conv2d(input, ops.winograd_weight(weight), bias, (1, 1), *limits)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_nan_stays_in_the_tiles_that_see_it(backend):
    input, weight = maps(1, 16, 12, 12), torch.randn(16, 16, 3, 3)
    input[0, 3, 5, 5] = math.nan
    result = ops.winograd_conv2d(input, ops.winograd_weight(weight), None, (1, 1), 0, 6)
    direct = F.conv2d(input, weight, padding=1)
    assert result.isnan()[direct.isnan()].all()
    # The one tile whose window has the pixel, of which the direct convolution spoils nine outputs.
    assert not result[..., :4, :].isnan().any()
    assert not result[..., 8:, :].isnan().any()


def test_other_layouts_are_copied(backend):
    input, weight = torch.randn(2, 32, 9, 22)[:, ::2, :, ::2], torch.randn(16, 16, 3, 3)
    bias = torch.randn(32)[::2]
    result = ops.winograd_conv2d(input, ops.winograd_weight(weight), bias, (1, 1))
    torch.testing.assert_close(result, F.conv2d(input, weight, bias, padding=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads):
    input, weight = maps(2, 64, 56, 56), ops.winograd_weight(torch.randn(64, 64, 3, 3))
    before = torch.get_num_threads()
    expected = ops.winograd_conv2d(input, weight)
    try:
        torch.set_num_threads(threads)
        result = ops.winograd_conv2d(input, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": maps(1, 16, 8, 8).double()}, "input must be float32, got"),
        ({"input": maps(1, 8, 8, 8)}, r"input must have shape \[N, I, H, W\] with I a multiple of 16, got"),
        ({"input": torch.zeros(1, 16, 8, 8)}, "input must be channels_last"),
        ({"input": maps(1, 32, 8, 8)}, r"weight must have shape \[36, O / 16, 32, 16\], got"),
        ({"input": maps(1, 16, 2, 2), "padding": [0, 0]}, "input must be at least 3 x 3 with its padding"),
        ({"weight": torch.zeros(36, 2, 16, 16).half()}, "weight must be float32, got"),
        ({"weight": torch.zeros(2, 36, 16, 16).transpose(0, 1)}, "weight must be contiguous"),
        ({"bias": torch.zeros(16)}, r"bias must have shape \[32\], got"),
        ({"bias": torch.zeros(32).double()}, "bias must be float32, got"),
        ({"padding": [1]}, "padding must be 2 numbers of at least 0"),
        ({"padding": [1, -1]}, "padding must be 2 numbers of at least 0"),
        ({"lower": 2.0, "upper": 1.0}, "lower must be at most upper, 1.*, got 2"),
    ],
    ids=case_id,
)
def test_errors(backend, change, message):
    options = {"input": maps(1, 16, 8, 8), "weight": torch.zeros(36, 2, 16, 16), "bias": None, "padding": [1, 1]}
    options |= {"lower": -math.inf, "upper": math.inf}
    with pytest.raises(RuntimeError, match=message):
        ops.registry.OPS["winograd_conv2d"](*{**options, **change}.values())


def test_opcheck():
    weight = ops.winograd_weight(torch.randn(32, 16, 3, 3))
    for bias in (None, torch.randn(32)):
        arguments = (maps(2, 16, 9, 8), weight, bias, [1, 1], 0.0, 6.0)
        torch.library.opcheck(torch.ops.pyfast_xai.winograd_conv2d.default, arguments)
