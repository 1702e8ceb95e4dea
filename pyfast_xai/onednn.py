"""Direct calls of oneDNN's convolutions and matrix products on the CPU.

PyTorch brings them but does not always choose them: pointwise convolutions on one thread and all products of float32
matrices go to BLAS, which on some processors takes twice as long. These are the operations that its own compiler calls.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OPS = (
    *("_reorder_convolution_weight", "_convolution_pointwise"),
    *("_reorder_convolution_transpose_weight", "_convolution_transpose_pointwise", "_linear_pointwise"),
)

_BACKENDS: Any = torch._C._ConvBackend  # type: ignore[attr-defined]

# PyTorch's own rule: on one thread, as many images make a pointwise convolution worth oneDNN's while.
_MANY_IMAGES = 16

# Rows from which a product pays for bringing its weight into the order that the kernel wants.
_LEAST_ROWS = 4


def available() -> bool:
    """Returns whether this PyTorch has oneDNN, and may use it."""
    return _is_built_in() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _is_built_in() -> bool:
    return torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)


def takes(*tensors: Tensor) -> bool:
    """Returns whether oneDNN is available and works with such tensors."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False
    return available()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `input @ weight.T + bias`, for an input `[..., I]` and a weight `[O, I]` in any memory order."""
    if not takes(input, weight) or input.dim() < 2 or input.numel() < _LEAST_ROWS * input.shape[-1]:
        return torch.nn.functional.linear(input, weight, bias)
    rows = input.flatten(0, -2)
    result = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return result.view(*input.shape[:-1], weight.shape[0])


def is_passed_over(input: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Returns whether PyTorch gives a transposed convolution of maps `[N, O, H, W]` to BLAS though oneDNN takes it."""
    if weight.dim() != 4 or tuple(weight.shape)[2:] != (1, 1) or max(stride) > 1 or torch.get_num_threads() > 1:
        return False
    return input.shape[0] < _MANY_IMAGES and input.numel() > 0 and takes(input, weight)


def serves(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Returns whether PyTorch gives a convolution of maps `[N, C, H, W]` to oneDNN."""
    geometry = (stride, padding, dilation, False, [0] * len(stride), groups, None)
    return torch._C._select_conv_backend(input, weight, bias, *geometry) == _BACKENDS.Mkldnn


def serves_transposed(
    input: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    output_padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Returns whether `adjoint` gives a transposed convolution of maps `[N, O, H, W]` to oneDNN."""
    if is_passed_over(input, weight, stride):
        return True
    geometry = (stride, padding, dilation, True, output_padding, groups, None)
    # PyTorch has no name for oneDNN's, which is what it takes but for these.
    fallbacks = (_BACKENDS.SlowTranspose2d, _BACKENDS.Empty, _BACKENDS.MkldnnEmpty)
    return torch._C._select_conv_backend(input, weight, None, *geometry) not in fallbacks


def shape_to_pack_for(maps: Tensor) -> tuple[int, ...]:
    """Returns the shape of maps to lay out weights for.

    Kernels want them one way for a single image and often another for several, however many. What is laid out
    otherwise is laid out again in every call, which can take several times as long as the convolution.
    """
    return (min(len(maps), 2), *maps.shape[1:])


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: tuple[str, Sequence[float]] = ("none", ()),
) -> Tensor:
    """Computes a convolution of maps `[N, C, H, W]` with a plain weight, or one packed for it, and an activation."""
    geometry: tuple[Any, ...] = (padding, stride, dilation, groups)
    name, numbers = activation
    return torch.ops.mkldnn._convolution_pointwise.default(input, weight, bias, *geometry, name, list(numbers), "")


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    output_padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Computes a transposed convolution of maps `[N, O, H, W]` with a plain weight, or one packed for it."""
    geometry: tuple[Any, ...] = (padding, output_padding, stride, dilation, groups)
    return torch.ops.mkldnn._convolution_transpose_pointwise.default(input, weight, None, *geometry, "none", [], "")
