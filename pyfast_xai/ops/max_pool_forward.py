"""A max-pool that remembers one byte a window."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op


def _fake(
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output: Tensor,
    offsets: Tensor,
) -> None:
    return None


_op = Op(
    "max_pool_forward(Tensor input, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor(a!) output,"
    " Tensor(b!) offsets) -> ()",
    _fake,
)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format that kernels keep: channels_last where a tensor has it and is not contiguous as well."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def max_pool_forward(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The largest element of every window, and which one it was: the first of equals, a NaN before all.

    Args:
        input: `[N, C, H, W]`, float16, bfloat16, float32 or float64; channels_last stays so.
        kernel: height and width of the window, at most 256 taps.
        stride: of the windows, down and right.
        padding: at every edge.
        dilation: between the taps of a window.
        ceil_mode: let the last window reach past the edge.

    Returns:
        Maxima `[N, C, H', W']` and, uint8 of the same shape and memory format, the row-major number of the winning
        tap in its window.

    Raises:
        RuntimeError: an input that does not fit, or a window of more than 256 taps.
    """
    # Of one map, for the size and for what PyTorch says of a wrong one: a meta tensor would import sympy.
    one = torch.ops.aten.max_pool2d_with_indices(input[:1, :1], kernel, stride, padding, dilation, ceil_mode)[0]
    size = (*input.shape[:2], *one.shape[2:])
    layout = memory_format(input)
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)
    offsets = torch.empty(size, dtype=torch.uint8, device=input.device, memory_format=layout)
    _op(input.detach().contiguous(memory_format=layout), kernel, stride, padding, dilation, output, offsets)
    return output, offsets
