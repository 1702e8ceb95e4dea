"""Sobol attribution (Fel, Cadene et al., 2021): what share of the score's variance each feature has a part in."""

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.feature_explainer import Coalitions, FeaturePerturbation, FeatureSettings, Values


class Sobol(FeaturePerturbation):
    """Total Sobol index of each feature: its share of the score's variance, interactions included (Fel et al., 2021).

    Features are faded by a scrambled Sobol sequence of `n_designs` masks A and as many B, from 0 (the baseline) to 1
    (the image). With C those masks of A in which one feature is that of B, the index is
    `mean((f(A) - f(C))^2) / (2 var f(A))` (Jansen, 1999). The scores of B are not needed, so that an image with F
    features takes `n_designs` (F + 1) forwards; targets share them.

    Args:
        model: in evaluation mode.
        n_designs: masks in A, best a power of two.
        **settings: those of `FeaturePerturbation`; by default features are the cells of a grid of 8 x 8.

    An explanation has the fields of that of `FeatureAblation`. Values are not negative: they say that a feature
    matters, not which way.

    Raises:
        InputError: a setting that does not exist, or more features than the sequence has dimensions for.

    Example:
        >>> import torch
        >>> from pyfast_xai import Sobol, demo
        >>> explanation = Sobol(demo.load(), feature_mask=3, n_designs=4)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.values.shape
        torch.Size([1, 9])
    """

    method = "sobol"
    paper = (
        "Look at the variance! Efficient black-box explanations with Sobol-based sensitivity analysis "
        "(Fel, Cadene et al., 2021)"
    )
    default_feature_mask = 8

    def __init__(self, model: nn.Module, *, n_designs: int = 32, **settings: Unpack[FeatureSettings]) -> None:
        super().__init__(model, **settings)
        self.n_designs = at_least(2, "n_designs", n_designs)

    def _coalitions(self, features: int) -> Coalitions:
        if 2 * features > SobolEngine.MAXDIM:
            raise InputError(f"feature_mask must have at most {SobolEngine.MAXDIM // 2} features, got {features}")
        engine = SobolEngine(2 * features, scramble=True, seed=self.seed)
        a, b = engine.draw(self.n_designs, dtype=torch.float64).split(features, 1)

        def rows(numbers: Tensor) -> Tensor:
            """Returns the masks of A, and then, feature by feature, those of which the feature is that of B."""
            design, feature = numbers % self.n_designs, numbers.div(self.n_designs, rounding_mode="floor") - 1
            return torch.where(feature[:, None] == torch.arange(features), b[design], a[design])

        return Coalitions(self.n_designs * (features + 1), rows)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        first, *others = after.split(self.n_designs)
        variance = first.var(0)
        parts = (torch.stack(others) - first).square().mean(1) / (2 * variance)
        return Values(torch.where(variance > 0, parts, 0).T)
