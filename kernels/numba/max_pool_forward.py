"""Numba twin of `max_pool_forward`: a tap at a time over contiguous numbers."""

import numpy as np
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread

Array = np.ndarray
Pair = tuple[int, ...]


@njit(nogil=True)
def _inside(size: int, windows: int, stride: int, start: int) -> tuple[int, int]:
    """Returns the range of windows whose tap lies inside; `start` is its place in window 0."""
    first = max(0, -(start // stride))
    return first, max(first, min(windows, (size - 1 - start) // stride + 1))


@one_thread
@njit(nogil=True, parallel=True)
def _pool_channels(
    input: np.ndarray,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    output: np.ndarray,
    offsets: np.ndarray,
) -> None:
    """Pools `input` [N, H, W, C]: the channels of a place are contiguous."""
    height, width, channels = input.shape[1:]
    _, rows, columns, _ = output.shape
    for line in prange(output.shape[0] * rows):
        n, y = line // rows, line % rows
        for x in range(columns):
            best, taps = output[n, y, x], offsets[n, y, x]
            best[:] = -np.inf
            first = True
            for i in range(kernel[0]):
                row = y * stride[0] - padding[0] + i * dilation[0]
                if row < 0 or row >= height:
                    continue
                for j in range(kernel[1]):
                    column = x * stride[1] - padding[1] + j * dilation[1]
                    if column < 0 or column >= width:
                        continue
                    tap = np.uint8(i * kernel[1] + j)
                    if first:  # it stays where all are -inf
                        taps[:] = tap
                        first = False
                    for c in range(channels):
                        value = input[n, row, column, c]
                        better = (value > best[c]) | (value != value)
                        best[c] = value if better else best[c]
                        taps[c] = tap if better else taps[c]


@one_thread
@njit(nogil=True, parallel=True)
def _pool_planes(
    input: np.ndarray,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    output: np.ndarray,
    offsets: np.ndarray,
) -> None:
    """Pools `input` [M, H, W]: the places of a row are contiguous."""
    height, width = input.shape[1:]
    _, rows, columns = output.shape
    for line in prange(output.shape[0] * rows):
        n, y = line // rows, line % rows
        best, taps = output[n, y], offsets[n, y]
        best[:] = -np.inf
        first_row = True
        for i in range(kernel[0]):
            row = y * stride[0] - padding[0] + i * dilation[0]
            if row < 0 or row >= height:
                continue
            values = input[n, row]
            if first_row:  # the first tap inside stays where all are -inf
                for j in range(kernel[1] - 1, -1, -1):
                    begin, end = _inside(width, columns, stride[1], j * dilation[1] - padding[1])
                    taps[begin:end] = np.uint8(i * kernel[1] + j)
                first_row = False
            for j in range(kernel[1]):
                start = j * dilation[1] - padding[1]
                begin, end = _inside(width, columns, stride[1], start)
                tap = np.uint8(i * kernel[1] + j)
                for x in range(begin, end):
                    value = values[x * stride[1] + start]
                    better = (value > best[x]) | (value != value)
                    best[x] = value if better else best[x]
                    taps[x] = tap if better else taps[x]


def max_pool_forward(
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output: Tensor,
    offsets: Tensor,
) -> None:
    """Fill `output` with the largest element of every window and `offsets` with the number of its tap."""
    checks.max_pool_forward(input, kernel, stride, padding, dilation, output, offsets)
    wide = output if output.dtype.itemsize > 2 else output.float()  # NumPy has no bfloat16
    geometry = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    maps = [array(tensor) for tensor in (input, wide, offsets)]
    if all(map.flags.c_contiguous for map in maps):
        source, largest, taps = (map.reshape(-1, *map.shape[2:]) for map in maps)
        _pool_planes(source, *geometry, largest, taps)
    else:
        source, largest, taps = (map.transpose(0, 2, 3, 1) for map in maps)
        _pool_channels(source, *geometry, largest, taps)
    if wide is not output:
        output.copy_(wide)
