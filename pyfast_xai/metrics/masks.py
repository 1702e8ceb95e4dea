"""Localisation by masks: how much of a map lies on the object. An image without an object has no value, NaN."""

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.metrics.checks import check_maps, check_masks
from pyfast_xai.metrics.perturbation import ranks_of
from pyfast_xai.metrics.similarity import ranks


def relevance_mass(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Returns the share of a map's sum that lies on the object (relevance mass accuracy, Arras et al., 2022).

    Args:
        heatmaps: `[N, H, W]`; negative values count as they are.
        masks: the object, bool `[N, H, W]`.

    Returns:
        float32 `[N]`, in 0..1 for maps without negative values; NaN without an object or where the map sums to 0.

    Raises:
        InputError: other shapes or dtypes, or NaN.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.relevance_mass(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.7500])
    """
    maps, inside = _flat(heatmaps, masks)
    return _nan_without_mask((maps * inside).sum(1) / maps.sum(1), inside)


def relevance_rank(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Returns the share of the hottest pixels, as many as the object has, that lie on it (Arras et al., 2022).

    Args:
        heatmaps: `[N, H, W]`; of equal values the first in reading order is the hotter one.
        masks: the object, bool `[N, H, W]`.

    Returns:
        float32 `[N]`, in 0..1; NaN without an object.

    Raises:
        InputError: other shapes or dtypes, or NaN.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.relevance_rank(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[True, True, False]]]))
        tensor([0.5000])
    """
    maps, inside = _flat(heatmaps, masks)
    size = inside.sum(1, keepdim=True)
    return _nan_without_mask(((ranks_of(maps) < size) & inside).sum(1) / size[:, 0], inside)


def top_k_intersection(heatmaps: Tensor, masks: Tensor, *, k: int = 1000, by_size: bool = False) -> Tensor:
    """Returns the share of the k hottest pixels that lie on the object (Theiner et al., 2021).

    Args:
        heatmaps: `[N, H, W]`; of equal values the first in reading order is the hotter one.
        masks: the object, bool `[N, H, W]`.
        k: pixels, at most those of the map.
        by_size: whether to divide by the object's share of the image (the concept influence of the paper): 1 is then
            what chance gives.

    Returns:
        float32 `[N]`; NaN without an object.

    Raises:
        InputError: other shapes or dtypes, NaN, or another k.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.top_k_intersection(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[True, True, False]]]), k=2)
        tensor([0.5000])
    """
    maps, inside = _flat(heatmaps, masks)
    if not 1 <= k <= maps.shape[1]:
        raise InputError(f"k must lie in [1, {maps.shape[1]}], the pixels of a map, got {k}")
    share = ((ranks_of(maps) < k) & inside).sum(1) / k
    return _nan_without_mask(share * maps.shape[1] / inside.sum(1) if by_size else share, inside)


def attribution_localization(heatmaps: Tensor, masks: Tensor, *, weighted: bool = False) -> Tensor:
    """Returns the share of the positive relevance that lies on the object (Kohlbrenner et al., 2020).

    With a mask of the quadrants of a mosaic that show the class, this is the Focus of Arias-Duart et al. (2022).

    Args:
        heatmaps: `[N, H, W]`; negative values count as 0.
        masks: the object, bool `[N, H, W]`.
        weighted: whether to divide by the object's share of the image, so that large objects, which any map hits, count
            less: 1 is then what an even map gets (the weighted ratio of the paper; Quantus multiplies instead).

    Returns:
        float32 `[N]`; NaN without an object, 0 for a map without positive values.

    Raises:
        InputError: other shapes or dtypes, or NaN.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.attribution_localization(torch.tensor([[[3.0, 1.0, -4.0]]]), torch.tensor([[[True, False, False]]]))
        tensor([0.7500])
    """
    maps, inside = _flat(heatmaps, masks)
    positive = maps.clamp_min(0)
    total = positive.sum(1)
    share = (positive * inside).sum(1) / torch.where(total > 0, total, 1)
    return _nan_without_mask(share * maps.shape[1] / inside.sum(1) if weighted else share, inside)


def mask_auc(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Returns the area under the ROC curve of pixels: the chance that one of the object is hotter than one that is not.

    Args:
        heatmaps: `[N, H, W]`; ties count half.
        masks: the object, bool `[N, H, W]`.

    Returns:
        float32 `[N]`, in 0..1, 0.5 for chance; NaN where the object is nowhere or everywhere.

    Raises:
        InputError: other shapes or dtypes, or NaN.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.mask_auc(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[True, True, False]]]))
        tensor([0.5000])
    """
    maps, inside = _flat(heatmaps, masks)
    count = maps.shape[1]
    size = inside.sum(1).double()
    place = (ranks(maps.double()) * count + count - 1) / 2  # of pixels in ascending order, from 0
    area = ((place * inside).sum(1) - size * (size - 1) / 2) / (size * (count - size))
    return area.to(maps.dtype)


def _flat(heatmaps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    maps = check_maps(heatmaps)
    return maps.flatten(1), check_masks(masks, maps).flatten(1)


def _nan_without_mask(values: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside.any(1), values, torch.nan)
