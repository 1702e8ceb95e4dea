"""Triton twin of `relu_backward`: the bits of one forward pass serve the gradients of every target."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Rectify
from pyfast_xai.kernels.triton.accumulate import accumulator

GRADIENT, DECONVNET, GUIDED = map(int, Rectify)
BLOCK = 256  # bytes of bits a program: 2048 elements, 16 a thread of 4 warps


@triton.jit(do_not_specialize=["blocks"])
def _relu_backward_kernel(
    grad_ptr,  # [K, size], as the elements lie in memory
    bits_ptr,  # [ceil(size / 8)], read with BY_BITS
    slope_ptr,  # [1], read with LEAKS
    out_ptr,  # [K, size], may be the gradient
    size,
    blocks,  # programs a target
    BY_BITS: tl.constexpr,
    BY_SIGN: tl.constexpr,
    LEAKS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    target = program // blocks
    o_byte = program % blocks * BLOCK + tl.arange(0, BLOCK)
    o_bit = tl.arange(0, 8)
    o_element = o_byte[:, None] * 8 + o_bit[None, :]  # [BLOCK, 8]
    m_element = o_element < size
    g = tl.load(grad_ptr + target * size + o_element, mask=m_element, other=0).to(ACC)

    passes = m_element
    if BY_BITS:
        byte = tl.load(bits_ptr + o_byte, mask=o_byte * 8 < size, other=0).to(tl.int32)
        passes = passes & (((byte[:, None] >> o_bit[None, :]) & 1) != 0)
    if BY_SIGN:
        passes = passes & ((g > 0) | (g != g))
    # Never slope * g without a slope: 0 times infinity is NaN.
    leaked = g * tl.load(slope_ptr) if LEAKS else tl.zeros_like(g)
    tl.store(out_ptr + target * size + o_element, tl.where(passes, g, leaked), mask=m_element)


def relu_backward(grad: Tensor, bits: Tensor | None, rule: int, negative_slope: float, out: Tensor) -> None:
    """Write to `out` what of each `grad[k]` passes: by the bits (GRADIENT), its sign (DECONVNET) or both (GUIDED)."""
    checks.relu_backward(grad, bits, rule, negative_slope, out)
    if not grad.numel():
        return
    size = grad[0].numel()
    blocks = triton.cdiv(size, 8 * BLOCK)
    with torch.cuda.device_of(grad):
        _relu_backward_kernel[(len(grad) * blocks,)](
            grad,
            grad if bits is None else bits.contiguous(),
            # A scalar argument would be float32.
            grad.new_full((1,), negative_slope, dtype=torch.promote_types(grad.dtype, torch.float32)),
            out,
            size,
            blocks,
            BY_BITS=bits is not None,
            BY_SIGN=rule != GRADIENT,
            LEAKS=negative_slope != 0,
            ACC=accumulator(grad.dtype),
            BLOCK=BLOCK,
        )
