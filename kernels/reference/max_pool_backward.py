"""Reference of `max_pool_backward`."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks


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
    targets = len(grad) // max(1, len(offsets))
    tap = offsets.long()
    rows = torch.arange(grad.shape[2], device=grad.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(grad.shape[3], device=grad.device) * stride[1] - padding[1]
    row = tap // kernel[1] * dilation[0] + rows
    column = tap % kernel[1] * dilation[1] + columns
    index = (row * out.shape[3] + column).repeat(targets, 1, 1, 1)
    out.zero_()
    out.copy_(torch.zeros_like(out).flatten(2).scatter_add_(2, index.flatten(2), grad.detach().flatten(2)).view_as(out))
