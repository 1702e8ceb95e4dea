"""FGVis' defence: an activation may go no further from zero than it did on the image (Wagner et al., 2019, Eq. 4).

The bounds are taken in one pass over the image (`Bounding`) and held in later ones (`Clipped`), at every call of every
elementwise nonlinearity, also where a module is used several times.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.rules.gradient import rectifiers
from pyfast_xai.rules.gradient.backward import GradientRules
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import Rule
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import SaveTensor

# Nonlinearities that do not rectify. Softmax is none: it weighs, and its outputs are no features.
_OTHERS = {
    f"aten::{name}"
    for name in ("sigmoid", "hardsigmoid", "tanh", "hardtanh", "log_sigmoid_forward", "rrelu_with_noise", "clamp")
}

Bounds = dict[str, Tensor]


def activates(node: Node) -> bool:
    """Returns whether a node is an elementwise nonlinearity."""
    return rectifiers.rectifies(node) or key(node.op) in _OTHERS


class Bounding(GradientRules):
    """Reads the activations of the image, from which `bounds_of` makes bounds; no gradient can be walked."""

    compares = True

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = node(*args, **kwargs)
        if activates(node):
            keep("bound", result if isinstance(result, Tensor) else result[0])
        return result


def bounds_of(tape: Tape) -> Bounds:
    """Returns the activations kept by `Bounding`, by name of the operation.

    What the model returns is no feature but the answer, and has no bound ("besides the final classification layer").
    """
    answers = {leaf for leaf in pytree.tree_leaves(tape.outputs) if isinstance(leaf, Value)}
    return {
        node.name: node.saved["bound"].tensor
        for node in tape
        if "bound" in node.saved and not any(value in answers for value in node.outputs)
    }


class Clipped(GradientRules):
    """The gradient, held where activations leave their bounds.

    Args:
        bounds: bounds of the same images, from `bounds_of`.
        defence: "gradient" leaves the forward as it is and lets no gradient pass an activation out of bounds
            (Eq. 6); "forward" clips the activation as well (Eq. 5).
        warned: see `GradientRules`.
    """

    compares = True

    def __init__(
        self, bounds: Bounds, defence: Literal["gradient", "forward"] = "gradient", warned: set[str] | None = None
    ) -> None:
        super().__init__(warned=warned)
        self._bounds = bounds
        self._clamp = defence == "forward"

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self._bounds.get(node.name)
        if bound is None:
            return super().run(node, keep, args, kwargs)
        upper = rectifiers.upper_of(node)
        if upper is not None:  # from zero on: the bound is one comparison more in the same pass
            return rectifiers.relu(node, keep, args[0], upper=upper, bound=bound, clamp=self._clamp)
        result = super().run(node, keep, args, kwargs)
        output = result if isinstance(result, Tensor) else result[0]
        low, high = bound.clamp(max=0), bound.clamp(min=0)
        keep("within", (output >= low) & (output <= high))
        if self._clamp:
            torch.clamp(output, low, high, out=output)
        return result

    def rule_of(self, node: Node) -> Rule:
        rule = super().rule_of(node)
        if "within" not in node.saved:
            return rule

        def backward(ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
            ctx.replace(torch.where(ctx.tensor("within"), ctx.grad, 0))
            rule.backward(ctx, *args, **kwargs)

        return replace(rule, backward=backward)
