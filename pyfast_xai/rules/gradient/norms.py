"""Layer norm, by the statistics that its forward pass has computed, and softmax, by its result."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.gradient.context import BackwardContext, stacked
from pyfast_xai.rules.gradient.table import rule
from pyfast_xai.rules.saving import save_result
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.record import SaveTensor

aten = torch.ops.aten


def _has_variable_weight(node: Node) -> bool:
    """Returns whether the weight or the bias depends on the inputs of the model."""
    return len(node.inputs) != 1 or not isinstance(node.args[0], Value)


def _saves_statistics(node: Node, keep: SaveTensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    result, mean, rstd = node(*args, **kwargs)
    keep("mean", mean)
    keep("rstd", rstd)
    return result, mean, rstd


@rule("native_layer_norm", saves=["input"], runs=_saves_statistics, unless=_has_variable_weight)
def _layer_norm(
    ctx: BackwardContext,
    input: Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    # The gradients of the statistics are left out, as by autograd.
    if ctx.grads[0] is None:
        return
    saved = ctx.tensor("input"), normalized_shape, ctx.tensor("mean"), ctx.tensor("rstd")
    constants = [None if tensor is None else tensor.detach() for tensor in (weight, bias)]
    grads = [
        aten.native_layer_norm_backward(grad, *saved, *constants, [True, False, False])[0] for grad in ctx.grads[0]
    ]
    ctx.propagate(input, stacked(grads))


def _converts(node: Node) -> bool:
    return bool(node.args[2])


@rule("_softmax", runs=save_result, unless=_converts)
def _softmax(ctx: BackwardContext, self: Value, dim: int, half_to_float: bool) -> None:
    result, dim = ctx.tensor("result"), dim % len(self.shape) if self.shape else 0
    grads = [aten._softmax_backward_data(grad, result, dim, self.dtype) for grad in ctx.grad]
    ctx.propagate(self, stacked(grads))
