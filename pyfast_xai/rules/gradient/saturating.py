"""Nonlinearities that saturate at both ends and do not rectify: sigmoid, tanh and the hard sigmoid."""

from typing import Any

import torch

from pyfast_xai.rules.gradient.arithmetic import is_complex
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import rule
from pyfast_xai.rules.saving import save_result
from pyfast_xai.tape import Value, key

aten = torch.ops.aten

_DERIVATIVES = {"aten::sigmoid": aten.sigmoid_backward.default, "aten::tanh": aten.tanh_backward.default}


@rule("sigmoid", "tanh", runs=save_result, unless=is_complex)
def _saturating(ctx: BackwardContext, self: Value, **kwargs: Any) -> None:
    ctx.propagate(self, _DERIVATIVES[key(ctx.node.op)](ctx.grad, ctx.tensor("result")))


@rule("hardsigmoid", saves=["self"])
def _hardsigmoid(ctx: BackwardContext, self: Value) -> None:
    ctx.propagate(self, aten.hardsigmoid_backward(ctx.grad, ctx.tensor("self").expand_as(ctx.grad)))
