"""Numba twin of `point_density`: Gaussians along the rows that hold points, then a product of matrices."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread

# The smallest value of a Gaussian of height one that counts. A product of two is not denormal, which would be slow.
NEGLIGIBLE = 1e-18


@one_thread
@njit(nogil=True, parallel=True, fastmath={"contract"})
def _blur_rows(counts: np.ndarray, gaussian: np.ndarray, out: np.ndarray) -> None:
    rows, width = counts.shape
    for row in prange(rows):
        for column in range(width):
            count = np.float32(counts[row, column])
            if count:
                for x in range(width):
                    out[row, x] += count * gaussian[width - 1 - column + x]


def _gaussian(size: int, sigma: float) -> Tensor:
    """Returns the Gaussian at distances -(size - 1) .. size - 1, float32 `[2 * size - 1]`."""
    distance = torch.arange(1 - size, size, dtype=torch.float64) / sigma
    values = torch.exp(-0.5 * distance.square())
    return torch.where(values < NEGLIGIBLE, 0, values).float()


def point_density(points: Tensor, images: int, height: int, width: int, sigma: float) -> Tensor:
    """Returns the sum of unit-height Gaussians at `points` [P], flat indices into [images, height, width]."""
    checks.point_density(points, images, height, width, sigma)
    counts = torch.bincount(points, minlength=images * height * width).view(images * height, width)
    blurred = torch.zeros(images, height, width)
    if blurred.numel():
        _blur_rows(array(counts), array(_gaussian(width, sigma)), array(blurred.view_as(counts)))
        spread = _gaussian(height, sigma).unfold(0, height, 1).flip(0)  # [height, height]
        blurred = spread @ blurred
    return blurred
