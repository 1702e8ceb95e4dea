"""The suffix of a tape: the operations that depend on one value, replayed with other numbers for that value."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError, UnsupportedOpError
from pyfast_xai.tape import aliasing
from pyfast_xai.tape.graph import Node, Tape, Value, find, substitute
from pyfast_xai.tape.record import HANDS_OUT, RecordingPolicy, SaveTensor, address, not_repeatable, written_by


class KeepSuffix:
    """A recording policy that saves what `replay_suffix` needs: the value itself, and the other inputs of the suffix.

    It tracks what has run, so an instance serves one recording at a time.

    Args:
        name: the operation that produces the value, see `Tape.find`; "" for the first input.
        output: index of the value among its results.
        like: a policy that takes the same operations apart, so that the others have the names that they have on its
            tapes; None to replay every operation as a whole.
    """

    def __init__(self, name: str, output: int = 0, like: RecordingPolicy | None = None) -> None:
        self._name, self._output, self._like = name, output, like
        self._producer: Node | None = None
        self._dependent: set[int] = set()  # operations that depend on the value

    def handles(self, op: OpOverload) -> bool:
        """Returns whether an operation is replayed as a whole."""
        return self._like is None or self._like.handles(op)

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Saves those arguments of an operation of the suffix that do not depend on the value."""
        if node.index == 0:
            self._producer, self._dependent = None, set()
        if not any(map(self._depends, node.inputs)):
            return
        self._dependent.add(node.index)
        for value, tensor in _pairs(node, args, kwargs):
            if not self._depends(value):
                keep(_saved_name(value), tensor)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the operation and returns its result; saves it if it is the value."""
        result = node(*args, **kwargs)
        if node.name == self._name:
            self._producer = node
            keep(VALUE, find(Tensor, (result,), {})[self._output])
        return result

    def _depends(self, value: Value) -> bool:
        if value.producer in self._dependent:
            return True
        if self._name == "":
            return value.producer is None and value.index == 0
        return self._producer is not None and value is self._producer.outputs[self._output]


VALUE = "value"  # the name under which the value is saved


def recorded_value(tape: Tape, value: Value) -> Tensor:
    """Returns the recorded numbers of the value that `KeepSuffix` named."""
    producer = tape.producer(value)
    if producer is None:
        raise InputError("layer must name a layer that computes its output, got one that returns the images themselves")
    return producer.saved[VALUE].tensor


def _saved_name(value: Value) -> str:
    return f"joins.{value.index}"


def _pairs(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Value, Tensor]]:
    """Yields the values among the arguments of a node with their tensors."""
    for recorded, replaced in zip((*node.args, *node.kwargs.values()), (*args, *kwargs.values()), strict=True):
        if isinstance(recorded, Value):
            yield recorded, replaced
        elif isinstance(recorded, (list, tuple)):
            yield from (
                (part, tensor) for part, tensor in zip(recorded, replaced, strict=True) if isinstance(part, Value)
            )


def suffix_nodes(tape: Tape, value: Value) -> list[Node]:
    """Returns the operations that depend on a value, in order."""
    depends, nodes = {value}, []
    for node in tape.nodes[0 if value.producer is None else value.producer + 1 :]:
        if not depends.isdisjoint(node.inputs):
            nodes.append(node)
            depends.update(output for output in node.outputs if output is not None)
    return nodes


def replay_suffix(tape: Tape, value: Value, replacement: Tensor) -> Any:
    """Computes the outputs of the model with other numbers for one value; runs only the operations that depend on it.

    Random numbers drawn elsewhere stay as recorded, and nothing is written to the model.

    Args:
        tape: a whole forward pass, recorded with `KeepSuffix`.
        value: the value that was named there, or a later one through which all of its suffix passes.
        replacement: shape, dtype and device of the value; operations may write to it. Any number of rows if the value
            is itself an output of the model. Gradients flow to it where they are enabled and the model was recorded
            outside inference mode.

    Returns:
        The outputs of the model, with a new tensor for each that depends on the value.

    Raises:
        InputError: the suffix draws random numbers, takes decisions from the value or hands numbers to other code, or
            the replacement does not fit.
        UnsupportedOpError: the model writes to a part of a tensor that does not depend on the value.
    """
    nodes = suffix_nodes(tape, value)
    reasons = [reason for reason in map(not_repeatable, nodes) if reason is not None]
    if nodes and tape.not_replayable == HANDS_OUT:
        reasons.append(HANDS_OUT)
    if reasons:
        raise InputError(f"model must be replayable above the layer, got one in which {reasons[0]}")
    rows = value.shape[:1] if nodes else tuple(replacement.shape[:1])
    if (tuple(replacement.shape), replacement.dtype) != ((*rows, *value.shape[1:]), value.dtype):
        raise InputError(
            f"replacement must be {list(value.shape)} {value.dtype}, got {list(replacement.shape)} {replacement.dtype}"
        )
    last = {source: node.index for node in nodes for source in node.inputs}
    end_values = tape.end_values(None)
    environment = {value: replacement}
    for node in nodes:
        number = functools.partial(_number, node, environment)
        args, kwargs = substitute(Value, number, node.args, node.kwargs)
        results = _run(node, args, kwargs)
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        environment.update(
            (output, tensor) for output, tensor in zip(node.outputs, results, strict=True) if output is not None
        )
        for source in node.inputs:
            if last[source] == node.index and source not in end_values:
                environment.pop(source, None)
    leaves, structure = pytree.tree_flatten(tape.outputs)
    recorded = pytree.tree_leaves(tape.result)
    new_leaves = [
        environment.get(leaf, tensor) if isinstance(leaf, Value) else tensor
        for leaf, tensor in zip(leaves, recorded, strict=True)
    ]
    return pytree.tree_unflatten(new_leaves, structure)


def _number(node: Node, environment: dict[Value, Tensor], source: Value) -> Tensor:
    if source in environment:
        return environment[source]
    saved = node.saved.get(_saved_name(source))
    if saved is None:
        raise UnsupportedOpError(
            f"operation {node.name!r} writes to a part of a tensor that does not depend on the layer, from which the "
            "model cannot be replayed; take a layer further up, or a method of another kind"
        )
    return saved.tensor


def _run(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the result of an operation; saved tensors of the recording are not written to."""
    if node.op is aliasing.scatter_view:
        return _scattered(*args)
    if node.op is aliasing.regenerate_view:
        return node.op(*args)
    saved_ids = {id(saved.tensor) for saved in node.saved.values()}
    written = {id(tensor) for tensor in written_by(node.op, args, kwargs)} & saved_ids
    if written:
        args, kwargs = substitute(Tensor, lambda t: t.clone() if id(t) in written else t, args, kwargs)
    return node(*args, **kwargs)


def _scattered(owner: Tensor, part: Tensor, geometry: aliasing.Geometry) -> Tensor:
    """Returns the owner of some memory after a part of it was written."""
    if address(part) == address(owner):
        return owner  # they share the memory, so the write has already happened
    owner = owner.clone()
    aliasing.regenerate_view(owner, geometry).copy_(part)
    return owner
