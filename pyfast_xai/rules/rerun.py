"""Operations that are run again on other numbers: what a recording keeps for that, and the arguments to run with."""

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyfast_xai.rules.gradient import derivative
from pyfast_xai.rules.gradient.backward import GradientRules
from pyfast_xai.rules.gradient.context import has_gradient
from pyfast_xai.rules.precision import at_least_float32, outside_inference_mode
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.graph import substitute
from pyfast_xai.tape.record import SaveTensor, writes


class KeepsInputs(GradientRules, abc.ABC):
    """A policy that keeps all inputs of some operations, and of the others what the gradient needs.

    Args:
        warned: see `GradientRules`.
    """

    def __init__(self, warned: set[str] | None = None) -> None:
        super().__init__(warned=warned)

    @abc.abstractmethod
    def reruns(self, node: Node) -> bool:
        """Returns whether an operation will be run again."""

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the inputs of an operation that will be run again; of another what the gradient needs."""
        if not self.reruns(node):
            super().save(node, keep, args, kwargs)
            return
        for value, tensor in derivative.pairs(node, args, kwargs):
            keep(str(value.index), tensor)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation as it is if it will be run again, and otherwise as the gradient does."""
        return node(*args, **kwargs) if self.reruns(node) else super().run(node, keep, args, kwargs)


def usable(tensor: Tensor) -> Tensor:
    """Returns a constant in float32 or more, that autograd accepts."""
    return outside_inference_mode(at_least_float32(tensor.detach()))


def with_numbers(node: Node, numbers: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a node with other numbers for what has a gradient, one for each in order.

    Args:
        node: recorded by a `KeepsInputs`.
        numbers: an operation that writes to its arguments gets copies of them.
    """
    following = iter(numbers)

    def number(value: Value) -> Tensor:
        if not has_gradient(value):
            return outside_inference_mode(node.saved[str(value.index)].tensor)
        tensor = next(following)
        return tensor.clone() if writes(node.op) else tensor

    args, kwargs = substitute(Tensor, usable, node.args, node.kwargs)
    return substitute(Value, number, args, kwargs)
