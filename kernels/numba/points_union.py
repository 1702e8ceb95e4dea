"""Numba twin of `points_union`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array
from pyfast_xai.kernels.numba.bits import positions

# Places per point above which reading an almost empty bitmap costs more than a sort.
SPARSE = 1024


@njit(nogil=True)
def _mark(points, words):
    for point in points:
        words[point >> 6] |= np.uint64(1) << np.uint64(point & 63)


def points_union(points: Tensor, size: int) -> Tensor:
    """Sorted distinct values of `points` [P], each in [0, size)."""
    checks.points_within(points, size)
    values = array(points)
    if size > SPARSE * len(values):
        return torch.from_numpy(np.unique(values))
    words = np.zeros(-(-size // 64), dtype=np.uint64)
    _mark(values, words)
    return positions(words[None], size)
