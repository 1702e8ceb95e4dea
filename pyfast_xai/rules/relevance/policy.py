"""The reading of relevance: what a recording keeps for the rules, and the backward pass by a composite."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._ops import OpOverload

from pyfast_xai.rules.gradient import derivative
from pyfast_xai.rules.gradient.backward import GradientRules
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import Rule
from pyfast_xai.rules.kinds import kind_of, takes_whole
from pyfast_xai.rules.relevance.attention import attention_relevance
from pyfast_xai.rules.relevance.composite import Composite
from pyfast_xai.rules.relevance.layer_rules import Gradient, LayerRule, Pass
from pyfast_xai.rules.relevance.maps import is_transposed, operation_map
from pyfast_xai.rules.rerun import KeepsInputs
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument


class RelevanceRules(KeepsInputs):
    """Keeps the inputs of every operation that changes numbers, so that any composite can be walked.

    Args:
        warned: see `GradientRules`.

    Example:
        >>> import torch
        >>> from pyfast_xai import Composite, record
        >>> from pyfast_xai.rules.gradient import backward_pass
        >>> from pyfast_xai.rules.relevance import RelevanceRules
        >>> policy, net = RelevanceRules(), torch.nn.Linear(4, 3)
        >>> tape = record(net, torch.randn(2, 4), policy=policy)
        >>> walked = policy.by(Composite(), tape, {})
        >>> backward_pass(walked, tape, {tape.outputs: tape.result[None]}, [tape.inputs[0]])[0].shape
        torch.Size([1, 2, 4])
    """

    def handles(self, op: OpOverload) -> bool:
        """Returns whether an operation is read as a whole."""
        return takes_whole(key(op)) or super().handles(op)

    def reruns(self, node: Node) -> bool:
        """Returns whether an operation changes numbers."""
        return kind_of(node) is not None

    def by(
        self, composite: Composite, tape: Tape, modules: Mapping[str, nn.Module], *, fold: bool = True
    ) -> GradientRules:
        """Returns the policy to walk a tape with.

        Args:
            composite: chooses the rules.
            tape: recorded with this policy.
            modules: modules of the model, by their paths.
            fold: whether a batch norm is part of the layer before it.

        Raises:
            InputError: a name in the composite that the model does not have.
        """
        plan = composite.plan(tape, modules)
        norms = _folded(tape, plan) if fold else {}
        behind = set(norms.values())
        rules = {}
        for index, (kind, rule) in plan.items():
            node = tape.nodes[index]
            layer_rule = Pass() if node in behind else rule
            rules[index] = Rule(_Walked(kind, layer_rule, norms.get(index)))
        return _Planned(rules, self.warned)


class _Planned(GradientRules):
    """The rules of a composite, by the places of the operations."""

    def __init__(self, rules: Mapping[int, Rule], warned: set[str]) -> None:
        super().__init__(warned=warned)
        self._rules = rules

    def rule_of(self, node: Node) -> Rule:
        """Returns the rule of a node."""
        return self._rules.get(node.index) or super().rule_of(node)


class _Walked:
    """A layer rule as the backward of one operation."""

    def __init__(self, kind: str, rule: LayerRule, norm: Node | None) -> None:
        self._kind, self._rule, self._norm = kind, rule, norm

    def __call__(self, ctx: BackwardContext, *args: Any, **kwargs: Any) -> None:
        if isinstance(self._rule, Gradient):
            derivative.RULE.backward(ctx, *args, **kwargs)
            return
        if self._kind == "attention" and not isinstance(self._rule, Pass):
            attention_relevance(ctx, self._rule)
            return
        for output, above in enumerate(ctx.grads):
            if above is None:
                continue
            layer = operation_map(ctx.node, self._kind, self._norm, output)
            for value, below in zip(layer.values, self._rule.relevance(layer, above), strict=True):
                ctx.propagate(value, below)


def _folded(tape: Tape, plan: Mapping[int, tuple[str, LayerRule]]) -> dict[int, Node]:
    """Returns the batch norms that become part of the layer before them, by the place of that layer."""
    uses: Counter[Value] = Counter(value for node in tape for value in node.inputs)
    uses.update(tape.end_values(None))
    norms = {}
    for index, (kind, layer_map) in plan.items():
        norm = tape.nodes[index]
        folds = kind == "batch_norm" and layer_map.leaves
        layer = tape.producer(norm.inputs[0]) if folds else None
        if layer is None or layer.index not in plan or uses[norm.inputs[0]] != 1:
            continue
        kind_before, rule = plan[layer.index]
        if kind_before in ("convolution", "linear") and rule.folds and _takes_channels(layer, kind_before):
            norms[layer.index] = norm
    return norms


def _takes_channels(layer: Node, kind: str) -> bool:
    """Returns whether the second dimension of a result belongs to the outputs of a layer's weight."""
    if kind == "linear":
        return key(layer.op) == "aten::linear" and len(layer.inputs[0].shape) == 2
    return len(layer.inputs[0].shape) == layer.args[1].dim() and (
        not is_transposed(layer) or argument(layer, "groups") == 1
    )
