"""Flipping: the score while regions are removed, the most important first.

`deletion` and `insertion` of pixels are in `faithfulness`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import Score
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.faithfulness import Curve, auc, curve
from pyfast_xai.metrics.perturbation import Baseline, Removal, patches

Order = Literal["morf", "lerf", "random"]
Segments = Tensor | Callable[[Tensor], Tensor]


def pixel_flipping(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    step: int | None = None,
    baseline: Baseline = "zero",
    score: Score = "logit",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Curve:
    """Measures the score of a class while features are flipped, the largest attribution first (Bach et al., 2015).

    It is `deletion` with the output of the model in place of the probability; low areas are good. It costs 29 forwards.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: `[R, H, W]` of pixels, or `[R, C, H, W]`, of which every number is a feature, as in Quantus.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        step: features that change at a time; None for a 28th of all. Quantus takes 1.
        baseline: the values that features get, see `deletion`.
        score: "logit" of the class, or its "probability".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Raises:
        InputError: attributions of another size or with NaN, settings, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import InputXGradient, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.pixel_flipping(model, images, InputXGradient(model)(images).attribution).auc.shape
        torch.Size([2])
    """
    return curve(Removal(model, images, attributions, target, baseline, score, batch_size, outputs), step)


class Regions(NamedTuple):
    """The loss of the score while regions are removed.

    Attributes:
        drops: score before less score after each of L regions, float32 `[R, L]`.
        aopc: area over the perturbation curve, the mean of the drops after 0 to L regions, float32 `[R]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> images, maps = torch.rand(2, 3, 96, 96), torch.rand(2, 96, 96)
        >>> metrics.region_perturbation(demo.load(), images, maps, patch=32, regions=4).drops.shape
        torch.Size([2, 4])
    """

    drops: Tensor
    aopc: Tensor


def region_perturbation(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    patch: int = 8,
    regions: int = 100,
    order: Order = "morf",
    baseline: Baseline = "zero",
    score: Score = "logit",
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Regions:
    """Measures the loss of the score while patches are removed, one after the other (AOPC, Samek et al., 2017).

    High areas are good in the order "morf", low ones in "lerf". It costs `regions` forwards.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: `[R, H, W]` or `[R, C, H, W]`; their sums over patches give the order.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        patch: side of a square patch in pixels; the paper's are 9.
        regions: how many are removed, at most all.
        order: "morf", the most relevant first; "lerf", the least relevant first; or "random".
        baseline: the values that pixels get, see `deletion`; the paper draws them at random.
        score: "logit" of the class, or its "probability".
        seed: seed of the random order.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Raises:
        InputError: attributions of another size or with NaN, settings, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.region_perturbation(model, images, GradCAM(model)(images).heatmap, patch=32).aopc.shape
        torch.Size([2])
    """
    one_of("order", order, ("morf", "lerf", "random"))
    if regions < 1:
        raise InputError(f"regions must be at least 1, got {regions}")
    groups = patches(images, patch)
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs, groups=groups)
    values = removal.values if order == "morf" else -removal.values
    if order == "random":
        values = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).to(values.device)
    drops = removal.before[:, None] - _flipped(removal, values, min(regions, values.shape[1]))[:, 1:]
    return Regions(drops, drops.sum(1) / (drops.shape[1] + 1))


def selectivity(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    patch: int = 8,
    baseline: Baseline = "zero",
    score: Score = "logit",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Curve:
    """Measures the score while all patches are removed, the most relevant first (Montavon et al., 2018).

    Low areas are good. It costs as many forwards as there are patches, 784 for patches of 8 pixels at 224 x 224.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: `[R, H, W]` or `[R, C, H, W]`; their sums over patches give the order.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        patch: side of a square patch in pixels.
        baseline: the values that pixels get, see `deletion`.
        score: "logit" of the class, or its "probability".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Raises:
        InputError: attributions of another size or with NaN, settings, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.selectivity(model, images, GradCAM(model)(images).heatmap, patch=32).auc.shape
        torch.Size([2])
    """
    groups = patches(images, patch)
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs, groups=groups)
    count = removal.values.shape[1]
    scores = _flipped(removal, removal.values, count)
    order = removal.values.argsort(dim=1, descending=True, stable=True)
    share = removal.sizes.gather(1, order).cumsum(1).mean(0) / removal.sizes[0].sum()
    return Curve(scores, auc(scores), torch.cat([share.new_zeros(1), share]))


def irof(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    segments: Segments | int = 16,
    baseline: Baseline = "mean",
    score: Score = "probability",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures the iterative removal of features (IROF, Rieger and Hansen, 2020): the area over the curve of segments.

    Segments are removed one after the other, the one with the largest mean attribution first; the area lies above the
    score as a share of what it was, over the share of the segments, so that 1 is best. Quantus gives the area in units
    of segments and starts after the first.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        segments: integers `[H, W]` or `[N, H, W]`, numbered from 0; a function that gives `[H, W]` for an image
            `[C, H, W]`, for example SLIC of scikit-image as in the paper; or the side of square patches in pixels.
        baseline: the values that segments get, see `deletion`; the paper's is the mean colour.
        score: "probability" of the class, or its "logit".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`.

    Raises:
        InputError: attributions of another size or with NaN, segments, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.irof(model, images, GradCAM(model)(images).heatmap, segments=32).shape
        torch.Size([2])
    """
    groups = _segments(segments, images)
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs, groups=groups)
    used = removal.sizes > 0
    means = torch.where(used, removal.values / removal.sizes.clamp_min(1), -torch.inf)
    # Numbers that an image does not use come last and remove nothing.
    ratio = _flipped(removal, means, means.shape[1]) / removal.before[:, None]
    steps = torch.arange(1, ratio.shape[1], device=ratio.device)
    counted = steps <= used.sum(1, keepdim=True)
    areas = (ratio[:, 1:] + ratio[:, :-1]) / 2
    return 1 - (areas * counted).sum(1) / counted.sum(1)


def _flipped(removal: Removal, values: Tensor, steps: int) -> Tensor:
    """Returns scores before and after each of some groups is removed, the largest value first, `[R, steps + 1]`."""
    ranks = removal.ranks(values)
    return removal.by_row(lambda rows, done: ranks[rows] < done[:, None], steps + 1)


def _segments(segments: Segments | int, images: Tensor) -> Tensor:
    if isinstance(segments, int):
        return patches(images, segments)
    if callable(segments) and not isinstance(segments, Tensor):
        segments = torch.stack([torch.as_tensor(segments(image)) for image in images.detach()])
    shapes = (images.shape[2:], (len(images), *images.shape[2:]))
    if segments.shape not in shapes or segments.is_floating_point() or bool((segments < 0).any()):
        expected = f"integers from 0 of shape {list(shapes[0])} or {list(shapes[1])}"
        raise InputError(f"segments must hold {expected}, got {list(segments.shape)} of {segments.dtype}")
    return segments.long()
