"""Numba twin of `conv_trace`: a few runs of multiply-adds over channels and one argmax, for every point."""

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Location
from pyfast_xai.kernels.numba import array, one_thread

PRODUCT, CENTER, ACTIVATION, SAME = map(int, Location)


@njit(nogil=True, inline="always")
def _beats(value: float, best: float) -> bool:
    # NaN counts as the largest and the first of equals stays, as in torch.argmax.
    return value > best or (value != value and best == best)


@one_thread
@njit(nogil=True, parallel=True)
def _trace(
    input: np.ndarray,  # [N, D, H, W, C]
    filters: np.ndarray,  # [F, T, C / groups]
    order: np.ndarray,  # [P], points of one filter side by side
    batch: np.ndarray,  # [P]
    row: np.ndarray,  # [P], of `filters`
    first_channel: np.ndarray,  # [P]
    position: np.ndarray,  # [3, P]
    negative: np.ndarray,  # [P]
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    location: int,
    tasks: int,
    out: np.ndarray,  # [P]
) -> None:
    _, depth, height, width, channels = input.shape
    per_group = filters.shape[2]
    count = len(order)
    for task in prange(tasks):
        sums = np.empty(per_group, dtype=filters.dtype)
        for i in range(task * count // tasks, (task + 1) * count // tasks):
            p = order[i]
            n, f, c0, flip = batch[p], row[p], first_channel[p], negative[p]
            z0 = position[0, p] * stride[0] - padding[0]
            y0 = position[1, p] * stride[1] - padding[1]
            x0 = position[2, p] * stride[2] - padding[2]

            sums[:] = 0
            for tap in range(filters.shape[1]):
                z = z0 + tap // (kernel[1] * kernel[2]) * dilation[0]
                y = y0 + tap // kernel[2] % kernel[1] * dilation[1]
                x = x0 + tap % kernel[2] * dilation[2]
                if 0 <= z < depth and 0 <= y < height and 0 <= x < width:
                    field = input[n, z, y, x, c0 : c0 + per_group]
                    taps = filters[f, tap]
                    for c in range(per_group):
                        sums[c] += field[c] * taps[c]
            best = 0
            for c in range(1, per_group):
                if _beats(-sums[c] if flip else sums[c], -sums[best] if flip else sums[best]):
                    best = c

            if location in (PRODUCT, ACTIVATION):
                z, y, x = z0, y0, x0
                any_inside = False
                best_value = filters[f, 0, 0]
                for tap in range(filters.shape[1]):
                    tz = z0 + tap // (kernel[1] * kernel[2]) * dilation[0]
                    ty = y0 + tap // kernel[2] % kernel[1] * dilation[1]
                    tx = x0 + tap % kernel[2] * dilation[2]
                    if 0 <= tz < depth and 0 <= ty < height and 0 <= tx < width:
                        value = input[n, tz, ty, tx, c0 + best]
                        if location == PRODUCT:
                            value *= filters[f, tap, best]
                            value = -value if flip else value
                        if not any_inside or _beats(value, best_value):
                            any_inside, best_value, z, y, x = True, value, tz, ty, tx
            elif location == CENTER:
                z = z0 + dilation[0] * (kernel[0] // 2)
                y = y0 + dilation[1] * (kernel[1] // 2)
                x = x0 + dilation[2] * (kernel[2] // 2)
            else:
                z, y, x = position[0, p] * stride[0], position[1, p] * stride[1], position[2, p] * stride[2]
            z = min(max(z, 0), depth - 1)
            y = min(max(y, 0), height - 1)
            x = min(max(x, 0), width - 1)
            out[p] = (((n * channels + c0 + best) * depth + z) * height + y) * width + x


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
    out = torch.empty_like(points)
    if not len(points):
        return out
    absent = array(points) < 0
    if absent.any():
        present = torch.from_numpy(~absent)
        signs = None if negative is None else negative[present]
        geometry = (output_size, stride, padding, dilation, groups, location)
        out.fill_(-1)[present] = conv_trace(input, weight, points[present], signs, *geometry)
        return out
    missing = 5 - input.dim()
    field = array(input.reshape(*input.shape[:2], *[1] * missing, *input.shape[2:]).movedim(1, -1))
    batch, filters, *position = np.unravel_index(array(points), (len(input), len(weight), *[1] * missing, *output_size))
    used, row = np.unique(filters, return_inverse=True)
    # Only the filters in use, channels innermost.
    rows = array(weight.detach()[torch.from_numpy(used)].flatten(2).mT.contiguous())
    _trace(
        field,
        rows,
        np.argsort(row, kind="stable"),
        batch,
        row,
        filters // (len(weight) // groups) * weight.shape[1],
        np.stack(position),
        np.zeros(len(points), dtype=bool) if negative is None else array(negative),
        (*[1] * missing, *weight.shape[2:]),
        (*[1] * missing, *stride),
        (*[0] * missing, *padding),
        (*[1] * missing, *dilation),
        location,
        min(len(points), 4 * get_num_threads()),
        array(out),
    )
    return out
