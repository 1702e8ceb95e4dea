"""Sums, products and what else happens element by element."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.response.layers import factor
from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import rule
from pyfast_xai.tape import Node, Value


@rule("add", "sub")
def _add(step: Step, self: Any, other: Any, *, alpha: float = 1) -> None:
    step.send(self, step.grad)
    sign = -alpha if step.node.op._schema.name.rstrip("_") == "aten::sub" else alpha
    if step.wants(other):
        step.send(other, step.grad if sign == 1 else step.grad * sign)


@rule("rsub")
def _rsub(step: Step, self: Any, other: Any, alpha: float = 1) -> None:
    if step.wants(self):
        step.send(self, step.grad * -alpha)
    step.send(other, step.grad)


@rule("neg")
def _neg(step: Step, self: Value) -> None:
    step.send(self, -step.grad)


def _other_factors(node: Node) -> list[str]:
    both = [isinstance(argument, Value) for argument in node.args[:2]]
    return ["self", "other"] if all(both) else []


@rule("mul", saves=_other_factors)
def _mul(step: Step, self: Any, other: Any) -> None:
    if step.wants(self):
        step.send(self, step.grad * factor(step, other, "other"))
    if step.wants(other):
        step.send(other, step.grad * factor(step, self, "self"))


def _divides(node: Node) -> bool:
    return isinstance(node.args[1], Value) or bool(node.kwargs.get("rounding_mode"))


@rule("div", unless=_divides)
def _div(step: Step, self: Value, other: Any, **kwargs: Any) -> None:
    step.send(self, step.grad / (other.detach() if isinstance(other, Tensor) else other))


@rule("clone", "alias", "_to_copy", "contiguous", "to", "lift_fresh", "dropout", "feature_dropout")
def _same(step: Step, self: Value, *args: Any, **kwargs: Any) -> None:
    step.send(self, step.grad)


@rule("detach")
def _detach(step: Step, self: Value) -> None:
    """The model says that no gradient passes here."""


@rule("copy")
def _copy(step: Step, self: Any, src: Any, non_blocking: bool = False) -> None:
    step.send(src, step.grad)


@rule("fill", "zero", unless=lambda node: len(node.inputs) > 1)
def _fill(step: Step, self: Any, *value: Any) -> None:
    """Nothing of what was there is left."""


@rule("masked_fill", saves=["mask"], unless=lambda node: any(isinstance(a, Value) for a in node.args[2:]))
def _masked_fill(step: Step, self: Any, mask: Any, value: Any) -> None:
    mask = factor(step, mask, "mask")
    step.send(self, torch.where(mask, 0, step.grad))
