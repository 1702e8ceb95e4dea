"""Convolution weights laid out once as the CPU's kernels want them, instead of in every call.

These are the operations with which PyTorch's own compiler packs weights. Laying them out takes a convolution on small
maps longer than the product itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.tape.nodes import Tape, Value, key
from pyfast_xai.tape.once import Once

_OPS = (
    *("_reorder_convolution_weight", "_convolution_pointwise"),
    *("_reorder_convolution_transpose_weight", "_convolution_transpose_pointwise"),
)


def pack(tape: Tape, once: Once) -> None:
    """Give the 2-D convolutions of a tape on the CPU kernels with packed weights, for themselves and their adjoints.

    The operation and its arguments on the tape stay, for readings of it.

    Args:
        tape: which is changed.
        once: keeps the packed weights.
    """
    if not _available():
        return
    for node in tape.nodes:
        if key(node.op) == "aten::conv2d":
            packed = _packed(once, *node.args, **node.kwargs)
            if packed is not None:
                node.kernel, node.adjoint = packed, packed.adjoint


@dataclass(frozen=True)
class _Packed:
    once: Once
    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        ops = torch.ops.mkldnn
        # For maps of this size: another batch is laid out alike, or again where the kernel wants it otherwise.
        weight = self.once(ops._reorder_convolution_weight.default, self.weight, *geometry, (1, *input.shape[1:]))
        return ops._convolution_pointwise.default(input, weight, self.bias, *geometry, "none", [], "")

    def adjoint(self, grad: Tensor, output_padding: list[int]) -> Tensor:
        geometry = (self.padding, tuple(output_padding), self.stride, self.dilation, self.groups)
        ops = torch.ops.mkldnn
        reorder = ops._reorder_convolution_transpose_weight.default
        weight = self.once(reorder, self.weight, *geometry, (1, *grad.shape[1:]))
        return ops._convolution_transpose_pointwise.default(grad, weight, None, *geometry, "none", [], "")


def _packed(
    once: Once,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> _Packed | None:
    if not (isinstance(input, Value) and len(input.shape) == 4 and input.device.type == "cpu"):
        return None
    floats = isinstance(weight, Tensor) and input.dtype == weight.dtype == torch.float32
    if not floats or isinstance(padding, str) or isinstance(bias, Value):
        return None
    padding, stride, dilation = (tuple(value) * (3 - len(value)) for value in (padding, stride, dilation))
    return _Packed(once, weight, None if bias is None else bias.detach(), padding, stride, dilation, groups)


def _available() -> bool:
    enabled = torch._C._has_mkldnn and bool(torch.backends.mkldnn.enabled)
    return enabled and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
