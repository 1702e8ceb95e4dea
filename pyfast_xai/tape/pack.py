"""Convolution weights laid out once as the CPU's kernels want them, instead of in every call."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.tape.nodes import Node, Tape, Value, key


class Packs:
    """Packed weights, each made once for however many tapes of a model."""

    def __init__(self) -> None:
        # With the tensor that each was made of, so that no id is used again.
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, weight: Tensor, geometry: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor:
        known = (id(weight), *geometry, shape[1:])
        if known not in self._made:
            self._made[known] = weight, torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape)
        return self._made[known][1]


def pack(tape: Tape, packs: Packs) -> None:
    """Give the 2-D convolutions of a tape on the CPU a kernel with packed weights.

    The operation and its arguments on the tape stay, for readings of it.

    Args:
        tape: which is changed.
        packs: where packed weights are kept.
    """
    if not _available():
        return
    for node in tape.nodes:
        if key(node.op) == "aten::conv2d" and _fits(node):
            weight, _, *geometry = _complete(*node.args, **node.kwargs)
            input = node.args[0]
            node.kernel = _Packed(packs(weight.detach(), _ordered(*geometry), input.shape))


class _Packed:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _, bias, *geometry = _complete(input, *args, **kwargs)
        convolve = torch.ops.mkldnn._convolution_pointwise.default
        return convolve(input, self._weight, bias, *_ordered(*geometry), "none", [], "")


def _complete(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> tuple[Any, ...]:
    return weight, bias, stride, padding, dilation, groups


def _ordered(stride: Any, padding: Any, dilation: Any, groups: int) -> tuple[Any, ...]:
    """As the packed kernels take them."""
    pairs = (tuple(value) * (3 - len(value)) for value in (padding, stride, dilation))
    return *pairs, groups


def _fits(node: Node) -> bool:
    weight, _, _, padding, *_ = _complete(*node.args, **node.kwargs)
    value = node.args[0]
    return (
        isinstance(value, Value)
        and len(value.shape) == 4
        and value.device.type == "cpu"
        and value.dtype == torch.float32
        and isinstance(weight, Tensor)
        and weight.dtype == torch.float32
        and not isinstance(padding, str)
    )


def _available() -> bool:
    """Whether this PyTorch has the operations that its own compiler packs with."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    enabled = torch._C._has_mkldnn and bool(torch.backends.mkldnn.enabled)
    return enabled and all(hasattr(torch.ops.mkldnn, name) for name in names)
