"""Reference of `max_pool_forward`: PyTorch's pool of the padded input, and its indices as numbers of taps."""

import math

import torch
from torch import Tensor
from torch.nn import functional

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
    extents = [(output.shape[2 + d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1 for d in range(2)]
    after = [extents[d] - padding[d] - input.shape[2 + d] for d in range(2)]
    padded = functional.pad(input.detach(), (padding[1], after[1], padding[0], after[0]), value=-math.inf)
    largest, index = functional.max_pool2d(padded, kernel, stride, 0, dilation, return_indices=True)
    output.copy_(largest)
    tap = torch.zeros_like(index)
    for d, place in enumerate((index // extents[1], index % extents[1])):
        window = torch.arange(output.shape[2 + d], device=index.device) * stride[d]
        # Where all are -inf it is the first tap inside the input.
        first = -((window - padding[d]).clamp_max(0) // dilation[d])
        shape = (-1, 1) if d == 0 else (-1,)
        number = torch.where(largest == -math.inf, first.view(shape), (place - window.view(shape)) // dilation[d])
        tap = tap * kernel[d] + number
    offsets.copy_(tap)
