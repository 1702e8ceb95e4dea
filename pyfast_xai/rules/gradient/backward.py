"""The backward pass: visits the tape from its end and hands the gradient of each result to the rule of its op."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.gradient import derivative
from pyfast_xai.rules.gradient.context import BackwardContext, Pending, has_gradient
from pyfast_xai.rules.gradient.table import GRADIENT, Rule, Table
from pyfast_xai.rules.saving import keep_arguments
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import SaveTensor

logger = logging.getLogger("pyfast_xai")

_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)


class GradientRules:
    """A dense reading: the gradient table with another laid over it.

    Rules are looked up when they are needed: one that is registered later takes effect.

    Args:
        overlay: rules that replace those of the gradient.
        warned: what has been warned of already, which several of one explainer may share.
    """

    def __init__(self, overlay: Table | None = None, warned: set[str] | None = None) -> None:
        self.overlay: Table = {} if overlay is None else overlay
        self.warned: set[str] = set() if warned is None else warned

    def rule_of(self, node: Node) -> Rule:
        """Returns the rule for a node: of the overlay, else of the gradient, else autograd's."""
        name = key(node.op)
        over, plain, cached = self.overlay.get(name), GRADIENT.get(name), node.rule
        if cached is None or cached[0] is not over or cached[1] is not plain:
            suited = (rule for rule in (over, plain) if rule is not None and rule.is_for(node))
            cached = node.rule = over, plain, next(suited, derivative.RULE)
        return cached[2]

    def handles(self, op: OpOverload) -> bool:
        name = key(op)
        return name in self.overlay or name in GRADIENT or name in derivative.WHOLE

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rule = self._rule_that_reads(node)
        if rule is None:
            return
        if rule is derivative.RULE:
            derivative.save(node, keep, args, kwargs)
        elif rule.saves:
            keep_arguments(node, rule.saves, keep, args, kwargs)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        looked_up = node.rule  # by `save`, just before
        if looked_up is not None and looked_up[2].runs is None:
            return node(*args, **kwargs)
        rule = self._rule_that_reads(node)
        runs = None if rule is None else rule.runs
        return node(*args, **kwargs) if runs is None else runs(node, keep, *args, **kwargs)

    def _rule_that_reads(self, node: Node) -> Rule | None:
        """Returns the rule for a node; None where no gradient can arrive at its inputs: none passes integers."""
        for value in node.inputs:
            if has_gradient(value):
                return self.rule_of(node)
        return None


def backward_pass(
    policy: GradientRules, tape: Tape, seeds: Mapping[Value, Tensor], to: Sequence[Value], *, retain: bool = False
) -> list[Tensor]:
    """Propagates gradients back to some values.

    Args:
        policy: the one the tape was recorded with.
        tape: tape of a forward pass.
        seeds: gradients to start from, `[K, *shape]` for K targets, by the value they belong to.
        to: values to arrive at: inputs of the tape or any on the way.
        retain: keep what was saved, so that another backward pass can follow.

    Returns:
        A gradient `[K, *shape]` for each of `to`; zeros where none arrives. Where none can arrive at any, because
        every way is blocked by an operation whose derivative is zero, a warning names these operations.

    Raises:
        UnsupportedOpError: an op on the way has no derivative.
    """
    reached, rules = _between(policy, tape, seeds, to)
    pending = Pending(reached)
    ends = set(to)
    targets = len(next(iter(seeds.values())))
    gradients: dict[Value, Tensor] = {}
    first = min(-1 if value.producer is None else value.producer for value in to)
    with torch.inference_mode(False), torch.no_grad():
        for value, seed in seeds.items():
            pending.add_borrowed(value, seed.to(value.device, value.dtype))
        for node in reversed(tape.nodes):
            if node.index < first:
                break
            grads = [pending.pop(value) for value in node.outputs]
            arrived = next((grad for grad in grads if grad is not None), None)
            if arrived is not None:
                if not ends.isdisjoint(node.outputs):
                    for output, grad in zip(node.outputs, grads, strict=True):
                        if grad is not None and output in ends:
                            # A copy, where what comes after could write to it.
                            gradients[output] = grad.clone() if node.index > first else grad
                rule = rules.get(node.index)
                if node.index > first and rule is not None:
                    rule.backward(BackwardContext(pending, node, grads, arrived), *node.args, **node.kwargs)
            if not retain:
                node.saved.clear()
        for value in to:
            grad = gradients.get(value)
            if grad is None:
                grad = pending.pop(value)
            if grad is None:
                grad = torch.zeros(targets, *value.shape, dtype=value.dtype, device=value.device)
            gradients[value] = grad
    return [gradients[value] for value in to]


def _between(
    policy: GradientRules, tape: Tape, ends: Collection[Value], to: Collection[Value]
) -> tuple[set[Value], dict[int, Rule]]:
    """Returns the values that a gradient on its way to `to` can arrive at, `to` themselves among them.

    The second result has the rules of the operations that it can pass, by their index.
    """
    reached = set(to)
    blocking: list[Node] = []
    rules: dict[int, Rule] = {}
    for node in tape.nodes:
        if reached.isdisjoint(node.inputs):
            continue
        rule = policy.rule_of(node)
        if rule.stops_at(node):
            if any(value is not None for value in node.outputs):
                blocking.append(node)
            continue
        rules[node.index] = rule
        for value in node.outputs:
            if value is None:
                continue
            if has_gradient(value):
                reached.add(value)
            elif not blocking or blocking[-1] is not node:
                blocking.append(node)
    if blocking and reached.isdisjoint(ends) and not _dependent(tape, to).isdisjoint(ends):
        _report(policy, tape, blocking, ends)
    return reached, rules


def _dependent(tape: Tape, on: Collection[Value]) -> set[Value]:
    """Returns the values that depend on others, these among them."""
    dependent = set(on)
    for node in tape.nodes:
        if not dependent.isdisjoint(node.inputs):
            dependent.update(value for value in node.outputs if value is not None)
    return dependent


def _report(policy: GradientRules, tape: Tape, blocking: Sequence[Node], ends: Collection[Value]) -> None:
    """Says which operations let no gradient pass on any way to where it begins.

    Raises:
        UnsupportedOpError: one of them computes with quantized numbers.
    """
    leads = set(ends)
    for node in reversed(tape.nodes):
        if not leads.isdisjoint(value for value in node.outputs if value is not None):
            leads.update(node.inputs)
    named = []
    for node in blocking:
        outputs = [value for value in node.outputs if value in leads]
        if not outputs:
            continue
        named.append(f"{key(node.op)} in {node.path or 'the model'!r} (operation {node.name!r})")
        if any(value is not None and value.dtype in _QUANTIZED for value in outputs):
            raise UnsupportedOpError(
                f"{named[-1]} returns quantized numbers, through which no gradient passes; explain the model before "
                f"it is quantized, or by a method without gradients (occlusion, RISE)"
            )
    message = (
        f"all gradients are zero, as none passes {' or '.join(named[:3])}: its derivative is zero or it returns no "
        f"floating-point numbers (the backward of a torch.autograd.Function is not followed); explain what goes into "
        f"it, or by a method without gradients (occlusion, RISE); a rule registered with "
        f"pyfast_xai.rules.gradient.rule lets them pass"
    )
    if named and message not in policy.warned:
        policy.warned.add(message)
        logger.warning(message)
