"""LRP with Captum's rules, which are attached to modules, for inputs and for layers."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.compat.called import FUNCTION
from pyfast_xai.compat.captum.arguments import (
    CaptumInputError,
    Inputs,
    Target,
    as_tuple,
    like,
    one_number_a_row,
)
from pyfast_xai.compat.captum.attribution import GradientAttribution
from pyfast_xai.compat.captum.deep_lift import checked_module, input_values
from pyfast_xai.compat.captum.layers import LayerOf, of_layer, split
from pyfast_xai.compat.captum.lrp_rules import (
    STABILIZER,
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
    UnfoldedEpsilon,
)
from pyfast_xai.compat.recording import Recording
from pyfast_xai.explainers.lrp import relevance_of_outputs
from pyfast_xai.rules.gradient import backward_pass
from pyfast_xai.rules.relevance import Composite, LayerRule, RelevanceRules

logger = logging.getLogger("pyfast_xai")
# By the names of the rules' classes, so that Captum's own are understood as well.
_RULES = {rule.__name__: rule for rule in (EpsilonRule, GammaRule, Alpha1_Beta0_Rule, IdentityRule)}


class RuleTypeError(CaptumInputError, TypeError):
    """A rule of a module that is none; also a `TypeError`, as there."""


def _rule_of(module: nn.Module) -> LayerRule | None:
    """Returns the layer rule that a user attached to a module as `rule`."""
    rule: Any = getattr(module, "rule", None)
    if rule is None or isinstance(rule, LayerRule):
        return rule
    name = type(rule).__name__
    if name not in _RULES:
        raise RuleTypeError(f"rule of a module must be one of {', '.join(_RULES)} or a LayerRule, got {name}")
    settings = {"epsilon": "STABILITY_FACTOR", "gamma": "gamma", "set_bias_to_zero": "set_bias_to_zero"}
    known = _RULES[name].__init__.__code__.co_varnames if name != "IdentityRule" else ()
    return _RULES[name](**{name: getattr(rule, at) for name, at in settings.items() if name in known}).layer_rule()


def _composite(model: nn.Module) -> Composite:
    """Returns the rules attached to modules, and Captum's for all else: epsilon for layers, batch norm and pools."""
    attached = [(_At(path), rule) for path, module in model.named_modules() if (rule := _rule_of(module)) is not None]
    return Composite([*attached, (("layer", "batch_norm", "pool", "sum"), UnfoldedEpsilon(STABILIZER))])


class _At:
    """Finds the operations of a module by its path in the user's model."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, node: Any) -> bool:
        # The user's model is a part of what is recorded.
        return node.path == f"{FUNCTION}.{self._path}".rstrip(".")


class LRP(GradientAttribution):
    """Shares the output among the inputs by rules that modules have as `rule` (Bach et al., 2015).

    Modules without a rule, and functions, have epsilon; activations leave relevance where it is. Modules may run twice,
    and sums of branches are shared. Attached rules stay where they are.

    Args:
        model: a module.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LRP
        >>> LRP(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    _multiply_by_inputs = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(checked_module(model))
        self.model = model
        _composite(model)  # refuses rules that are none

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the model.
            return_convergence_delta: return the output less the sum of the attributions, too.
            verbose: log the rules that modules have.

        Returns:
            Of the shape of the inputs; with a delta `[N]`, a pair.

        Raises:
            InputError: arguments or rules that do not fit.
        """
        tensors = as_tuple(inputs)
        recording = self._record(tensors, additional_forward_args, rules=RelevanceRules())
        relevance = shared(self.model, recording, target, input_values(recording, tensors), verbose)
        return _with_delta(recording, target, like(inputs, relevance), relevance, return_convergence_delta)

    def compute_convergence_delta(self, attributions: Inputs, output: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the output less the sum of the attributions, `[N]`."""
        return _missing(as_tuple(attributions), output)

    def has_convergence_delta(self) -> bool:
        return True


class LayerLRP(LayerOf):
    """Relevance of a layer; see `LRP`.

    Args:
        model: a module.
        layer: a module of it, or several in a list.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerLRP
        >>> model = demo.load()
        >>> LayerLRP(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 80, 12, 12])
    """

    _multiply_by_inputs = True

    def __init__(self, model: nn.Module, layer: Any) -> None:
        super().__init__(checked_module(model), layer)
        self.model = model
        _composite(model)

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Attributes the output to the layer; see `LRP.attribute`.

        Returns:
            Of the shape of the layer; of several layers a list; with a delta, a pair.
        """
        recording = self._record(
            as_tuple(inputs),
            additional_forward_args,
            rules=RelevanceRules(),
            layers=self.layers,
            at_input=attribute_to_layer_input,
        )
        values = [value for layer_values in recording.layers for value in layer_values]
        relevance = shared(self.model, recording, target, values, verbose)
        counts = [len(layer_values) for layer_values in recording.layers]
        by_layer = [list(part) for part in split(relevance, counts)]
        results = [of_layer(part) for part in by_layer]
        if not isinstance(self.layer, (list, tuple)):
            return _with_delta(recording, target, results[0], by_layer[0], return_convergence_delta)
        if not return_convergence_delta:
            return results
        return results, [_with_delta(recording, target, None, part, True)[1] for part in by_layer]

    def has_convergence_delta(self) -> bool:
        return True


def shared(
    model: nn.Module, recording: Recording, target: Target, to: list[Any], verbose: bool = False
) -> list[Tensor]:
    """Returns the relevance of some values for the output of a target."""
    rules = recording.rules
    assert isinstance(rules, RelevanceRules)
    composite = _composite(model)
    if verbose:
        for path, module in model.named_modules():
            if _rule_of(module) is not None:
                logger.info("%s: %s", path, _rule_of(module))
    score = one_number_a_row(target)
    with torch.enable_grad():
        seeds = recording.seeds(lambda output: score(output))
    policy = rules.by(composite, recording.tape, {})
    start = relevance_of_outputs(recording.tape, seeds)
    return [gradient[0].contiguous() for gradient in backward_pass(policy, recording.tape, start, to, retain=True)]


def _with_delta(
    recording: Recording, target: Target, result: Any, relevance: Sequence[Tensor], return_delta: bool
) -> Any:
    if not return_delta:
        return result
    return result, _missing(relevance, one_number_a_row(target)(recording.output))


def _missing(attributions: Sequence[Tensor], output: Tensor) -> Tensor:
    """Returns the output less the sum of the attributions, `[N]`."""
    return output.flatten() - sum(attribution.flatten(1).sum(1) for attribution in attributions)
