"""Numba twin of `relu_forward`.

Of two floats that are not negative the larger is the larger as an integer too, and what lies above infinity is NaN: one
kernel on integers serves the half types, which NumPy lacks or computes slowly, without a copy.
"""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.numba import array, one_thread

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 4096  # elements of one task
GATHER = np.uint64(0x0102040810204080)


def patterns(tensor: Tensor) -> np.ndarray:
    """Returns the elements of a dense tensor in memory order, as integers of their width that share its memory."""
    return array(tensor.as_strided((tensor.numel(),), (1,)).view(INTEGERS[tensor.element_size()]))


def pattern(value: float, dtype: torch.dtype) -> int:
    """Returns a number of this dtype as an integer."""
    return int(torch.tensor(value, dtype=dtype).view(INTEGERS[dtype.itemsize]))


@one_thread
@njit(nogil=True, parallel=True)
def _rectify(
    input: np.ndarray,
    bound: np.ndarray,
    bounded: bool,
    clamp: bool,
    magnitude: int,
    infinity: int,
    upper: int,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    size = len(input)
    largest = infinity if upper == infinity else upper - 1  # that passes
    for task in prange((size + BLOCK - 1) // BLOCK):
        first = task * BLOCK
        count = min(size - first, BLOCK)
        mask = np.zeros(BLOCK, dtype=np.uint8)
        for j in range(count):
            x = input[first + j]
            nan = (x & magnitude) > infinity
            y = x if (x > 0) | nan else 0
            y = upper if (y > upper) & (not nan) else y
            passes = (x > 0) & (x <= largest)
            if bounded:
                b = bound[first + j]
                # Nothing lies within NaN, and zero has two patterns.
                bound_magnitude = -1 if b > infinity else b if b & magnitude else 0
                passes &= y <= bound_magnitude
                if clamp:
                    y = y if nan | (y <= bound_magnitude) else b
            out[first + j] = y
            mask[j] = passes
        # Eight bytes that are 0 or 1 become the bits of one by a multiplication.
        eights = mask.view(np.uint64)
        for byte in range((count + 7) // 8):
            bits[first // 8 + byte] = (eights[byte] * GATHER) >> np.uint64(56)


def relu_forward(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> Tensor:
    """Write `min(max(x, 0), upper)` to `out`; the bits say `0 < x < upper`, and where there is a bound `<= bound`."""
    checks.relu_forward(input, upper, bound, clamp, out)
    bits = torch.empty((input.numel() + 7) // 8, dtype=torch.uint8)
    x = patterns(input)
    _rectify(
        x,
        x if bound is None else patterns(bound),
        bound is not None,
        clamp,
        np.iinfo(x.dtype).max,
        pattern(torch.inf, input.dtype),
        pattern(upper, input.dtype),
        patterns(out),
        array(bits),
    )
    return bits
