"""Triton twin of `linear_trace`: ORs of bit rows, several neurons and words at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.padded_nonzero import padded_nonzero
from pyfast_xai.kernels.triton.accumulate import accumulator

WORD = tl.constexpr(64)
BLOCK_POINTS = 32  # neurons whose bits are in flight at once
BLOCK_WORDS = 16  # words of a neuron, one cache line
FEW_WORDS = 4  # and one sector of it, where a program for each line would leave the device idle
IDLE = 256  # programs


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["features", "words", "blocks"])
def _linear_trace_kernel(
    input_ptr,  # [R, features]
    positive_ptr,  # [O, words]
    negative_ptr,  # [O, words]
    start_ptr,  # [R + 1], where the points of each row begin
    neuron_ptr,  # [P], by row
    flip_ptr,  # [P], read with SIGNED
    reached_ptr,  # [R, features]
    features,
    words,
    blocks,  # programs a row
    row_stride,
    column_stride,
    SIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    o_word = program % blocks * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    m_word = o_word < words
    excited = tl.zeros([BLOCK_POINTS, BLOCK_WORDS], tl.int64)
    inhibited = tl.zeros([BLOCK_POINTS, BLOCK_WORDS], tl.int64)
    last = tl.load(start_ptr + row + 1)
    for first in range(tl.load(start_ptr + row), last, BLOCK_POINTS):
        o_point = first + tl.arange(0, BLOCK_POINTS)
        m_point = o_point < last
        neuron = tl.load(neuron_ptr + o_point, mask=m_point, other=0)
        o_bits = neuron[:, None] * words + o_word[None, :]  # [BLOCK_POINTS, BLOCK_WORDS]
        m_bits = m_point[:, None] & m_word[None, :]
        up = tl.load(positive_ptr + o_bits, mask=m_bits, other=0)
        down = tl.load(negative_ptr + o_bits, mask=m_bits, other=0)
        if SIGNED:
            flip = tl.load(flip_ptr + o_point, mask=m_point, other=0)[:, None] != 0
            excited |= tl.where(flip, down, up)
            inhibited |= tl.where(flip, up, down)
        else:
            excited |= up
            inhibited |= down

    excited_word = tl.reduce(excited, 0, _or)
    inhibited_word = tl.reduce(inhibited, 0, _or)
    o_bit = tl.arange(0, WORD)
    o_column = o_word[:, None] * WORD + o_bit[None, :]  # [BLOCK_WORDS, WORD]
    m_column = o_column < features
    value = tl.load(input_ptr + row * row_stride + o_column * column_stride, mask=m_column, other=0).to(ACC)
    above = ((excited_word[:, None] >> o_bit[None, :]) & 1) != 0
    below = ((inhibited_word[:, None] >> o_bit[None, :]) & 1) != 0
    reached = (above & (value > 0)) | (below & (value < 0))
    tl.store(reached_ptr + row * features + o_column, reached, mask=m_column)


def linear_trace(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None,
    capacity: int | None = None,
) -> Tensor:
    """Returns the union over a row's points of `{j : input[r, j] * weight[o, j] > 0}` (`< 0` for a negative point)."""
    checks.linear_trace(input, weight_positive, weight_negative, points, negative, capacity)
    rows, features = input.shape
    outputs, words = weight_positive.shape
    if not input.numel() or not len(points):
        return points.new_full((capacity or 0,), -1)
    ordered, order = points.sort()  # flat indices, so by row; those of -1 before any
    start = torch.searchsorted(ordered, torch.arange(rows + 1, device=points.device) * outputs)
    reached = torch.empty(rows, features, dtype=torch.bool, device=input.device)
    block = BLOCK_WORDS if rows * words >= IDLE * BLOCK_WORDS else FEW_WORDS
    blocks = triton.cdiv(words, block)
    with torch.cuda.device_of(input):
        _linear_trace_kernel[(rows * blocks,)](
            input,
            weight_positive.contiguous(),
            weight_negative.contiguous(),
            start,
            ordered % outputs,
            ordered if negative is None else negative[order],
            reached,
            features,
            words,
            blocks,
            *input.stride(),
            SIGNED=negative is not None,
            ACC=accumulator(input.dtype),
            BLOCK_POINTS=BLOCK_POINTS,
            BLOCK_WORDS=block,
        )
    return padded_nonzero(reached.flatten(), capacity)
