"""The walk itself: visit the tape backwards and hand the gradient of each result to the rule of its op."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyfast_xai.rules.response import derivative
from pyfast_xai.rules.response.step import Pending, Step
from pyfast_xai.rules.response.table import GRADIENT, Rule
from pyfast_xai.rules.saving import keep_arguments
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import Keep


class Response:
    """A dense reading: the gradient table with another laid over it.

    Args:
        overlay: rules that replace those of the gradient.
    """

    def __init__(self, overlay: Mapping[str, Rule] | None = None) -> None:
        self.table = {**GRADIENT, **(overlay or {})}

    def rule_of(self, node: Node) -> Rule:
        found = self.table.get(key(node.op))
        if found is None or (found.unless is not None and found.unless(node)):
            return derivative.RULE
        return found

    def understands(self, op: OpOverload) -> bool:
        name = key(op)
        return name in self.table or name in derivative.WHOLE

    def save(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _differentiable(node):
            return
        own = self.rule_of(node)
        if own is derivative.RULE:
            derivative.save(node, keep, args, kwargs)
        else:
            keep_arguments(node, own.saves(node), keep, args, kwargs)

    def run(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runs = self.rule_of(node).runs if _differentiable(node) else None
        return node(*args, **kwargs) if runs is None else runs(node, keep, *args, **kwargs)


def _differentiable(node: Node) -> bool:
    """Whether a gradient can arrive at anything the node was made of: nothing is walked through integers."""
    return any(value.dtype.is_floating_point for value in node.inputs)


def walk(
    reading: Response, tape: Tape, seeds: Mapping[Value, Tensor], to: Sequence[Value], *, retain: bool = False
) -> list[Tensor]:
    """Walk gradients back to some values.

    Args:
        reading: the one the tape was recorded with.
        tape: of a forward pass.
        seeds: gradients to start from, `[K, *shape]` for K targets, by the value they belong to.
        to: values to arrive at: inputs of the tape or any on the way.
        retain: keep what was saved, so that the tape can be walked again.

    Returns:
        A gradient `[K, *shape]` for each of `to`; zeros where none arrives.

    Raises:
        UnsupportedOpError: an op on the way has no derivative.
    """
    pending = Pending(_between(tape, to))
    targets = len(next(iter(seeds.values())))
    arrived: dict[Value, Tensor] = {}
    first = min(-1 if value.producer is None else value.producer for value in to)
    with torch.inference_mode(False), torch.no_grad():
        for value, seed in seeds.items():
            pending.lend(value, seed.to(value.device, value.dtype))
        for node in reversed(tape.nodes):
            if node.index < first:
                break
            grads = [pending.pop(value) for value in node.outputs]
            for output, grad in zip(node.outputs, grads, strict=True):
                if output is not None and output in to and grad is not None:
                    # A copy, where what comes after could write to it.
                    arrived[output] = grad.clone() if node.index > first else grad
            if node.index > first and any(grad is not None for grad in grads):
                reading.rule_of(node).pull(Step(pending, node, grads), *node.args, **node.kwargs)
            if not retain:
                node.saved.clear()
        for value in to:
            grad = arrived.get(value)
            if grad is None:
                grad = pending.pop(value)
            if grad is None:
                grad = torch.zeros(targets, *value.shape, dtype=value.dtype, device=value.device)
            arrived[value] = grad
    return [arrived[value] for value in to]


def _between(tape: Tape, sources: Sequence[Value]) -> set[Value]:
    """The floating-point values that depend on any of `sources`, and these themselves."""
    found = set(sources)
    for node in tape.nodes:
        if any(value in found for value in node.inputs):
            found.update(v for v in node.outputs if v is not None and v.dtype.is_floating_point)
    return found
