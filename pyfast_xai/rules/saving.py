"""Arguments of an op to save, by their names in its schema."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from pyfast_xai.tape import Node
from pyfast_xai.tape.graph import parameters
from pyfast_xai.tape.record import SaveTensor

# Names of arguments, or a function of a node that gives them.
Saves = Collection[str] | Callable[[Node], Collection[str]]


def save_result(node: Node, keep: SaveTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs an operation and saves its result as "result", for rules whose derivative follows from it."""
    result = node(*args, **kwargs)
    keep("result", result)
    return result


def keep_arguments(node: Node, saves: Saves, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keeps the tensors among the named arguments; those of a list as `name.0`, `name.1` and so on."""
    names = saves(node) if callable(saves) else saves
    if not names:
        return
    declared = parameters(node.op)
    for name in dict.fromkeys(names):
        if name not in declared:
            continue
        position, _ = declared[name]
        value = args[position] if position < len(args) else kwargs.get(name)
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(tensor, Tensor):
                keep(name if tensor is value else f"{name}.{i}", tensor)
