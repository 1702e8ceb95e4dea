"""What rules of every reading keep: arguments of the op, by their names in its schema."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pyfast_xai.tape import Node
from pyfast_xai.tape.record import Keep


def keep_arguments(node: Node, names: Iterable[str], keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the tensors among the named arguments; those of a list as `name.0`, `name.1` and so on."""
    wanted = set(names)
    if not wanted:
        return
    for position, argument in enumerate(node.op._schema.arguments):
        if argument.name in wanted:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                if isinstance(tensor, Tensor):
                    keep(argument.name if tensor is value else f"{argument.name}.{i}", tensor)
