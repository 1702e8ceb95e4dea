"""From maps and points to places: outliers, boxes, peaks, overlap. Boxes are (x1, y1, x2, y2) in inclusive pixels."""

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.errors import InputError

CHUNK = 1 << 21  # spans looked up at once


def remove_outliers(
    points: Sequence[Tensor], size: tuple[int, int], radius: float = 0.10, share: float = 0.05
) -> list[Tensor]:
    """Keep the points that have enough others around them (CNN-Fixations, section IV-A).

    A point stays if more than `share` of all points of its image, itself included, lie nearer than `radius`. Points
    that coincide count as often as they occur.

    Neighbours are counted row by row of the disc around a point, as differences of running sums: exact, and linear
    in the number of points.

    Args:
        points: of each image, int64 `[P, 2]` as (y, x) pixels within it.
        size: (H, W) of the images, in pixels.
        radius: of the neighbourhood, as a share of the image diagonal.
        share: of the points that must lie in it.

    Returns:
        The points kept of each image, in their order.
    """
    height, width = size
    # Squared distances of pixels are integers, and d < r holds where d <= ceil(r) - 1.
    reach = math.ceil((radius * math.hypot(height, width)) ** 2) - 1
    far = math.isqrt(max(reach, 0))
    disc = [(dy, math.isqrt(reach - dy * dy)) for dy in range(-far, far + 1)] if reach >= 0 else []
    kept = []
    for own in points:
        offset, half = torch.tensor(disc, dtype=torch.int64, device=own.device).view(-1, 2).unbind(1)
        counts = torch.bincount(own[:, 0] * width + own[:, 1], minlength=height * width).view(height, width)
        # Rows of zeros above and below, a column of zeros before the sums.
        sums = counts.new_zeros(height + 2 * far, width + 1)
        torch.cumsum(counts, 1, out=sums[far : far + height, 1:])
        near = []
        for part in own.split(max(1, CHUNK // max(1, len(disc)))):
            row, x = (part[:, :1] + offset + far) * (width + 1), part[:, 1:]
            right, left = (x + half + 1).clamp(max=width), (x - half).clamp(min=0)
            near.append((sums.take(row + right) - sums.take(row + left)).sum(1))
        kept.append(own[torch.cat(near) > math.floor(share * len(own))])
    return kept


def hull(points: Sequence[Tensor]) -> Tensor:
    """The smallest box around the points of each image.

    Args:
        points: of each image, `[P, 2]` as (y, x) pixels.

    Returns:
        Boxes `[N, 4]`, float32, on the device of the points; a row of NaN where an image has no points.
    """
    boxes = torch.full((len(points), 4), math.nan, device=points[0].device if len(points) else None)
    for n, own in enumerate(points):
        if len(own):
            boxes[n] = torch.cat([own.amin(0).flip(0), own.amax(0).flip(0)]).float()
    return boxes


def largest_segment(heatmap: Tensor, threshold: float = 0.15) -> Tensor:
    """The box of the largest 8-connected segment of each map, cut at a share of its range.

    Args:
        heatmap: `[N, H, W]`.
        threshold: how far from the least to the largest value of the map to cut, between 0 and 1 (Eigen-CAM scales
            its map to 0..255 first); a pixel at the threshold belongs to the segment.

    Returns:
        Boxes `[N, 4]`, float32, on the device of the map. Of segments with equally many pixels the first in reading
        order is taken; a map that is not finite or constant gives a row of NaN.

    Raises:
        InputError: a threshold that is no such share, or something else than a batch of maps.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold must lie between 0 and 1, got {threshold}")
    if heatmap.dim() != 3:
        raise InputError(f"heatmap must have shape [N, H, W], got {list(heatmap.shape)}")
    maps = heatmap.detach().float()
    if maps.numel() == 0:
        return maps.new_full((len(maps), 4), math.nan)
    low, top = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    usable = torch.isfinite(maps).all(2).all(1) & (top > low).flatten()
    labels = segments((maps >= low + threshold * (top - low)) & usable[:, None, None])
    sizes = torch.bincount(labels.flatten())
    sizes[0] = 0
    flat = labels.flatten(1)
    largest = flat.gather(1, sizes[flat].argmax(1, keepdim=True))[:, :, None]
    inside = (labels == largest) & (largest > 0)
    columns, rows = inside.any(1).int(), inside.any(2).int()
    ends = [a.argmax(1) for a in (columns, rows)]
    ends += [a.shape[1] - 1 - a.flip(1).argmax(1) for a in (columns, rows)]
    return torch.where(usable[:, None], torch.stack(ends, 1).float(), math.nan)


def segments(mask: Tensor) -> Tensor:
    """Numbers of the 8-connected segments of masks `[N, H, W]`, distinct over all of them; 0 is background."""
    # Pixels touch within a map, never across maps.
    touch = [[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3]
    if mask.is_cuda and importlib.util.find_spec("cupyx"):
        import cupy
        from cupyx.scipy import ndimage

        # On torch's own memory and stream: nothing is copied, and all that waits is CuPy for the number of segments.
        stream = torch.cuda.current_stream(mask.device).cuda_stream
        with cupy.cuda.Device(mask.device.index), cupy.cuda.ExternalStream(stream):
            labels, _ = ndimage.label(cupy.from_dlpack(mask.byte()), structure=touch)
            return torch.from_dlpack(labels).long()
    from scipy import ndimage

    labels, _ = ndimage.label(mask.cpu().numpy(), structure=touch)
    return torch.from_numpy(labels).long().to(mask.device)


def peak(heatmap: Tensor) -> Tensor:
    """Where each map `[N, H, W]` is largest, the first of equals: int64 `[N, 2]` as (y, x) pixels."""
    flat = heatmap.flatten(1).argmax(1)
    width = heatmap.shape[2]
    return torch.stack([torch.div(flat, width, rounding_mode="floor"), flat % width], 1)


def iou(a: Tensor, b: Tensor, *, inclusive: bool = True) -> Tensor:
    """Intersection over union of boxes `[..., 4]`, broadcast; 0 where either is NaN.

    Args:
        a: boxes as (x1, y1, x2, y2).
        b: likewise.
        inclusive: the last pixel belongs to the box, so a box of one pixel has x1 = x2 (ILSVRC, PASCAL VOC). Without,
            coordinates are those of edges, and such a box is empty.
    """
    extra = 1 if inclusive else 0
    # Areas in pixels do not fit into small integers.
    a, b = (boxes if boxes.dtype == torch.float64 else boxes.float() for boxes in (a, b))
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + extra
    shared = sides.clamp_min(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2] + extra).prod(-1) for boxes in (a, b)]
    return (shared / (areas[0] + areas[1] - shared)).nan_to_num(nan=0.0)
