"""zennit's rules: those of `rules.relevance`, with zennit's arguments."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.rules import relevance
from pyfast_xai.rules.relevance import LayerRule
from pyfast_xai.rules.relevance.layer_rules import Stabilizer
from pyfast_xai.rules.relevance.maps import OperationMap


class _Rule(LayerRule):
    """A rule of this library, with or without the biases.

    Args:
        rule: rule of this library.
        zero_params: "bias", or a list of it, leaves biases out; None for nothing.
    """

    def __init__(self, rule: LayerRule, zero_params: str | Sequence[str] | None) -> None:
        zeros = [zero_params] if isinstance(zero_params, str) else list(zero_params or ())
        if set(zeros) - {"bias"}:
            raise InputError(f"zero_params must be None or 'bias', got {zero_params!r}")
        self.rule, self.zero_params = rule, zero_params
        self.folds, self.leaves = rule.folds, rule.leaves

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        return self.rule.relevance(self._reduced(layer), above)

    def _reduced(self, layer: OperationMap) -> OperationMap:
        """Returns a layer without what `zero_params` leaves out."""
        if not self.zero_params:
            return layer
        forward = layer.forward
        return dataclasses.replace(layer, forward=lambda leaves, modify, of_bias: forward(leaves, modify, None))

    def copy(self) -> Any:
        """Returns the rule itself, which keeps nothing of a model."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r})"


class Epsilon(_Rule):
    """Shares relevance by contributions; see `rules.relevance.Epsilon`.

    Args:
        epsilon: a number, or a function that makes the denominator.
        zero_params: "bias" leaves biases out.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import Epsilon
        >>> Epsilon(epsilon=0.25, zero_params="bias").zero_params
        'bias'
    """

    def __init__(self, epsilon: Stabilizer = 1e-6, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(relevance.Epsilon(epsilon), zero_params)


class Gamma(_Rule):
    """Favours what agrees with the sign of the result; see `rules.relevance.Gamma`.

    Args:
        gamma: how much.
        stabilizer: added to the denominator.
        zero_params: "bias" leaves biases out.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import Gamma
        >>> Gamma(gamma=0.1).rule.gamma
        0.1
    """

    def __init__(
        self,
        gamma: float = 0.25,
        stabilizer: Stabilizer = 1e-6,
        zero_params: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(relevance.Gamma(gamma, stabilizer), zero_params)

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`; the sign that is favoured is that of the result with its bias."""
        if not self.zero_params:
            return self.rule.relevance(layer, above)
        assert isinstance(self.rule, relevance.Gamma)
        return self.rule.favouring(layer.run(layer.inputs)[0], self._reduced(layer), above)


class ZPlus(_Rule):
    """Shares relevance among positive contributions; see `rules.relevance.ZPlus`.

    Args:
        stabilizer: added to the denominator.
        zero_params: "bias" leaves biases out.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import ZPlus
        >>> ZPlus().rule
        ZPlus(stabilizer=1e-06)
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(relevance.ZPlus(stabilizer), zero_params)


class AlphaBeta(_Rule):
    """Shares relevance among positive and negative contributions; see `rules.relevance.AlphaBeta`.

    Args:
        alpha: factor of the positive ones.
        beta: factor of the negative ones.
        stabilizer: added to the denominators.
        zero_params: "bias" leaves biases out.

    Raises:
        InputError: a negative number, or a difference that is not 1.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import AlphaBeta
        >>> AlphaBeta(alpha=2, beta=1).rule.beta
        1
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 1.0,
        stabilizer: Stabilizer = 1e-6,
        zero_params: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(relevance.AlphaBeta(alpha, beta, stabilizer), zero_params)


class ZBox(_Rule):
    """Shares relevance among pixels of a range; see `rules.relevance.ZBox`.

    Args:
        low: the smallest value of a pixel.
        high: the largest.
        stabilizer: added to the denominator.
        zero_params: "bias" leaves biases out.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import ZBox
        >>> ZBox(low=-2.0, high=2.0).rule.low
        -2.0
    """

    def __init__(
        self,
        low: float | Tensor,
        high: float | Tensor,
        stabilizer: Stabilizer = 1e-6,
        zero_params: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(relevance.ZBox(low, high, stabilizer), zero_params)


class WSquare(_Rule):
    """Shares relevance by squared weights; see `rules.relevance.WSquare`.

    Args:
        stabilizer: added to the denominator.
        zero_params: "bias" leaves biases out.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import WSquare
        >>> WSquare().rule
        WSquare(stabilizer=1e-06)
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(relevance.WSquare(stabilizer), zero_params)


class Flat(_Rule):
    """Shares relevance evenly; see `rules.relevance.Flat`.

    Args:
        stabilizer: added to the denominator.
        zero_params: accepted; there is no bias in this rule.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import Flat
        >>> Flat().rule
        Flat(stabilizer=1e-06)
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(relevance.Flat(stabilizer), zero_params)


class Norm(_Rule):
    """Shares relevance by contributions where there is no weight; see `rules.relevance.Norm`.

    Args:
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import Norm
        >>> Norm().rule
        Norm(epsilon=1e-06)
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__(relevance.Norm(stabilizer), None)


class Pass(_Rule):
    """Leaves relevance where it is.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import Pass
        >>> Pass().rule
        Pass()
    """

    def __init__(self) -> None:
        super().__init__(relevance.Pass(), None)


class _Rectifier(LayerRule):
    """Base of rules for rectifiers."""

    folds = False

    def copy(self) -> Any:
        """Returns the rule itself, which keeps nothing of a model."""
        return self


class ReLUDeconvNet(_Rectifier):
    """Passes what is positive above (Zeiler and Fergus, 2014).

    Example:
        >>> from pyfast_xai.compat.zennit.rules import ReLUDeconvNet
        >>> ReLUDeconvNet().folds
        False
    """

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        return [above.clamp_min(0)]


class ReLUGuidedBackprop(_Rectifier):
    """Passes what is positive above and below (Springenberg et al., 2015).

    Example:
        >>> from pyfast_xai.compat.zennit.rules import ReLUGuidedBackprop
        >>> ReLUGuidedBackprop().folds
        False
    """

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        return layer.run(layer.inputs)[1](above.clamp_min(0))


class ReLUBetaSmooth(_Rectifier):
    """Takes the derivative of softplus for that of ReLU (Dombrowski et al., 2019).

    Args:
        beta_smooth: beta of the softplus.

    Example:
        >>> from pyfast_xai.compat.zennit.rules import ReLUBetaSmooth
        >>> ReLUBetaSmooth().beta_smooth
        10.0
    """

    def __init__(self, beta_smooth: float = 10.0) -> None:
        self.beta_smooth = beta_smooth

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        return [above * torch.sigmoid(self.beta_smooth * layer.inputs[0])]
