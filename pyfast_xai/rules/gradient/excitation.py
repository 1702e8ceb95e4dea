"""Excitation backprop: a probability walks back, and each neuron shares its own among those that excite it.

`P(a_j) = sum_i P(a_i) w+_ij a_j / sum_k w+_ik a_k` with `w+ = max(w, 0)`, without biases (Zhang et al., 2016).
Activations are taken to be >= 0 as in the paper; a negative activation excites no neuron and gets nothing.

=============================================  =====================================================================
operation                                      shares
=============================================  =====================================================================
linear, convolution, matrix product            by positive weight and activation, as above
average, sum and interpolation over positions  by activation: their weights are positive
sum of two                                     by the positive part of each
product of two                                 all to the larger, which the other gates; evenly between two of a size
attention                                      by attention and value
max-pool                                       all to the winner, as the gradient does
normalisation, activation function             all, as it is
what only moves elements                       as the gradient does
=============================================  =====================================================================

What is not here keeps the rule of the gradient. `Contrastive` gives one layer what excites its neurons less what
inhibits them.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.gradient.backward import GradientRules
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.derivative import node_device
from pyfast_xai.rules.gradient.layers import PRODUCTS, factor
from pyfast_xai.rules.gradient.strides import canonical
from pyfast_xai.rules.gradient.table import NamedTable, Rule, rule
from pyfast_xai.rules.precision import at_least_float32, outside_inference_mode
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument, parameters, substitute

EXCITATION = NamedTable("EXCITATION", __name__)


def _values(*names: str) -> Callable[[Node], list[str]]:
    """Returns the names of those arguments that depend on the inputs."""
    return lambda node: [name for name in names if isinstance(argument(node, name), Value)]


def _share(ctx: BackwardContext, below: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the share of the results that each element of `below` gets, `[K, *below.shape]`.

    Args:
        ctx: whose `grad` is shared.
        below: the activations that excite.
        forward: linear, with weights that are not negative.
    """
    with torch.enable_grad(), torch.autocast(node_device(ctx.node), enabled=False):
        excites = at_least_float32(below).clamp_min(0).requires_grad_()
        total = forward(excites)
        excited = total > torch.finfo(total.dtype).tiny
        parts = []
        for grad in ctx.grad:
            each = canonical(torch.where(excited, grad / total.detach(), 0))
            parts.append(torch.autograd.grad(total, excites, each, retain_graph=True)[0])
    return excites.detach() * torch.stack(parts)


# Layers with weights


def _apply(node: Node, below: Tensor, weight: Tensor) -> Tensor:
    """Returns a layer without its bias."""
    name = key(node.op).removeprefix("aten::")
    if name in PRODUCTS:
        left, right = (weight, below) if _left_is_weight(node) else (below, weight)
        return left @ right
    return node.op(below, weight, None, *node.args[3:], **node.kwargs)


# By name, the arguments of which one excites and the other weighs.
_LAYERS = dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution"), ("input", "weight"))
_WEIGHTED = {**_LAYERS, **PRODUCTS}


def _left_is_weight(node: Node) -> bool:
    """Returns whether a product weighs by its left factor: attention by its values, a constant anything."""
    return isinstance(argument(node, PRODUCTS[key(node.op).removeprefix("aten::")][1]), Value)


def _arguments(node: Node) -> tuple[str, str]:
    """Returns the names of the activation and the weight."""
    name = key(node.op).removeprefix("aten::")
    below, weight = _WEIGHTED[name]
    return (weight, below) if name in PRODUCTS and _left_is_weight(node) else (below, weight)


def _excited(ctx: BackwardContext, sign: int) -> tuple[Value, Tensor]:
    """Returns the input of a layer and the share it gets through the weights of one sign."""
    below, weight = _arguments(ctx.node)
    value = argument(ctx.node, below)
    weights = at_least_float32(factor(ctx, argument(ctx.node, weight), weight)).mul(sign).clamp_min(0)
    return value, _share(ctx, factor(ctx, value, below), lambda x: _apply(ctx.node, x, weights))


def _operands(node: Node) -> list[str]:
    return _values(*_arguments(node))(node)


def _is_complex(node: Node) -> bool:
    """Returns whether there is no order among the numbers of a node, and so nothing that excites."""
    return any(value is not None and value.dtype.is_complex for value in (*node.inputs, *node.outputs))


@rule(*_WEIGHTED, saves=_operands, unless=_is_complex, table=EXCITATION)
def _weighted(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
    ctx.propagate(*_excited(ctx, 1))


def _contrasted(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
    value, for_it = _excited(ctx, 1)
    ctx.propagate(value, for_it - _excited(ctx, -1)[1])


class Contrastive(GradientRules):
    """Excitation backprop with one layer that gives excitation less inhibition.

    Below that layer all is linear, so that the difference walks at once.

    Args:
        layer: name of an operation with weights, see `last_weighted`.
        warned: see `GradientRules`.
    """

    def __init__(self, layer: str, warned: set[str] | None = None) -> None:
        super().__init__(EXCITATION, warned)
        self._layer = layer

    def rule_of(self, node: Node) -> Rule:
        rule = super().rule_of(node)
        return replace(rule, backward=_contrasted) if node.name == self._layer else rule


def last_weighted(tape: Tape, ends: Collection[Value]) -> str | None:
    """Returns the name of the last layer with weights of its own in front of some values; None where there is none."""
    required = set(ends)
    for node in reversed(tape.nodes):
        if required.isdisjoint(value for value in node.outputs if value is not None):
            continue
        name = key(node.op).removeprefix("aten::")
        if name in _WEIGHTED and not isinstance(argument(node, _arguments(node)[1]), Value):
            return node.name
        required.update(node.inputs)
    return None


# Positive weights of their own


def _first(node: Node) -> list[str]:
    return [next(iter(parameters(node.op)))]


@rule(
    *("mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
    saves=_first,
    unless=_is_complex,
    table=EXCITATION,
)
def _averaged(ctx: BackwardContext, below: Value, *args: Any, **kwargs: Any) -> None:
    (name,) = _first(ctx.node)
    ctx.propagate(below, _share(ctx, ctx.tensor(name), lambda x: ctx.node.op(x, *args, **kwargs)))


@rule("scaled_dot_product_attention", saves=_values("query", "key", "value", "attn_mask"), table=EXCITATION)
def _attention(ctx: BackwardContext, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> None:
    if ctx.wants(value):
        q, k = (_constant(factor(ctx, value, name)) for value, name in ((query, "query"), (key, "key")))
        args, kwargs = substitute(Value, lambda _: ctx.tensor("attn_mask"), args, kwargs)
        args, kwargs = substitute(Tensor, _constant, args, kwargs)
        below = factor(ctx, value, "value")
        ctx.propagate(value, _share(ctx, below, lambda x: ctx.node.op(q, k, x, *args, **kwargs)))


def _constant(tensor: Tensor) -> Tensor:
    return outside_inference_mode(at_least_float32(tensor))


# Element by element


@rule("add", "sub", saves=_values("self", "other"), unless=_is_complex, table=EXCITATION)
def _sum(ctx: BackwardContext, self: Any, other: Any, *, alpha: float = 1) -> None:
    sign = -alpha if ctx.node.op._schema.name.rstrip("_") == "aten::sub" else alpha
    if not (isinstance(self, Value) and isinstance(other, Value)):
        ctx.propagate(self if isinstance(self, Value) else other, ctx.grad)  # the other is a bias
        return
    first = at_least_float32(ctx.tensor("self")).clamp_min(0)
    second = at_least_float32(ctx.tensor("other")).mul(sign).clamp_min(0)
    total = first + second
    each = torch.where(total > torch.finfo(total.dtype).tiny, ctx.grad / total, 0)
    ctx.propagate(self, each * first)
    ctx.propagate(other, each * second)


@rule("mul", unless=_is_complex, table=EXCITATION)
def _gated(ctx: BackwardContext, self: Any, other: Any) -> None:
    if not (isinstance(self, Value) and isinstance(other, Value)):
        ctx.propagate(self if isinstance(self, Value) else other, ctx.grad)
    elif self.numel == other.numel:
        ctx.propagate(self, ctx.grad / 2)
        ctx.propagate(other, ctx.grad / 2)
    else:
        ctx.propagate(self if self.numel > other.numel else other, ctx.grad)


def _passed(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
    """Passes the whole gradient to the first argument that depends on the inputs."""
    ctx.propagate(next(argument for argument in args if isinstance(argument, Value)), ctx.grad)


rule(
    # Normalisation. What is divided by normalises, too.
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_batch_norm", "native_layer_norm"),
    *("native_group_norm", "_native_batch_norm_legit_no_training", "div", "rsub", "neg"),
    # Activation functions.
    *("relu", "hardtanh", "relu6", "leaky_relu", "prelu", "rrelu_with_noise", "elu", "celu", "selu", "gelu", "silu"),
    *("mish", "softplus", "hardswish", "hardsigmoid", "sigmoid", "tanh", "log_sigmoid_forward", "threshold", "clamp"),
    *("clamp_min", "clamp_max", "softmax", "_softmax", "log_softmax", "_log_softmax", "pow", "sqrt", "exp", "log"),
    *("abs", "erf"),
    unless=_is_complex,
    table=EXCITATION,
)(_passed)
