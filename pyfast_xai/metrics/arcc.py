"""ARCC and ADCC: the coherency, the complexity and the faithfulness of a map in one number."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyfast_xai import render
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.checks import check_maps
from pyfast_xai.metrics.explain import Explain, maps_of
from pyfast_xai.metrics.faithfulness import drop_increase, road
from pyfast_xai.metrics.scorer import Scorer
from pyfast_xai.metrics.similarity import correlation


class Arcc(NamedTuple):
    """The harmonic mean of three properties of a map, float32 `[N]` each.

    Attributes:
        score: the mean, in 0..1; high is good.
        coherency: correlation of the map with that of the image times the map, moved to 0..1; high is good.
        complexity: mean of the map, stretched to 0..1; low is good.
        faithfulness: twice ROAD, or 1 less the average drop, in 0..1; high is good.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> explain = GradCAM(model)
        >>> metrics.arcc(model, explain, images, explain(images).heatmap).coherency.shape
        torch.Size([2])
    """

    score: Tensor
    coherency: Tensor
    complexity: Tensor
    faithfulness: Tensor


def arcc(
    model: nn.Module,
    explain: Explain,
    images: Tensor,
    heatmaps: Tensor,
    target: Target = None,
    *,
    percentiles: Sequence[float] = (20, 40, 60, 80),
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Arcc:
    """Measures coherency, complexity and ROAD, and their harmonic mean (ARCC, as in pytorch-grad-cam).

    Without percentiles the average drop takes the place of ROAD: the ADCC of Poppi et al. (2021). It costs an
    explanation and two forwards an image, and two more for each percentile.

    Args:
        model: in evaluation mode.
        explain: the method, which explains the image times its map once more.
        images: `[N, C, H, W]`, as the model takes them.
        heatmaps: `[N, H, W]`.
        target: None for the class with the largest output, an int for all, or one an image.
        percentiles: percentiles of ROAD; none for ADCC.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which scores depend, see `Explainer`.

    Raises:
        InputError: maps of another size or with NaN, or images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> explain = GradCAM(model)
        >>> metrics.arcc(model, explain, images, explain(images).heatmap).score.shape
        torch.Size([2])
    """
    scorer = Scorer(model, images, target, batch_size, outputs)
    maps = render.normalize(check_maps(heatmaps, images))
    mixed = maps_of(explain(images.detach() * maps[:, None].to(images.dtype), scorer.target), images)
    coherency = (correlation(mixed, maps) + 1) / 2
    complexity = maps.mean((1, 2))
    if len(percentiles):
        twice = (
            2
            * road(
                model, images, maps, scorer.target, percentiles=percentiles, batch_size=batch_size, outputs=outputs
            ).combined
        )
        faithfulness = twice.clamp(0, 1)
    else:
        dropped = drop_increase(model, images, maps, scorer.target, batch_size=batch_size, outputs=outputs).drop
        faithfulness = 1 - dropped.clamp_max(1)
    parts = torch.stack([coherency, 1 - complexity, faithfulness]).double()
    score = torch.where((parts > 0).all(0), 3 / (1 / parts).sum(0), 0.0)
    return Arcc(score.float(), coherency.float(), complexity.float(), faithfulness.float())
