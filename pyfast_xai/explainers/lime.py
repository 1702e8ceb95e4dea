"""LIME (Ribeiro, Singh and Guestrin, 2016): a linear model of what superpixels do to the score."""

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.feature_explainer import Coalitions, FeaturePerturbation, FeatureSettings, Values
from pyfast_xai.explainers.common.perturbation_explainer import positive


class LIME(FeaturePerturbation):
    """Weights of superpixels in a linear model of the score around the image (Ribeiro et al., 2016).

    Superpixels are left out at random, each with probability one half. A ridge regression of the scores on what was
    left, in which a sample counts the more the nearer it is to the whole image, gives a weight to each superpixel.
    Settings are those of the authors' `lime_image`.

    Args:
        model: in evaluation mode.
        n_samples: number of samples, the first of which is the image itself.
        sampling: "uniform", fair coins whose samples the kernel weighs, or "kernel": samples are drawn as often as the
            kernel would weigh them and count alike (GLIME, Tan et al., 2023). Both have the same limit but for the
            penalty; under a narrow kernel, such as 0.1, where most weights are near zero, these values are steadier.
        kernel_width: width of the exponential kernel on the cosine distance to the image.
        alpha: penalty on the squares of the weights; the intercept has none.
        **settings: those of `FeaturePerturbation`; by default features are superpixels by quickshift, and absent ones
            have their own mean colour.

    An explanation has the fields of that of `FeatureAblation`, where `values` are the weights, and `fit`.

    Raises:
        InputError: a setting that does not exist, or scikit-image is needed and not installed.

    Example:
        >>> import torch
        >>> from pyfast_xai import LIME, demo
        >>> explanation = LIME(demo.load(), feature_mask=4, n_samples=50)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([1, 96, 96])
    """

    method = "lime"
    paper = '"Why should I trust you?": explaining the predictions of any classifier (Ribeiro et al., 2016)'
    default_feature_mask = "quickshift"
    default_baseline = "mean"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_samples: int = 1000,
        sampling: Literal["uniform", "kernel"] = "uniform",
        kernel_width: float = 0.25,
        alpha: float = 1.0,
        **settings: Unpack[FeatureSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.n_samples = at_least(2, "n_samples", n_samples)
        self.sampling = one_of("sampling", sampling, ("uniform", "kernel"))
        self.kernel_width, self.alpha = positive("kernel_width", kernel_width), positive("alpha", alpha)

    def _coalitions(self, features: int) -> Coalitions:
        generator = torch.Generator().manual_seed(self.seed)
        if self.sampling == "kernel":
            present = self._near(features, generator)
        else:
            drawn = [torch.randint(2, (features,), generator=generator) for _ in range(self.n_samples)]
            present = torch.stack(drawn).bool()
        present[0] = True
        return Coalitions(self.n_samples, present.__getitem__)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        present = coalitions.rows(torch.arange(coalitions.samples)).double()
        weights = self._nearness(present.mean(1))
        if self.sampling == "kernel":
            weights = torch.ones_like(weights)
        return ridge_regression(present, after, weights, self.alpha)

    def _nearness(self, share: Tensor) -> Tensor:
        """Returns the weights of samples with some share of the features, by their cosine distance to the image."""
        # The cosine of m ones among n with n ones is the root of m / n.
        distance = 1 - share.sqrt()
        return (-0.5 * (distance / self.kernel_width) ** 2).exp()

    def _near(self, features: int, generator: torch.Generator) -> Tensor:
        """Returns samples bool `[S, F]`, drawn in proportion to the kernel."""
        # The kernel knows only how many features are present: first that number, then which they are.
        count = torch.arange(features + 1, dtype=torch.float64)
        subsets = torch.lgamma(count + 1) + torch.lgamma(features - count + 1)  # one over their number, in logarithms
        chances = self._nearness(count / features).log() - subsets
        sizes = (chances - chances.max()).exp().multinomial(self.n_samples, replacement=True, generator=generator)
        order = torch.rand(self.n_samples, features, generator=generator).argsort(1).argsort(1)
        return order < sizes[:, None]


def ridge_regression(features: Tensor, answers: Tensor, weights: Tensor, alpha: float) -> Values:
    """Returns the weights of features in linear models, and the weighted R squared of these.

    Args:
        features: float64 `[S, F]`; an intercept is added, which has no penalty.
        answers: float64 `[S, K]`, each with a regression of its own.
        weights: weights of the samples, `[S]`.
        alpha: penalty on the squares of the weights.
    """
    features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    weighted = features.T * weights
    gram, product = weighted @ features, weighted @ answers
    penalty = torch.full((len(gram),), alpha, dtype=gram.dtype)
    penalty[-1] = 0
    solution = torch.linalg.solve(gram + penalty.diag(), product)
    residual = weights @ (answers - features @ solution).square()
    mean = product[-1] / gram[-1, -1]
    spread = weights @ (answers - mean).square()
    # Scores that do not change at all are fitted by the intercept.
    tiny = 1e-14 * (weights @ answers.square())
    return Values(solution[:-1].T, torch.where(spread > tiny, 1 - residual / spread, 1.0))
