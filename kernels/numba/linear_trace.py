"""Numba twin of `linear_trace`: ORs of bit rows."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread
from pyfast_xai.kernels.numba.bits import filled, positions

TILE = 64  # words of one task: a row of results is split, for a single image has a single row


@one_thread
@njit(nogil=True, parallel=True)
def _reach(
    input: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    start: np.ndarray,
    neuron: np.ndarray,
    flip: np.ndarray,
    out: np.ndarray,
) -> None:
    words = out.shape[1]
    tiles = (words + TILE - 1) // TILE
    for task in prange(out.shape[0] * tiles):
        row = task // tiles
        first = task % tiles * TILE
        last = min(words, first + TILE)
        excited = np.zeros(TILE, dtype=np.uint64)
        inhibited = np.zeros(TILE, dtype=np.uint64)
        for i in range(start[row], start[row + 1]):
            for word in range(first, last):
                positive_word = positive[neuron[i], word]
                negative_word = negative[neuron[i], word]
                excited[word - first] |= negative_word if flip[i] else positive_word
                inhibited[word - first] |= positive_word if flip[i] else negative_word
        for word in range(first, last):
            positive_bits = np.uint64(0)
            negative_bits = np.uint64(0)
            for column in range(word * 64, min(input.shape[1], word * 64 + 64)):
                value = input[row, column]
                bit = np.uint64(column & 63)
                positive_bits |= np.uint64(value > 0) << bit
                negative_bits |= np.uint64(value < 0) << bit
            out[row, word] = (excited[word - first] & positive_bits) | (inhibited[word - first] & negative_bits)


def linear_trace(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None,
    capacity: int | None = None,
) -> Tensor:
    """Returns the union over a row's points of `{j : input[r, j] * weight[o, j] > 0}` (`< 0` for a negative point)."""
    checks.linear_trace(input, weight_positive, weight_negative, points, negative, capacity)
    rows, features = input.shape
    order = np.argsort(array(points), kind="stable")  # flat indices, so by row; those of -1 before any
    row, neuron = np.divmod(array(points)[order], max(1, len(weight_positive)))
    flip = np.zeros(len(order), dtype=bool) if negative is None else array(negative)[order]
    reached = array(torch.empty(rows, weight_positive.shape[1], dtype=torch.int64)).view(np.uint64)
    _reach(
        array(input),
        array(weight_positive).view(np.uint64),
        array(weight_negative).view(np.uint64),
        np.searchsorted(row, np.arange(rows + 1)),
        neuron,
        flip,
        reached,
    )
    return filled(positions(reached, features), capacity)
