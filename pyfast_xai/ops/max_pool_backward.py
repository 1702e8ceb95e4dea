"""Gradients of a max-pool, by the bytes it remembered."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.ops.max_pool_forward import memory_format
from pyfast_xai.ops.registry import Op


def _fake(
    grad: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    return None


_op = Op(
    "max_pool_backward(Tensor grad, Tensor offsets, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    " Tensor(a!) out) -> ()",
    _fake,
)


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradients of K targets through one pool: each goes to the element that won its window.

    Args:
        grad: `[K, N, C, H', W']`, float16, bfloat16, float32 or float64.
        offsets: uint8 `[N, C, H', W']`, from `max_pool_forward`; their memory format is that of the result.
        size: height and width of the input.
        kernel: as in the forward.
        stride: as in the forward.
        padding: as in the forward.
        dilation: as in the forward.

    Returns:
        `[K, N, C, H, W]`.

    Raises:
        RuntimeError: offsets that do not fit.
    """
    layout = memory_format(offsets)
    flat = grad.detach().flatten(0, 1).contiguous(memory_format=layout)
    shape = (*flat.shape[:2], *size)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    _op(flat, offsets, kernel, stride, padding, dilation, out)
    return out.unflatten(0, grad.shape[:2])
