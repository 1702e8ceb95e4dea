"""Rectifying nonlinearities, the one place where saliency, DeconvNet, guided backprop and FGVis differ.

With R the gradient of the output and f' the derivative at the input x:

==========  ===========================================  ====================================================
table       passes                                       source
==========  ===========================================  ====================================================
GRADIENT    R f'(x)                                      Simonyan, Vedaldi and Zisserman, 2014
DECONVNET   max(R, 0)                                    Zeiler and Fergus, 2014
GUIDED      max(R, 0) f'(x) where x > 0                  Springenberg et al., 2015
LINEAR      R                                            CLEAR, equations 1 to 3 (Kumar, Wong and Taylor, 2017)
==========  ===========================================  ====================================================

The papers know ReLU only. For the others the same reading is taken: DeconvNet looks at no activation, and guided
backprop drops what is negative above or below, on which f' >= 0 holds for every rectifier here. Sigmoid, tanh and
their kind do not rectify and keep their gradient in every table.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast_xai import ops
from pyfast_xai.ops import Rectify
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import NamedTable, rule
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.graph import argument
from pyfast_xai.tape.record import SaveTensor, writes

aten = torch.ops.aten

DECONVNET = NamedTable("DECONVNET", __name__)
GUIDED = NamedTable("GUIDED", __name__)
LINEAR = NamedTable("LINEAR", __name__)


# Masks of one bit an element


def memory_order(value: Value) -> list[int]:
    """Returns the dimensions of a value from the outermost in memory to the innermost; unchanged if it has gaps."""
    return list(_memory_order(value.shape, value.stride)[0])


@functools.lru_cache(maxsize=4096)
def _memory_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[list[int], bool]:
    """Returns `memory_order` for such a value, and whether it is dense."""
    order = sorted(range(len(shape)), key=lambda d: -stride[d])
    expected = 1
    for d in reversed(order):
        if shape[d] != 1 and stride[d] != expected:
            return list(range(len(order))), False
        expected *= shape[d]
    return order, True


def _aligned(ctx: BackwardContext) -> tuple[Tensor, bool]:
    """Returns the gradient in the memory order of its value, in which its bits were written, and whether it is ours."""
    value = ctx.node.outputs[0]
    assert value is not None
    order, dense = _memory_order(value.shape, value.stride)
    if dense and ctx.grad.stride() == (value.numel, *value.stride):
        return ctx.grad, ctx.owns_memory
    back = sorted(range(len(order)), key=order.__getitem__)
    aligned = ctx.grad.permute(0, *[d + 1 for d in order]).contiguous().permute(0, *[d + 1 for d in back])
    return aligned, ctx.owns_memory or aligned.data_ptr() != ctx.grad.data_ptr()


def _rectified(ctx: BackwardContext, mode: Rectify, negative_slope: float = 0.0) -> Tensor:
    if mode is Rectify.DECONVNET:
        return ctx.grad.clamp_min_(0) if ctx.owns_memory else ctx.grad.clamp_min(0)
    grad, owned = _aligned(ctx)
    bits = ctx.tensor("bits")
    return ops.relu_backward(grad, bits, mode, negative_slope=negative_slope, out=grad if owned else None)


def relu(node: Node, keep: SaveTensor, input: Tensor, **settings: Any) -> Tensor:
    """Rectify, in place where the op does, and keep the mask."""
    if writes(node.op):
        output, bits = ops.relu_forward(input, out=input if _dense(input) else None, **settings)
        result = input if output is input else input.copy_(output)
    else:
        result, bits = ops.relu_forward(input, **settings)
    keep("bits", bits)
    return result


def _dense(tensor: Tensor) -> bool:
    return _memory_order(tensor.shape, tensor.stride())[1]


def upper_of(node: Node) -> float | None:
    """Returns the value at which a rectifier that is the identity above zero saturates; None for others."""
    name = key(node.op)
    if name == "aten::relu":
        return math.inf
    return argument(node, "max_val") if name == "aten::hardtanh" and not _not_relu6(node) else None


def _runs_relu(node: Node, keep: SaveTensor, self: Tensor) -> Tensor:
    return relu(node, keep, self)


def _runs_hardtanh(node: Node, keep: SaveTensor, self: Tensor, min_val: float = -1, max_val: float = 1) -> Tensor:
    return relu(node, keep, self, upper=max_val)


def _runs_leaky(node: Node, keep: SaveTensor, self: Tensor, negative_slope: float = 0.01) -> Tensor:
    keep("bits", ops.relu_forward(self)[1])
    return node(self, negative_slope)


def _not_relu6(node: Node) -> bool:
    return not 0 == argument(node, "min_val") < argument(node, "max_val")


@rule("relu", runs=_runs_relu)
def _relu(ctx: BackwardContext, self: Value) -> None:
    ctx.propagate(self, _rectified(ctx, Rectify.GRADIENT))


@rule("hardtanh", runs=_runs_hardtanh, unless=_not_relu6)
def _hardtanh(ctx: BackwardContext, self: Value, *limits: float) -> None:
    ctx.propagate(self, _rectified(ctx, Rectify.GRADIENT))


@rule("leaky_relu", runs=_runs_leaky)
def _leaky_relu(ctx: BackwardContext, self: Value, negative_slope: float = 0.01) -> None:
    ctx.propagate(self, _rectified(ctx, Rectify.GRADIENT, negative_slope))


@rule("relu", runs=_runs_relu, table=GUIDED)
@rule("hardtanh", runs=_runs_hardtanh, unless=_not_relu6, table=GUIDED)
@rule("leaky_relu", runs=_runs_leaky, table=GUIDED)
def _guided_by_bits(ctx: BackwardContext, self: Value, *settings: float) -> None:
    ctx.propagate(self, _rectified(ctx, Rectify.GUIDED))


@rule("relu", "leaky_relu", table=DECONVNET)
@rule("hardtanh", unless=_not_relu6, table=DECONVNET)
def _deconvnet(ctx: BackwardContext, self: Value, *settings: Any, **more: Any) -> None:
    ctx.propagate(self, _rectified(ctx, Rectify.DECONVNET))


@rule("relu", "leaky_relu", table=LINEAR)
@rule("hardtanh", unless=_not_relu6, table=LINEAR)
def _linear(ctx: BackwardContext, self: Value, *settings: Any, **more: Any) -> None:
    ctx.propagate(self, ctx.grad)


# Others, which keep their input

Derivative = Callable[..., Tensor]


def _elu(grad: Tensor, x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return aten.elu_backward.default(grad, alpha, scale, input_scale, False, x)


_SMOOTH: dict[str, Derivative] = {
    "silu": aten.silu_backward.default,
    "mish": aten.mish_backward.default,
    "hardswish": aten.hardswish_backward.default,
    "gelu": lambda grad, x, *, approximate="none": aten.gelu_backward.default(grad, x, approximate=approximate),
    "softplus": lambda grad, x, beta=1, threshold=20: aten.softplus_backward.default(grad, x, beta, threshold),
    "elu": _elu,
    "celu": lambda grad, x, alpha=1.0: _elu(grad, x, alpha, 1, 1 / alpha),
    "selu": lambda grad, x: _elu(grad, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946),
}


def _clamp(grad: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    inside = x >= min
    return torch.where(inside if max is None else inside & (x <= max), grad, 0)


def _prelu(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.detach()
    slope = weight.view(-1, *[1] * (x.dim() - 2)) if weight.dim() == 1 and weight.numel() > 1 else weight
    return torch.where(x > 0, grad, grad * slope)


def _threshold(grad: Tensor, x: Tensor, threshold: float, value: float) -> Tensor:
    return torch.where(x <= threshold, 0, grad)


# Derivatives of activations with few slopes, applied to the gradients of all targets, `[K, *shape]`.
_PIECEWISE: dict[str, Derivative] = {"prelu": _prelu, "clamp": _clamp, "clamp_min": _clamp, "threshold": _threshold}
_DERIVATIVES = _SMOOTH | _PIECEWISE


def _is_not_rectifier(node: Node) -> bool:
    """Clamps and thresholds at another place than zero; a slope that depends on the input."""
    name = key(node.op).removeprefix("aten::")
    if name in ("clamp", "clamp_min"):
        return argument(node, "min") != 0 or len(node.inputs) > 1
    if name == "threshold":
        return argument(node, "threshold") != 0 or argument(node, "value") != 0
    return len(node.inputs) > 1


@rule(*_PIECEWISE, saves=["self"], unless=_is_not_rectifier)
def _piecewise(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    ctx.propagate(self, _derivative(ctx)(ctx.grad, ctx.tensor("self"), *args, **kwargs))


@rule(*_PIECEWISE, saves=["self"], unless=_is_not_rectifier, table=GUIDED)
def _piecewise_guided(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    x = ctx.tensor("self")
    ctx.propagate(self, torch.where(x > 0, _derivative(ctx)(ctx.grad.clamp_min(0), x, *args, **kwargs), 0))


@rule(*_SMOOTH, saves=["self"], unless=_is_not_rectifier)
def _smooth(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    x = ctx.tensor("self")
    if len(ctx.grad) == 1:
        ctx.propagate(self, _derivative(ctx)(ctx.grad[0], x, *args, **kwargs)[None])
    else:
        slope = _derivative(ctx)(torch.ones_like(x), x, *args, **kwargs)
        ctx.propagate(self, ctx.scaled(slope))


@rule(*_SMOOTH, saves=["self"], unless=_is_not_rectifier, table=GUIDED)
def _smooth_guided(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    x = ctx.tensor("self")
    grad = ctx.grad.clamp_min_(0) if ctx.owns_memory else ctx.grad.clamp_min(0)
    if len(grad) == 1:
        ctx.propagate(self, aten.threshold_backward.default(_derivative(ctx)(grad[0], x, *args, **kwargs), x, 0)[None])
    else:
        slope = _derivative(ctx)(torch.ones_like(x), x, *args, **kwargs)
        ctx.propagate(self, grad.mul_(aten.threshold_backward.default(slope, x, 0)))


def _derivative(ctx: BackwardContext) -> Derivative:
    return _DERIVATIVES[key(ctx.node.op).removeprefix("aten::")]


rule(*_DERIVATIVES, unless=_is_not_rectifier, table=DECONVNET)(_deconvnet)
rule(*_DERIVATIVES, unless=_is_not_rectifier, table=LINEAR)(_linear)


def rectifies(node: Node) -> bool:
    """Returns whether a node is a rectifying nonlinearity, which the tables above rewrite."""
    rule = GUIDED.get(key(node.op))
    return rule is not None and rule.is_for(node)
