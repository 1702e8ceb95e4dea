"""Nonlinearities that saturate at both ends and do not rectify: sigmoid, tanh and the hard sigmoid."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import rule
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.record import SaveTensor

aten = torch.ops.aten

_DERIVATIVES = {"aten::sigmoid": aten.sigmoid_backward.default, "aten::tanh": aten.tanh_backward.default}


def _keeps_result(node: Node, keep: SaveTensor, self: Tensor) -> Tensor:
    result = node(self)
    keep("result", result)
    return result


def _is_complex(node: Node) -> bool:
    return node.inputs[0].dtype.is_complex


@rule("sigmoid", "tanh", runs=_keeps_result, unless=_is_complex)
def _saturating(ctx: BackwardContext, self: Value, **kwargs: Any) -> None:
    ctx.propagate(self, _DERIVATIVES[key(ctx.node.op)](ctx.grad, ctx.tensor("result")))


@rule("hardsigmoid", saves=["self"])
def _hardsigmoid(ctx: BackwardContext, self: Value) -> None:
    ctx.propagate(self, aten.hardsigmoid_backward(ctx.grad, ctx.tensor("self").expand_as(ctx.grad)))
