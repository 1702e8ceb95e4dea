"""The CPU's kernels for convolutions, with weights laid out once as they want them, instead of in every call.

Laying them out takes a convolution on small maps longer than the product itself. The kernels can rectify their results
before they write them, too. Where it is faster, 3 x 3 convolutions and their adjoints are Winograd's.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast_xai import onednn, ops
from pyfast_xai.tape.nodes import Node, Tape, Value, argument, key
from pyfast_xai.tape.once import Once

# What a convolution can do to its results on the way out: the kernel's name for it, and its numbers.
_FINISHES: dict[str, Callable[[Node], tuple[str, list[float]]]] = {
    "aten::relu": lambda node: ("relu", []),
    "aten::relu6": lambda node: ("hardtanh", [0, 6]),
    "aten::hardtanh": lambda node: ("hardtanh", [argument(node, "min_val"), argument(node, "max_val")]),
    "aten::hardswish": lambda node: ("hardswish", []),
    "aten::silu": lambda node: ("swish", []),
}

# Between which limits what has no numbers of its own leaves its results.
_LIMITS: dict[str, list[float]] = {"none": [-math.inf, math.inf], "relu": [0, math.inf]}


def pack(tape: Tape, once: Once, *, until: Value | None = None, seen: bool = True) -> None:
    """Give the 2-D convolutions of a tape on the CPU kernels with packed weights, for themselves and their adjoints.

    The operations and their arguments on the tape stay, for readings of it.

    Args:
        tape: which is changed.
        once: keeps the packed weights.
        until: the value it was stopped at, None for a whole forward.
        seen: whether a reading may look at what a convolution gave. Where none does, convolutions also do the
            rectifiers that alone read them.
    """
    if not onednn.available():
        return
    for node in tape.nodes:
        if key(node.op) == "aten::linear" and isinstance(argument(node, "weight"), Tensor):
            node.kernel = onednn.linear
        if key(node.op) == "aten::conv2d":
            packed = _packed(once, *node.args, **node.kwargs)
            if packed is not None:
                node.kernel, node.adjoint = packed, packed.adjoint
    if not seen:
        _finish(tape, until)


def _finish(tape: Tape, until: Value | None) -> None:
    uses = Counter(value for node in tape.nodes for value in node.inputs)
    uses.update(tape.ends(until))
    for node in tape.nodes:
        finish = _FINISHES.get(key(node.op))
        if finish is None or len(node.inputs) != 1 or uses[node.inputs[0]] != 1:
            continue
        convolution = tape.producer(node.inputs[0])
        if convolution is not None and isinstance(convolution.kernel, _Packed):
            convolution.kernel, node.kernel = dataclasses.replace(convolution.kernel, finish=finish(node)), _finished


def _finished(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


@dataclasses.dataclass(frozen=True)
class _Packed:
    once: Once
    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    finish: tuple[str, list[float]] = ("none", [])

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, numbers = self.finish
        limits = numbers if name == "hardtanh" else _LIMITS.get(name)
        if limits is not None and self._by_winograd(input, self.padding):
            weight = self.once(ops.winograd_weight, self.weight)
            return ops.winograd_conv2d(input, weight, self.bias, self.padding, *limits)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_weight.default
        weight = self.once(reorder, self.weight, *geometry, _maps_like(input))
        return torch.ops.mkldnn._convolution_pointwise.default(input, weight, self.bias, *geometry, *self.finish, "")

    def adjoint(self, grad: Tensor, output_padding: list[int]) -> Tensor:
        # That of a convolution without a stride is one, too, with its kernels turned round.
        around = (2 - self.padding[0], 2 - self.padding[1])
        if self._by_winograd(grad, around):
            return ops.winograd_conv2d(grad, self.once(_winograd_adjoint_weight, self.weight), None, around)
        geometry = (self.padding, tuple(output_padding), self.stride, self.dilation, self.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight.default
        weight = self.once(reorder, self.weight, *geometry, _maps_like(grad))
        return onednn.transposed_convolution(grad, weight, *geometry)

    def _by_winograd(self, maps: Tensor, padding: tuple[int, ...]) -> bool:
        plain = (*self.stride, *self.dilation, self.groups) == (1, 1, 1, 1, 1)
        return plain and min(padding) >= 0 and ops.winograd_pays(maps, self.weight, padding)


def _winograd_adjoint_weight(weight: Tensor) -> Tensor:
    return ops.winograd_weight(weight.transpose(0, 1).flip(2, 3))


def _maps_like(maps: Tensor) -> tuple[int, ...]:
    """The shape to lay out weights for.

    Kernels want them one way for a single image and often another for several, however many. What is laid out
    otherwise is laid out again in every call, which can take several times as long as the convolution.
    """
    return (min(len(maps), 2), *maps.shape[1:])


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
