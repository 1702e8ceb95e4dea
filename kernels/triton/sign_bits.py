"""Triton twin of `sign_bits`: a weight is read once for both signs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks

WORD = tl.constexpr(64)
WORDS = 32  # words of a program: 2048 elements, 16 a thread of 4 warps


@triton.jit(do_not_specialize=["words", "blocks"])
def _sign_bits_kernel(
    weight_ptr,  # [rows, columns]
    positive_ptr,  # [rows, words]
    negative_ptr,  # [rows, words]
    columns,
    words,
    blocks,  # programs a row
    stride_r,
    stride_c,
    WORDS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    o_word = program % blocks * WORDS + tl.arange(0, WORDS)
    o_bit = tl.arange(0, WORD).to(tl.int64)
    o_column = o_word[:, None] * WORD + o_bit[None, :]  # [WORDS, 64]
    weight = tl.load(weight_ptr + row * stride_r + o_column * stride_c, mask=o_column < columns, other=0)
    if weight.dtype == tl.bfloat16:
        weight = weight.to(tl.float32)  # few devices compare bfloat16
    # Columns past the end hold zero, which has no sign.
    positive = tl.sum((weight > 0).to(tl.int64) << o_bit[None, :], 1)
    negative = tl.sum((weight < 0).to(tl.int64) << o_bit[None, :], 1)
    tl.store(positive_ptr + row * words + o_word, positive, mask=o_word < words)
    tl.store(negative_ptr + row * words + o_word, negative, mask=o_word < words)


def sign_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bit j % 64 of word j // 64 of row o says `weight[o, j] > 0` (first result) and `< 0` (second)."""
    checks.sign_bits(weight)
    rows, columns = weight.shape
    words = triton.cdiv(columns, WORD.value)
    positive, negative = (torch.empty((rows, words), dtype=torch.int64, device=weight.device) for _ in range(2))
    if not positive.numel():
        return positive, negative
    blocks = triton.cdiv(words, WORDS)
    with torch.cuda.device_of(weight):
        _sign_bits_kernel[(rows * blocks,)](
            weight.detach(), positive, negative, columns, words, blocks, *weight.stride(), WORDS=WORDS
        )
    return positive, negative
