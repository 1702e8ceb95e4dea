"""What a tape is made of: values, the nodes that made them, and what a reading saved on the way."""

import difflib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Value:
    """One version of one tensor that depends on the inputs; the numbers themselves are not kept.

    The node that made it is known by its place on the tape: a reference would close a cycle, and all that a reading
    saved would wait for the garbage collector.
    """

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    producer: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return f"%{self.index}{list(self.shape)}"


@dataclass(eq=False, slots=True)
class Saved:
    """A tensor that a reading keeps; replaced by a copy just before an in-place op would overwrite it."""

    tensor: Tensor


@dataclass(eq=False, slots=True)
class Node:
    """One operation of the forward pass.

    Attributes:
        index: place on the tape.
        op: the ATen overload, or one of the two operations of `tape.alias`.
        args: positional arguments, with a `Value` for every tensor that depends on the inputs.
        kwargs: keyword arguments, likewise.
        outputs: the flattened results, None for one that is no tensor or does not depend on the inputs.
        path: module the op ran in, "" for the model itself.
        name: unique on the tape: path, op and a count.
        saved: what the reading saved, by name.
        inputs: the values among the arguments.
        kernel: does what `op` does, faster; None for `op` itself.
        adjoint: of a convolution, `adjoint(gradient, output_padding)` takes a gradient of its result to one of its
            input; None where nobody has prepared that.
    """

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value | None]
    path: str
    name: str
    inputs: list[Value] = field(init=False)
    saved: dict[str, Saved] = field(default_factory=dict)
    kernel: Callable[..., Any] | None = None
    adjoint: Callable[[Tensor, list[int]], Tensor] | None = None

    def __post_init__(self) -> None:
        # Looked at several times a node, in every recording and walk.
        self.inputs = find(Value, self.args, self.kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The operation on tensors."""
        return (self.kernel or self.op)(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.outputs} = {self.name}({', '.join(map(str, self.inputs))})"


@dataclass(eq=False, slots=True)
class Tape:
    """The operations of one forward pass, in order.

    Attributes:
        inputs: values of the tensors the model was given, in order of the flattened arguments.
        input_structure: how they nest in `(args, kwargs)`, other arguments in place.
        nodes: the operations that depend on the inputs.
        outputs: what the model returned, with a `Value` for each tensor that depends on the inputs; None where the
            forward was stopped early.
        result: what the model returned, as tensors that can be used outside inference mode.
        modules: the values each module returned, by module path, one list a call.
        reached: the tensor at which the forward was stopped.
        not_replayable: why `replay` would not repeat this forward, or None.
        folded: names of what ran as part of something else, or led nowhere and did not run.
    """

    inputs: list[Value] = field(default_factory=list)
    input_structure: Any = None
    nodes: list[Node] = field(default_factory=list)
    outputs: Any = None
    result: Any = None
    modules: dict[str, list[list[Value]]] = field(default_factory=dict)
    reached: Tensor | None = None
    not_replayable: str | None = None
    folded: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def producer(self, value: Value) -> Node | None:
        """The node that made a value; None for an input."""
        return None if value.producer is None else self.nodes[value.producer]

    def ends(self, until: Value | None) -> set[Value]:
        """The values that a replay hands back: what the model returned, or the one at which it stopped."""
        outputs = self.outputs if until is None else until
        return {leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Value)}

    def names(self) -> list[str]:
        """Names accepted by `find`: module paths first, then operations."""
        return [*filter(None, self.modules), *(node.name for node in self.nodes)]

    def find(self, name: str, argument: str = "layer") -> Value:
        """The value that a module (in its last call) or an operation returned; the first tensor of several.

        Raises:
            InputError: no such name; the message has the close ones.
        """
        calls: list[Any] = [*self.modules.get(name, []), *(n.outputs for n in self.nodes if n.name == name)]
        if calls:
            for value in calls[-1]:
                if value is not None:
                    return value
        if name in self.folded:
            raise InputError(f"{argument} must name what runs on its own in an accelerated model, got {name!r}")
        raise InputError(unknown_name(name, self.names(), argument))


@functools.cache
def key(op: Any) -> str:
    """The name that rules for an op are registered under: of its schema, in-place forms included."""
    return op._schema.name.rstrip("_") if isinstance(op, OpOverload) else f"alias::{op.__name__}"


def argument(node: Node, name: str) -> Any:
    """An argument of a node by its name in the schema."""
    for position, declared in enumerate(node.op._schema.arguments):
        if declared.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, declared.default_value)
    raise KeyError(name)


def find(kind: type[T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[T]:
    """The arguments of an op that are of a kind.

    Arguments of an op nest no deeper than a list of tensors, and this runs for each op that is recorded: no pytree.
    """
    found: list[T] = []
    for argument in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(argument, kind):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found.extend(part for part in argument if isinstance(part, kind))
    return found


def substitute(
    kind: type[T], function: Callable[[T], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an op with `function` applied to those of a kind."""

    def changed(argument: Any) -> Any:
        if isinstance(argument, kind):
            return function(argument)
        if isinstance(argument, (list, tuple)) and any(isinstance(part, kind) for part in argument):
            return type(argument)(function(part) if isinstance(part, kind) else part for part in argument)
        return argument

    return tuple(map(changed, args)), {name: changed(argument) for name, argument in kwargs.items()}


def unknown_name(name: str, names: list[str], argument: str) -> str:
    """The sentence for a layer that is not there."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f" such as {', '.join(map(repr, close))}" if close else f" (there are {len(names)})"
    return f"{argument} must name a module or operation that ran{hint}, got {name!r}"
