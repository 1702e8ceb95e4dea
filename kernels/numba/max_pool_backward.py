"""Numba twin of `max_pool_backward`: a plane at a time."""

import numpy as np
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread


@one_thread
@njit(nogil=True, parallel=True)
def _scatter(
    grad: np.ndarray,
    offsets: np.ndarray,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    out: np.ndarray,
) -> None:
    images, channels, height, width = grad.shape
    for plane in prange(images * channels):
        n, c = plane // channels, plane % channels
        out[n, c] = 0
        for y in range(height):
            for x in range(width):
                tap = offsets[n % offsets.shape[0], c, y, x]
                row = y * stride[0] - padding[0] + tap // kernel[1] * dilation[0]
                column = x * stride[1] - padding[1] + tap % kernel[1] * dilation[1]
                out[n, c, row, column] += grad[n, c, y, x]


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    """Add every gradient to the element of `out` that won its window; the others become 0."""
    checks.max_pool_backward(grad, offsets, kernel, stride, padding, dilation, out)
    wide = out if out.dtype.itemsize > 2 else out.float()  # NumPy has no bfloat16
    geometry = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    _scatter(array(grad), array(offsets), *geometry, array(wide))
    if wide is not out:
        out.copy_(wide)
