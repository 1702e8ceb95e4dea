"""Numba twin of `relu_backward`."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Rectify
from pyfast_xai.kernels.numba import array, one_thread
from pyfast_xai.kernels.numba.relu_forward import BLOCK, pattern, patterns

GRADIENT, DECONVNET, GUIDED = map(int, Rectify)
SPREAD = np.uint64(0x0101010101010101)
PLACES = np.uint64(0x8040201008040201)


@one_thread
@njit(nogil=True, parallel=True)
def _pass(
    grad: np.ndarray,
    bits: np.ndarray,
    rule: int,
    magnitude: int,
    infinity: int,
    leaks: bool,
    leak: np.ndarray,
    out: np.ndarray,
) -> None:
    rows, size = grad.shape
    blocks = (size + BLOCK - 1) // BLOCK
    for task in prange(rows * blocks):
        row = task // blocks
        first = task % blocks * BLOCK
        count = min(size - first, BLOCK)
        mask = np.ones(BLOCK, dtype=np.uint8)
        if rule != DECONVNET:
            # The bits of a byte become eight bytes, each 0 where its bit is.
            eights = mask.view(np.uint64)
            for byte in range((count + 7) // 8):
                eights[byte] = (bits[first // 8 + byte] * SPREAD) & PLACES
        for j in range(count):
            g = grad[row, first + j]
            passes = mask[j] != 0
            if rule != GRADIENT:
                passes &= (g > 0) | ((g & magnitude) > infinity)
            leaked = leak[row, first + j]  # read in any case: bits are hard to predict, a branch would be slow
            out[row, first + j] = g if passes else leaked if leaks else 0


def relu_backward(grad: Tensor, bits: Tensor | None, rule: int, negative_slope: float, out: Tensor) -> None:
    """Write to `out` what of each `grad[k]` passes: by the bits (GRADIENT), its sign (DECONVNET) or both (GUIDED)."""
    checks.relu_backward(grad, bits, rule, negative_slope, out)
    if not grad.numel():
        return
    packed = np.zeros(0, dtype=np.uint8) if bits is None else array(bits.contiguous())
    g = patterns(grad).reshape(len(grad), -1)
    _pass(
        g,
        packed,
        rule,
        np.iinfo(g.dtype).max,
        pattern(torch.inf, grad.dtype),
        negative_slope != 0,
        patterns(grad.detach() * negative_slope).reshape(g.shape) if negative_slope else g,
        patterns(out).reshape(g.shape),
    )
