"""Numba twin of `points_union`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array
from pyfast_xai.kernels.numba.bits import filled, positions

# Places per point above which reading an almost empty bitmap costs more than a sort.
SPARSE = 1024


@njit(nogil=True)
def _mark(points: np.ndarray, words: np.ndarray) -> None:
    for point in points:
        if point >= 0:
            words[point >> 6] |= np.uint64(1) << np.uint64(point & 63)


def points_union(points: Tensor, size: int, capacity: int | None = None) -> Tensor:
    """Returns the sorted distinct values of `points` [P], each in [0, size) or -1, which is left out."""
    checks.points_union(points, size, capacity)
    values = array(points)
    if size > SPARSE * len(values):
        distinct = np.unique(values)
        return filled(torch.from_numpy(distinct[distinct >= 0]), capacity)
    words = np.zeros(-(-size // 64), dtype=np.uint64)
    _mark(values, words)
    return filled(positions(words[None], size), capacity)
