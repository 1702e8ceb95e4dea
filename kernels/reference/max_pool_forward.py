"""Reference of `max_pool_forward`."""

import math

import torch
from torch import Tensor

from pyfast_xai.kernels import checks


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
    if not output.numel():
        return
    (rows, row_inside), (columns, column_inside) = (
        _taps(input.shape[2 + d], output.shape[2 + d], kernel[d], stride[d], padding[d], dilation[d], input.device)
        for d in range(2)
    )
    inside = (row_inside[:, None, :, None] & column_inside[None, :, None, :]).flatten(2)  # [H', W', taps]
    values = input.detach()[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4)
    largest = values.masked_fill(~inside, -math.inf).amax(-1, keepdim=True)
    # The first of equals wins, and the last of several NaNs, as in PyTorch.
    first = (inside & (values == largest)).int().argmax(-1)
    nan = (inside & values.isnan()).int()
    last = math.prod(kernel) - 1 - nan.flip(-1).argmax(-1)
    tap = torch.where(nan.any(-1), last, first)
    output.copy_(values.take_along_dim(tap[..., None], -1)[..., 0])
    offsets.copy_(tap)


def _taps(
    size: int, windows: int, kernel: int, stride: int, padding: int, dilation: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return places `[windows, kernel]` of the taps along a dimension, and which of them lie inside."""
    start = torch.arange(windows, device=device)[:, None] * stride - padding
    coordinate = start + torch.arange(kernel, device=device) * dilation
    return coordinate.clamp(0, size - 1), (coordinate >= 0) & (coordinate < size)
