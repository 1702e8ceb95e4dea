"""The data of a tape: values, the nodes that made them, and the tensors that a policy saved."""

import dataclasses
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
    """One version of one tensor that depends on the inputs; it does not hold the numbers.

    It refers to its producer by index on the tape: a reference would close a cycle, and saved tensors would be freed
    only by the garbage collector.
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
    """A tensor that a policy saved; replaced by a copy just before an in-place op would overwrite it."""

    tensor: Tensor


@dataclass(eq=False, slots=True)
class Node:
    """One operation of the forward pass.

    Attributes:
        index: position on the tape.
        op: the ATen overload, or one of the two operations of `tape.aliasing`.
        args: positional arguments, with a `Value` for every tensor that depends on the inputs.
        kwargs: keyword arguments, with `Value`s in the same way.
        outputs: the flattened results, None for each that is no tensor or does not depend on the inputs.
        path: module the op ran in, "" for the model itself.
        name: unique on the tape: path, op and a count.
        saved: the tensors that the policy saved, by name.
        inputs: the values among the arguments.
        kernel: computes the same as `op`, faster; None for `op` itself.
        adjoint: backward of a convolution with respect to its input, `adjoint(gradient, output_padding)`; it returns
            None to leave a call to PyTorch's own kernel. None for operations without a prepared one.
        rule: the rules that the last policy had for such operations, and that which it chose for this one.
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
    adjoint: Callable[[Tensor, list[int]], Tensor | None] | None = None
    rule: tuple[Any, Any, Any] | None = None

    def __post_init__(self) -> None:
        # Computed once, because every recording and backward pass reads it several times.
        self.inputs = find(Value, self.args, self.kwargs)

    @staticmethod
    def with_inputs(
        index: int, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str, name: str, inputs: list[Value]
    ) -> "Node":
        """Returns a node without outputs, for which the values among the arguments are known: looking is slower."""
        node = object.__new__(Node)
        node.index, node.op, node.args, node.kwargs = index, op, args, kwargs
        node.outputs, node.path, node.name, node.inputs = [], path, name, inputs
        node.saved, node.kernel, node.adjoint, node.rule = {}, None, None, None
        return node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the operation on tensors."""
        return (self.kernel or self.op)(*args, **kwargs)

    def without_saved(self) -> "Node":
        """Returns the same operation on the same values, without saved tensors; `dataclasses.replace` is slower."""
        copy = object.__new__(Node)
        copy.index, copy.op, copy.args, copy.kwargs = self.index, self.op, self.args, self.kwargs
        copy.outputs, copy.path, copy.name, copy.inputs = self.outputs, self.path, self.name, self.inputs
        copy.saved, copy.kernel, copy.adjoint, copy.rule = {}, self.kernel, self.adjoint, self.rule
        return copy

    def __repr__(self) -> str:
        return f"{self.outputs} = {self.name}({', '.join(map(str, self.inputs))})"


@dataclass(eq=False, slots=True)
class Tape:
    """The operations of one forward pass, in order.

    Attributes:
        inputs: values of the tensors the model was given, in order of the flattened arguments.
        input_structure: the `(args, kwargs)` of the model with the values in place of tensors.
        nodes: the operations that depend on the inputs.
        outputs: the model's outputs, with a `Value` for each tensor that depends on the inputs; None if the forward
            was stopped early.
        result: the model's outputs, as copies of its tensors.
        modules: the values that each module returned, by module path, with one list for each call.
        reached: the tensor at which the forward was stopped.
        not_replayable: why `replay` would not repeat this forward, or None.
        writes: whether the model wrote to tensors that existed before; they have been restored.
        folded: names of modules and operations that were fused into others, or removed because nothing used them.
    """

    inputs: list[Value] = field(default_factory=list)
    input_structure: Any = None
    nodes: list[Node] = field(default_factory=list)
    outputs: Any = None
    result: Any = None
    modules: dict[str, list[list[Value]]] = field(default_factory=dict)
    reached: Tensor | None = None
    not_replayable: str | None = None
    writes: bool = False
    folded: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def copy(self) -> "Tape":
        """Returns a tape with the same operations on new values, without results and saved tensors."""
        copies: dict[Value, Value] = {}

        def copied(value: Value) -> Value:
            return copies.setdefault(value, dataclasses.replace(value))

        def copied_nodes() -> Iterator[Node]:
            for node in self.nodes:
                args, kwargs = substitute(Value, copied, node.args, node.kwargs)
                outputs = [None if value is None else copied(value) for value in node.outputs]
                yield dataclasses.replace(node, args=args, kwargs=kwargs, outputs=outputs, saved={}, rule=None)

        return dataclasses.replace(
            self,
            inputs=[copied(value) for value in self.inputs],
            input_structure=pytree.tree_map_only(Value, copied, self.input_structure),
            nodes=list(copied_nodes()),
            outputs=pytree.tree_map_only(Value, copied, self.outputs),
            result=None,
            modules={path: [[*map(copied, call)] for call in calls] for path, calls in self.modules.items()},
            reached=None,
            folded=set(self.folded),
        )

    def producer(self, value: Value) -> Node | None:
        """Returns the node that made a value; None for an input."""
        return None if value.producer is None else self.nodes[value.producer]

    def end_values(self, until: Value | None) -> set[Value]:
        """Returns the values that a replay returns: the model's outputs, or the value at which it stopped."""
        outputs = self.outputs if until is None else until
        return {leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Value)}

    def names(self) -> list[str]:
        """Returns the names accepted by `find`: module paths first, then operations."""
        return [*filter(None, self.modules), *(node.name for node in self.nodes)]

    def find(self, name: str, argument: str = "layer") -> Value:
        """Returns the value that a module or an operation returned; the first tensor of several.

        A module that ran several times is read at its last call; "name@0" is the first call, "name@1" the second, and
        "name@-1" the last.

        Raises:
            InputError: there is no such name or call; the message suggests similar ones.
        """
        path, call = call_of(name)
        calls: list[Any] = [*self.modules.get(path, []), *(n.outputs for n in self.nodes if n.name == path)]
        if calls and not -len(calls) <= call < len(calls):
            raise InputError(f"{argument} must name one of the calls 0 to {len(calls) - 1} of {path!r}, got {name!r}")
        if calls and path not in self.folded:
            for value in calls[call]:
                if value is not None:
                    return value
        if path in self.folded:
            raise InputError(
                f"{argument} must name a layer that an accelerated model does not fuse into another, got {name!r}"
            )
        raise InputError(unknown_name(name, self.names(), argument))


def call_of(name: str) -> tuple[str, int]:
    """Returns the name before an "@" and the number of the call behind it, -1 without one."""
    path, separator, call = name.rpartition("@")
    return (path, int(call)) if separator and call.lstrip("-").isdecimal() else (name, -1)


def cached_by_identity(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Computes a function once for each op. The hash of an op, which `functools.cache` takes, costs a microsecond."""
    results: dict[int, tuple[Any, T]] = {}

    @functools.wraps(function)
    def cached(op: Any) -> T:
        result = results.get(id(op))
        if result is None:
            # The op is kept, so that no other object gets its identity.
            result = results[id(op)] = (op, function(op))
        return result[1]

    return cached


@cached_by_identity
def key(op: Any) -> str:
    """Returns the name that rules for an op are registered under: its schema's, the same for in-place forms."""
    return op._schema.name.rstrip("_") if isinstance(op, OpOverload) else f"aliasing::{op.__name__}"


@cached_by_identity
def parameters(op: OpOverload) -> dict[str, tuple[int, Any]]:
    """Returns the position and the default of each argument of an op, by its name in the schema."""
    return {declared.name: (position, declared.default_value) for position, declared in enumerate(op._schema.arguments)}


def argument(node: Node, name: str) -> Any:
    """Returns an argument of a node by its name in the schema.

    Raises:
        KeyError: the op has no such argument.
    """
    position, default = parameters(node.op)[name]
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _is_numbers(argument: list[Any] | tuple[Any, ...]) -> bool:
    """Returns whether a list has numbers, as sizes and strides are: an op's list is of one type."""
    return not argument or isinstance(argument[0], int)


def find(kind: type[T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[T]:
    """Returns the arguments of an op that are instances of `kind`.

    Arguments of an op nest no deeper than a list of tensors. This runs for each recorded op, so it avoids pytree.
    """
    matching: list[T] = []
    for argument in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(argument, kind):
            matching.append(argument)
        elif isinstance(argument, (list, tuple)) and not _is_numbers(argument):
            matching.extend(part for part in argument if isinstance(part, kind))
    return matching


def substitute(
    kind: type[T], function: Callable[[T], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of an op with `function` applied to the instances of `kind`."""

    def changed(argument: Any) -> Any:
        if isinstance(argument, kind):
            return function(argument)
        if isinstance(argument, (list, tuple)) and any(isinstance(part, kind) for part in argument):
            return type(argument)(function(part) if isinstance(part, kind) else part for part in argument)
        return argument

    return tuple(map(changed, args)), {name: changed(argument) for name, argument in kwargs.items()}


def unknown_name(name: str, names: list[str], argument: str) -> str:
    """Returns the error message for the name of a layer that does not exist."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = (
        f" such as {', '.join(map(repr, close))}"
        if close
        else " (pyfast_xai.layers(model, images) lists those with a map)"
    )
    return f"{argument} must name a module or operation that ran{hint}, got {name!r}"
