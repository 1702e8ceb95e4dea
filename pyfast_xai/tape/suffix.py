"""The suffix of a tape: what depends on one value, run again with other numbers in its place."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError, UnsupportedOpError
from pyfast_xai.tape import aliasing
from pyfast_xai.tape.graph import Node, Tape, Value, find, substitute
from pyfast_xai.tape.record import HANDS_OUT, SaveTensor, address, not_repeatable, written_by


class KeepSuffix:
    """A recording policy that keeps what `replay_suffix` needs: the value itself, and what joins it from elsewhere.

    It knows what has run, so each is for one recording at a time.

    Args:
        name: of the operation that makes the value, see `Tape.find`; "" for the first input.
        output: which of its results.
    """

    def __init__(self, name: str, output: int = 0) -> None:
        self._name, self._output = name, output
        self._maker: Node | None = None
        self._above: set[int] = set()  # operations that depend on the value

    def handles(self, op: OpOverload) -> bool:
        """Returns True: every operation is replayed as a whole."""
        return True

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the arguments of an operation above the value that do not depend on it."""
        if node.index == 0:
            self._maker, self._above = None, set()
        if not any(map(self._depends, node.inputs)):
            return
        self._above.add(node.index)
        for value, tensor in _pairs(node, args, kwargs):
            if not self._depends(value):
                keep(_kept(value), tensor)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns what the operation returns, and keeps it where it is the value."""
        result = node(*args, **kwargs)
        if node.name == self._name:
            self._maker = node
            keep(VALUE, find(Tensor, (result,), {})[self._output])
        return result

    def _depends(self, value: Value) -> bool:
        if value.producer in self._above:
            return True
        if self._name == "":
            return value.producer is None and value.index == 0
        return self._maker is not None and value is self._maker.outputs[self._output]


VALUE = "value"  # what is kept of the operation that makes the value


def kept_value(tape: Tape, value: Value) -> Tensor:
    """Returns the recorded numbers of the value that `KeepSuffix` named."""
    maker = tape.producer(value)
    if maker is None:
        raise InputError("layer must return what an operation made, got the images themselves")
    return maker.saved[VALUE].tensor


def _kept(value: Value) -> str:
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
    """Returns what the model returns when one value has other numbers; what does not depend on it is not run again.

    Random numbers that were drawn elsewhere stay as they were recorded, and nothing is written to the model.

    Args:
        tape: of a whole forward pass, recorded with `KeepSuffix`.
        value: the value that was named there, or one above it through which everything above it passes.
        replacement: numbers of the shape, dtype and device of the value, which an operation may write to; any number of
            rows where nothing depends on the value but what the model returned. Gradients are followed where they are
            enabled and the model was recorded outside inference mode.

    Returns:
        What the model returned, with a new tensor for each that depends on the value.

    Raises:
        InputError: a forward that draws random numbers from the value, takes decisions from it or hands numbers to
            other code, or a replacement that does not fit.
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
    ends = tape.ends(None)
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
            if last[source] == node.index and source not in ends:
                environment.pop(source, None)
    leaves, structure = pytree.tree_flatten(tape.outputs)
    recorded = pytree.tree_leaves(tape.result)
    returned = [
        environment.get(leaf, tensor) if isinstance(leaf, Value) else tensor
        for leaf, tensor in zip(leaves, recorded, strict=True)
    ]
    return pytree.tree_unflatten(returned, structure)


def _number(node: Node, environment: dict[Value, Tensor], source: Value) -> Tensor:
    if source in environment:
        return environment[source]
    kept = node.saved.get(_kept(source))
    if kept is None:
        raise UnsupportedOpError(
            f"operation {node.name!r} writes to a part of a tensor that does not depend on the layer, from which the "
            "model cannot be replayed; take a layer further up, or a method of another kind"
        )
    return kept.tensor


def _run(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns what an operation returns; what was kept of the recording is not written to."""
    if node.op is aliasing.scatter_view:
        return _scattered(*args)
    if node.op is aliasing.regenerate_view:
        return node.op(*args)
    kept = {id(saved.tensor) for saved in node.saved.values()}
    written = {id(tensor) for tensor in written_by(node.op, args, kwargs)} & kept
    if written:
        args, kwargs = substitute(Tensor, lambda t: t.clone() if id(t) in written else t, args, kwargs)
    return node(*args, **kwargs)


def _scattered(owner: Tensor, part: Tensor, geometry: aliasing.Geometry) -> Tensor:
    """Returns the owner of some memory after a part of it was written."""
    if address(part) == address(owner):
        return owner  # they share the memory: the write has happened
    owner = owner.clone()
    aliasing.regenerate_view(owner, geometry).copy_(part)
    return owner
