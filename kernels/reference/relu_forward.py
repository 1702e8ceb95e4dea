"""Reference of `relu_forward`."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks

BYTE = 8


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _pack(mask: Tensor) -> Tensor:
    size = -(-len(mask) // BYTE)
    padded = torch.zeros(size * BYTE, dtype=torch.uint8, device=mask.device)
    padded[: len(mask)] = mask
    place = torch.tensor([1 << bit for bit in range(BYTE)], dtype=torch.uint8, device=mask.device)
    return (padded.view(size, BYTE) * place).sum(-1, dtype=torch.uint8)


def relu_forward(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> Tensor:
    """Write `min(max(x, 0), upper)` to `out`; the bits say `0 < x < upper`, and where there is a bound `<= bound`."""
    checks.relu_forward(input, upper, bound, clamp, out)
    x = in_memory_order(input)
    end = torch.tensor(upper, dtype=x.dtype, device=x.device)
    mask = (x > 0) & ((x < end) | end.isinf())
    # Comparisons that are false for NaN, which stays.
    output = torch.where(x <= 0, 0, x)
    output = torch.where(output > end, end, output)
    if bound is not None:
        most = in_memory_order(bound)
        mask &= output <= most
        if clamp:
            output = torch.where((output <= most) | output.isnan(), output, most)
    in_memory_order(out).copy_(output)
    return _pack(mask)
