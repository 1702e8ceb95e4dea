"""Reference of `max_pool_forward`."""

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
    checks.max_pool(input, "input", output, "output", offsets, kernel, stride, padding, dilation)
    if not output.numel():
        return
    pooled, index = torch.ops.aten.max_pool2d_with_indices(
        input, kernel, stride, padding, dilation, _ceils(input, output, kernel, stride, padding, dilation)
    )
    rows = torch.arange(output.shape[2], device=input.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(output.shape[3], device=input.device) * stride[1] - padding[1]
    row = (index // input.shape[3] - rows) // dilation[0]
    column = (index % input.shape[3] - columns) // dilation[1]
    output.copy_(pooled)
    offsets.copy_(row * kernel[1] + column)


def _ceils(
    input: Tensor, output: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> bool:
    """Whether the last window reaches past the edge, which the size of the output tells."""
    floors = [
        (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)
    ]
    return list(output.shape[2:]) != floors
