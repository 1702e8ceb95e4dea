"""Feature ablation and permutation: how far the score drops where a feature has another value."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.feature_explainer import Coalitions, FeaturePerturbation, FeatureSettings, Values
from pyfast_xai.explainers.common.feature_masks import Features


class FeatureAblation(FeaturePerturbation):
    """Drop of the score where one feature is replaced by the baseline (Zeiler and Fergus, 2014, with any features).

    Of N images with F features, N F changed images go through the model, `batch_size` at a time. The drops are those
    of Captum's class of this name.

    Args:
        model: in evaluation mode.
        **settings: those of `FeaturePerturbation`; by default features are the cells of a grid of 7 x 7.

    An explanation has `values`, the drop for each feature, `[N, F]`; `attribution`, the same at the places of the
    features, `[N, C, H, W]`; `signed_map`, its mean over the channels, `[N, H, W]`; `heatmap`, the positive part; and
    `feature_mask`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import FeatureAblation, demo
        >>> explanation = FeatureAblation(demo.load(), feature_mask=4)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.values.shape, explanation.heatmap.shape
        (torch.Size([1, 16]), torch.Size([1, 96, 96]))
    """

    method = "feature-ablation"
    paper = "Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014)"

    def __init__(self, model: nn.Module, **settings: Unpack[FeatureSettings]) -> None:
        super().__init__(model, **settings)

    def _coalitions(self, features: int) -> Coalitions:
        return all_but_one(features, features)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        return Values((before - after).T)


class FeaturePermutation(FeaturePerturbation):
    """Mean drop of the score where a feature is that of another image (Breiman, 2001; Fisher et al., 2019).

    Features are pixels at the same place of the other image, so that masks should be those of places. In random order,
    an image takes the feature of the one behind it, then of the second behind it, and so on: `n_permutations` of one
    less than the number of images is the mean over all pairs (Fisher et al., 2019, Eq. 3).

    Args:
        model: in evaluation mode.
        n_permutations: other images that each image takes a feature of, one after the other.
        references: the other images, `[R, C, H, W]`; None for those of the call, of which there must be two, and on
            which explanations then depend.
        **settings: those of `FeaturePerturbation`, of which `baseline` and `blur` do nothing; by default features are
            the cells of a grid of 7 x 7.

    An explanation has the fields of that of `FeatureAblation`.

    Raises:
        InputError: a setting that does not exist, or fewer other images than `n_permutations`.

    Example:
        >>> import torch
        >>> from pyfast_xai import FeaturePermutation, demo
        >>> explanation = FeaturePermutation(demo.load(), feature_mask=4)(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.values.shape
        torch.Size([2, 16])
    """

    method = "feature-permutation"
    paper = "Random forests (Breiman, 2001)"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_permutations: int = 1,
        references: Tensor | None = None,
        **settings: Unpack[FeatureSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.n_permutations = at_least(1, "n_permutations", n_permutations)
        self.references = references

    def _coalitions(self, features: int) -> Coalitions:
        return all_but_one(features, features * self.n_permutations)

    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        drops = (before - after).view(self.n_permutations, -1, len(before))
        return Values(drops.mean(0).T)

    def _hidden(self, images: Tensor, features: Features) -> Callable[[int, Tensor], Tensor]:
        others = images if self.references is None else self.references.to(images)
        if others.shape[1:] != images.shape[1:]:
            raise InputError(
                f"references must have shape [R, {', '.join(map(str, images.shape[1:]))}], got {list(others.shape)}"
            )
        count = len(others) - (self.references is None)
        if count < self.n_permutations:
            raise InputError(
                f"images must have {self.n_permutations} others for n_permutations={self.n_permutations}, got {count}"
            )
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.seed))
        place = order.argsort()

        def hidden(n: int, samples: Tensor) -> Tensor:
            turn = samples.div(features.counts[n], rounding_mode="floor")
            start = int(place[n]) + 1 if self.references is None else 0
            return others[order[(start + turn) % len(others)].to(others.device)]

        return hidden


def all_but_one(features: int, samples: int) -> Coalitions:
    """Returns samples that lack the first feature, the second and so on, and then the first again."""

    def rows(numbers: Tensor) -> Tensor:
        present = torch.ones(len(numbers), features, dtype=torch.bool)
        present[torch.arange(len(numbers)), numbers % features] = False
        return present

    return Coalitions(samples, rows)
