"""Reference of `conv_trace`: Algorithm 2 of CNN-Fixations, vectorised over points."""

import math

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Location

PRODUCT, CENTER, ACTIVATION, SAME = map(int, Location)
CHUNK = 1 << 24  # elements of one gathered block of receptive fields


def _unravel(flat: Tensor, shape: list[int]) -> list[Tensor]:
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat // size
    return coordinates[::-1]


def conv_trace(
    input: Tensor,
    weight: Tensor,
    points: Tensor,
    negative: Tensor | None,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    location: int,
) -> Tensor:
    """Returns each point's strongest input channel in its receptive field, and a place there; see `ops.conv_trace`."""
    checks.conv_trace(input, weight, points, negative, output_size, stride, padding, dilation, groups, location)
    size = math.prod(weight.shape[1:])
    step = max(1, CHUNK // max(1, size))
    parts = [
        _trace(
            input,
            weight,
            points[start : start + step],
            None if negative is None else negative[start : start + step],
            output_size,
            stride,
            padding,
            dilation,
            groups,
            location,
        )
        for start in range(0, len(points), step)
    ]
    # Absent points were traced as if they were the first point.
    return torch.cat(parts).masked_fill_(points < 0, -1) if parts else points.clone()


def _trace(
    input: Tensor,
    weight: Tensor,
    points: Tensor,
    negative: Tensor | None,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    location: int,
) -> Tensor:
    spatial = list(input.shape[2:])
    kernel = list(weight.shape[2:])
    rank = len(spatial)
    device = input.device
    batch, filters, *position = _unravel(points.clamp(min=0), [input.shape[0], weight.shape[0], *output_size])
    per_group = weight.shape[1]
    first_channel = filters // (weight.shape[0] // groups) * per_group  # [P]

    # Input coordinate of every kernel tap, and whether it lies inside the input. [P, K] each.
    taps = torch.cartesian_prod(*[torch.arange(k, device=device) for k in kernel]).view(-1, rank)
    inside = torch.ones(len(points), len(taps), dtype=torch.bool, device=device)
    coordinates = []
    for d in range(rank):
        start = position[d] * stride[d] - padding[d]
        coordinate = start[:, None] + taps[None, :, d] * dilation[d]
        inside &= (coordinate >= 0) & (coordinate < spatial[d])
        coordinates.append(coordinate.clamp(0, spatial[d] - 1))

    channels = first_channel[:, None] + torch.arange(per_group, device=device)  # [P, C]
    receptive_field = (batch[:, None, None], channels[:, :, None], *[p[:, None, :] for p in coordinates])
    fields = input[receptive_field]  # [P, C, K]
    # Half-precision inputs are summed in float32, as every backend does.
    exact = torch.promote_types(input.dtype, torch.float32)
    fields = fields.to(exact)
    # Outside, the clamped neighbour was gathered: it may be infinite, so it is replaced and not multiplied by zero.
    products = (fields * weight.flatten(2)[filters].to(exact)).masked_fill(~inside[:, None, :], 0)
    if negative is not None:
        # Look for the strongest inhibition instead: the least sum, the least product.
        products = torch.where(negative[:, None, None], -products, products)
    best = products.sum(-1).argmax(1)  # [P], the first of equals

    rows = torch.arange(len(points), device=device)
    if location in (PRODUCT, ACTIVATION):
        values = products[rows, best] if location == PRODUCT else fields[rows, best]
        tap = values.masked_fill(~inside, -math.inf).argmax(1)
        target = [p[rows, tap] for p in coordinates]
    else:
        target = []
        for d in range(rank):
            middle = dilation[d] * (kernel[d] // 2) - padding[d] if location == CENTER else 0
            target.append((position[d] * stride[d] + middle).clamp(0, spatial[d] - 1))

    flat = batch * input.shape[1] + channels[rows, best]
    for d in range(rank):
        flat = flat * spatial[d] + target[d]
    return flat
