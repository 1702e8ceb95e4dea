"""Reading positions out of a bitmap."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array

_ONE, _TWO, _FOUR, _TOP = np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_PAIRS, _NIBBLES = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_BYTES, _SUM = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)


@njit(nogil=True)
def _count(word: np.uint64) -> np.int64:
    word -= (word >> _ONE) & _PAIRS
    word = (word & _NIBBLES) + ((word >> _TWO) & _NIBBLES)
    return np.int64((((word + (word >> _FOUR)) & _BYTES) * _SUM) >> _TOP)


@njit(nogil=True)
def _write(words: np.ndarray, columns: int, out: np.ndarray) -> int:
    filled = 0
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            word = words[row, column]
            base = row * columns + column * 64
            while word:
                remaining = word & (word + _ALL)  # without its lowest bit
                out[filled] = base + _count((word ^ remaining) + _ALL)
                filled += 1
                word = remaining
    return filled


@njit(nogil=True)
def _count_all(words: np.ndarray) -> int:
    total = 0
    for row in range(words.shape[0]):
        for word in words[row]:
            total += _count(word)
    return total


def positions(words: np.ndarray, columns: int) -> Tensor:
    """Returns sorted flat indices into `[R, columns]` of the set bits of `words` [R, ceil(columns / 64)], uint64."""
    out = torch.empty(_count_all(words), dtype=torch.int64)
    _write(words, columns, array(out))
    return out


def filled(points: Tensor, capacity: int | None) -> Tensor:
    """Returns `points` [Q] padded with -1 to `capacity` entries; None leaves them unchanged."""
    if capacity is None:
        return points
    checks.capacity_suffices(capacity, len(points))
    out = torch.full((capacity,), -1, dtype=torch.int64)
    out[: len(points)] = points
    return out
