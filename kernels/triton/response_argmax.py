"""Triton twin of `response_argmax`: a program holds some pixels and lets all classes pass by."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.triton.accumulate import accumulator

BLOCK = 128  # pixels a program, one a thread: the channels are summed in turn, so pixels are all the parallelism


@triton.jit(do_not_specialize=["count", "channels", "area", "width", "blocks"])
def _response_argmax_kernel(
    responses_ptr,  # [count, N, channels, H, width]
    classes_ptr,  # [count, N]
    best_ptr,  # [N, area]
    winner_ptr,  # [N, area]
    count,
    channels,
    area,
    width,
    blocks,  # programs an image
    stride_k,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    class_stride_k,
    class_stride_n,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    o_pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < area
    best = tl.load(best_ptr + n * area + o_pixel, mask=m_pixel, other=0)
    winner = tl.load(winner_ptr + n * area + o_pixel, mask=m_pixel, other=0)

    # Pointers advance by strides: products of 32-bit counters and strides could overflow.
    p_class = classes_ptr + n * class_stride_n
    p_response = responses_ptr + n * stride_n + o_pixel // width * stride_h + o_pixel % width * stride_w
    for _ in range(count):
        index = tl.load(p_class)
        p_channel = p_response
        total = tl.zeros([BLOCK], ACC)
        for _ in range(channels):
            total += tl.load(p_channel, mask=m_pixel, other=0).to(ACC)
            p_channel += stride_c
        wins = (total > best) & (index >= 0)
        best = tl.where(wins, total, best)
        winner = tl.where(wins, index, winner)
        p_class += class_stride_k
        p_response += stride_k
    tl.store(best_ptr + n * area + o_pixel, best, mask=m_pixel)
    tl.store(winner_ptr + n * area + o_pixel, winner, mask=m_pixel)


def response_argmax(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    """Replace `best` and `winner`, class by class, where the sum over the channels is larger."""
    checks.response_argmax(responses, classes, best, winner)
    if not best.numel():
        return
    count, images, channels, height, width = responses.shape
    blocks = triton.cdiv(height * width, BLOCK)
    with torch.cuda.device_of(responses):
        _response_argmax_kernel[(images * blocks,)](
            responses,
            classes,
            best,
            winner,
            count,
            channels,
            height * width,
            width,
            blocks,
            *responses.stride(),
            *classes.stride(),
            ACC=accumulator(responses.dtype),
            BLOCK=BLOCK,
        )
