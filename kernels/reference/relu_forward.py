"""Reference of `relu_forward`."""

import math

import torch
from torch import Tensor

from pyfast_xai.kernels import checks

BYTE = 8


def in_memory_order(tensor: Tensor) -> Tensor:
    """Returns the elements of a dense tensor as they lie in memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _pack(mask: Tensor) -> Tensor:
    size = -(-len(mask) // BYTE)
    padded = torch.zeros(size * BYTE, dtype=torch.uint8, device=mask.device)
    padded[: len(mask)] = mask
    # Made on the device: a constant that is copied there cannot be part of a CUDA graph.
    weights = 1 << torch.arange(BYTE, dtype=torch.uint8, device=mask.device)
    return (padded.view(size, BYTE) * weights).sum(-1, dtype=torch.uint8)


def relu_forward(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> Tensor:
    """Write `min(max(x, 0), upper)` to `out`; the bits say `0 < x < upper`, and where there is a bound `<= bound`."""
    checks.relu_forward(input, upper, bound, clamp, out)
    x = in_memory_order(input)
    limit = torch.tensor(upper, dtype=x.dtype).item()  # on the host: rounded, and perhaps to infinity
    mask = x > 0
    if not math.isinf(limit):
        mask &= x < limit
    # Comparisons that are false for NaN, which stays.
    output = torch.where(x <= 0, 0, x)
    output = torch.where(output > limit, limit, output)
    if bound is not None:
        bound_values = in_memory_order(bound)
        mask &= output <= bound_values
        if clamp:
            output = torch.where((output <= bound_values) | output.isnan(), output, bound_values)
    in_memory_order(out).copy_(output)
    return _pack(mask)
