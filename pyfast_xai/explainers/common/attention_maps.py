"""The attention of a recorded forward pass: the probabilities of fused attention, or those that a softmax made."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.axes import axes_of
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.rules.fused_attention import fused_attention, recorded_number
from pyfast_xai.rules.gradient import GradientRules, derivative
from pyfast_xai.rules.kinds import PRODUCTS
from pyfast_xai.rules.relevance.layer_rules import stabilized
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument
from pyfast_xai.tape.record import SaveTensor

_FUSED = "aten::scaled_dot_product_attention"
_SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::_safe_softmax"}
_MOVES = {
    *("dropout", "to", "_to_copy", "view", "reshape", "_unsafe_view", "expand", "contiguous", "clone", "unflatten"),
    *("unsqueeze", "squeeze", "flatten", "nan_to_num", "type_as"),
}
_WEIGHTS = "attention weights"


class KeepAttention:
    """A recording policy that keeps the inputs of attention, and the tensors of another policy.

    Args:
        gradients: the rules of the backward pass; None without one.
    """

    def __init__(self, gradients: GradientRules | None = None) -> None:
        self.gradients = gradients

    def handles(self, op: OpOverload) -> bool:
        """Returns whether an op stays whole: fused attention, and the ops of the other policy."""
        return key(op) == _FUSED or (self.gradients is not None and self.gradients.handles(op))

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps queries, keys, values and masks of fused attention, as its gradient needs them, too."""
        if self.gradients is not None:
            self.gradients.save(node, keep, args, kwargs)
        elif key(node.op) == _FUSED:
            derivative.save(node, keep, args, kwargs)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the square matrices of a softmax, which may be attention that is spelled out."""
        result = node(*args, **kwargs) if self.gradients is None else self.gradients.run(node, keep, args, kwargs)
        if key(node.op) in _SOFTMAX and result.dim() in (3, 4) and result.shape[-1] == result.shape[-2]:
            keep(_WEIGHTS, result)
        return result


@dataclass(frozen=True)
class Attention:
    """The self-attention of one layer.

    Attributes:
        weights: probabilities of the keys for each query, `[N, heads, T, T]`.
        value: the value on the tape: the probabilities themselves, or the result of fused attention.
        values: values of fused attention, `[N, heads, T, D]`; None where `value` is the probabilities.
    """

    weights: Tensor
    value: Value
    values: Tensor | None = None

    def gradient(self, gradient: Tensor) -> Tensor:
        """Returns the gradient of the probabilities, `[K, N, heads, T, T]`, from that of `value`, `[K, *shape]`."""
        heads = self.weights.shape[:2]
        gradient = at_least_float32(gradient).reshape(len(gradient), *heads, *gradient.shape[-2:])
        return gradient if self.values is None else gradient @ self.values.mT

    def relevance(self, relevance: Tensor, stabilizer: float) -> Tensor:
        """Returns the relevance of the probabilities, `[K, N, heads, T, T]`, from that of `value`, `[K, *shape]`.

        Of fused attention the probabilities get half of it, by contributions to the product with the values.
        """
        heads = self.weights.shape[:2]
        relevance = at_least_float32(relevance).reshape(len(relevance), *heads, *relevance.shape[-2:])
        if self.values is None:
            return relevance
        share = relevance / stabilized(self.weights @ self.values, stabilizer)
        return self.weights * (share @ self.values.mT) / 2


def attention_of(tape: Tape, images: int) -> list[Attention]:
    """Returns the self-attention of every layer, in the order in which they ran.

    Args:
        tape: recorded with `KeepAttention`.
        images: number of images.

    Raises:
        InputError: no attention, attention of parts of the images, or among several numbers of tokens.
    """
    layers = [_attention(node, images) for node in _attending(tape)]
    sizes = sorted({tuple(layer.weights.shape[-2:]) for layer in layers})
    if not layers:
        raise InputError("model must have self-attention over tokens of the images, got none on its recorded forward")
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        check_whole_images(tape)
        received = ", ".join(f"{rows} x {columns}" for rows, columns in sizes)
        raise InputError(f"model must attend among the same tokens in every layer, got attention of {received}")
    return layers


def check_whole_images(tape: Tape) -> None:
    """Refuses attention in windows of the images, whose rows are parts of images.

    Raises:
        InputError: there is such attention.
    """
    axes = axes_of(tape)
    for node in _attending(tape):
        value = argument(node, "query") if key(node.op) == _FUSED else node.outputs[0]
        if isinstance(value, Value) and value in axes and axes[value][0].positions:
            raise _parts_of_images(node, value.shape)


def _attending(tape: Tape) -> list[Node]:
    """Returns the operations whose results are attention, or what fused attention made of values."""
    readers: dict[Value, list[Node]] = defaultdict(list)
    for node in tape:
        for value in node.inputs:
            readers[value].append(node)

    def is_multiplied(value: Value) -> bool:
        """Returns whether probabilities weigh other activations in a product."""
        stack = [value]
        while stack:
            for node in readers[stack.pop()]:
                if len(node.inputs) > 1 and (key(node.op) in PRODUCTS or key(node.op) == "aten::einsum"):
                    return True
                if key(node.op).split("::")[1] in _MOVES:
                    stack += [output for output in node.outputs if output is not None]
        return False

    spelled_out = (node for node in tape if _WEIGHTS in node.saved)
    multiplied = {node.index for node in spelled_out if node.outputs[0] is not None and is_multiplied(node.outputs[0])}
    return [node for node in tape if key(node.op) == _FUSED or node.index in multiplied]


def _attention(node: Node, images: int) -> Attention:
    result = node.outputs[0]
    assert result is not None
    if key(node.op) != _FUSED:
        return Attention(_by_head(node.saved[_WEIGHTS].tensor, images, node), result)
    query, keys, values = (recorded_number(node, name) for name in ("query", "key", "value"))
    fused = fused_attention(node, query, keys)
    scores, values = fused.scores(query, keys), fused.each_head(values)
    weights = _by_head(fused.softmax(scores), images, node)
    values = values.expand(*scores.shape[:-2], *values.shape[-2:])
    return Attention(weights, result, values.reshape(*weights.shape[:2], *values.shape[-2:]))


def _by_head(weights: Tensor, images: int, node: Node) -> Tensor:
    """Returns probabilities by image and head, `[N, heads, T, T]`."""
    lead = math.prod(weights.shape[:-2])
    if weights.dim() not in (3, 4) or lead % images:
        raise _parts_of_images(node, weights.shape)
    return at_least_float32(weights).reshape(images, lead // images, *weights.shape[-2:])


def _parts_of_images(node: Node, shape: tuple[int, ...]) -> InputError:
    return InputError(
        "model must attend over whole images, one row for each, got attention in windows of them at "
        f"{node.name!r}: {list(shape)}"
    )
