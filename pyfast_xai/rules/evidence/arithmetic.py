"""Elementwise operations: a point stays where it is, and of two terms the larger contributor explains it."""

import math
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.evidence.backward import TraceContext, rule
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
def identity(ctx: TraceContext, input: Any, *rest: Any, **_: Any) -> None:
    """Traces each element to the input element in the same place."""
    ctx.propagate(input, ctx.points)


@rule("neg", "rsqrt", "reciprocal")
def falling(ctx: TraceContext, input: Any, *rest: Any) -> None:
    """Traces each element to the same place with its sign turned: the lower the input, the higher the output."""
    ctx.propagate(input, ctx.points.flip())


@rule("fill", "zero", "copy", "fill_diagonal")
def replaced(ctx: TraceContext, self: Value, source: Any = None, *rest: Any, **_: Any) -> None:
    """Ends the trace at overwritten elements; follows a copied tensor, which may have been broadcast."""
    if isinstance(source, Value):
        ctx.propagate(source, ctx.points.to(broadcast(ctx.points.index, ctx.shape, source.shape)))


def _both(node: Node) -> tuple[str, ...]:
    """Returns the operands are compared only where both depend on the input."""
    return ("self", "other") if all(isinstance(argument, Value) for argument in node.args[:2]) else ()


def _send(ctx: TraceContext, value: Any, points: Points) -> None:
    if isinstance(value, Value):
        ctx.propagate(value, points.to(broadcast(points.index, ctx.shape, value.shape)))


def _constant(ctx: TraceContext, operand: Any, points: Points) -> Tensor | float:
    """Returns a constant operand of points, broadcast to them."""
    # A number that the model keeps on the host, beside activations on a device.
    if not isinstance(operand, Tensor) or operand.device != points.index.device:
        return float(operand)
    return gather(operand, broadcast(points.index, ctx.shape, operand.shape))


def _sum(ctx: TraceContext, first: Any, second: Any, scale: float) -> None:
    """Traces `first + scale * second` to the larger contributor; a tie goes to the skip path."""
    points = ctx.points
    turned = points.flip() if scale < 0 else points
    if not (isinstance(first, Value) and isinstance(second, Value)):
        _send(ctx, first, points)
        _send(ctx, second, turned)
        return
    a, b = ctx.tensor("self"), ctx.tensor("other")
    b = _number(ctx, b, points) * scale
    takes_first = _leads(ctx, _number(ctx, a, points), b, deeper=ctx.depth(second) < ctx.depth(first))
    _send(ctx, first, points.to(points.index, takes_first))
    _send(ctx, second, turned.to(turned.index, ~takes_first))


def _number(ctx: TraceContext, operand: Tensor, points: Points) -> Tensor:
    return gather(operand, broadcast(points.index, ctx.shape, operand.shape))


def _leads(ctx: TraceContext, first: Tensor, second: Tensor, *, deeper: bool) -> Tensor:
    """Returns where the first of two terms is the larger contributor; of equals it is the one with fewer layers."""
    lead = ctx.points.signed(first) - ctx.points.signed(second)
    return lead > 0 if deeper else lead >= 0


@rule("add", saves=_both)
def add(ctx: TraceContext, self: Any, other: Any, *, alpha: float = 1) -> None:
    _sum(ctx, self, other, alpha)


@rule("sub", saves=_both)
def sub(ctx: TraceContext, self: Any, other: Any, *, alpha: float = 1) -> None:
    _sum(ctx, self, other, -alpha)


def _terms(node: Node) -> list[str]:
    """Returns the operands of `self + tensor1 * tensor2` that depend on the input, if both terms do."""
    names = [n for n, part in zip(_TERMS, node.args, strict=False) if isinstance(part, Value)]
    return names if names[:1] == ["self"] and len(names) > 1 else []


_TERMS = ("self", "tensor1", "tensor2")


@rule("addcmul", saves=_terms)
def addcmul(ctx: TraceContext, self: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> None:
    """Traces `self + value * tensor1 * tensor2` as a sum of a product, whose feature is traced as `mul` traces it."""
    points, factors = ctx.points, (tensor1, tensor2)
    if _terms(ctx.node):
        one, two = (
            _number(ctx, ctx.tensor(name), points) if isinstance(part, Value) else _constant(ctx, part, points)
            for name, part in zip(_TERMS[1:], factors, strict=True)
        )
        deeper = max(ctx.depth(part) for part in factors if isinstance(part, Value)) < ctx.depth(self)
        takes_self = _leads(
            ctx, _number(ctx, ctx.tensor("self"), points), torch.as_tensor(one * two * value), deeper=deeper
        )
        _send(ctx, self, points.to(points.index, takes_self))
        points = points.to(points.index, ~takes_self)
    else:
        _send(ctx, self, points)
    if any(isinstance(part, Value) for part in factors):
        _gated(ctx, tensor1, tensor2, points.flip() if value < 0 else points)


@rule("rsub", saves=_both)
def rsub(ctx: TraceContext, self: Any, other: Any, alpha: float = 1) -> None:
    if isinstance(other, Value):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for rsub of two activations, {ctx.node.name!r}")
    _send(ctx, self, ctx.points.flip() if alpha > 0 else ctx.points)


def _is_gate(ctx: TraceContext, value: Value) -> bool:
    producer = ctx.producer(value)
    return producer is not None and key(producer.op) in _GATES


@rule("mul")
def mul(ctx: TraceContext, self: Any, other: Any) -> None:
    """Traces a product to the gated feature, not to its gate; a negative constant turns the sign."""
    _gated(ctx, self, other, ctx.points)


def _gated(ctx: TraceContext, self: Any, other: Any, points: Points) -> None:
    for feature, factor in ((self, other), (other, self)):
        if isinstance(feature, Value) and not isinstance(factor, Value):
            factor = _constant(ctx, factor, points)
            negative = factor < 0
            if isinstance(negative, Tensor):
                _send(ctx, feature, points.flip(negative))
            else:
                _send(ctx, feature, points.flip() if negative else points)
            return
    smaller = other.numel < self.numel or (other.numel == self.numel and not _is_gate(ctx, self))
    _send(ctx, self if smaller else other, points)


@rule("div", "true_divide")
def div(ctx: TraceContext, self: Any, other: Any, **_: Any) -> None:
    if isinstance(self, Value) and not isinstance(other, Value):
        mul(ctx, self, other)
    elif isinstance(self, Value):
        _send(ctx, self, ctx.points)  # the denominator normalises (local response normalisation)
    else:
        _send(ctx, other, ctx.points.flip())


@rule("where", "masked_fill")
def masked(ctx: TraceContext, *args: Any) -> None:
    """Traces `where(mask, a, b)` and `masked_fill(a, mask, number)` to the operand that the mask chose."""
    mask, chosen, other = args if ctx.node.op._schema.name == "aten::where" else (args[1], args[2], args[0])
    if isinstance(mask, Value):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for a mask that depends on the input, {ctx.node.name!r}")
    on = gather(mask, broadcast(ctx.points.index, ctx.shape, mask.shape))
    _send(ctx, chosen, ctx.points.to(ctx.points.index, on))
    _send(ctx, other, ctx.points.to(ctx.points.index, ~on))


@rule("maximum", "minimum", saves=["self", "other"])
def extremum(ctx: TraceContext, self: Any, other: Any) -> None:
    """Traces a minimum or maximum to the operand that the result was taken from."""
    a, b = (gather(ctx.tensor(n), broadcast(ctx.points.index, ctx.shape, ctx.tensor(n).shape)) for n in _PAIR)
    first = a >= b if "max" in ctx.node.op._schema.name else a <= b
    _send(ctx, self, ctx.points.to(ctx.points.index, first))
    _send(ctx, other, ctx.points.to(ctx.points.index, ~first))


_PAIR = ("self", "other")


@rule("glu", saves=())
def glu(ctx: TraceContext, input: Value, dim: int = -1) -> None:
    """Traces a GLU to the first half of the channels, which the second half gates."""
    dim %= len(ctx.shape)
    inner = math.prod(ctx.shape[dim:])
    outer = torch.div(ctx.points.index, inner, rounding_mode="floor")
    ctx.propagate(input, ctx.points.to(outer * 2 * inner + ctx.points.index % inner))
