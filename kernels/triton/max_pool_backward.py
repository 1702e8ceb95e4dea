"""Triton twin of `max_pool_backward`: every element gathers from the windows that it may have won, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.triton.accumulate import accumulator
from pyfast_xai.kernels.triton.tiles import places, tile


@triton.jit(
    do_not_specialize=["images", "channels", "height", "width", "grad_height", "grad_width", "c_tiles", "x_tiles"]
)
def _max_pool_backward_kernel(
    grad_ptr,  # [K * images, channels, grad_height, grad_width]
    offsets_ptr,  # [images, channels, grad_height, grad_width]
    out_ptr,  # [K * images, channels, height, width]
    images,
    channels,
    height,
    width,
    grad_height,
    grad_width,
    c_tiles,  # programs a row of elements: c_tiles * x_tiles
    x_tiles,
    grad_stride_n,
    grad_stride_c,
    grad_stride_y,
    grad_stride_x,
    offsets_stride_n,
    offsets_stride_c,
    offsets_stride_y,
    offsets_stride_x,
    out_stride_n,
    out_stride_c,
    out_stride_y,
    out_stride_x,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    n, y, o_channel, o_x, m_place = places(channels, height, width, c_tiles, x_tiles, BLOCK_C, BLOCK_X)
    p_grad = grad_ptr + n * grad_stride_n + o_channel[:, None] * grad_stride_c
    p_offsets = offsets_ptr + n % images * offsets_stride_n + o_channel[:, None] * offsets_stride_c

    total = tl.zeros([BLOCK_C, BLOCK_X], ACC)
    # The element is tap (i, j) of the window at (below / stride, beside / stride). From the last tap to the first the
    # windows come in their order, in which autograd adds, too.
    for back_i in range(KERNEL[0]):
        i = KERNEL[0] - 1 - back_i
        below = y + PADDING[0] - i * DILATION[0]
        at_y = below // STRIDE[0]
        if (below >= 0) & (at_y * STRIDE[0] == below) & (at_y < grad_height):
            for back_j in range(KERNEL[1]):
                j = KERNEL[1] - 1 - back_j
                beside = o_x + PADDING[1] - j * DILATION[1]
                at_x = beside // STRIDE[1]
                m_window = m_place & ((beside >= 0) & (at_x * STRIDE[1] == beside) & (at_x < grad_width))[None, :]
                p_tap = p_offsets + at_y * offsets_stride_y + at_x[None, :] * offsets_stride_x
                tap = tl.load(p_tap, mask=m_window, other=0).to(tl.int32)
                m_winner = m_window & (tap == i * KERNEL[1] + j)
                p_source = p_grad + at_y * grad_stride_y + at_x[None, :] * grad_stride_x
                total += tl.load(p_source, mask=m_winner, other=0).to(ACC)
    p_out = out_ptr + n * out_stride_n + y * out_stride_y
    tl.store(p_out + o_channel[:, None] * out_stride_c + o_x[None, :] * out_stride_x, total, mask=m_place)


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    """Add every gradient to the element of `out` that won its window; the others become 0."""
    checks.max_pool_backward(grad, offsets, kernel, stride, padding, dilation, out)
    if not grad.numel():
        out.zero_()
        return
    rows, channels, height, width = out.shape
    block_c, block_x = tile(channels, width, innermost=out.stride(1) == 1)
    tiles = triton.cdiv(channels, block_c), triton.cdiv(width, block_x)
    with torch.cuda.device_of(grad):
        _max_pool_backward_kernel[(rows * height * tiles[0] * tiles[1],)](
            grad,
            offsets,
            out,
            len(offsets),
            channels,
            height,
            width,
            *grad.shape[2:],
            *tiles,
            *grad.stride(),
            *offsets.stride(),
            *out.stride(),
            KERNEL=tuple(kernel),
            STRIDE=tuple(stride),
            PADDING=tuple(padding),
            DILATION=tuple(dilation),
            ACC=accumulator(grad.dtype),
            BLOCK_C=block_c,
            BLOCK_X=block_x,
        )
