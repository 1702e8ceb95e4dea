"""Arguments of an op to save, by their names in its schema."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from pyfast_xai.tape import Node
from pyfast_xai.tape.record import SaveTensor

# Names of arguments, or a function of a node that gives them.
Saves = Iterable[str] | Callable[[Node], Iterable[str]]


def keep_arguments(node: Node, saves: Saves, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keeps the tensors among the named arguments; those of a list as `name.0`, `name.1` and so on."""
    wanted = set(saves(node) if callable(saves) else saves)
    if not wanted:
        return
    for position, argument in enumerate(node.op._schema.arguments):
        if argument.name in wanted:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                if isinstance(tensor, Tensor):
                    keep(argument.name if tensor is value else f"{argument.name}.{i}", tensor)
