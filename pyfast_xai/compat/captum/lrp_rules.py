"""The rules that Captum's users attach to modules (`captum.attr._utils.lrp_rules`)."""

from dataclasses import dataclass

from torch import Tensor

from pyfast_xai.rules.relevance import Epsilon, LayerRule, Pass
from pyfast_xai.rules.relevance.layer_rules import stabilized
from pyfast_xai.rules.relevance.maps import Modify, OperationMap, positive_part, times, unchanged

STABILIZER = 1e-9


class UnfoldedEpsilon(Epsilon):
    """Epsilon for a layer without the batch norm behind it, which has a rule of its own."""

    folds = False


@dataclass(frozen=True)
class _Modified(LayerRule):
    """Shares by changed weights, with the bias as it is or without it."""

    modify: Modify
    bias: bool
    folds = False

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        result, adjoint = layer.run(layer.inputs, self.modify, bias=unchanged if self.bias else False)
        return times(layer.inputs, adjoint(above / stabilized(result, STABILIZER)))


class EpsilonRule:
    """Shares relevance by contributions.

    Args:
        epsilon: added to the denominator.

    Example:
        >>> from pyfast_xai.compat.captum.lrp_rules import EpsilonRule
        >>> EpsilonRule(0.1).STABILITY_FACTOR
        0.1
    """

    def __init__(self, epsilon: float = STABILIZER) -> None:
        self.STABILITY_FACTOR = epsilon

    def layer_rule(self) -> LayerRule:
        """Returns the rule of this library that does the same."""
        return UnfoldedEpsilon(self.STABILITY_FACTOR)


class GammaRule:
    """Shares relevance by contributions with weights `w + gamma w+`.

    Args:
        gamma: how much positive weights count more.
        set_bias_to_zero: leave the bias out.

    Example:
        >>> from pyfast_xai.compat.captum.lrp_rules import GammaRule
        >>> GammaRule(gamma=0.5).gamma
        0.5
    """

    def __init__(self, gamma: float = 0.25, set_bias_to_zero: bool = False) -> None:
        self.gamma, self.set_bias_to_zero = gamma, set_bias_to_zero

    def layer_rule(self) -> LayerRule:
        """Returns the rule of this library that does the same."""
        return _Modified(self._modified, not self.set_bias_to_zero)

    def _modified(self, weight: Tensor) -> Tensor:
        return weight + self.gamma * weight.clamp_min(0)


class Alpha1_Beta0_Rule:  # noqa: N801
    """Shares relevance by contributions with positive weights.

    Args:
        set_bias_to_zero: leave the bias out.

    Example:
        >>> from pyfast_xai.compat.captum.lrp_rules import Alpha1_Beta0_Rule
        >>> Alpha1_Beta0_Rule(set_bias_to_zero=True).set_bias_to_zero
        True
    """

    def __init__(self, set_bias_to_zero: bool = False) -> None:
        self.set_bias_to_zero = set_bias_to_zero

    def layer_rule(self) -> LayerRule:
        """Returns the rule of this library that does the same."""
        return _Modified(positive_part, not self.set_bias_to_zero)


class IdentityRule:
    """Leaves relevance where it is.

    Example:
        >>> from pyfast_xai.compat.captum.lrp_rules import IdentityRule
        >>> IdentityRule().layer_rule()
        Pass()
    """

    def layer_rule(self) -> LayerRule:
        """Returns the rule of this library that does the same."""
        return Pass()
