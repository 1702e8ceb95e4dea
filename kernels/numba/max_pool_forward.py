"""Numba twin of `max_pool_forward`: a plane at a time."""

import numpy as np
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread


@one_thread
@njit(nogil=True, parallel=True)
def _pool(
    input: np.ndarray,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    output: np.ndarray,
    offsets: np.ndarray,
) -> None:
    images, channels, height, width = input.shape
    for plane in prange(images * channels):
        n, c = plane // channels, plane % channels
        for y in range(output.shape[2]):
            for x in range(output.shape[3]):
                best, tap = -np.inf, -1
                for i in range(kernel[0]):
                    row = y * stride[0] - padding[0] + i * dilation[0]
                    if row < 0 or row >= height:
                        continue
                    for j in range(kernel[1]):
                        column = x * stride[1] - padding[1] + j * dilation[1]
                        if column < 0 or column >= width:
                            continue
                        value = input[n, c, row, column]
                        if tap < 0 or value > best or np.isnan(value):
                            best, tap = value, i * kernel[1] + j
                output[n, c, y, x] = best
                offsets[n, c, y, x] = tap


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
    _pool(array(input), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), array(wide), array(offsets))
    if wide is not output:
        output.copy_(wide)
