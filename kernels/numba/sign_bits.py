"""Numba twin of `sign_bits`."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread


@one_thread
@njit(nogil=True, parallel=True)
def _pack(weight: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> None:
    columns = weight.shape[1]
    for row in prange(weight.shape[0]):
        for word in range(positive.shape[1]):
            positive_bits = np.uint64(0)
            negative_bits = np.uint64(0)
            for column in range(word * 64, min(columns, word * 64 + 64)):
                value = weight[row, column]
                bit = np.uint64(column & 63)
                positive_bits |= np.uint64(value > 0) << bit
                negative_bits |= np.uint64(value < 0) << bit
            positive[row, word] = positive_bits
            negative[row, word] = negative_bits


def sign_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packs signs: bit j % 64 of word j // 64 of row o says `weight[o, j] > 0` (first result) or `< 0` (second)."""
    checks.sign_bits(weight)
    positive = torch.empty(weight.shape[0], (weight.shape[1] + 63) // 64, dtype=torch.int64)
    negative = torch.empty_like(positive)
    _pack(array(weight), array(positive).view(np.uint64), array(negative).view(np.uint64))
    return positive, negative
