"""A max-pool that remembers one byte a window."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
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
    """Returns the format that kernels keep: channels_last if a tensor has it and is not contiguous as well."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def suggested_format(tensor: Tensor) -> torch.memory_format:
    """Returns the format that PyTorch gives a result of maps with such strides, dense or not."""
    smallest = 0
    for d in (1, 3, 2, 0):
        size, stride = tensor.shape[d], tensor.stride(d)
        # A batch of one channel, or of one image of one pixel, is read as contiguous.
        if not size or stride < smallest or (d == 1 and not stride) or (d == 0 and smallest == tensor.stride(1)):
            return torch.contiguous_format
        smallest = stride * max(1, size)
    return torch.channels_last


def max_pool_forward(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the largest element of every window, and its place: the first of equals, a NaN before all.

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
        RuntimeError: an input that does not fit, a window of more than 256 taps, or one that holds no element.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> input = torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]])
        >>> output, offsets = ops.max_pool_forward(input, (2, 2), (2, 2), (0, 0), (1, 1))
        >>> output, offsets
        (tensor([[[[3.]]]]), tensor([[[[1]]]], dtype=torch.uint8))
    """
    if input.dim() != 4:
        raise RuntimeError(f"input must have shape [N, C, H, W], got {list(input.shape)}")
    geometry = [list(numbers) for numbers in (kernel, stride, padding, dilation)]
    checks.pool_geometry(*geometry)
    # One map gives the output size and PyTorch's own errors; a meta tensor would import sympy.
    single = torch.ops.aten.max_pool2d_with_indices(input[:1, :1], *geometry, ceil_mode)[0]
    size = (*input.shape[:2], *single.shape[2:])
    layout = suggested_format(input)
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)
    offsets = torch.empty(size, dtype=torch.uint8, device=input.device, memory_format=layout)
    _op(input.detach().contiguous(memory_format=layout), *geometry, output, offsets)
    return output, offsets
