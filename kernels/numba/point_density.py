"""Numba twin of `point_density`: Gaussians along the rows that hold points, then a sum of rows."""

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread


@one_thread
@njit(nogil=True, parallel=True)
def _density(
    row_of: np.ndarray, start: np.ndarray, column: np.ndarray, count: np.ndarray, gaussian: np.ndarray, out: np.ndarray
) -> None:
    images, height, width = out.shape
    reach = len(gaussian) - 1
    lines = np.zeros((len(row_of), width))
    for line in prange(len(row_of)):
        for i in range(start[line], start[line + 1]):
            for x in range(max(0, column[i] - reach), min(width, column[i] + reach + 1)):
                lines[line, x] += count[i] * gaussian[abs(x - column[i])]
    for target in prange(images * height):
        y = target % height
        total = np.zeros(width)
        line = np.searchsorted(row_of, target - min(reach, y))
        last = target + min(reach, height - 1 - y)
        while line < len(row_of) and row_of[line] <= last:
            share = gaussian[abs(target - row_of[line])]
            for x in range(width):
                total[x] += share * lines[line, x]
            line += 1
        for x in range(width):
            out[target // height, y, x] = total[x]


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> Tensor:
    """Returns the sum of unit-height Gaussians at `points` [P], flat indices into [images, height, width]."""
    checks.point_density(points, images, height, width, sigma)
    out = torch.empty((images, height, width), dtype=torch.float32)
    flat, count = np.unique(array(points), return_counts=True)
    row, column = np.divmod(flat, max(1, width))
    row_of, start = np.unique(row, return_index=True)
    # Beyond this distance all points together round to zero in float32, whose least number is 2 ** -149.
    reach = sigma * math.sqrt(2 * (150 * math.log(2) + math.log(max(1, len(points)))))
    distance = np.arange(min(reach, max(height, width)) + 1)
    gaussian = np.exp(-((distance / sigma) ** 2) / 2)
    _density(row_of, np.append(start, len(flat)), column, count, gaussian, array(out))
    return out
