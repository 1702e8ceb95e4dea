"""Triton twin of `relu_forward`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.triton.accumulate import accumulator

BLOCK = 256  # bytes of bits a program: 2048 elements, 16 a thread of 4 warps


@triton.jit
def _relu_forward_kernel(
    input_ptr,  # [size], as the elements lie in memory
    upper_ptr,  # [1], read with HAS_UPPER
    bound_ptr,  # [size], read with HAS_BOUND
    out_ptr,  # [size], may be the input
    bits_ptr,  # [ceil(size / 8)]
    size,
    HAS_UPPER: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    CLAMP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_bit = tl.arange(0, 8)
    o_element = o_byte[:, None] * 8 + o_bit[None, :]  # [BLOCK, 8]
    m_element = o_element < size
    x = tl.load(input_ptr + o_element, mask=m_element, other=0).to(ACC)

    # Comparisons that are false for NaN, which stays.
    output = tl.where(x <= 0, 0.0, x)
    passes = x > 0
    if HAS_UPPER:
        upper = tl.load(upper_ptr).to(ACC)
        output = tl.where(output > upper, upper, output)
        passes = passes & (x < upper)
    if HAS_BOUND:
        bound = tl.load(bound_ptr + o_element, mask=m_element, other=0).to(ACC)
        in_bound = output <= bound
        passes = passes & in_bound
        if CLAMP:
            output = tl.where(in_bound | (output != output), output, bound)
    tl.store(out_ptr + o_element, output, mask=m_element)

    # Lanes past the end hold zero, which does not pass.
    byte = tl.sum(passes.to(tl.int32) << o_bit[None, :], 1)
    tl.store(bits_ptr + o_byte, byte.to(tl.uint8), mask=o_byte * 8 < size)


def relu_forward(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> Tensor:
    """Write `min(max(x, 0), upper)` to `out`; the bits say `0 < x < upper`, and where there is a bound `<= bound`."""
    checks.relu_forward(input, upper, bound, clamp, out)
    bits = torch.empty((input.numel() + 7) // 8, dtype=torch.uint8, device=input.device)
    if not len(bits):
        return bits
    limit = torch.tensor(upper, dtype=input.dtype).item()  # on the host: rounded, and perhaps to infinity
    bounded = math.isfinite(limit)
    with torch.cuda.device_of(input):
        _relu_forward_kernel[(triton.cdiv(len(bits), BLOCK),)](
            input,
            # A scalar argument would be float32.
            input.new_full((1,), limit) if bounded else input,
            input if bound is None else bound,
            out,
            bits,
            input.numel(),
            HAS_UPPER=bounded,
            HAS_BOUND=bound is not None,
            CLAMP=clamp,
            ACC=accumulator(input.dtype),
            BLOCK=BLOCK,
        )
    return bits
