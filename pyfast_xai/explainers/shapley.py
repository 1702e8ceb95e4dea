"""Shapley values of features: exact, by samples of permutations, and by regression (Kernel SHAP)."""

import itertools
import math

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.feature_explainer import Coalitions, FeaturePerturbation, FeatureSettings, Values

MAX_EXACT = 20  # features: more than a million forward passes an image


class ShapleyValues(FeaturePerturbation):
    """Exact Shapley values of few features, from the scores of all their subsets (Shapley, 1953).

    A feature's value is the mean, over all orders in which features join, of what it adds to the score. Each of the
    2^F subsets is asked once, so that F features need 2^F forwards, and not F for each of F! orders. Values add up to
    the score of the image less that of the baseline.

    Args:
        model: in evaluation mode.
        **settings: those of `FeaturePerturbation`; by default features are the cells of a grid of 3 x 3.

    An explanation has the fields of that of `FeatureAblation`.

    Raises:
        InputError: a setting that does not exist, or more than 20 features.

    Example:
        >>> import torch
        >>> from pyfast_xai import ShapleyValues, demo
        >>> explanation = ShapleyValues(demo.load(), feature_mask=2)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.values.shape
        torch.Size([1, 4])
    """

    method = "shapley-values"
    paper = "A value for n-person games (Shapley, 1953)"
    default_feature_mask = 3

    def __init__(self, model: nn.Module, **settings: Unpack[FeatureSettings]) -> None:
        super().__init__(model, **settings)

    def _coalitions(self, features: int) -> Coalitions:
        if features > MAX_EXACT:
            raise InputError(
                f"feature_mask must have at most {MAX_EXACT} features for exact Shapley values, got {features}"
            )
        return Coalitions(2**features, lambda numbers: (numbers[:, None] >> torch.arange(features) & 1).bool())

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        numbers = torch.arange(coalitions.samples)
        present = coalitions.rows(numbers)
        features = present.shape[1]
        # The share of the orders in which exactly these features come first, before one more.
        shares = torch.tensor(
            [1 / (features * math.comb(features - 1, size)) for size in range(features)], dtype=torch.float64
        )
        values = torch.empty(features, after.shape[1], dtype=torch.float64)
        for feature in range(features):
            without = numbers[~present[:, feature]]
            weights = shares[present[without].sum(1)]
            values[feature] = weights @ (after[without | 1 << feature] - after[without])
        return Values(values.T)


class ShapleyValueSampling(FeaturePerturbation):
    """Shapley values of features by random orders in which they join (Castro, Gomez and Tejada, 2009).

    A feature's value is the mean, over `n_samples` random orders, of what it adds to the score when it joins those
    before it. The empty and the whole image are asked once, so that F features need `n_samples` (F - 1) + 1 forwards.
    Values add up to the score of the image less that of the baseline.

    Args:
        model: in evaluation mode.
        n_samples: orders; images with as many features share them.
        **settings: those of `FeaturePerturbation`; by default features are the cells of a grid of 7 x 7.

    An explanation has the fields of that of `FeatureAblation`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import ShapleyValueSampling, demo
        >>> explain = ShapleyValueSampling(demo.load(), feature_mask=2, n_samples=5)
        >>> explain(torch.rand(1, 3, 96, 96), target=3).values.shape
        torch.Size([1, 4])
    """

    method = "shapley-value-sampling"
    paper = "Polynomial calculation of the Shapley value based on sampling (Castro, Gomez and Tejada, 2009)"

    def __init__(self, model: nn.Module, *, n_samples: int = 25, **settings: Unpack[FeatureSettings]) -> None:
        super().__init__(model, **settings)
        self.n_samples = at_least(1, "n_samples", n_samples)

    def _coalitions(self, features: int) -> Coalitions:
        joins, steps = self._joins(features), max(1, features - 1)

        def rows(numbers: Tensor) -> Tensor:
            """Returns the empty image, and then, order by order, the first feature, the first two and so on."""
            turn = (numbers - 1).clamp_min(0)
            present = joins[turn.div(steps, rounding_mode="floor")] <= (turn % steps)[:, None]
            return present & (numbers > 0)[:, None]

        return Coalitions(1 + self.n_samples * (features - 1), rows)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        features = 1 + (coalitions.samples - 1) // self.n_samples
        start, stop = (end.expand(self.n_samples, 1, -1) for end in (after[0], before))
        path = torch.cat([start, after[1:].reshape(self.n_samples, features - 1, len(before)), stop], 1)
        joins = self._joins(features)[..., None].expand(-1, -1, len(before))
        return Values(path.diff(dim=1).gather(1, joins).mean(0).T)

    def _joins(self, features: int) -> Tensor:
        """Returns the place of each feature in each order, int64 `[n_samples, F]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack([torch.randperm(features, generator=generator) for _ in range(self.n_samples)])


class KernelShap(FeaturePerturbation):
    """Shapley values of features as the weights of a linear model (Lundberg and Lee, 2017, Theorem 2).

    Scores of samples are fitted by least squares, in which a sample with k of F features weighs
    `(F - 1) / (C(F, k) k (F - k))`, and values add up exactly to the score of the image less that of the baseline. As
    in the authors' code, all subsets of the sizes with the largest weights (1 and F - 1, 2 and F - 2, ...) are asked
    for as long as `n_samples` lasts; the rest is drawn from those that remain, in pairs of a subset and its complement.
    With `n_samples` of 2^F - 2 or more nothing is drawn, and the values are exact.

    Args:
        model: in evaluation mode.
        n_samples: subsets beside the empty and the whole one; images with as many features share them.
        **settings: those of `FeaturePerturbation`; by default features are the cells of a grid of 7 x 7.

    An explanation has the fields of that of `FeatureAblation`.

    Raises:
        InputError: a setting that does not exist, or fewer samples than features.

    Example:
        >>> import torch
        >>> from pyfast_xai import KernelShap, demo
        >>> explanation = KernelShap(demo.load(), feature_mask=4, n_samples=64)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.values.shape
        torch.Size([1, 16])
    """

    method = "kernel-shap"
    paper = "A unified approach to interpreting model predictions (Lundberg and Lee, 2017)"

    def __init__(self, model: nn.Module, *, n_samples: int = 1000, **settings: Unpack[FeatureSettings]) -> None:
        super().__init__(model, **settings)
        self.n_samples = at_least(1, "n_samples", n_samples)

    def _coalitions(self, features: int) -> Coalitions:
        subsets, _ = self._weighted(features)
        present = torch.cat([subsets.new_zeros(1, features), subsets])
        return Coalitions(len(present), present.__getitem__)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        present = coalitions.rows(torch.arange(1, coalitions.samples))
        features, empty = present.shape[1], after[0]
        _, weights = self._weighted(features)
        # Least squares of values whose sum is fixed; the last unknown is its multiplier.
        weighted = (present * weights[:, None]).T
        system = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        system[:-1, :-1] = weighted @ present.double()
        system[-1, :-1] = system[:-1, -1] = 1
        right = torch.cat([weighted @ (after[1:] - empty), (before - empty)[None]])
        return Values(torch.linalg.lstsq(system, right, driver="gelsd").solution[:-1].T)

    def _weighted(self, features: int) -> tuple[Tensor, Tensor]:
        """Returns subsets that are neither empty nor whole, bool `[S, F]`, and their weights, float64 `[S]`."""
        if features > 1 and self.n_samples < min(2 * features, 2**features - 2):
            raise InputError(f"n_samples must be at least {2 * features}, twice the features, got {self.n_samples}")
        # The weight of all subsets of a size and of their complements.
        left = {size: (1 + (2 * size != features)) / (size * (features - size)) for size in range(1, features // 2 + 1)}
        subsets: dict[tuple[int, ...], float] = {}
        while left:
            size, weight = next(iter(left.items()))
            count = math.comb(features, size) * (1 + (2 * size != features))
            if (self.n_samples - len(subsets)) * weight / sum(left.values()) < count * (1 - 1e-8):
                break
            for chosen in itertools.combinations(range(features), size):
                subsets[chosen] = subsets[_complement(chosen, features)] = weight / count
            del left[size]
        if left:
            drawn = self._drawn(features, left, self.n_samples - len(subsets))
            share = sum(left.values()) / sum(drawn.values())
            subsets |= {chosen: count * share for chosen, count in drawn.items()}
        present = torch.zeros(len(subsets), features, dtype=torch.bool)
        for row, chosen in zip(present, subsets, strict=True):
            row[list(chosen)] = True
        return present, torch.tensor(list(subsets.values()), dtype=torch.float64)

    def _drawn(self, features: int, sizes: dict[int, float], count: int) -> dict[tuple[int, ...], int]:
        """Returns how often each of at most `count` different subsets was drawn, always with its complement."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn: dict[tuple[int, ...], int] = {}
        lengths = torch.tensor(list(sizes))[
            torch.multinomial(torch.tensor(list(sizes.values())), 2 * count, True, generator=generator)
        ]
        for size in lengths.tolist():
            chosen = tuple(sorted(torch.randperm(features, generator=generator)[:size].tolist()))
            pair = (chosen, _complement(chosen, features))
            if chosen not in drawn and len(drawn) + 2 > count:
                break
            for one in pair:
                drawn[one] = drawn.get(one, 0) + 1
        return drawn


def _complement(chosen: tuple[int, ...], features: int) -> tuple[int, ...]:
    absent = set(range(features)).difference(chosen)
    return tuple(sorted(absent))
