"""The reading of DeepLIFT: what two recordings keep, and the backward pass that compares them."""

from collections.abc import Callable, Mapping
from typing import Any

from torch._ops import OpOverload

from pyfast_xai.errors import InputError
from pyfast_xai.rules.gradient.backward import GradientRules
from pyfast_xai.rules.gradient.context import BackwardContext, has_gradient
from pyfast_xai.rules.gradient.table import Rule
from pyfast_xai.rules.kinds import kind_of, takes_whole
from pyfast_xai.rules.rerun import KeepsInputs
from pyfast_xai.rules.rescale import multipliers
from pyfast_xai.rules.rescale.multipliers import Both
from pyfast_xai.tape import Node, Tape, key

Multiplier = Callable[[BackwardContext, Both], None]

_BY_KIND: Mapping[str, Multiplier] = {
    "activation": multipliers.elementwise,
    "product": multipliers.bilinear,
    "matmul": multipliers.bilinear,
    "attention": multipliers.attention,
    "softmax": multipliers.softmax,
    "normalization": multipliers.normalized,
    "other": multipliers.integrated,
}
_MAX_POOLS = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
)
_BY_NAME: Mapping[str, Multiplier] = {
    **{f"aten::{name}": multipliers.max_pool for name in _MAX_POOLS},
    **{f"aten::{name}": multipliers.larger for name in ("maximum", "minimum")},
    **{f"aten::{name}": multipliers.extreme for name in ("amax", "amin", "max", "min")},
}
# Elementwise and linear: the gradient says all.
_LINEAR = {f"aten::{name}" for name in ("mul", "neg", "dropout", "feature_dropout", "native_dropout")}


def multiplier_of(node: Node) -> Multiplier | None:
    """Returns the rule for the multipliers of an operation; None where they are the gradient."""
    name = key(node.op)
    if name in _BY_NAME and any(map(has_gradient, node.inputs)):
        two = sum(map(has_gradient, node.inputs)) > 1
        return multipliers.larger if two and name in ("aten::max", "aten::min") else _BY_NAME[name]
    kind = kind_of(node)
    if kind is None:
        return None
    if name == "aten::div":
        by_number = len(node.inputs) == 1 and node.inputs[0] is node.args[0]
        return None if by_number else multipliers.division
    if kind == "activation" and name in _LINEAR:
        return None
    return _BY_KIND.get(kind)


class RescaleRules(KeepsInputs):
    """Keeps the inputs of what is not linear, of an image or a baseline.

    Args:
        warned: see `GradientRules`.
    """

    def handles(self, op: OpOverload) -> bool:
        """Returns whether an operation is read as a whole."""
        return takes_whole(key(op)) or key(op) in _BY_NAME or super().handles(op)

    def reruns(self, node: Node) -> bool:
        """Returns whether an operation is not linear."""
        return multiplier_of(node) is not None

    def against(self, tape: Tape, reference: Tape) -> GradientRules:
        """Returns the policy to walk the tape of images with.

        Args:
            tape: tape of the images.
            reference: tape of the baselines, one of which may stand for all images.

        Raises:
            InputError: the model did not run the same operations on both.
        """
        names, others = ([(node.op, node.name) for node in recorded] for recorded in (tape, reference))
        if names != others:
            both = zip(names, others, strict=False)
            operation = next((name for (_, name), (_, other) in both if name != other), "the end")
            raise InputError(
                f"model must run the same operations on images and baselines, got others from {operation!r} on"
            )
        return _Against(reference, self.warned)


def reference_broadcasts(tape: Tape, reference: Tape) -> bool:
    """Returns whether the numbers kept of one baseline broadcast to those of the images."""
    for node, other in zip(tape, reference, strict=False):
        for value, counterpart in zip(node.inputs, other.inputs, strict=False):
            sizes = zip(value.shape, counterpart.shape, strict=False)
            if len(value.shape) != len(counterpart.shape) or any(length not in (1, size) for size, length in sizes):
                return False
    return True


class _Against(GradientRules):
    """The multipliers between two recordings."""

    def __init__(self, reference: Tape, warned: set[str]) -> None:
        super().__init__(warned=warned)
        self._reference = reference

    def rule_of(self, node: Node) -> Rule:
        """Returns the rule of a node."""
        multiplier = multiplier_of(node)
        if multiplier is None:
            return super().rule_of(node)
        other = self._reference.nodes[node.index]

        def backward(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
            multiplier(ctx, Both(node, other))

        return Rule(backward)
