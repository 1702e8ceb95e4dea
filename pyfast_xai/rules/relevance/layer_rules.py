"""Rules of layer-wise relevance propagation: how the relevance of a result is shared among what it was made of.

With z the result, x the inputs, w the weights and R the relevance of the result; w+ and w- are the positive and the
negative parts. Every quotient is stabilised: `R / (z + epsilon sign(z))`, with `sign(0) = 1`.

==============  ===================================================================  ==================================
rule            contribution of `x_i` to `z_j`                                       source
==============  ===================================================================  ==================================
Epsilon, Norm   `x_i w_ij`                                                           Bach et al., 2015, Eq. 58
ZPlus           `x+ w+` and `x- w-`                                                  Bach et al., 2015, Eq. 60
AlphaBeta       alpha times the positive, beta times the negative contributions      Bach et al., 2015, Eq. 60
Gamma           `x_i (w_ij + gamma w+_ij)`; signs by that of z                       Montavon et al., 2019; Andéol, 2021
ZBox            `x_i w_ij - low w+_ij - high w-_ij`                                  Montavon et al., 2017
WSquare         `w_ij ** 2`                                                          Montavon et al., 2017
Flat            1                                                                    Lapuschkin et al., 2019
Pass            all of it stays where it is                                          for elementwise operations
Gradient        what the gradient would be                                           for all else
Bilinear        a share to each of two factors, epsilon among their elements         Achtibat et al., 2024, Eq. 14
Taylor          `x_i (R_i - s_i sum_j R_j)` of a softmax s                           Achtibat et al., 2024, Eq. 12
Positive        `x+ w+` and `x- w-`, no bias                                         Chefer et al., 2021, Eq. 5
Balance         `x_i w_ij`, and each term in proportion to its total                 Chefer et al., 2021, Eq. 9 and 10
Gate            all to the larger factor of a product; half each between equals      Achtibat et al., 2024, Eq. 13
==============  ===================================================================  ==================================
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.rules.relevance.maps import (
    OperationMap,
    added,
    negative_part,
    positive_part,
    times,
)

Stabilizer = float | Callable[[Tensor], Tensor]


def stabilized(total: Tensor, stabilizer: Stabilizer) -> Tensor:
    """Returns a denominator moved away from zero by a number, or what a function makes of it."""
    if callable(stabilizer):
        return stabilizer(total)
    return torch.where(total < 0, total - stabilizer, total + stabilizer)


class LayerRule(abc.ABC):
    """A rule: what the relevance of a result becomes at the inputs of an operation.

    A rule of your own derives from this class.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import LRP, Composite
        >>> from pyfast_xai.rules.relevance import LayerRule
        >>> class Magnitude(LayerRule):
        ...     def relevance(self, layer, above):
        ...         _, adjoint = layer.run(layer.inputs, torch.abs, bias=False)
        ...         return [x.abs() * own for x, own in zip(layer.inputs, adjoint(above))]
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
        >>> LRP(net, composite=Composite({"linear": Magnitude()}))(torch.randn(2, 3, 4, 4)).attribution.shape
        torch.Size([2, 3, 4, 4])
    """

    # Whether a batch norm behind the layer becomes part of it.
    folds = True
    # Whether relevance is left where it is, so that a batch norm can be part of the layer before it.
    leaves = False

    @abc.abstractmethod
    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """Returns the relevance of each of `layer.inputs`, `[K, *input]`.

        Args:
            layer: the operation.
            above: the relevance of its result, `[K, *result]`.
        """


@dataclass(frozen=True)
class Epsilon(LayerRule):
    """Shares relevance by the contributions to the result, `R_i = sum_j x_i w_ij R_j / (z_j + epsilon sign(z_j))`.

    The bias takes its share with it. Of an operation that is not linear the contributions are the inputs times the
    derivative.

    Args:
        epsilon: a number, or a function that makes the denominator of z. Larger ones absorb what is contradictory.

    Example:
        >>> from pyfast_xai.rules.relevance import Epsilon
        >>> Epsilon(0.25)
        Epsilon(epsilon=0.25)
    """

    epsilon: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        result, adjoint = layer.run(layer.inputs)
        return times(layer.inputs, adjoint(above / stabilized(result, self.epsilon)))


@dataclass(frozen=True)
class Norm(Epsilon):
    """Shares relevance by the contributions, as `Epsilon`, where there is no weight: at sums and average pools.

    Args:
        epsilon: see `Epsilon`.

    Example:
        >>> from pyfast_xai.rules.relevance import Norm
        >>> Norm()
        Norm(epsilon=1e-06)
    """


@dataclass(frozen=True)
class Balance(LayerRule):
    """Shares by the contributions, and gives each term of a sum a part in proportion to its own total.

    With `R_u` and `R_v` the shares of two terms by `Epsilon`, which need not conserve R, each is brought to the total
    `sum R |sum R_u| / (|sum R_u| + |sum R_v|)`, of each image by itself. The bias takes nothing.

    Args:
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import Balance
        >>> Balance()
        Balance(stabilizer=1e-06)
    """

    stabilizer: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        result, adjoint = layer.run(layer.inputs, bias=False)
        shares = times(layer.inputs, adjoint(above / stabilized(result, self.stabilizer)))
        if len(shares) == 1 or any(share.shape != above.shape for share in shares):
            return shares
        totals = torch.stack([share.flatten(2).sum(2) for share in shares])  # [terms, K, N]
        parts = totals.abs() / totals.abs().sum(0) * above.flatten(2).sum(2)
        factors = torch.where(totals == 0, 0, parts / totals).view(*totals.shape, *[1] * (above.dim() - 2))
        return times(shares, list(factors))


@dataclass(frozen=True)
class Positive(LayerRule):
    """Shares relevance among positive contributions only, as `ZPlus`, of which the bias is none.

    Args:
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import Positive
        >>> Positive()
        Positive(stabilizer=1e-06)
    """

    stabilizer: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        total, back = layer.signed(positive_part, negative_part, bias=False)
        return back(above / stabilized(total, self.stabilizer))


@dataclass(frozen=True)
class Gamma(LayerRule):
    """Favours what agrees with the sign of the result, by weights `w + gamma w+` where it is positive.

    In the form for inputs of both signs (Andéol et al., 2021).

    Args:
        gamma: how much.
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import Gamma
        >>> Gamma(0.1)
        Gamma(gamma=0.1, stabilizer=1e-06)
    """

    gamma: float = 0.25
    stabilizer: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        return self.favouring(None, layer, above)

    def favouring(self, sign: Tensor | None, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """Returns the relevance of the inputs where what agrees with another sign than that of the result is favoured.

        Args:
            sign: of the shape of the result; None for the result itself.
            layer: see `LayerRule.relevance`.
            above: likewise.
        """
        excites, back_excites = layer.signed(positive_part, negative_part)
        inhibits, back_inhibits = layer.signed(negative_part, positive_part)
        result = excites + inhibits
        # By the sign of a result, one of its two sums counts more.
        sign = result if sign is None else sign
        favoured = result + self.gamma * torch.where(sign > 0, excites, inhibits)
        share = torch.where(sign != 0, above / stabilized(favoured, self.stabilizer), 0)
        more = share * (1 + self.gamma)
        return added(
            back_excites(torch.where(sign > 0, more, share)), back_inhibits(torch.where(sign > 0, share, more))
        )


@dataclass(frozen=True)
class AlphaBeta(LayerRule):
    """Shares alpha times the relevance among positive and minus beta times it among negative contributions.

    Args:
        alpha: factor of the positive ones.
        beta: factor of the negative ones; `alpha - beta` is 1.
        stabilizer: added to the denominators.

    Raises:
        InputError: a negative number, or a difference that is not 1.

    Example:
        >>> from pyfast_xai.rules.relevance import AlphaBeta
        >>> AlphaBeta(2, 1)
        AlphaBeta(alpha=2, beta=1, stabilizer=1e-06)
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: Stabilizer = 1e-6

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or self.alpha - self.beta != 1:
            raise InputError(
                f"alpha and beta must not be negative and differ by 1, got alpha={self.alpha} and beta={self.beta}"
            )

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        excites, back = layer.signed(positive_part, negative_part)
        excited = back(above * self.alpha / stabilized(excites, self.stabilizer))
        if not self.beta:
            return excited
        inhibits, back = layer.signed(negative_part, positive_part)
        return added(excited, back(above * -self.beta / stabilized(inhibits, self.stabilizer)))


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """Shares relevance among positive contributions only.

    Args:
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import ZPlus
        >>> ZPlus()
        ZPlus(stabilizer=1e-06)
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__(1.0, 0.0, stabilizer)

    def __repr__(self) -> str:
        return f"ZPlus(stabilizer={self.stabilizer})"


@dataclass(frozen=True, eq=False)
class ZBox(LayerRule):
    """Shares relevance among pixels by how far they are from the end of their range that the weight likes least.

    Args:
        low: the smallest value of a pixel: a number, or a tensor that broadcasts to the images.
        high: the largest.
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import ZBox
        >>> ZBox(0, 1)
        ZBox(low=0, high=1, stabilizer=1e-06)
    """

    low: float | Tensor
    high: float | Tensor
    stabilizer: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        low, high = ([self._bound(end, x) for x in layer.inputs] for end in (self.low, self.high))
        result, back = layer.run(layer.inputs)
        lowest, back_low = layer.run(low, positive_part)
        highest, back_high = layer.run(high, negative_part)
        share = above / stabilized(result - lowest - highest, self.stabilizer)
        at_box = added(times(low, back_low(share)), times(high, back_high(share)))
        return [relevance - box for relevance, box in zip(times(layer.inputs, back(share)), at_box, strict=True)]

    def _bound(self, end: float | Tensor, x: Tensor) -> Tensor:
        bound = torch.as_tensor(end, dtype=x.dtype, device=x.device)
        try:
            return bound.expand(x.shape)
        except RuntimeError:
            raise InputError(
                f"low and high must broadcast to the input, {list(x.shape)}, got {list(bound.shape)}"
            ) from None


@dataclass(frozen=True)
class WSquare(LayerRule):
    """Shares relevance by the squares of the weights, independent of the inputs.

    Args:
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import WSquare
        >>> WSquare()
        WSquare(stabilizer=1e-06)
    """

    stabilizer: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        total, adjoint = layer.run([torch.ones_like(x) for x in layer.inputs], torch.square)
        return adjoint(above / stabilized(total, self.stabilizer))


@dataclass(frozen=True)
class Flat(LayerRule):
    """Shares relevance evenly among all inputs of a result.

    Args:
        stabilizer: added to the denominator.

    Example:
        >>> from pyfast_xai.rules.relevance import Flat
        >>> Flat()
        Flat(stabilizer=1e-06)
    """

    stabilizer: Stabilizer = 1e-6

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        total, adjoint = layer.run([torch.ones_like(x) for x in layer.inputs], torch.ones_like, bias=False)
        return adjoint(above / stabilized(total, self.stabilizer))


@dataclass(frozen=True)
class Pass(LayerRule):
    """Leaves relevance where it is.

    Example:
        >>> from pyfast_xai.rules.relevance import Pass
        >>> Pass()
        Pass()
    """

    folds = False
    leaves = True

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        first, *others = layer.inputs
        if above[0].numel() < first.numel():
            raise InputError(
                f"composite must give {layer.name!r} another rule than Pass: it makes {list(above.shape[1:])} of "
                f"{list(first.shape)}"
            )
        return [
            above,
            *(
                torch.zeros((), dtype=above.dtype, device=above.device).expand(len(above), *other.shape)
                for other in others
            ),
        ]


@dataclass(frozen=True)
class Gradient(LayerRule):
    """Sends back what the gradient would be.

    Example:
        >>> from pyfast_xai.rules.relevance import Gradient
        >>> Gradient()
        Gradient()
    """

    folds = False

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        return layer.run(layer.inputs)[1](above)


@dataclass(frozen=True)
class Bilinear(LayerRule):
    """Gives both factors of a product a share, and shares that by contributions.

    Of attention the factors are the attention weights and the values. With `first=0` the attention weights are taken
    for constants and all relevance goes to the values, the rule of Ali et al. (XAI for transformers, 2022).

    Args:
        first: the share of the first factor.
        stabilizer: added to the denominator.
        softmax: the rule of the softmax inside fused attention; None for `Taylor`.

    Example:
        >>> from pyfast_xai.rules.relevance import Bilinear
        >>> Bilinear(first=0)
        Bilinear(first=0, stabilizer=1e-06, softmax=None)
    """

    first: float = 0.5
    stabilizer: Stabilizer = 1e-6
    softmax: LayerRule | None = None

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        result, adjoint = layer.run(layer.inputs)
        shares = times(layer.inputs, adjoint(above / stabilized(result, self.stabilizer)))
        if len(shares) == 1:
            return shares
        return [shares[0] * self.first, shares[1] * (1 - self.first)]


@dataclass(frozen=True)
class Taylor(LayerRule):
    """Shares the relevance of a softmax s by its expansion at the inputs, `x_i (R_i - s_i sum_j R_j)`.

    The rest stays with the constant of the expansion: relevance is not conserved.

    Example:
        >>> from pyfast_xai.rules.relevance import Taylor
        >>> Taylor()
        Taylor()
    """

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        result, adjoint = layer.run(layer.inputs)
        # The derivative of s_j by x_i over s_j is `[i = j] - s_i`.
        share = torch.where(result != 0, above / result, 0)
        # Masked entries are -inf, and have no relevance.
        return [
            torch.where(torch.isfinite(x), x * gradient, 0)
            for x, gradient in zip(layer.inputs, adjoint(share), strict=True)
        ]


@dataclass(frozen=True)
class Gate(LayerRule):
    """Gives the relevance of a product to the larger factor, which the other gates; half each to two of one size.

    Example:
        >>> from pyfast_xai.rules.relevance import Gate
        >>> Gate()
        Gate()
    """

    def relevance(self, layer: OperationMap, above: Tensor) -> list[Tensor]:
        """See `LayerRule.relevance`."""
        first, second = layer.values
        share = 0.5 if first.numel == second.numel else float(first.numel > second.numel)
        return [above * share, above * (1 - share)]
