"""Gradients of a max-pool, by the bytes it remembered."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
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
    """Propagates gradients of K targets through one pool: each goes to the element that won its window.

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
        RuntimeError: shapes or dtypes that do not fit, or an offset that names no tap inside the input; on a device
            such an offset is left out.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> geometry = (2, 2), (2, 2), (0, 0), (1, 1)
        >>> output, offsets = ops.max_pool_forward(torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]]), *geometry)
        >>> ops.max_pool_backward(torch.ones(1, 1, 1, 1, 1), offsets, (2, 2), *geometry)
        tensor([[[[[0., 1.],
                   [0., 0.]]]]])
    """
    if grad.dim() != 5:
        raise RuntimeError(f"grad must have shape [K, N, C, H', W'], got {list(grad.shape)}")
    if offsets.dim() != 4:
        raise RuntimeError(f"offsets must have shape [N, C, H', W'], got {list(offsets.shape)}")
    if len(size) != 2 or not all(0 <= extent < 2**31 for extent in size):
        raise RuntimeError(f"size must be 2 numbers of at least 0 and less than 2**31, got {list(size)}")
    geometry = [list(numbers) for numbers in (kernel, stride, padding, dilation)]
    checks.pool_geometry(*geometry)
    layout = memory_format(offsets)
    flat = grad.detach().flatten(0, 1).contiguous(memory_format=layout)
    shape = (*flat.shape[:2], *size)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    _op(flat, offsets, *geometry, out)
    return out.unflatten(0, grad.shape[:2])
