"""Segmenters as classifiers of a region of the image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError


class SegmentationClassifier(nn.Module):
    """A classifier of a region of images, made of a segmenter: a class for each of its classes.

    Of scores `s [N, classes, H, W]` its output `[N, classes]` is the mean over the region,
    `sum_p w_p s_cp / sum_p w_p`. Every explainer takes it, with classes as targets, those that compare classes among
    them (CLEAR, FGVis, Finer-CAM, CNN-Fixations, Consensus). Volumes `[N, classes, D, H, W]` and signals are served in
    the same way.

    Args:
        model: returns scores with a row for each image, alone, in a dict or an object of Transformers (under the names
            "out" or "logits"), or in a tuple or list, whose first tensor of as many dimensions as the images is taken;
            in evaluation mode. It becomes a submodule and is not changed.
        region: weights `[H, W]` of the places that count, bool or floating-point, or a class for every place, integers
            `[H, W]`, of which each class gets its own; None for the whole image. Of another size than the scores it is
            brought to theirs.
        output: entry of a dict, or number of an entry of a tuple, that is taken instead, as "aux".

    Regions that differ by image are an argument of the call, `explainer(images, target, region=regions)` with
    `[N, H, W]`; those of `predicted(images)` are the areas that the model itself gives to each class. A class without a
    place in the region has the score zero.

    A model of one class, `[N, 1, H, W]`, gives single outputs: explain it with `outputs="independent logits"`.

    Raises:
        InputError: a region of another shape; when called, a model that returns nothing of this kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import GradCAM, SegmentationClassifier
        >>> segmenter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
        >>> classifier, images = SegmentationClassifier(segmenter), torch.rand(2, 3, 16, 16)
        >>> GradCAM(classifier)(images, target=3, region=classifier.predicted(images)).heatmap.shape
        torch.Size([2, 16, 16])
    """

    region: Tensor | None

    def __init__(self, model: nn.Module, region: Tensor | None = None, *, output: str | int | None = None) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.training = model.training
        self.register_buffer("region", region, persistent=False)

    def forward(self, images: Tensor, *args: Any, region: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Returns the mean scores over the region, `[N, classes]`.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            *args: further arguments of the model.
            region: `[N, H, W]`, one an image, instead of that of the classifier.
            **kwargs: further keyword arguments of the model.
        """
        scores = self.scores(images, *args, **kwargs)
        chosen = self.region if region is None else region
        if chosen is None:
            return scores.mean(tuple(range(2, scores.dim())))
        weights = _weights(chosen.to(scores.device), scores).flatten(2)
        total = weights.sum(2)
        return (scores.flatten(2) * weights).sum(2) / torch.where(total > 0, total, 1)

    def scores(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the scores of every place, `[N, classes, H, W]`.

        Raises:
            InputError: the model returns nothing of this kind.
        """
        returned = self.model(images, *args, **kwargs)
        scores = returned if self.output is None else _entry(returned, self.output)
        if self.output is None and not isinstance(returned, Tensor):
            scores = _scores(returned, images.dim())
        if not isinstance(scores, Tensor) or scores.dim() != images.dim() or not scores.is_floating_point():
            received = f"{scores.dtype}{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"model must return scores [N, classes, ...] with the axes of the images, got {received}")
        return scores

    @torch.no_grad()
    def predicted(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the class with the largest score at every place, int64 `[N, H, W]`.

        Of a model of one class it is 0 where the score is positive, and -1, no class, elsewhere.
        """
        scores = self.scores(images, *args, **kwargs)
        return (scores[:, 0] > 0).long() - 1 if scores.shape[1] == 1 else scores.argmax(1)


def _entry(returned: Any, name: str | int) -> Any:
    try:
        return returned[name]
    except (KeyError, IndexError, TypeError):
        raise InputError(
            f"output must name an entry of what the model returns, {type(returned).__name__}, got {name!r}"
        ) from None


def _scores(returned: Any, rank: int) -> Any:
    """Returns the scores among several things."""
    for name in ("out", "logits"):
        if isinstance(returned, Mapping) and isinstance(returned.get(name), Tensor):
            return returned[name]
        if isinstance(getattr(returned, name, None), Tensor):
            return getattr(returned, name)
    leaves = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.dim() == rank]
    return leaves[0] if leaves else returned


def _weights(region: Tensor, scores: Tensor) -> Tensor:
    """Returns how much every place counts for every class, `[1 or N, 1 or classes, *size]`."""
    images, classes, *size = scores.shape
    rows = region[None] if region.dim() == len(size) else region
    if rows.dim() != len(size) + 1 or len(rows) not in (1, images):
        raise InputError(
            f"region must have {len(size)} axes as the images do, with one an image in front or without, got "
            f"{list(region.shape)} for {images} images"
        )
    whole = rows[:, None]
    if region.dtype == torch.bool or region.is_floating_point():
        weights = whole.to(scores.dtype)
        return weights if list(whole.shape[2:]) == size else functional.interpolate(weights, size, mode="area")
    if list(whole.shape[2:]) != size:
        whole = functional.interpolate(whole.double(), size, mode="nearest-exact").long()
    numbers = torch.arange(classes, device=scores.device).view(1, -1, *[1] * len(size))
    return (whole == numbers).to(scores.dtype)
