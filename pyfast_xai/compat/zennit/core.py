"""Composites of zennit: which module has which rule, and a model whose gradients are relevance."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.compat.called import FUNCTION
from pyfast_xai.compat.recording import Recording, record_call
from pyfast_xai.compat.zennit.canonizers import Canonizer
from pyfast_xai.compat.zennit.layer import Sum
from pyfast_xai.errors import InputError
from pyfast_xai.rules import relevance
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.rules.kinds import kind_of
from pyfast_xai.rules.relevance import LayerRule, RelevanceRules
from pyfast_xai.tape import Node

__all__ = ["Composite", "Modified", "Stabilizer"]

ModuleMap = Callable[[dict[Any, Any], str, nn.Module], LayerRule | None]


class Stabilizer:
    """Moves denominators away from zero.

    Args:
        epsilon: by how much.
        clip: make magnitudes at least that large, instead of adding it.
        norm_scale: in units of the root mean square.
        dim: dimensions of that mean; all but the first for None.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.zennit.core import Stabilizer
        >>> Stabilizer(0.5)(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.5000,  0.5000,  1.5000])
    """

    def __init__(
        self, epsilon: float = 1e-6, clip: bool = False, norm_scale: bool = False, dim: tuple[int, ...] | None = None
    ) -> None:
        self.epsilon, self.clip, self.norm_scale, self.dim = epsilon, clip, norm_scale, dim

    def __call__(self, input: Tensor) -> Tensor:
        """Returns the moved denominator."""
        epsilon: Any = self.epsilon
        if self.norm_scale:
            dims = tuple(range(1, input.dim())) if self.dim is None else self.dim
            epsilon = epsilon * input.square().mean(dims, keepdim=True).sqrt()
        sign = torch.where(input < 0, -1, 1).to(input)
        return sign * torch.maximum(input.abs(), torch.as_tensor(epsilon)) if self.clip else input + sign * epsilon


class Composite:
    """Rules for the modules of a model.

    Args:
        module_map: `module_map(ctx, name, module)` returns the rule of a module, or None; `ctx` is a dict that one pass
            over the modules shares.
        canonizers: with any, batch norms are parts of the layers before them and sums of branches have the rule of
            `Sum`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.zennit.core import Composite
        >>> from pyfast_xai.compat.zennit.rules import Epsilon
        >>> rules = lambda ctx, name, module: Epsilon() if isinstance(module, torch.nn.Conv2d) else None
        >>> images = torch.rand(2, 3, 96, 96, requires_grad=True)
        >>> with Composite(rules).context(demo.load()) as modified:
        ...     output = modified(images)
        ...     relevance, = torch.autograd.grad(output, images, torch.eye(10)[[3, 3]])
        >>> relevance.shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, module_map: ModuleMap | None = None, canonizers: Sequence[Canonizer] | None = None) -> None:
        self.module_map: ModuleMap = module_map or (lambda ctx, name, module: None)
        self.canonizers = list(canonizers or ())
        self.active = True

    @property
    def folds(self) -> bool:
        """Returns whether batch norms are parts of the layers before them."""
        return bool(self.canonizers)

    @contextlib.contextmanager
    def context(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yields a model of the same outputs, whose gradients are relevance; the module itself is not changed."""
        yield Modified(module, self)

    @contextlib.contextmanager
    def inactive(self) -> Iterator["Composite"]:
        """Gives plain gradients inside."""
        self.active = False
        try:
            yield self
        finally:
            self.active = True

    def policy(self, model: nn.Module, recording: Recording) -> GradientRules:
        """Returns the policy to walk a recording of a model with.

        Raises:
            InputError: a rule for a module that has others inside.
        """
        by_path = self._rules_by_path(model)
        of_sum = self.module_map({}, "", Sum()) if self.folds else None

        def rule(node: Node) -> LayerRule | None:
            match, kind = by_path.get(node.path), kind_of(node)
            if match is None and self.folds and kind == "batch_norm":
                return _Merged()
            return of_sum if match is None and kind == "sum" and len(node.inputs) == 2 else match

        # What has no rule keeps its gradient.
        rules = [(_Has(rule, node), node_rule) for node in recording.tape if (node_rule := rule(node)) is not None]
        composite = relevance.Composite([*rules, (lambda node: True, relevance.Gradient())])
        recorded_rules = recording.rules
        assert isinstance(recorded_rules, RelevanceRules)
        return recorded_rules.by(composite, recording.tape, {}, fold=self.folds)

    def _rules_by_path(self, model: nn.Module) -> dict[str, LayerRule]:
        ctx: dict[Any, Any] = {}
        rules = {}
        for name, module in model.named_modules():
            rule = self.module_map(ctx, name, module) if self.active else None
            if rule is None:
                continue
            if next(module.children(), None) is not None:
                raise InputError(
                    f"module_map must give rules to modules without others inside, got one for {name or 'the model'!r}"
                )
            if not isinstance(rule, LayerRule):
                raise InputError(
                    f"module_map must return rules of this library, got {type(rule).__name__} for {name!r}"
                )
            rules[f"{FUNCTION}.{name}".rstrip(".")] = rule
        return rules


class _Merged(relevance.Gradient):
    """The gradient of a batch norm without a rule, which can be part of the layer before it."""

    leaves = True


class _Has:
    """Finds one operation."""

    def __init__(self, rule: Any, node: Node) -> None:
        self._index = node.index

    def __call__(self, node: Node) -> bool:
        return node.index == self._index


class Modified(nn.Module):
    """A model whose gradients with respect to its input are relevance.

    Args:
        model: the model that is run.
        composite: chooses the rules; None for the gradient.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.zennit.core import Modified
        >>> Modified(demo.load(), None)(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(self, model: nn.Module, composite: Composite | None) -> None:
        super().__init__()
        self._model, self._composite = [model], composite

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output of the model."""
        return _Walk.apply(input, self._model[0], self._composite)


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, model: nn.Module, composite: Composite | None) -> Tensor:
        ctx.recording, ctx.model, ctx.composite = recorded(model, input), model, composite
        return ctx.recording.output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        return walked(ctx.recording, ctx.model, ctx.composite, above), None, None


def recorded(model: nn.Module, input: Tensor) -> Recording:
    """Returns a recording from which any composite can be walked.

    Raises:
        InputError: a model that returns something else than a tensor.
    """
    recording = record_call(model, [input], rules=RelevanceRules())
    if not isinstance(recording.output, Tensor):
        raise InputError(f"model must return a tensor, got {type(recording.output).__name__}")
    return recording


def walked(recording: Recording, model: nn.Module, composite: Composite | None, above: Tensor) -> Tensor:
    """Returns the relevance or gradient at the input.

    Args:
        recording: recording of the model.
        model: the model that was recorded.
        composite: chooses the rules.
        above: relevance of the output, of its shape.
    """
    policy = (composite or Composite()).policy(model, recording)
    start = {recording.tape.outputs[0]: above.expand(recording.output.shape)[None]}
    (value,) = recording.inputs
    assert value is not None
    return backward_pass(policy, recording.tape, start, [value], retain=True)[0][0].contiguous()
