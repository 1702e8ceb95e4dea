"""Numba twin of `winograd_conv2d`: a tile at a time."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_at_a_time
from pyfast_xai.kernels.reference.winograd_conv2d import PRODUCT, WINDOW

_WINDOW, _PRODUCT = np.array(WINDOW, np.float32), np.array(PRODUCT, np.float32)


@njit(nogil=True)
def _both_ways(transform, square):
    """`T s T^T` of squares `[6, 6, channels]`, along rows first."""
    size, channels = len(transform), square.shape[2]
    half, whole = np.zeros((size, 6, channels), np.float32), np.zeros((size, size, channels), np.float32)
    for y in range(size):
        for a in range(6):
            half[y] += transform[y, a] * square[a]
    for x in range(size):
        for b in range(6):
            whole[:, x] += transform[x, b] * half[:, b]
    return whole


@one_at_a_time
@njit(nogil=True, parallel=True)
def _convolve(input, weight, bias, padding, lower, upper, output):
    images, height, width, channels = input.shape
    _, tall, wide, filters = output.shape
    rows, columns, lanes = (tall + 3) // 4, (wide + 3) // 4, weight.shape[3]
    for tile in prange(images * rows * columns):
        n, top, left = tile // (rows * columns), tile // columns % rows * 4, tile % columns * 4
        window = np.zeros((6, 6, channels), np.float32)
        for y in range(max(0, padding[0] - top), min(6, height + padding[0] - top)):
            for x in range(max(0, padding[1] - left), min(6, width + padding[1] - left)):
                window[y, x] = input[n, top + y - padding[0], left + x - padding[1]]
        window = _both_ways(_WINDOW, window)
        product = np.zeros((6, 6, filters), np.float32)
        for place in range(36):
            numbers, sums = window[place // 6, place % 6], product[place // 6, place % 6]
            for panel in range(filters // lanes):
                for i in range(channels):
                    for lane in range(lanes):
                        sums[panel * lanes + lane] += numbers[i] * weight[place, panel, i, lane]
        pixels = _both_ways(_PRODUCT, product)
        for y in range(min(4, tall - top)):
            for x in range(min(4, wide - left)):
                for o in range(filters):
                    value = pixels[y, x, o] + bias[o]
                    value = lower if value < lower else value
                    output[n, top + y, left + x, o] = upper if value > upper else value


def winograd_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], lower: float, upper: float
) -> Tensor:
    """The convolution, tile by tile of 4 x 4 outputs."""
    checks.winograd_conv2d(input, weight, bias, padding, lower, upper)
    filters = weight.shape[1] * weight.shape[3]
    height, width = (input.shape[2 + d] + 2 * padding[d] - 2 for d in range(2))
    output = torch.empty(input.shape[0], height, width, filters)
    shift = torch.zeros(filters) if bias is None else bias
    maps, limits = input.permute(0, 2, 3, 1), (np.float32(lower), np.float32(upper))
    _convolve(array(maps), array(weight), array(shift), tuple(padding), *limits, array(output))
    return output.permute(0, 3, 1, 2)
