"""The trace: visits the tape from its end and hands the points of each result to the rule of its op."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyfast_xai import ops
from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.ops import Location
from pyfast_xai.rules.evidence.points import Points, union
from pyfast_xai.rules.saving import Saves, keep_arguments
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import SaveTensor


@dataclass(frozen=True)
class Options:
    """Choices that the paper leaves open.

    Attributes:
        location: where in a receptive field a point lands.
        first_fc: at the fully connected layer on a flattened map, one position a neuron ("argmax", the authors'
            code) or every positive contribution ("all", the paper's Algorithm 1).
        signed: below a layer, a point on a negative activation looks for what made it low. The paper has only
            rectified activations, on which this changes nothing.
    """

    location: Location = Location.PRODUCT
    first_fc: Literal["argmax", "all"] = "argmax"
    signed: bool = False


class TraceContext:
    """An operation of a trace: the points of its results, and where they go.

    Attributes:
        node: the operation.
        points: those on the first result that has any (most ops have one result).
        results: those on each result, None where there are none.
        options: what the paper leaves open.
        batch: how many images the tape is of.
    """

    def __init__(self, walk: "_Walk", node: Node, results: list[Points | None]) -> None:
        self.node = node
        self.results = results
        self.points = next(points for points in results if points is not None)
        self.options = walk.options
        self.batch = walk.batch
        self._walk = walk
        self._sent: list[Points] = []

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the result that `points` lie on."""
        at = next(i for i, points in enumerate(self.results) if points is self.points)
        value = self.node.outputs[at]
        assert value is not None
        return value.shape

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor that the rule saved under this name."""
        return self.node.saved[name].tensor

    def producer(self, value: Value) -> Node | None:
        """Returns the node that made a value; None for an input."""
        return self._walk.tape.producer(value)

    def depth(self, value: Value) -> int:
        """Returns the most layers with weights between an input and this value."""
        return self._walk.depth(value)

    def leads(self, value: Any) -> bool:
        """Returns whether an argument of the node depends on what the points are traced to."""
        return isinstance(value, Value) and value in self._walk.leading

    def propagate(self, value: Any, points: Points) -> None:
        """Continues at an argument of the node; what reaches a constant, or only other inputs, ends there.

        Split points between arguments with `points.to(index, keep)`. Sending the same points to two arguments
        duplicates them.
        """
        if not self.leads(value) or not len(points):
            return
        before = [sent for sent in self._sent if sent.origins is points.origins]
        self._sent.append(points)
        if before and not all(sent.share for sent in (*before, points)):
            points = replace(points, origins=frozenset())
        start = points.start and not weighted(self.node)
        self._walk.pending.setdefault(value, []).append(replace(points, share=False, start=start))

    def sign_bits(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the packed signs of a weight `[O, I]`, packed once a trace at most."""
        bits = self._walk.sign_bits.get(weight)
        if bits is None:
            bits = self._walk.sign_bits[weight] = ops.sign_bits(weight)
        return bits


Trace = Callable[..., None]


@dataclass(frozen=True)
class Rule:
    """The rule that traces evidence through one op.

    Attributes:
        trace: `trace(ctx, *args, **kwargs)`, see `rule`.
        saves: names of the op's tensor arguments that `trace` reads, or a function of the node that gives them.
        weighted: the op is a layer with weights that the input does not determine.
    """

    trace: Trace
    saves: Saves = ()
    weighted: bool = False


_rules: dict[str, Rule] = {}


def rule(*names: str, saves: Saves = (), weighted: bool = False) -> Callable[[Trace], Trace]:
    """Registers an evidence rule, also for explainers that exist already.

    Args:
        *names: ops by schema name, without overload or trailing underscore, e.g. "aten::relu"; `aten::` may be left
            out. The in-place form is meant too.
        saves: names of the op's tensor arguments that the rule reads, or a function of the node that gives them.
        weighted: the op is a layer with weights. Points below it are told from those that no layer has traced, and of
            two branches that are added the one with fewer such layers is the skip path.

    The rule is called as `rule(ctx, *args, **kwargs)` with the arguments of the node, in which a `Value` stands for
    every tensor that depends on the inputs, and calls `ctx.propagate(argument, points)`.
    """

    def register(function: Trace) -> Trace:
        for name in names:
            _rules[name if "::" in name else f"aten::{name}"] = Rule(function, saves, weighted)
        return function

    return register


def weighted(node: Node) -> bool:
    """Returns whether a node is a layer with weights."""
    entry = _rules.get(key(node.op))
    return entry is not None and entry.weighted


class _Evidence:
    """The reading, as a recording sees it."""

    def handles(self, op: OpOverload) -> bool:
        return key(op) in _rules

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entry = _rules.get(key(node.op))
        if entry is not None:
            keep_arguments(node, entry.saves, keep, args, kwargs)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node(*args, **kwargs)


policy = _Evidence()


class _Walk:
    def __init__(self, tape: Tape, to: Value, options: Options) -> None:
        self.tape = tape
        self.leading = {to}
        for node in tape.nodes:
            if not self.leading.isdisjoint(node.inputs):
                self.leading.update(value for value in node.outputs if value is not None)
        self.options = options
        self.batch = tape.inputs[0].shape[0]
        self.pending: dict[Value, list[Points]] = {}
        self.sign_bits: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._depth: dict[Value, int] = {}

    def depth(self, value: Value) -> int:
        # Iterative: networks are deeper than Python's stack.
        stack = [value]
        while stack:
            at = stack[-1]
            producer = self.tape.producer(at)
            below = [] if producer is None else producer.inputs
            missing = [v for v in below if v not in self._depth]
            if missing:
                stack.extend(missing)
                continue
            layer = producer is not None and weighted(producer)
            self._depth[at] = max((self._depth[v] for v in below), default=0) + layer
            stack.pop()
        return self._depth[value]


def walk(tape: Tape, starts: dict[Value, Points], to: Value, options: Options) -> Points:
    """Traces points back to a value.

    Args:
        tape: recorded with `policy`.
        starts: points to explain, by the value they lie on.
        to: where to stop: an input of the tape or any value on the way.
        options: what the paper leaves open.

    Returns:
        The distinct points that reach `to`: on the CPU as many as there are, on a device as many entries as there can
        be, absent ones among them. Nothing waits for a device.

    Raises:
        UnsupportedOpError: an op on the way has no rule.
    """
    state = _Walk(tape, to, options)
    for start, points in starts.items():
        state.pending[start] = [Points(points.index, points.negative, start=True)]
    with torch.inference_mode():
        for node in reversed(tape.nodes):
            if to in state.pending and to.producer == node.index:
                break
            output_points = [[] if value is None else state.pending.pop(value, []) for value in node.outputs]
            if not any(output_points):
                continue
            entry = _rules.get(key(node.op))
            if entry is None:
                raise UnsupportedOpError(
                    f"CNN-Fixations has no evidence rule for {key(node.op)}, which ran in {node.path or 'the model'!r} "
                    f"(operation {node.name!r}); register one with pyfast_xai.rules.evidence.rule({key(node.op)!r})"
                )
            if any(value is not None and value.dtype.is_complex for value in (*node.inputs, *node.outputs)):
                raise UnsupportedOpError(
                    f"CNN-Fixations has no rule for complex numbers, which {key(node.op)} in "
                    f"{node.path or 'the model'!r} (operation {node.name!r}) works with: there is no larger one of two"
                )
            # Points that came past a layer and points that did not are traced apart: rules tell them from each other.
            for past_layers in (False, True):
                results = []
                for value, parts in zip(node.outputs, output_points, strict=True):
                    chosen = [part for part in parts if part.start != past_layers]
                    results.append(union(chosen, value.numel) if chosen and value is not None else None)
                if any(points is not None for points in results):
                    entry.trace(TraceContext(state, node, results), *node.args, **node.kwargs)
        reached = state.pending.get(to)
        empty = torch.empty(0, dtype=torch.int64, device=to.device)
        return Points(empty) if reached is None else union(reached, to.numel)
