"""Faithfulness: the model's output after pixels that a map marks are removed, kept or recoloured.

The model is called as it is, in inference mode and in batches. Results are values for each image; a figure for a data
set is their mean.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.checks import check_classes, check_maps, check_share
from pyfast_xai.metrics.imputation import noisy_linear_imputation
from pyfast_xai.metrics.perturbation import Baseline, Removal, baseline_for, check_step, ranks_of, versions_of
from pyfast_xai.metrics.scorer import Scorer

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
SWAPS = ((2, 0, 1), (1, 2, 0))
"""The labels that survive other colours.
permute three channels, and the only ones that leave none as it was."""


class Curve(NamedTuple):
    """Score of a class while features change, in the order of their attributions.

    Attributes:
        scores: float32 `[R, S + 1]`, before any and after each of S steps.
        auc: area under each curve, float32 `[R]`.
        changed: share of the features that have changed at each score, float32 `[S + 1]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> curve = metrics.deletion(demo.load(), torch.rand(2, 3, 96, 96), torch.rand(2, 96, 96), target=3, step=2304)
        >>> curve.scores.shape, curve.auc.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """

    scores: Tensor
    auc: Tensor
    changed: Tensor


def deletion(
    model: nn.Module,
    images: Tensor,
    heatmaps: Tensor,
    target: Target = None,
    *,
    step: int | None = None,
    baseline: Baseline = "zero",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Curve:
    """Measures the probability of a class while the hottest pixels are deleted; low areas are good (RISE, 2018).

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        heatmaps: one for each image and target, image by image, `[R, H, W]`; of equal values the first in reading
            order is the hotter one. Of attributions `[R, C, H, W]` every number changes by itself.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        step: pixels that change at a time, in all channels; None for a 28th of them, RISE's 1792 of 224 x 224.
        baseline: the values that pixels get: "zero", "mean" (of each channel of the image), "blur" (a Gaussian of 11
            pixels and sigma 5), a tensor that broadcasts to the images, or a function of them.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which scores depend, see `Explainer`.

    Raises:
        InputError: maps of another size or with NaN, or images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.deletion(model, images, Saliency(model)(images).heatmap, step=2304).auc.shape
        torch.Size([2])
    """
    removal = Removal(model, images, heatmaps, target, baseline, "probability", batch_size, outputs, name="heatmaps")
    return curve(removal, step)


def insertion(
    model: nn.Module,
    images: Tensor,
    heatmaps: Tensor,
    target: Target = None,
    *,
    step: int | None = None,
    baseline: Baseline = "blur",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Curve:
    """Measures the probability of a class while the hottest pixels are inserted; high areas are good (RISE, 2018).

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        heatmaps: one for each image and target, see `deletion`.
        target: None for the class with the largest output for the whole image, an int for all, N ints or `[N, K]` ints.
        step: pixels that change at a time, see `deletion`.
        baseline: what the images start as, see `deletion`; RISE blurs them.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which scores depend, see `Explainer`.

    Raises:
        InputError: maps of another size or with NaN, or images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.insertion(model, images, Saliency(model)(images).heatmap, step=2304).auc.shape
        torch.Size([2])
    """
    removal = Removal(model, images, heatmaps, target, baseline, "probability", batch_size, outputs, name="heatmaps")
    return curve(removal, step, insert=True)


def auc(scores: Tensor) -> Tensor:
    """Returns the area under curves `[..., S + 1]` over 0..1 by the trapezoid rule, as in RISE's evaluator.

    Steps count alike, also a last one that changes fewer pixels.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.auc(torch.tensor([[1.0, 0.5, 0.0]]))
        tensor([0.5000])
    """
    if scores.shape[-1] < 2:
        raise InputError(f"scores must hold at least two points, got {scores.shape[-1]}")
    return (scores.sum(-1) - scores[..., 0] / 2 - scores[..., -1] / 2) / (scores.shape[-1] - 1)


def curve(removal: Removal, step: int | None, *, insert: bool = False) -> Curve:
    """Returns the scores while features are removed, or come back, in the order of their attributions."""
    features = removal.values.shape[1]
    step = check_step(step, features)
    steps = math.ceil(features / step)
    ranks = removal.ranks()

    def removed(rows: Tensor, done: Tensor) -> Tensor:
        changed = ranks[rows] < (done * step)[:, None]
        return ~changed if insert else changed

    scores = removal.by_row(removed, steps + 1)
    share = (torch.arange(steps + 1, device=scores.device) * step).clamp(max=features) / features
    return Curve(scores, auc(scores), share)


class DropIncrease(NamedTuple):
    """The probability lost, and whether it rises, when the model sees only what the map shows.

    Attributes:
        drop: share of the probability that is lost, 0 where none is, float32 `[N]`; its mean is the average drop.
        increase: whether the probability rises, bool `[N]`; its mean is the average increase (in confidence).

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> result = metrics.drop_increase(demo.load(), torch.rand(2, 3, 96, 96), torch.ones(2, 96, 96))
        >>> result.drop.shape, result.increase.dtype
        (torch.Size([2]), torch.bool)
    """

    drop: Tensor
    increase: Tensor


def drop_increase(
    model: nn.Module,
    images: Tensor,
    heatmaps: Tensor,
    target: Target = None,
    *,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> DropIncrease:
    """Measures the average drop and increase in confidence (Chattopadhay et al., Grad-CAM++, 2018).

    The image is multiplied by its map, stretched to 0..1, after normalisation; pixels that the map leaves out become
    the colour that the model sees as zero.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        heatmaps: `[N, H, W]`.
        target: None for the class with the largest output, an int for all, or one an image.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which scores depend, see `Explainer`.

    Raises:
        InputError: maps of another size or with NaN, or images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> drop, increase = metrics.drop_increase(model, images, GradCAM(model)(images).heatmap)
        >>> drop.shape
        torch.Size([2])
    """
    before, after = masked_scores(model, images, heatmaps, target, batch_size, outputs)
    lost = (before - after).clamp_min(0) / before.abs()
    return DropIncrease(lost.nan_to_num(nan=0.0), after > before)


def masked_scores(
    model: nn.Module, images: Tensor, heatmaps: Tensor, target: Target, batch_size: int, outputs: Outputs
) -> tuple[Tensor, Tensor]:
    """Returns the scores of images, and those of images times their maps stretched to 0..1, float32 `[N]` each."""
    scorer = Scorer(model, images, target, batch_size, outputs)
    maps = render.normalize(check_maps(heatmaps, images)).to(images.dtype)
    return scorer.score, scorer(images.detach() * maps[:, None], torch.arange(len(images), device=images.device))


class Road(NamedTuple):
    """Change of the probability when pixels are made unremarkable.

    Attributes:
        most: scores without the most relevant pixels, float32 `[N, P]`; the lower the better.
        least: scores without the least relevant ones, float32 `[N, P]`; the higher the better.
        combined: half the difference, mean over percentiles, float32 `[N]`; the higher the better.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> road = metrics.road(demo.load(), torch.rand(1, 3, 96, 96), torch.rand(1, 96, 96), percentiles=[50])
        >>> road.combined.shape
        torch.Size([1])
    """

    most: Tensor
    least: Tensor
    combined: Tensor


def road(
    model: nn.Module,
    images: Tensor,
    heatmaps: Tensor,
    target: Target = None,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Road:
    """Computes ROAD, remove and debias (Rong et al., 2022): pixels are imputed from their neighbours.

    A deleted pixel betrays its place; one that is imputed by `noisy_linear_imputation` does not. Numbers are those of
    pytorch-grad-cam's ROADMostRelevantFirst, ROADLeastRelevantFirst and ROADCombined on the softmax of the class.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        heatmaps: `[N, H, W]`; of equal values the first in reading order is the more relevant one.
        target: None for the class with the largest output, an int for all, or one an image.
        percentiles: percentiles of each map, between 0 and 100; pixels at and above are removed (for `least`, as many
            of the lowest).
        noise: standard deviation of what is added to imputed pixels, in units of the images.
        seed: seed of that noise, which is the same for every image.
        batch_size: images at once, for the model and the imputation.
        outputs: the kind of the model's outputs, on which scores depend, see `Explainer`.

    Raises:
        InputError: maps of another size or with NaN, or images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(1, 3, 96, 96)
        >>> most, least, combined = metrics.road(model, images, GradCAM(model)(images).heatmap, percentiles=[50])
        >>> torch.allclose(combined, (least - most) / 2)
        True
    """
    scorer = Scorer(model, images, target, batch_size, outputs)
    maps = check_maps(heatmaps, images)
    order = ranks_of(maps.flatten(1)).view(maps.shape)
    for percentile in percentiles:
        if not 0 < percentile < 100:
            raise InputError(f"percentiles must lie between 0 and 100, got {percentile}")
    if not len(percentiles):
        raise InputError("percentiles must hold at least one, got none")
    pixels, levels = order[0].numel(), len(percentiles)
    # NumPy's percentile lies among sorted values at (n - 1) p / 100; rounded, since 9.000001 of 10 is nine.
    counts = [max(1, math.ceil(round((pixels - 1) * p / 100, 6))) for p in percentiles]
    limit = torch.tensor([*(pixels - k for k in counts), *counts], device=order.device)
    changes = []
    for image, version in versions_of(len(order), 2 * levels, batch_size, order.device):
        limits, ranks = limit[version][:, None, None], order[image]
        missing = torch.where((version < levels)[:, None, None], ranks < limits, ranks >= limits)
        imputed = noisy_linear_imputation(images[image], missing, noise=noise, seed=seed)
        changes.append(scorer(imputed, image) - scorer.score[image])
    most, least = torch.cat(changes).view(len(order), 2, levels).unbind(1)
    return Road(most, least, (least - most).mean(1) / 2)


class ColorSwap(NamedTuple):
    """The labels that survive other colours.

    Attributes:
        unchanged: whether the class stays, bool `[N, S]`.
        correct: whether the image was right before, bool `[N]`; all are where no labels were given.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> result = metrics.color_swap(demo.load(), torch.rand(2, 3, 96, 96))
        >>> result.unchanged.shape, result.correct
        (torch.Size([2, 2]), tensor([True, True]))
    """

    unchanged: Tensor
    correct: Tensor

    @property
    def share(self) -> Tensor:
        """Returns the share of the correct images that stay correct, the mean over swaps; NaN if none was correct."""
        return self.unchanged[self.correct].float().mean()


def color_swap(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    swaps: Sequence[Sequence[int]] = SWAPS,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
) -> ColorSwap:
    """Measures whether a class depends on colour: swaps channels and runs the model again (FGVis, section 4.3).

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        labels: right class of each image, int `[N]`: images that are wrong to begin with do not count. None asks
            whether the predicted class stays.
        swaps: for each, which channel goes where. The paper's BGR to RBG and BGR to GRB, which are the two rotations in
            any order of channels: no channel keeps its place.
        mean: mean of the normalisation, one a channel, so that colours are swapped and not normalised values.
        std: likewise.
        batch_size: images the model is given at once.

    Raises:
        InputError: a swap that is none, or images or labels that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> metrics.color_swap(demo.load(), torch.rand(2, 3, 96, 96), labels=torch.tensor([3, 7])).unchanged.shape
        torch.Size([2, 2])
    """
    scorer = Scorer(model, images, None, batch_size)
    channels, images = images.shape[1], images.detach()
    for swap in swaps:
        if sorted(swap) != list(range(channels)):
            raise InputError(f"swaps must each hold the channels 0..{channels - 1} once, got {tuple(swap)}")
    if not len(swaps):
        raise InputError("swaps must hold at least one, got none")
    shift = _per_channel(mean, images, "mean", 0.0)
    scale = _per_channel(std, images, "std", 1.0)
    right = scorer.target if labels is None else check_classes(labels, len(images), "labels").to(images.device)
    colors = images * scale + shift
    unchanged = [scorer.outputs((colors[:, list(swap)] - shift) / scale).argmax(1) == right for swap in swaps]
    return ColorSwap(torch.stack(unchanged, 1), scorer.target == right)


def _per_channel(values: Sequence[float] | None, images: Tensor, name: str, default: float) -> Tensor:
    values = [default] * images.shape[1] if values is None else values
    if len(values) != images.shape[1]:
        raise InputError(f"{name} must hold one number for each of {images.shape[1]} channels, got {len(values)}")
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)


class StrongFeatures(NamedTuple):
    """The images that are classified correctly, bool `[N]` for each kind of input; the means are accuracies.

    Attributes:
        full: as they are.
        only: with nothing but their strong features.
        without: without them.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> images, labels = torch.rand(2, 3, 96, 96), torch.tensor([3, 7])
        >>> result = metrics.strong_features(demo.load(), images, torch.rand(2, 96, 96), labels)
        >>> result.full.shape, result.only.dtype
        (torch.Size([2]), torch.bool)
    """

    full: Tensor
    only: Tensor
    without: Tensor


def strong_features(
    model: nn.Module,
    images: Tensor,
    responses: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.5,
    dilation: int = 0,
    fill: float | Tensor = 0.0,
    batch_size: int = 64,
) -> StrongFeatures:
    """Measures the accuracy on the strong features of a class, and on the rest (CLEAR, Table 1).

    Which response is strong, and how far around it pixels are taken, the paper does not say.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        responses: to the right class, `[N, H, W]`.
        labels: right class of each image, int `[N]`.
        threshold: least response of a strong feature, as a share of the largest; only positive ones count.
        dilation: pixels around a strong feature that belong to it.
        fill: what other pixels become, broadcast to the images: the background (MNIST) or grey (SVHN) in the paper.
        batch_size: images the model is given at once.

    Raises:
        InputError: responses of another size or with NaN, or images or labels that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images, labels = demo.load(), torch.rand(2, 3, 96, 96), torch.tensor([3, 7])
        >>> full, only, without = metrics.strong_features(model, images, GradCAM(model)(images, labels).heatmap, labels)
        >>> full.shape, full.dtype
        (torch.Size([2]), torch.bool)
    """
    check_share(threshold, "threshold")
    if dilation < 0:
        raise InputError(f"dilation must not be negative, got {dilation}")
    scorer = Scorer(model, images, None, batch_size)
    maps = check_maps(responses, images, "responses")
    labels = check_classes(labels, len(images), "labels", scorer.columns.shape[1]).to(images.device)
    strong = (maps >= threshold * maps.amax((1, 2), keepdim=True)) & (maps > 0)
    if dilation:
        size = 2 * dilation + 1
        strong = functional.max_pool2d(strong[:, None].float(), size, 1, dilation)[:, 0] > 0
    images = images.detach()
    filled = baseline_for(images, fill if isinstance(fill, Tensor) else torch.tensor(fill), "fill")
    only = torch.where(strong[:, None], images, filled)
    without = torch.where(strong[:, None], filled, images)
    return StrongFeatures(
        scorer.target == labels,
        scorer.outputs(only).argmax(1) == labels,
        scorer.outputs(without).argmax(1) == labels,
    )
