"""Feature masks: which numbers of an image are hidden and shown together."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.tensors import at_least_float32

SUPERPIXELS = ("quickshift", "slic")
FeatureMask = Literal["quickshift", "slic"] | int | Tensor | Callable[[Tensor], Any]


def check_feature_mask(feature_mask: FeatureMask) -> FeatureMask:
    """Refuses values that cannot be a feature mask.

    Raises:
        InputError: a name that is not known, or a grid without a cell.
    """
    if isinstance(feature_mask, Tensor) or callable(feature_mask):
        return feature_mask
    if isinstance(feature_mask, int):
        return at_least(1, "feature_mask", feature_mask)
    return one_of("feature_mask", feature_mask, SUPERPIXELS)


class Features:
    """Images divided into features.

    Args:
        feature_mask: "quickshift" or "slic", superpixels of scikit-image; an int, the cells along each side of a grid;
            integers `[H, W]`, `[N, H, W]` or `[1 or N, 1 or C, H, W]`, equal where numbers belong together; or a
            function that gives `[H, W]`, or `[1 or C, H, W]`, for an image `[C, H, W]`.
        images: `[N, C, H, W]`.
        n_superpixels: about how many SLIC makes.
        seed: seed of quickshift.

    Attributes:
        mask: the feature of each number, from 0 without a gap in each image, int64 `[N, 1 or C, H, W]`; of volumes and
            signals with their axes.
        counts: the number of features of each image.

    Raises:
        InputError: a mask that does not fit, or scikit-image is needed and not installed.
    """

    def __init__(self, feature_mask: FeatureMask, images: Tensor, n_superpixels: int, seed: int) -> None:
        if isinstance(feature_mask, Tensor):
            made = [_fitting(feature_mask, images)]
        elif isinstance(feature_mask, int):
            made = [_grid(feature_mask, images)]
        elif callable(feature_mask):
            made = [_returned(feature_mask(image), image) for image in images]
        else:
            made = [_superpixels(feature_mask, image, n_superpixels, seed)[None, None] for image in images]
        numbered = [_numbered(mask.to(images.device)) for mask in torch.cat(made)]
        self.mask = torch.stack([mask for mask, _ in numbered]).expand(len(images), *[-1] * (images.dim() - 1))
        counts = [count for _, count in numbered]
        self.counts = counts * len(images) if len(counts) == 1 else counts

    def shown(self, n: int, present: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
        """Returns an image of which some features are present, `[m, C, H, W]`.

        Args:
            n: which of the images.
            present: bool `[m, F]`, or how much of each feature is present, from 0 to 1.
            image: `[C, H, W]`.
            hidden: what the image is where a feature is absent, `[C, H, W]` or `[m, C, H, W]`.
        """
        there = present.to(image.device)[:, self.mask[n]]
        if present.dtype == torch.bool:
            return torch.where(there, image, hidden)
        there = there.to(image.dtype)
        return there * image + (1 - there) * hidden

    def means(self, images: Tensor) -> Tensor:
        """Returns images `[N, C, H, W]` in which every feature has its mean colour."""
        means = []
        for image, mask, count in zip(images, self.mask, self.counts, strict=True):
            where = mask.expand_as(image).flatten(1)
            sums = at_least_float32(image).new_zeros(len(image), count)
            sizes = sums.scatter_add(1, where, torch.ones_like(where, dtype=sums.dtype))
            sums.scatter_add_(1, where, at_least_float32(image).flatten(1))
            means.append((sums / sizes).gather(1, where).view_as(image))
        return torch.stack(means).to(images.dtype)


def _fitting(mask: Tensor, images: Tensor) -> Tensor:
    count, channels, *size = images.shape
    shapes = [[*size], [count, *size], [count, channels, *size]]
    rank = images.dim()
    whole = mask[None] if mask.dim() == rank - 2 else mask
    whole = whole[:, None] if whole.dim() == rank - 1 else whole
    fits = whole.dim() == rank and all(side in (1, full) for side, full in zip(whole.shape, shapes[2], strict=True))
    if not fits or list(whole.shape[2:]) != size:
        raise InputError(
            f"feature_mask must have shape {shapes[0]}, {shapes[1]} or {shapes[2]}, got {list(mask.shape)}"
        )
    return _integers(whole)


def _returned(mask: Any, image: Tensor) -> Tensor:
    made = torch.as_tensor(mask)
    whole = made if made.dim() == image.dim() else made[None]
    if whole.shape[1:] != image.shape[1:] or len(whole) not in (1, len(image)):
        raise InputError(
            f"feature_mask must return {list(image.shape[1:])} or {list(image.shape)}, got {list(made.shape)}"
        )
    return _integers(whole)[None]


def _integers(mask: Tensor) -> Tensor:
    if mask.is_floating_point() or mask.is_complex():
        raise InputError(f"feature_mask must hold integers, got {mask.dtype}")
    return mask


def _numbered(mask: Tensor) -> tuple[Tensor, int]:
    """Returns a mask whose numbers begin at 0 and have no gap, and how many they are."""
    features, numbered = mask.unique(return_inverse=True)
    return numbered, len(features)


def _grid(cells: int, images: Tensor) -> Tensor:
    number = torch.zeros((), dtype=torch.int64, device=images.device)
    for side in images.shape[2:]:
        place = torch.arange(side, device=images.device) * min(cells, side) // side
        number = number[..., None] * cells + place
    return number[None, None]


def _superpixels(kind: str, image: Tensor, n_superpixels: int, seed: int) -> Tensor:
    if image.dim() != 3:
        raise InputError(
            f"feature_mask must be an int, a tensor or a function for volumes and signals, got {kind!r}, which makes "
            "superpixels of images"
        )
    try:
        from skimage import segmentation
    except ImportError as error:
        raise InputError(
            f"feature_mask {kind!r} needs scikit-image (pip install scikit-image), or must be an int or a tensor"
        ) from error
    # What people see, since the distances between colours are those that people see.
    shown = render.for_display(image[None])[0].permute(1, 2, 0).double().cpu().numpy()
    if kind == "slic":
        return torch.from_numpy(segmentation.slic(shown, n_segments=n_superpixels, start_label=0))
    return torch.from_numpy(segmentation.quickshift(shown, kernel_size=4, max_dist=200, ratio=0.2, rng=seed))
