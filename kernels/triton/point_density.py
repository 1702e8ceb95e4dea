"""Triton twin of `point_density`: integer counts, then a Gaussian along each axis."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks

BLOCK = 256  # points, or pixels, of one program


@triton.jit
def _count_kernel(points_ptr, counts_ptr, count, BLOCK: tl.constexpr):
    o_point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_point = o_point < count
    place = tl.load(points_ptr + o_point, mask=m_point, other=0)
    # Sums of integers do not depend on their order, so the density is the same every time.
    tl.atomic_add(counts_ptr + place, tl.full([BLOCK], 1, tl.int32), mask=m_point, sem="relaxed")


@triton.jit(do_not_specialize=["extent", "inner", "reach"])
def _blur_kernel(
    source_ptr,  # [outer, extent, inner], blurred along `extent`
    gaussian_ptr,  # [reach + 1], by distance
    out_ptr,  # as the source
    size,
    extent,
    inner,
    reach,
    BLOCK: tl.constexpr,
):
    o_pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < size
    at = o_pixel // inner % extent
    total = tl.load(source_ptr + o_pixel, mask=m_pixel, other=0).to(tl.float32)  # the Gaussian is 1 at distance 0
    p_before = source_ptr + o_pixel
    p_after = source_ptr + o_pixel
    for distance in range(1, reach + 1):
        p_before -= inner
        p_after += inner
        before = tl.load(p_before, mask=m_pixel & (at >= distance), other=0).to(tl.float32)
        after = tl.load(p_after, mask=m_pixel & (at + distance < extent), other=0).to(tl.float32)
        total += tl.load(gaussian_ptr + distance) * (before + after)
    tl.store(out_ptr + o_pixel, total, mask=m_pixel)


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> Tensor:
    """Returns the sum of unit-height Gaussians at `points` [P], flat indices into [images, height, width]."""
    checks.point_density(points, images, height, width, sigma)
    counts = torch.zeros((images, height, width), dtype=torch.int32, device=points.device)
    if not len(points):
        return counts.float()
    # Beyond this distance all points together round to zero in float32, whose least number is 2 ** -149.
    reach = sigma * math.sqrt(2 * (150 * math.log(2) + math.log(len(points))))
    reaches = [int(min(reach, extent - 1)) for extent in (width, height)]
    distance = torch.arange(max(reaches) + 1, dtype=torch.float64, device=points.device) / sigma
    gaussian = torch.exp(-distance.square() / 2).float()
    rows, density = torch.empty_like(counts, dtype=torch.float32), torch.empty_like(counts, dtype=torch.float32)
    grid = (triton.cdiv(counts.numel(), BLOCK),)
    with torch.cuda.device_of(points):
        _count_kernel[(triton.cdiv(len(points), BLOCK),)](points.contiguous(), counts, len(points), BLOCK=BLOCK)
        _blur_kernel[grid](counts, gaussian, rows, counts.numel(), width, 1, reaches[0], BLOCK=BLOCK)
        _blur_kernel[grid](rows, gaussian, density, counts.numel(), height, width, reaches[1], BLOCK=BLOCK)
    return density
