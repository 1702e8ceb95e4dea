"""The walk itself: visit the tape backwards and hand the gradient of each result to the rule of its op."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyfast_xai.rules.response import derivative
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
        return node.op(*args, **kwargs) if runs is None else runs(node, keep, *args, **kwargs)


def _differentiable(node: Node) -> bool:
    """Whether a gradient can arrive at anything the node was made of: nothing is walked through integers."""
    return any(value.dtype.is_floating_point for value in node.inputs)


class Step:
    """One node on the way back: the gradients of its results, and where they go.

    Every gradient has one dimension more than its value, in front: the targets, `[K, *shape]`.

    Attributes:
        node: the operation.
        grads: of each result, None where nothing arrived.
        grad: the first of them (most ops have one result).
    """

    def __init__(self, pending: "_Pending", node: Node, grads: list[Tensor | None]) -> None:
        self.node = node
        self.grads = grads
        self.grad = next(grad for grad in grads if grad is not None)
        self._pending = pending

    def tensor(self, name: str) -> Tensor:
        """What was saved under this name."""
        return self.node.saved[name].tensor

    def replace(self, grad: Tensor) -> None:
        """Go on with another gradient of the first result."""
        self.grads[next(i for i, own in enumerate(self.grads) if own is self.grad)] = grad
        self.grad = grad

    @property
    def exclusive(self) -> bool:
        """Whether `grad` may be overwritten: nobody else reads its memory."""
        return self._pending.exclusive(self.grad)

    def wants(self, argument: Any) -> bool:
        """Whether the gradient of an argument is needed."""
        return isinstance(argument, Value) and argument in self._pending.needed

    def send(self, argument: Any, grad: Tensor) -> None:
        """Continue at an argument of the node; what reaches a constant ends there.

        A gradient of a broadcast argument is summed, one in another dtype converted.
        """
        if not self.wants(argument):
            return
        if grad.shape[1:] != argument.shape:
            grad = _sum_to(grad, argument.shape)
        if grad.dtype != argument.dtype or grad.device != argument.device:
            grad = grad.to(argument.device, argument.dtype)
        self._pending.add(argument, grad)


def _sum_to(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    lead = grad.dim() - 1 - len(shape)
    dims = [*range(1, 1 + lead)]
    dims += [1 + lead + i for i, n in enumerate(shape) if n == 1 and grad.shape[1 + lead + i] != 1]
    if dims:
        grad = grad.sum(dims, keepdim=True)
    return grad.reshape(grad.shape[0], *shape)


def _overlaps(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class _Pending:
    """Gradients on their way, and who shares memory with whom."""

    def __init__(self, needed: set[Value]) -> None:
        self.needed = needed
        self._grads: dict[Value, Tensor] = {}
        self._holders: Counter[int] = Counter()
        self._lent: list[Tensor] = []

    def lend(self, value: Value, grad: Tensor) -> None:
        """Take a gradient that belongs to someone else and is never overwritten."""
        self._lent.append(grad)
        self._holders[grad.untyped_storage()._cdata] += 1
        self.add(value, grad)

    def add(self, value: Value, grad: Tensor) -> None:
        before = self._grads.get(value)
        if before is not None:
            # In the order of arrival, as autograd sums them.
            self._drop(before)
            own = self.exclusive(before) and before.untyped_storage()._cdata != grad.untyped_storage()._cdata
            grad = before.add_(grad) if own else before + grad
        self._grads[value] = grad
        self._holders[grad.untyped_storage()._cdata] += 1

    def pop(self, value: Value | None) -> Tensor | None:
        grad = None if value is None else self._grads.pop(value, None)
        if grad is not None:
            self._drop(grad)
        return grad

    def exclusive(self, grad: Tensor) -> bool:
        return not self._holders[grad.untyped_storage()._cdata] and not _overlaps(grad) and not grad.is_inference()

    def _drop(self, grad: Tensor) -> None:
        storage = grad.untyped_storage()._cdata
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]  # the address may be used again


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
    pending = _Pending(_between(tape, to))
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
