"""HSIC attribution (Novello, Fel and Vigouroux, 2022): how much the score depends on the presence of a feature."""

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.feature_explainer import Coalitions, FeaturePerturbation, FeatureSettings, Values


class HSIC(FeaturePerturbation):
    """Dependence of the score on the presence of each feature (Novello et al., 2022, Eq. 3).

    The measure is the Hilbert-Schmidt independence criterion, `tr(K H L H) / (n - 1)^2`, of the Dirac kernel K on
    presence and a Gaussian kernel L on scores, whose width is the median score, as in the authors' code. Of the samples
    each feature is present in half (a Latin hypercube); images with as many features, and all targets, share them.

    Args:
        model: in evaluation mode.
        n_samples: n, an even number.
        **settings: those of `FeaturePerturbation`; by default features are the cells of a grid of 8 x 8.

    An explanation has the fields of that of `FeatureAblation`. Values are not negative: they say that a feature
    matters, not which way.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import HSIC, demo
        >>> explanation = HSIC(demo.load(), feature_mask=4, n_samples=32)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.values.shape
        torch.Size([1, 16])
    """

    method = "hsic"
    paper = (
        "Making sense of dependence: efficient black-box explanations using dependence measure "
        "(Novello, Fel and Vigouroux, 2022)"
    )
    default_feature_mask = 8

    def __init__(self, model: nn.Module, *, n_samples: int = 500, **settings: Unpack[FeatureSettings]) -> None:
        super().__init__(model, **settings)
        self.n_samples = at_least(2, "n_samples", n_samples)

    def _coalitions(self, features: int) -> Coalitions:
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(self.n_samples, generator=generator) for _ in range(features)]
        present = torch.stack(orders, 1) < self.n_samples // 2
        return Coalitions(self.n_samples, present.__getitem__)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        present = coalitions.rows(torch.arange(coalitions.samples)).double()
        values = []
        for scores in after.T:
            width = scores.quantile(0.5).abs().clamp_min(torch.finfo(scores.dtype).tiny ** 0.25)
            kernel = (-0.5 * ((scores[:, None] - scores) / width).square()).exp()
            centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
            # The Dirac kernel of x is x x' + (1 - x)(1 - x'), and rows of the centred kernel add up to zero.
            values.append(2 * ((centred @ present) * present).sum(0) / (self.n_samples - 1) ** 2)
        return Values(torch.stack(values))
