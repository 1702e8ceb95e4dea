"""Triton twin of `max_pool_forward`: a program holds a tile of a row of windows and lets their taps pass by."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.triton.accumulate import accumulator
from pyfast_xai.kernels.triton.tiles import places, tile


@triton.jit(do_not_specialize=["channels", "height", "width", "out_height", "out_width", "c_tiles", "x_tiles"])
def _max_pool_forward_kernel(
    input_ptr,  # [N, channels, height, width]
    output_ptr,  # [N, channels, out_height, out_width]
    offsets_ptr,  # the same
    channels,
    height,
    width,
    out_height,
    out_width,
    c_tiles,  # programs a row of windows: c_tiles * x_tiles
    x_tiles,
    input_stride_n,
    input_stride_c,
    input_stride_y,
    input_stride_x,
    output_stride_n,
    output_stride_c,
    output_stride_y,
    output_stride_x,
    offsets_stride_n,
    offsets_stride_c,
    offsets_stride_y,
    offsets_stride_x,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    n, at_y, o_channel, o_x, m_place = places(channels, out_height, out_width, c_tiles, x_tiles, BLOCK_C, BLOCK_X)
    p_field = input_ptr + n * input_stride_n + o_channel[:, None] * input_stride_c
    y0 = at_y * STRIDE[0] - PADDING[0]
    x0 = o_x * STRIDE[1] - PADDING[1]

    best = tl.full([BLOCK_C, BLOCK_X], float("-inf"), ACC)
    winner = tl.full([BLOCK_C, BLOCK_X], -1, tl.int32)  # none yet
    for i in range(KERNEL[0]):
        y = y0 + i * DILATION[0]
        if (y >= 0) & (y < height):
            for j in range(KERNEL[1]):
                x = x0 + j * DILATION[1]
                m_tap = m_place & ((x >= 0) & (x < width))[None, :]
                p_tap = p_field + y * input_stride_y + x[None, :] * input_stride_x
                value = tl.load(p_tap, mask=m_tap, other=0).to(ACC)
                # The first of equals wins, and the last of several NaNs, as in PyTorch.
                wins = m_tap & ((winner < 0) | (value > best) | (value != value))
                best = tl.where(wins, value, best)
                winner = tl.where(wins, i * KERNEL[1] + j, winner)
    p_output = output_ptr + n * output_stride_n + at_y * output_stride_y
    p_offsets = offsets_ptr + n * offsets_stride_n + at_y * offsets_stride_y
    tl.store(p_output + o_channel[:, None] * output_stride_c + o_x[None, :] * output_stride_x, best, mask=m_place)
    p_offsets += o_channel[:, None] * offsets_stride_c + o_x[None, :] * offsets_stride_x
    tl.store(p_offsets, winner.to(tl.uint8), mask=m_place)


def max_pool_forward(
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output: Tensor,
    offsets: Tensor,
) -> None:
    """Fill `output` with the largest element of every window and `offsets` with the number of its tap."""
    checks.max_pool_forward(input, kernel, stride, padding, dilation, output, offsets)
    if not output.numel():
        return
    images, channels, out_height, out_width = output.shape
    block_c, block_x = tile(channels, out_width, innermost=output.stride(1) == 1)
    tiles = triton.cdiv(channels, block_c), triton.cdiv(out_width, block_x)
    with torch.cuda.device_of(input):
        _max_pool_forward_kernel[(images * out_height * tiles[0] * tiles[1],)](
            input,
            output,
            offsets,
            *input.shape[1:],
            out_height,
            out_width,
            *tiles,
            *input.stride(),
            *output.stride(),
            *offsets.stride(),
            KERNEL=tuple(kernel),
            STRIDE=tuple(stride),
            PADDING=tuple(padding),
            DILATION=tuple(dilation),
            ACC=accumulator(input.dtype),
            BLOCK_C=block_c,
            BLOCK_X=block_x,
        )
