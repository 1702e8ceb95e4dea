"""Sums, products and what else happens element by element."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.layers import conjugate, factor
from pyfast_xai.rules.gradient.table import rule
from pyfast_xai.tape import Node, Value, key


@rule("add", "sub")
def _add(ctx: BackwardContext, self: Any, other: Any, *, alpha: float = 1) -> None:
    ctx.propagate(self, ctx.grad)
    sign = -alpha if key(ctx.node.op) == "aten::sub" else alpha
    if ctx.wants(other):
        ctx.propagate(other, ctx.grad if sign == 1 else ctx.grad * conjugate(sign))


@rule("rsub")
def _rsub(ctx: BackwardContext, self: Any, other: Any, alpha: float = 1) -> None:
    if ctx.wants(self):
        ctx.propagate(self, ctx.grad * conjugate(-alpha))
    ctx.propagate(other, ctx.grad)


@rule("neg")
def _neg(ctx: BackwardContext, self: Value) -> None:
    ctx.propagate(self, -ctx.grad)


def _other_factors(node: Node) -> list[str]:
    both = [isinstance(argument, Value) for argument in node.args[:2]]
    return ["self", "other"] if all(both) else []


@rule("mul", saves=_other_factors)
def _mul(ctx: BackwardContext, self: Any, other: Any) -> None:
    if ctx.wants(self):
        ctx.propagate(self, ctx.grad * conjugate(factor(ctx, other, "other")))
    if ctx.wants(other):
        ctx.propagate(other, ctx.grad * conjugate(factor(ctx, self, "self")))


def _rounds(node: Node) -> bool:
    return bool(node.kwargs.get("rounding_mode"))


def _divides_by_value(node: Node) -> bool:
    return isinstance(node.args[1], Value) and not _rounds(node)


@rule("div", unless=_divides_by_value, blocks=_rounds)
def _div(ctx: BackwardContext, self: Value, other: Any, **kwargs: Any) -> None:
    ctx.propagate(self, ctx.grad / conjugate(other.detach() if isinstance(other, Tensor) else other))


@rule("clone", "alias", "_to_copy", "contiguous", "to", "lift_fresh")
def _same(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    ctx.propagate(self, ctx.grad)


def is_complex(node: Node) -> bool:
    """Returns whether an input of a node is complex."""
    return any(value.dtype.is_complex for value in node.inputs)


@rule("detach", "round", "floor", "ceil", "trunc", "sign", "bernoulli", "poisson", blocks=True)
@rule("sgn", unless=is_complex, blocks=True)
def _no_gradient(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
    """Sends nothing: the derivative is zero wherever there is one, or the model says that no gradient passes."""


@rule("copy")
def _copy(ctx: BackwardContext, self: Any, src: Any, non_blocking: bool = False) -> None:
    ctx.propagate(src, ctx.grad)


def _fills_with_value(node: Node) -> bool:
    return len(node.inputs) > 1


@rule("fill", "zero", unless=_fills_with_value, blocks=True)
def _fill(ctx: BackwardContext, self: Any, *value: Any) -> None:
    """Blocks the gradient: the previous contents are overwritten."""


def _masks_with_value(node: Node) -> bool:
    return any(isinstance(argument, Value) for argument in node.args[2:])


@rule("masked_fill", saves=["mask"], unless=_masks_with_value)
def _masked_fill(ctx: BackwardContext, self: Any, mask: Any, value: Any) -> None:
    mask = factor(ctx, mask, "mask")
    ctx.propagate(self, torch.where(mask, 0, ctx.grad))
