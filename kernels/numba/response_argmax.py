"""Numba twin of `response_argmax`: a row of pixels at a time."""

import numpy as np
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread


@one_thread
@njit(nogil=True, parallel=True)
def _fold(responses: np.ndarray, classes: np.ndarray, best: np.ndarray, winner: np.ndarray) -> None:
    count, images, channels, height, width = responses.shape
    for task in prange(images * height):
        n, y = task // height, task % height
        total = np.empty(width, dtype=best.dtype)
        for k in range(count):
            if classes[k, n] < 0:
                continue
            total[:] = 0
            for c in range(channels):
                for x in range(width):
                    total[x] += responses[k, n, c, y, x]
            for x in range(width):
                if total[x] > best[n, y, x]:
                    best[n, y, x] = total[x]
                    winner[n, y, x] = classes[k, n]


def response_argmax(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    """Replace `best` and `winner`, class by class, where the sum over the channels is larger."""
    checks.response_argmax(responses, classes, best, winner)
    _fold(array(responses), array(classes.contiguous()), array(best), array(winner))
