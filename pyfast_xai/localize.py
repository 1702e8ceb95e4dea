"""From maps and points to places: outliers, boxes, peaks, overlap. Boxes are (x1, y1, x2, y2) in inclusive pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 24  # distances held at once


def remove_outliers(
    points: Sequence[Tensor], size: tuple[int, int], radius: float = 0.10, share: float = 0.05
) -> list[Tensor]:
    """Keep the points that have enough others around them (CNN-Fixations, section IV-A).

    A point stays if more than `share` of all points of its image, itself included, lie nearer than `radius`. Points
    that coincide count as often as they occur.

    Args:
        points: of each image, int64 `[P, 2]` as (y, x) pixels.
        size: (H, W) of the images, in pixels.
        radius: of the neighbourhood, as a share of the image diagonal.
        share: of the points that must lie in it.

    Returns:
        The points kept of each image, in their order.
    """
    reach = (radius * math.hypot(*size)) ** 2
    kept = []
    for own in points:
        near = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        for rows in torch.arange(len(own), device=own.device).split(max(1, CHUNK // max(1, len(own)))):
            # Integer squares: no rounding at the rim of the circle.
            apart = (own[rows, None] - own[None]).square().sum(-1)
            near[rows] = (apart < reach).sum(1)
        kept.append(own[near > share * len(own)])
    return kept


def hull(points: Sequence[Tensor]) -> Tensor:
    """The smallest box around the points of each image.

    Args:
        points: of each image, `[P, 2]` as (y, x) pixels.

    Returns:
        Boxes `[N, 4]`, float32; a row of NaN where an image has no points.
    """
    boxes = torch.full((len(points), 4), math.nan)
    for n, own in enumerate(points):
        if len(own):
            low, high = own.amin(0), own.amax(0)
            boxes[n] = torch.stack([low[1], low[0], high[1], high[0]]).float()
    return boxes


def largest_segment(heatmap: Tensor, threshold: float = 0.15) -> Tensor:
    """The box of the largest 8-connected segment of each map, cut at a share of its maximum.

    Args:
        heatmap: `[N, H, W]`.
        threshold: share of the maximum, 0 to 1; a pixel at the threshold belongs to the segment.

    Returns:
        Boxes `[N, 4]`, float32, on the device of the map; a row of NaN for a map without a positive, finite maximum.
    """
    from scipy import ndimage

    maps = heatmap.detach().float().cpu()
    boxes = torch.full((len(maps), 4), math.nan)
    for n, own in enumerate(maps):
        top = float(own.max())
        if not math.isfinite(top) or top <= 0:
            continue
        labels, count = ndimage.label((own >= threshold * top).numpy(), structure=[[1] * 3] * 3)
        sizes = torch.bincount(torch.from_numpy(labels).flatten(), minlength=count + 1)
        largest = int(sizes[1:].argmax()) + 1
        rows, columns = ndimage.find_objects(labels, largest)[largest - 1]
        boxes[n] = torch.tensor([columns.start, rows.start, columns.stop - 1, rows.stop - 1]).float()
    return boxes.to(heatmap.device)


def peak(heatmap: Tensor) -> Tensor:
    """Where each map `[N, H, W]` is largest, the first of equals: int64 `[N, 2]` as (y, x) pixels."""
    flat = heatmap.flatten(1).argmax(1)
    width = heatmap.shape[2]
    return torch.stack([torch.div(flat, width, rounding_mode="floor"), flat % width], 1)


def area(boxes: Tensor) -> Tensor:
    """Pixels in boxes `[..., 4]`."""
    return (boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes `[..., 4]`, broadcast; 0 where either is NaN."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low + 1).clamp_min(0).prod(-1)
    return (shared / (area(a) + area(b) - shared)).nan_to_num(nan=0.0)
