"""Places from maps and points: outliers, boxes, peaks, overlap. Boxes are (x1, y1, x2, y2) in inclusive pixels.

A box rule makes one box of each map, or of its points: `Segment`, `Mass` or `Hull`. Where a rule is an argument, its
text stands for it as well: "segment:0.4", "mass:0.05", "hull".
"""

import abc
import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.ops.registry import current_backend

CHUNK = 1 << 21  # spans looked up at once


def remove_outliers(
    points: Sequence[Tensor], size: Sequence[int], radius: float = 0.10, share: float = 0.05
) -> list[Tensor]:
    """Keeps the points that have enough others around them (CNN-Fixations, section IV-A).

    A point stays if more than `share` of all points of its image, itself included, lie nearer than `radius`. Points
    that coincide count as often as they occur.

    Neighbours are counted row by row of the disc around a point, as differences of running sums: exact, and linear
    in the number of points.

    Args:
        points: points of each image, int64 `[P, 2]` as (y, x) pixels within it; `[P, 3]` of volumes, `[P, 1]` of
            signals.
        size: (H, W) of the images, in pixels; (D, H, W) of volumes, (L,) of signals.
        radius: radius of the neighbourhood, as a share of the image diagonal.
        share: share of the points that must lie in it.

    Returns:
        The points kept of each image, in their order.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> cluster = torch.cartesian_prod(torch.arange(10), torch.arange(10))
        >>> points = torch.cat([cluster, torch.tensor([[90, 90]])])
        >>> [len(kept) for kept in localize.remove_outliers([points], (96, 96))]
        [100]
    """
    *lead, width = size
    # Squared distances of pixels are integers, and d < r holds where d <= ceil(r) - 1.
    reach = math.ceil((radius * diagonal(size)) ** 2) - 1
    far = math.isqrt(max(reach, 0))
    padded = [side + 2 * far for side in lead]
    # Of every row of the disc: how far it lies off the point, as a number of rows, and half of its length.
    disc = [
        (_place(step, padded), math.isqrt(reach - square))
        for step in itertools.product(*([range(-far, far + 1)] * len(lead)))
        if (square := sum(offset * offset for offset in step)) <= reach
    ]
    results = []
    for pixels in points:
        offset, half = torch.tensor(disc, dtype=torch.int64, device=pixels.device).view(-1, 2).unbind(1)
        counts = torch.bincount(_place(pixels.unbind(1), size), minlength=math.prod(size)).view(*lead, width)
        # Rows of zeros above and below, a column of zeros before the sums.
        sums = counts.new_zeros(*padded, width + 1)
        inner = (*(slice(far, far + side) for side in lead), slice(1, None))
        sums[inner] = counts.cumsum(-1)
        near = []
        for part in pixels.split(max(1, CHUNK // max(1, len(disc)))):
            first = _place([place + far for place in part[:, :-1].unbind(1)], padded)
            row, x = (first + offset if isinstance(first, int) else first[:, None] + offset) * (width + 1), part[:, -1:]
            right, left = (x + half + 1).clamp(max=width), (x - half).clamp(min=0)
            near.append((sums.take(row + right) - sums.take(row + left)).sum(1))
        results.append(pixels[torch.cat(near) > math.floor(share * len(pixels))])
    return results


def diagonal(size: Sequence[int]) -> float:
    """Returns the length of the diagonal of an image (H, W), or a volume, in pixels; axes of one pixel count nothing.

    Example:
        >>> from pyfast_xai import localize
        >>> localize.diagonal((30, 40)), localize.diagonal((1, 30, 40))
        (50.0, 50.0)
    """
    return math.hypot(*(side for side in size if side > 1))


def _place(coordinates: Sequence[Any], size: Sequence[int]) -> Any:
    """Returns the flat index of coordinates, numbers or tensors, in an array of some size; 0 without a coordinate."""
    index: Any = 0
    for coordinate, side in zip(coordinates, size, strict=True):
        index = index * side + coordinate
    return index


def hull(points: Sequence[Tensor]) -> Tensor:
    """Returns the smallest box around the points of each image.

    Args:
        points: points of each image, `[P, 2]` as (y, x) pixels.

    Returns:
        Boxes `[N, 4]`, float32, on the device of the points; a row of NaN where an image has no points.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> localize.hull([torch.tensor([[2, 5], [8, 3]])])
        tensor([[3., 2., 5., 8.]])
    """
    boxes = torch.full((len(points), 4), math.nan, device=points[0].device if len(points) else None)
    for n, pixels in enumerate(points):
        if len(pixels):
            boxes[n] = torch.cat([pixels.amin(0).flip(0), pixels.amax(0).flip(0)]).float()
    return boxes


def largest_segment(heatmap: Tensor, threshold: float = 0.15) -> Tensor:
    """Returns the box of the largest 8-connected segment of each map, cut at a share of its range.

    Args:
        heatmap: `[N, H, W]`.
        threshold: how far from the least to the largest value of the map to cut, between 0 and 1 (Eigen-CAM scales
            its map to 0..255 first); a pixel at the threshold belongs to the segment.

    Returns:
        Boxes `[N, 4]`, float32, on the device of the map. Of segments with equally many pixels the first in reading
        order is taken; a map that is not finite or constant gives a row of NaN.

    Raises:
        InputError: a threshold that is no such share, or something else than a batch of maps.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> heatmap = torch.zeros(1, 8, 8)
        >>> heatmap[0, 2:5, 3:7] = heatmap[0, 7, 0] = 1
        >>> localize.largest_segment(heatmap).tolist()
        [[3.0, 2.0, 6.0, 4.0]]
    """
    labels, usable = _cut(heatmap, threshold)
    if labels.numel() == 0:
        return heatmap.new_full((len(heatmap), 4), math.nan, dtype=torch.float32)
    sizes = torch.bincount(labels.flatten())
    sizes[0] = 0
    flat = labels.flatten(1)
    largest = flat.gather(1, sizes[flat].argmax(1, keepdim=True))[:, :, None]
    inside = (labels == largest) & (largest > 0)
    columns, rows = inside.any(1).int(), inside.any(2).int()
    ends = [a.argmax(1) for a in (columns, rows)]
    ends += [a.shape[1] - 1 - a.flip(1).argmax(1) for a in (columns, rows)]
    return torch.where(usable[:, None], torch.stack(ends, 1).float(), math.nan)


def largest_segments(heatmap: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Returns the boxes of `largest_segment` at several thresholds.

    Where Numba is installed, maps on the CPU take one pass for all thresholds, which Numba compiles on the first call;
    elsewhere, and with a backend other than "auto" and "numba", the thresholds are cut one after the other. The boxes
    are the same.

    Args:
        heatmap: `[N, H, W]`.
        thresholds: T of them, in any order; see `largest_segment`.

    Returns:
        Boxes `[T, N, 4]`, float32, on the device of the map; a map that is not finite or constant gives rows of NaN.

    Raises:
        InputError: a threshold that is no share between 0 and 1, or something else than a batch of maps.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> heatmap = torch.tensor([[[0.0, 0.3, 1.0, 0.6]]])
        >>> localize.largest_segments(heatmap, (0.2, 0.5)).tolist()
        [[[1.0, 0.0, 3.0, 0.0]], [[2.0, 0.0, 3.0, 0.0]]]
    """
    for threshold in thresholds:
        _check_threshold(threshold)
    maps, low, top, usable = _ranges(heatmap)
    boxes = maps.new_full((len(thresholds), len(maps), 4), math.nan)
    if not len(thresholds) or not maps.numel():
        return boxes
    if maps.device.type != "cpu" or current_backend() not in ("auto", "numba") or not importlib.util.find_spec("numba"):
        return torch.stack([largest_segment(maps, threshold) for threshold in thresholds])
    from pyfast_xai.kernels.numba.threshold_boxes import threshold_boxes

    rising = sorted(range(len(thresholds)), key=thresholds.__getitem__)
    # The very numbers at which one threshold cuts.
    cuts = torch.cat([low + thresholds[index] * (top - low) for index in rising], 2)
    for n in usable.nonzero().flatten().tolist():
        rows = boxes.new_empty(len(thresholds), 4)
        threshold_boxes(torch.searchsorted(cuts[n, 0], maps[n].contiguous(), right=True), rows)
        boxes[rising, n] = rows
    return boxes


def segment_boxes(heatmap: Tensor, threshold: float = 0.15, least: float = 0.0) -> list[Tensor]:
    """Returns the boxes of all 8-connected segments of each map, cut at a share of its range: several objects.

    Args:
        heatmap: `[N, H, W]`.
        threshold: see `largest_segment`.
        least: pixels that a segment needs, as a share of those of the largest one of its map.

    Returns:
        For each map boxes `[B, 4]`, float32, on its device, the segment with most pixels first, equal ones in reading
        order; none for a map that is not finite or constant.

    Raises:
        InputError: a share out of range, or something else than a batch of maps.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> heatmap = torch.zeros(1, 8, 8)
        >>> heatmap[0, 2:5, 3:7] = heatmap[0, 7, 0] = 1
        >>> localize.segment_boxes(heatmap)[0].tolist()
        [[3.0, 2.0, 6.0, 4.0], [0.0, 7.0, 0.0, 7.0]]
    """
    if not 0 <= least <= 1:
        raise InputError(f"least must lie in 0 to 1, got {least}")
    labels, _ = _cut(heatmap, threshold)
    if labels.numel() == 0:
        return [heatmap.new_zeros((0, 4), dtype=torch.float32) for _ in heatmap]
    image, y, x = labels.nonzero().unbind(1)
    number = labels[image, y, x]
    count = int(labels.max()) + 1
    corners = torch.stack([x, y, x, y])
    ends = [
        corners.new_zeros(count).scatter_reduce(0, number, corner, reduce, include_self=False)
        for corner, reduce in zip(corners, ("amin", "amin", "amax", "amax"), strict=True)
    ]
    boxes, pixels = torch.stack(ends, 1).float(), torch.bincount(number, minlength=count)
    owner = torch.zeros_like(pixels).scatter_(0, number, image)
    boxes_of_images = []
    for n in range(len(heatmap)):
        numbers = ((owner == n) & (pixels > 0)).nonzero().flatten()
        numbers = numbers[pixels[numbers].argsort(descending=True, stable=True)]
        boxes_of_images.append(boxes[numbers[pixels[numbers] >= least * pixels[numbers[:1]]]])
    return boxes_of_images


def _cut(heatmap: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns the numbers of the segments of each map above a share of its range, and which maps have a range."""
    _check_threshold(threshold)
    maps, low, top, usable = _ranges(heatmap)
    return segments((maps >= low + threshold * (top - low)) & usable[:, None, None]), usable


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise InputError(f"threshold must lie between 0 and 1, got {threshold}")


def _check_mass(cut: float, power: float) -> None:
    if not 0 <= cut < 0.5:
        raise InputError(f"cut must lie in 0 to 0.5, without 0.5 itself, got {cut}")
    if not 0 < power < math.inf:
        raise InputError(f"power must be positive and finite, got {power}")


def _ranges(heatmap: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns maps as float32, their least and largest values `[N, 1, 1]`, and which are finite and not constant."""
    if heatmap.dim() != 3:
        raise InputError(f"heatmap must have shape [N, H, W], got {list(heatmap.shape)}")
    maps = heatmap.detach().float()
    if maps.numel() == 0:
        zero = maps.new_zeros(len(maps), 1, 1)
        return maps, zero, zero, zero.flatten() > 0
    low, top = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return maps, low, top, torch.isfinite(maps).all(2).all(1) & (top > low).flatten()


def mass_box(heatmap: Tensor, cut: float = 0.05, power: float = 1.0) -> Tensor:
    """Returns the box that leaves a share of the mass of each map beyond each of its four sides.

    The map, raised to a power, is summed over rows and over columns. From each end of both sums as many rows or
    columns are dropped as hold at most a share `cut` of the whole: quantiles of the two marginal distributions, by two
    running sums.

    Args:
        heatmap: `[N, H, W]`; what is negative has no mass.
        cut: share of the mass that may lie beyond each side, from 0 up to and without 0.5.
        power: power of the map; a larger one heeds the hottest pixels more.

    Returns:
        Boxes `[N, 4]`, float32, on the device of the map; a row of NaN for a map that is not finite, constant, or
        nowhere positive.

    Raises:
        InputError: a share or a power out of range, or something else than a batch of maps.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> heatmap = torch.zeros(1, 8, 8)
        >>> heatmap[0, 2:5, 3:7] = 1
        >>> heatmap[0, 7, 0] = 0.1
        >>> localize.mass_box(heatmap).tolist()
        [[3.0, 2.0, 6.0, 4.0]]
    """
    _check_mass(cut, power)
    maps, _, top, usable = _ranges(heatmap)
    if maps.numel() == 0:
        return maps.new_full((len(maps), 4), math.nan)
    usable = usable & (top > 0).flatten()
    # Scaled to 1, so that no power leaves the range of numbers.
    mass = torch.where(usable[:, None, None], maps.clamp_min(0) / top, 0).pow(power)
    starts, ends = [], []
    for dim in (1, 2):  # over rows for columns, over columns for rows
        line = mass.sum(dim, dtype=torch.float64)
        most = cut * line.sum(1, keepdim=True)
        starts.append((line.cumsum(1) <= most).sum(1))
        ends.append(line.shape[1] - 1 - (line.flip(1).cumsum(1) <= most).sum(1))
    return torch.where(usable[:, None], torch.stack(starts + ends, 1).float(), math.nan)


class BoxRule(abc.ABC):
    """A rule that makes one box of each explanation. Its text is its name and its settings: "mass:0.05:1.0".

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> heatmap = torch.zeros(1, 8, 8)
        >>> heatmap[0, 2:5, 3:7] = 1
        >>> rule = localize.box_rule("segment:0.4")
        >>> rule(heatmap).tolist(), str(rule)
        ([[3.0, 2.0, 6.0, 4.0]], 'segment:0.4')
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def __call__(self, heatmap: Tensor, points: Sequence[Tensor] | None = None) -> Tensor:
        """Returns boxes `[N, 4]`, float32; a row of NaN where there is no evidence.

        Args:
            heatmap: `[N, H, W]`.
            points: points of each map, `[P, 2]` as (y, x) pixels; None where the method has none.
        """

    def __str__(self) -> str:
        return ":".join([self.name, *map(str, astuple(self))])  # type: ignore[call-overload]


@dataclass(frozen=True)
class Segment(BoxRule):
    """The largest segment of a map, see `largest_segment`.

    Args:
        threshold: share of the range of the map at which it is cut, between 0 and 1.

    Raises:
        InputError: a threshold that is no such share.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> heatmap = torch.zeros(1, 8, 8)
        >>> heatmap[0, 2:5, 3:7] = 1
        >>> localize.Segment(0.4)(heatmap).tolist()
        [[3.0, 2.0, 6.0, 4.0]]
    """

    threshold: float = 0.15
    name: ClassVar[str] = "segment"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def __call__(self, heatmap: Tensor, points: Sequence[Tensor] | None = None) -> Tensor:
        return largest_segment(heatmap, self.threshold)


@dataclass(frozen=True)
class Mass(BoxRule):
    """Most of the mass of a map, see `mass_box`.

    Args:
        cut: share of the mass that may lie beyond each side, from 0 up to and without 0.5.
        power: power of the map, larger than 0.

    Raises:
        InputError: a share or a power out of range.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> localize.Mass(0.05)(torch.rand(2, 8, 8)).shape
        torch.Size([2, 4])
    """

    cut: float = 0.05
    power: float = 1.0
    name: ClassVar[str] = "mass"

    def __post_init__(self) -> None:
        _check_mass(self.cut, self.power)

    def __call__(self, heatmap: Tensor, points: Sequence[Tensor] | None = None) -> Tensor:
        return mass_box(heatmap, self.cut, self.power)


@dataclass(frozen=True)
class Hull(BoxRule):
    """The smallest box around all points, see `hull`; for methods that have points.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> localize.Hull()(torch.zeros(1, 8, 8), [torch.tensor([[2, 5], [6, 3]])]).tolist()
        [[3.0, 2.0, 5.0, 6.0]]
    """

    name: ClassVar[str] = "hull"

    def __call__(self, heatmap: Tensor, points: Sequence[Tensor] | None = None) -> Tensor:
        if points is None:
            raise InputError("box_rule must be one of maps, segment or mass, for a method without points, got 'hull'")
        return hull(points).to(heatmap.device)


SEGMENT = Segment()
"""The rule of an explanation that was given none."""

RULES: dict[str, type[BoxRule]] = {rule.name: rule for rule in (Segment, Mass, Hull)}


def box_rule(rule: BoxRule | str) -> BoxRule:
    """Returns the rule that a text stands for: its name, and its settings in their order after colons.

    Args:
        rule: "segment", "segment:0.4", "mass:0.05", "mass:0.03:2" or "hull", for example; a rule is returned as it is.

    Raises:
        InputError: a rule that does not exist, or settings that it does not take.

    Example:
        >>> from pyfast_xai import localize
        >>> localize.box_rule("segment:0.4")
        Segment(threshold=0.4)
        >>> str(localize.Mass(cut=0.03, power=2))
        'mass:0.03:2'
    """
    if isinstance(rule, BoxRule):
        return rule
    name, *settings = str(rule).split(":")
    if name not in RULES:
        raise InputError(
            f"box_rule must be {', '.join(RULES)}, with settings after colons as in 'segment:0.4', got {rule!r}"
        )
    parameters = [field.name for field in fields(RULES[name])]  # type: ignore[arg-type]
    try:
        numbers = [float(setting) for setting in settings]
    except ValueError:
        raise InputError(f"box_rule must have numbers after its colons, as in 'segment:0.4', got {rule!r}") from None
    if len(numbers) > len(parameters):
        allowed = f"at most {':'.join([name, *parameters])}" if parameters else f"{name!r} without settings"
        raise InputError(f"box_rule must be {allowed}, got {rule!r}")
    return RULES[name](*numbers)


def segments(mask: Tensor) -> Tensor:
    """Labels the 8-connected segments of masks `[N, H, W]` with numbers distinct over all of them; 0 is background.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> localize.segments(torch.tensor([[[True, False, True], [True, False, True]]]))
        tensor([[[1, 0, 2],
                 [1, 0, 2]]])
    """
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
    """Returns the largest pixel of each map `[N, H, W]`, the first of equals, as (y, x): int64 `[N, 2]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> localize.peak(torch.tensor([[[0.0, 1.0], [3.0, 2.0]]]))
        tensor([[1, 0]])
    """
    flat = heatmap.flatten(1).argmax(1)
    width = heatmap.shape[2]
    return torch.stack([torch.div(flat, width, rounding_mode="floor"), flat % width], 1)


def iou(a: Tensor, b: Tensor, *, inclusive: bool = True) -> Tensor:
    """Returns the intersection over union of boxes `[..., 4]`, broadcast; 0 if either is NaN.

    Args:
        a: boxes as (x1, y1, x2, y2).
        b: likewise.
        inclusive: the last pixel belongs to the box, so a box of one pixel has x1 = x2 (ILSVRC, PASCAL VOC). Without,
            coordinates are those of edges, and such a box is empty.

    Example:
        >>> import torch
        >>> from pyfast_xai import localize
        >>> localize.iou(torch.tensor([0.0, 0, 9, 9]), torch.tensor([0.0, 0, 9, 4]))
        tensor(0.5000)
    """
    extra = 1 if inclusive else 0
    # Areas in pixels do not fit into small integers.
    a, b = (boxes if boxes.dtype == torch.float64 else boxes.float() for boxes in (a, b))
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + extra
    shared = sides.clamp_min(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2] + extra).prod(-1) for boxes in (a, b)]
    return (shared / (areas[0] + areas[1] - shared)).nan_to_num(nan=0.0)
