"""Checks that every metric makes of maps, masks and boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.errors import InputError

Boxes = Tensor | Sequence[Tensor] | tuple[Tensor, Tensor]


def check_maps(heatmaps: Tensor, images: Tensor | None = None, name: str = "heatmaps") -> Tensor:
    """Checks heat maps `[N, H, W]` and returns them as float32 without a gradient (float64 stays).

    Where images are given the maps must be of their size, and come to their device.

    Raises:
        InputError: another shape, no map at all, NaN or infinity.
    """
    if not isinstance(heatmaps, Tensor):
        raise InputError(f"{name} must be a tensor [N, H, W], got {type(heatmaps).__name__}")
    if heatmaps.dim() != 3 or heatmaps.numel() == 0:
        raise InputError(f"{name} must have shape [N, H, W] and hold at least one map, got {list(heatmaps.shape)}")
    if images is not None and (len(heatmaps), *heatmaps.shape[1:]) != (len(images), *images.shape[2:]):
        expected = [len(images), *images.shape[2:]]
        raise InputError(f"{name} must have the size of the images, {expected}, got {list(heatmaps.shape)}")
    maps = heatmaps.detach() if images is None else heatmaps.detach().to(images.device)
    maps = maps if maps.dtype == torch.float64 else maps.float()
    bad = (~torch.isfinite(maps)).flatten(1).any(1)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        raise InputError(f"{name} must be finite, got NaN or infinity in map {first} ({int(bad.sum())} of {len(maps)})")
    return maps


def check_attributions(attributions: Tensor, images: Tensor, each: int = 1, name: str = "attributions") -> Tensor:
    """Checks attributions `[R, H, W]` or `[R, C, H, W]`, one for each image and target; see `check_maps`.

    Raises:
        InputError: another shape, NaN or infinity.
    """
    if isinstance(attributions, Tensor) and attributions.dim() == 4:
        rows, shape = len(images) * each, images.shape[1:]
        if attributions.shape != (rows, *shape):
            expected = [rows, *shape]
            raise InputError(f"{name} must have shape {expected}, got {list(attributions.shape)}")
        return check_maps(attributions.flatten(1, 2), None, name).view(attributions.shape).to(images.device)
    like = images.new_empty(1).expand(len(images) * each, 1, *images.shape[2:])
    return check_maps(attributions, like, name)


def check_masks(masks: Tensor, maps: Tensor, name: str = "masks") -> Tensor:
    """Checks masks and returns them as bool, on the device of the maps.

    Raises:
        InputError: another shape or dtype.
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        received = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"{name} must be a bool tensor, got {received}")
    if masks.shape != maps.shape:
        raise InputError(f"{name} must have shape {list(maps.shape)}, got {list(masks.shape)}")
    return masks.to(maps.device)


def check_boxes(boxes: Tensor, name: str = "boxes") -> Tensor:
    """Checks boxes `[N, 4]` and returns them in floating point; a row with NaN is an image without a box.

    Raises:
        InputError: another shape, or a box whose end lies before its beginning.
    """
    if not isinstance(boxes, Tensor):
        raise InputError(f"{name} must be a tensor [N, 4], got {type(boxes).__name__}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise InputError(f"{name} must have shape [N, 4], got {list(boxes.shape)}")
    boxes = boxes.detach()
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bool(reversed_.any()):
        raise InputError(f"{name} must have x1 <= x2 and y1 <= y2, got {boxes[reversed_][0].tolist()}")
    return boxes


def compressed(truth: Boxes, count: int, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Checks boxes and returns all of them, `[M, 4]` in floating point, and the number in each image, int64 `[N]`.

    Args:
        truth: `[N, 4]`, one box an image; or a list of N tensors `[B, 4]`; or all boxes `[M, 4]` and where those of
            each image begin, int `[N + 1]` (compressed rows: the last entry is M).
        count: images there must be.
        empty: whether an image may have no box.

    Raises:
        InputError: another number of images, an image without a box, or boxes that are none.
    """
    if isinstance(truth, Tensor):
        flat, lengths = truth, torch.ones(len(truth), dtype=torch.int64, device=truth.device)
    elif isinstance(truth, tuple) and len(truth) == 2 and truth[1].dim() == 1:
        flat, offsets = truth[0], truth[1].to(truth[0].device).long()
        lengths = offsets.diff()
        if len(offsets) == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != len(flat) or bool((lengths < 0).any()):
            received = f"{_short(offsets)} for {len(flat)} boxes"
            raise InputError(f"truth must have offsets that rise from 0 to the number of boxes, got {received}")
    else:
        for i, boxes in enumerate(truth):
            if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4:
                received = str(list(boxes.shape)) if isinstance(boxes, Tensor) else type(boxes).__name__
                raise InputError(f"truth must hold boxes [B, 4] of each image, got {received} for image {i}")
        flat = torch.cat(list(truth)) if len(truth) else torch.zeros(0, 4)
        lengths = torch.tensor([len(boxes) for boxes in truth], dtype=torch.int64, device=flat.device)
    flat = check_boxes(flat, "truth")
    finite = torch.isfinite(flat).all(1)
    if not bool(finite.all()):
        raise InputError(f"truth must be finite, got {flat[~finite][0].tolist()}")
    if len(lengths) != count:
        raise InputError(f"truth must hold the boxes of {count} images, got {len(lengths)}")
    without = lengths == 0
    if not empty and bool(without.any()):
        first, missing = int(without.int().argmax()), int(without.sum())
        raise InputError(f"truth must hold a box for every image, got none for image {first} ({missing} of {count})")
    return flat, lengths


def padded(truth: Boxes, count: int, *, empty: bool = False) -> Tensor:
    """Returns the boxes of each image as one tensor `[N, B, 4]`, B at least 1, padded with NaN; see `compressed`."""
    flat, lengths = compressed(truth, count, empty=empty)
    rows = torch.arange(count, device=flat.device).repeat_interleave(lengths)
    slots = torch.arange(len(flat), device=flat.device) - (lengths.cumsum(0) - lengths)[rows]
    boxes = flat.new_full((count, max([1, *lengths.tolist()]), 4), torch.nan)
    boxes[rows, slots] = flat
    return boxes


def check_classes(labels: Tensor, count: int, name: str, classes: int | None = None) -> Tensor:
    """Checks classes and returns them as int64 `[N]`.

    Raises:
        InputError: not one integer for each, or a class that does not exist.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        received = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"{name} must be a tensor of integers, got {received}")
    if labels.shape != (count,):
        raise InputError(f"{name} must have shape [{count}], got {list(labels.shape)}")
    labels = labels.long()
    if classes is not None and bool(((labels < 0) | (labels >= classes)).any()):
        worst = labels[(labels < 0) | (labels >= classes)][0]
        raise InputError(f"{name} must lie in [0, {classes}), got {int(worst)}")
    return labels


def check_share(value: float, name: str) -> float:
    """Checks that a number is more than 0 and at most 1, and returns it.

    Raises:
        InputError: another.
    """
    if not 0 < value <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {value}")
    return value


def _short(values: Tensor) -> str:
    shown = values.tolist()
    return str(shown) if len(shown) <= 6 else f"[{shown[0]}, ..., {shown[-1]}]"
