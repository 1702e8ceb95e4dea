"""The box of the largest segment of a map at each of many thresholds, from one pass over its pixels."""

import numpy as np
from numba import njit
from torch import Tensor

from pyfast_xai.kernels.numba import array


@njit(nogil=True)
def _root(parent: np.ndarray, pixel: int) -> int:
    while parent[pixel] != pixel:
        parent[pixel] = parent[parent[pixel]]
        pixel = parent[pixel]
    return pixel


@njit(nogil=True)
def _hottest_first(levels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels by falling level, and where in them each level ends, `[count + 1]`."""
    ends = np.zeros(count + 1, np.int64)
    for level in levels:
        ends[level] += 1
    for level in range(count - 1, -1, -1):
        ends[level] += ends[level + 1]
    order, place = np.empty(len(levels), np.int64), ends.copy()
    for pixel in range(len(levels) - 1, -1, -1):
        place[levels[pixel]] -= 1
        order[place[levels[pixel]]] = pixel
    return order, ends


@njit(nogil=True)
def _boxes(levels: np.ndarray, height: int, width: int, result: np.ndarray) -> None:
    count = len(result)
    order, ends = _hottest_first(levels, count)
    parent = np.full(len(levels), -1, np.int64)  # -1: the pixel is below the threshold
    size, first = np.empty(len(levels), np.int64), np.empty(len(levels), np.int64)
    box = np.empty((len(levels), 4), np.int64)
    largest = -1
    start = 0
    for level in range(count, 0, -1):
        for pixel in order[start : ends[level]]:
            y, x = pixel // width, pixel % width
            root = pixel
            parent[pixel], size[pixel], first[pixel] = pixel, 1, pixel
            box[pixel, 0], box[pixel, 1], box[pixel, 2], box[pixel, 3] = x, y, x, y
            for row in range(max(y - 1, 0), min(y + 2, height)):
                for column in range(max(x - 1, 0), min(x + 2, width)):
                    neighbour = row * width + column
                    if parent[neighbour] < 0:
                        continue
                    other = _root(parent, neighbour)
                    if other == root:
                        continue
                    if size[other] > size[root]:
                        root, other = other, root
                    parent[other] = root
                    size[root] += size[other]
                    first[root] = min(first[root], first[other])
                    for side in range(2):
                        box[root, side] = min(box[root, side], box[other, side])
                        box[root, side + 2] = max(box[root, side + 2], box[other, side + 2])
            # A segment grows with each pixel, so only the one that has just grown can outdo the largest.
            if largest >= 0:
                largest = _root(parent, largest)
            if (
                largest < 0
                or size[root] > size[largest]
                or (size[root] == size[largest] and first[root] < first[largest])
            ):
                largest = root
        start = ends[level]
        for side in range(4):
            result[level - 1, side] = box[largest, side]


def threshold_boxes(levels: Tensor, result: Tensor) -> None:
    """Writes the box of the largest 8-connected segment of a map at each of T rising thresholds.

    Pixels join by falling value, and segments that touch are united (a union-find), so each threshold costs only the
    pixels between it and the next.

    Args:
        levels: how many of the thresholds each pixel reaches, int64 `[H, W]` on the CPU, contiguous, 0 to T; at least
            one pixel reaches all.
        result: takes the boxes (x1, y1, x2, y2), float32 `[T, 4]`. Of segments with equally many pixels it is the
            first in reading order.
    """
    height, width = levels.shape
    _boxes(array(levels.flatten()), height, width, array(result))
