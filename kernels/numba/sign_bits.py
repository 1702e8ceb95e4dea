"""Numba twin of `sign_bits`."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_at_a_time


@one_at_a_time
@njit(nogil=True, parallel=True)
def _pack(weight: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> None:
    columns = weight.shape[1]
    for row in prange(weight.shape[0]):
        for word in range(positive.shape[1]):
            above = np.uint64(0)
            below = np.uint64(0)
            for at in range(word * 64, min(columns, word * 64 + 64)):
                value = weight[row, at]
                bit = np.uint64(at & 63)
                above |= np.uint64(value > 0) << bit
                below |= np.uint64(value < 0) << bit
            positive[row, word] = above
            negative[row, word] = below


def sign_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packs signs: bit j % 64 of word j // 64 of row o says `weight[o, j] > 0` (first result) or `< 0` (second)."""
    checks.sign_bits(weight)
    positive = torch.empty(weight.shape[0], (weight.shape[1] + 63) // 64, dtype=torch.int64)
    negative = torch.empty_like(positive)
    _pack(array(weight), array(positive).view(np.uint64), array(negative).view(np.uint64))
    return positive, negative
