"""Elementwise operations: a point stays where it is, and of two terms the larger contributor explains it."""

import math
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.evidence.backward import Step, rule
from pyfast_xai.rules.evidence.points import Points, broadcast, gather
from pyfast_xai.tape import Node, Value, key

# Outputs of these in a product say how much of the other factor passes.
_GATES = {f"aten::{name}" for name in ("sigmoid", "hardsigmoid", "softmax", "tanh", "silu", "gelu", "relu")}


@rule(
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
    *("hardtanh", "hardsigmoid", "softplus", "sigmoid", "tanh", "threshold", "clamp", "clamp_min", "clamp_max"),
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "log_sigmoid", "softsign", "hardshrink", "softshrink"),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
    *("pow", "sqrt", "square", "exp", "log", "log1p", "abs", "round", "floor", "ceil", "nan_to_num"),
    *("clone", "contiguous", "alias", "detach", "lift_fresh", "to", "_to_copy", "type_as", "float", "half"),
)
def identity(step: Step, input: Any, *rest: Any, **_: Any) -> None:
    """One input element a result element, in the same place."""
    step.send(input, step.points)


@rule("neg", "rsqrt", "reciprocal")
def falling(step: Step, input: Any, *rest: Any) -> None:
    """The lower the input, the higher the output."""
    step.send(input, step.points.flip())


@rule("fill", "zero", "copy", "fill_diagonal")
def replaced(step: Step, self: Value, source: Any = None, *rest: Any, **_: Any) -> None:
    """What was there before is gone; a copied tensor may have been broadcast."""
    if isinstance(source, Value):
        step.send(source, step.points.to(broadcast(step.points.index, step.shape, source.shape)))


def _both(node: Node) -> tuple[str, ...]:
    """Operands are compared only where both depend on the input."""
    return ("self", "other") if all(isinstance(argument, Value) for argument in node.args[:2]) else ()


def _send(step: Step, value: Any, points: Points) -> None:
    if isinstance(value, Value):
        step.send(value, points.to(broadcast(points.index, step.shape, value.shape)))


def _constant(step: Step, operand: Any) -> Tensor | float:
    """A constant operand of the points, broadcast to them."""
    # A number that the model keeps on the host, beside activations on a device.
    if not isinstance(operand, Tensor) or operand.device != step.points.index.device:
        return float(operand)
    return gather(operand, broadcast(step.points.index, step.shape, operand.shape))


def _sum(step: Step, first: Any, second: Any, scale: float) -> None:
    """`first + scale * second`: the larger contributor; a tie goes to the skip path."""
    points = step.points
    turned = points.flip() if scale < 0 else points
    if not (isinstance(first, Value) and isinstance(second, Value)):
        _send(step, first, points)
        _send(step, second, turned)
        return
    a, b = step.tensor("self"), step.tensor("other")
    a = gather(a, broadcast(points.index, step.shape, a.shape))
    b = gather(b, broadcast(points.index, step.shape, b.shape)) * scale
    lead = points.signed(a) - points.signed(b)
    # The skip path is the one with fewer layers on it; of equals, the first operand.
    takes_first = lead > 0 if step.depth(second) < step.depth(first) else lead >= 0
    _send(step, first, points.to(points.index, takes_first))
    _send(step, second, turned.to(turned.index, ~takes_first))


@rule("add", saves=_both)
def add(step: Step, self: Any, other: Any, *, alpha: float = 1) -> None:
    _sum(step, self, other, alpha)


@rule("sub", saves=_both)
def sub(step: Step, self: Any, other: Any, *, alpha: float = 1) -> None:
    _sum(step, self, other, -alpha)


@rule("rsub", saves=_both)
def rsub(step: Step, self: Any, other: Any, alpha: float = 1) -> None:
    if isinstance(other, Value):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for rsub of two activations, {step.node.name!r}")
    _send(step, self, step.points.flip() if alpha > 0 else step.points)


def _is_gate(step: Step, value: Value) -> bool:
    producer = step.producer(value)
    return producer is not None and key(producer.op) in _GATES


@rule("mul")
def mul(step: Step, self: Any, other: Any) -> None:
    """A gated feature is traced, its gate is not; a negative constant turns the sign."""
    for feature, factor in ((self, other), (other, self)):
        if isinstance(feature, Value) and not isinstance(factor, Value):
            factor = _constant(step, factor)
            negative = factor < 0
            if isinstance(negative, Tensor):
                _send(step, feature, step.points.flip(negative))
            else:
                _send(step, feature, step.points.flip() if negative else step.points)
            return
    smaller = other.numel < self.numel or (other.numel == self.numel and not _is_gate(step, self))
    _send(step, self if smaller else other, step.points)


@rule("div", "true_divide")
def div(step: Step, self: Any, other: Any, **_: Any) -> None:
    if isinstance(self, Value) and not isinstance(other, Value):
        mul(step, self, other)
    elif isinstance(self, Value):
        _send(step, self, step.points)  # the denominator normalises (local response normalisation)
    else:
        _send(step, other, step.points.flip())


@rule("where", "masked_fill")
def masked(step: Step, *args: Any) -> None:
    """`where(mask, a, b)` and `masked_fill(a, mask, number)`: the operand the mask chose."""
    mask, chosen, other = args if step.node.op._schema.name == "aten::where" else (args[1], args[2], args[0])
    if isinstance(mask, Value):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for a mask that depends on the input, {step.node.name!r}")
    on = gather(mask, broadcast(step.points.index, step.shape, mask.shape))
    _send(step, chosen, step.points.to(step.points.index, on))
    _send(step, other, step.points.to(step.points.index, ~on))


@rule("maximum", "minimum", saves=["self", "other"])
def extremum(step: Step, self: Any, other: Any) -> None:
    """The operand that the result was taken from."""
    a, b = (gather(step.tensor(n), broadcast(step.points.index, step.shape, step.tensor(n).shape)) for n in _PAIR)
    first = a >= b if key(step.node.op) == "aten::maximum" else a <= b
    _send(step, self, step.points.to(step.points.index, first))
    _send(step, other, step.points.to(step.points.index, ~first))


_PAIR = ("self", "other")


@rule("glu", saves=())
def glu(step: Step, input: Value, dim: int = -1) -> None:
    """The first half of the channels, which the second half gates."""
    dim %= len(step.shape)
    inner = math.prod(step.shape[dim:])
    outer = torch.div(step.points.index, inner, rounding_mode="floor")
    step.send(input, step.points.to(outer * 2 * inner + step.points.index % inner))
