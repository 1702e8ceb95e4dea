"""Excitation backprop: a probability walks back, and each neuron shares its own among those that excite it.

`P(a_j) = sum_i P(a_i) w+_ij a_j / sum_k w+_ik a_k` with `w+ = max(w, 0)`, without biases (Zhang et al., 2016).
Activations are taken to be >= 0 as in the paper; what is negative excites nobody and gets nothing.

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
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.response.backward import Response
from pyfast_xai.rules.response.derivative import node_device
from pyfast_xai.rules.response.layers import factor
from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import Rule, Table, rule
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.nodes import argument, substitute

EXCITATION: Table = {}


def _values(*names: str) -> Callable[[Node], list[str]]:
    """Of some arguments, those that depend on the inputs."""
    return lambda node: [name for name in names if isinstance(argument(node, name), Value)]


def _share(step: Step, below: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """What each element of `below` gets of the results, `[K, *below.shape]`.

    Args:
        step: whose `grad` is shared.
        below: the activations that excite.
        forward: linear, with weights that are not negative.
    """
    with torch.enable_grad(), torch.autocast(node_device(step.node), enabled=False):
        excites = _wide(below).clamp_min(0).requires_grad_()
        total = forward(excites)
        excited = total > torch.finfo(total.dtype).tiny
        parts = []
        for own in step.grad:
            each = torch.where(excited, own / total.detach(), 0)
            parts.append(torch.autograd.grad(total, excites, each, retain_graph=True)[0])
    return excites.detach() * torch.stack(parts)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: shares of a map are small numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Layers with weights


def _apply(node: Node, below: Tensor, weight: Tensor) -> Tensor:
    """A layer without its bias."""
    name = key(node.op).removeprefix("aten::")
    if name in _PRODUCTS:
        left, right = (weight, below) if _weight_is_left(node) else (below, weight)
        return left @ right
    return node.op(below, weight, None, *node.args[3:], **node.kwargs)


# By name, the arguments of which one excites and the other weighs.
_LAYERS = dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution"), ("input", "weight"))
_PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "matmul": ("self", "other"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}
_WEIGHTED = {**_LAYERS, **_PRODUCTS}


def _weight_is_left(node: Node) -> bool:
    """Whether a product weighs by its left factor: attention does with its values, a constant does with anything."""
    return isinstance(argument(node, _PRODUCTS[key(node.op).removeprefix("aten::")][1]), Value)


def _arguments(node: Node) -> tuple[str, str]:
    """Names of what excites and what weighs."""
    name = key(node.op).removeprefix("aten::")
    below, weight = _WEIGHTED[name]
    return (weight, below) if name in _PRODUCTS and _weight_is_left(node) else (below, weight)


def _excited(step: Step, sign: int) -> tuple[Value, Tensor]:
    """What a layer's input gets through weights of a sign."""
    below, weight = _arguments(step.node)
    value = argument(step.node, below)
    weights = _wide(factor(step, argument(step.node, weight), weight)).mul(sign).clamp_min(0)
    return value, _share(step, factor(step, value, below), lambda x: _apply(step.node, x, weights))


def _operands(node: Node) -> list[str]:
    return _values(*_arguments(node))(node)


@rule(*_WEIGHTED, saves=_operands, table=EXCITATION)
def _weighted(step: Step, *args: Any, **kwargs: Any) -> None:
    step.send(*_excited(step, 1))


def _contrasted(step: Step, *args: Any, **kwargs: Any) -> None:
    value, for_it = _excited(step, 1)
    step.send(value, for_it - _excited(step, -1)[1])


class Contrastive(Response):
    """Excitation backprop with one layer that gives what excites less what inhibits.

    Below that layer all is linear, so that the difference walks at once.

    Args:
        layer: name of an operation with weights, see `last_weighted`.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(EXCITATION)
        self._layer = layer

    def rule_of(self, node: Node) -> Rule:
        own = super().rule_of(node)
        return Rule(_contrasted, own.saves) if node.name == self._layer else own


def last_weighted(tape: Tape, ends: Collection[Value]) -> str | None:
    """The name of the last layer with weights of its own in front of some values; None where there is none."""
    wanted = set(ends)
    for node in reversed(tape.nodes):
        if wanted.isdisjoint(value for value in node.outputs if value is not None):
            continue
        name = key(node.op).removeprefix("aten::")
        if name in _WEIGHTED and not isinstance(argument(node, _arguments(node)[1]), Value):
            return node.name
        wanted.update(node.inputs)
    return None


# Positive weights of their own


def _first(node: Node) -> list[str]:
    return [node.op._schema.arguments[0].name]


@rule(
    *("mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
    saves=_first,
    table=EXCITATION,
)
def _averaged(step: Step, below: Value, *args: Any, **kwargs: Any) -> None:
    (name,) = _first(step.node)
    step.send(below, _share(step, step.tensor(name), lambda x: step.node.op(x, *args, **kwargs)))


@rule("scaled_dot_product_attention", saves=_values("query", "key", "value"), table=EXCITATION)
def _attention(step: Step, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> None:
    if step.wants(value):
        q, k = (_constant(factor(step, given, name)) for given, name in ((query, "query"), (key, "key")))
        args, kwargs = substitute(Tensor, _constant, args, kwargs)
        below = factor(step, value, "value")
        step.send(value, _share(step, below, lambda x: step.node.op(q, k, x, *args, **kwargs)))


def _constant(tensor: Tensor) -> Tensor:
    """As it can stand in a graph, which what was recorded in inference mode cannot."""
    tensor = _wide(tensor) if tensor.is_floating_point() else tensor
    return tensor.clone() if tensor.is_inference() else tensor


# Element by element


@rule("add", "sub", saves=_values("self", "other"), table=EXCITATION)
def _sum(step: Step, self: Any, other: Any, *, alpha: float = 1) -> None:
    sign = -alpha if step.node.op._schema.name.rstrip("_") == "aten::sub" else alpha
    if not (isinstance(self, Value) and isinstance(other, Value)):
        step.send(self if isinstance(self, Value) else other, step.grad)  # the other is a bias
        return
    first = _wide(step.tensor("self")).clamp_min(0)
    second = _wide(step.tensor("other")).mul(sign).clamp_min(0)
    total = first + second
    each = torch.where(total > torch.finfo(total.dtype).tiny, step.grad / total, 0)
    step.send(self, each * first)
    step.send(other, each * second)


@rule("mul", table=EXCITATION)
def _gated(step: Step, self: Any, other: Any) -> None:
    if not (isinstance(self, Value) and isinstance(other, Value)):
        step.send(self if isinstance(self, Value) else other, step.grad)
    elif self.numel == other.numel:
        step.send(self, step.grad / 2)
        step.send(other, step.grad / 2)
    else:
        step.send(self if self.numel > other.numel else other, step.grad)


def _passed(step: Step, *args: Any, **kwargs: Any) -> None:
    """All of it, to the first argument that depends on the inputs."""
    step.send(next(argument for argument in args if isinstance(argument, Value)), step.grad)


rule(
    # Normalisation. What is divided by normalises, too.
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_batch_norm", "native_layer_norm"),
    *("native_group_norm", "_native_batch_norm_legit_no_training", "div", "rsub", "neg"),
    # Activation functions.
    *("relu", "hardtanh", "relu6", "leaky_relu", "prelu", "rrelu_with_noise", "elu", "celu", "selu", "gelu", "silu"),
    *("mish", "softplus", "hardswish", "hardsigmoid", "sigmoid", "tanh", "log_sigmoid_forward", "threshold", "clamp"),
    *("clamp_min", "clamp_max", "softmax", "_softmax", "log_softmax", "_log_softmax", "pow", "sqrt", "exp", "log"),
    *("abs", "erf"),
    table=EXCITATION,
)(_passed)
