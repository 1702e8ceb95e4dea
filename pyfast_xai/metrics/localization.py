"""Localisation: overlap of evidence and object. Boxes are (x1, y1, x2, y2) in inclusive pixels, results shares in 0..1.

What has a value for each image is a function. What has one for a data set only is a class: `update` with batches, then
`compute`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfast_xai import localize, render
from pyfast_xai.errors import InputError
from pyfast_xai.localize import iou
from pyfast_xai.metrics.checks import (
    Boxes,
    check_boxes,
    check_classes,
    check_maps,
    check_masks,
    check_share,
    compressed,
    padded,
)

THRESHOLDS = tuple(i / 100 for i in range(1, 100))


def box_correct(boxes: Tensor, truth: Boxes, *, threshold: float = 0.5, inclusive: bool = True) -> Tensor:
    """Returns whether the box of each image overlaps one of its ground-truth boxes enough (ILSVRC's criterion).

    Args:
        boxes: one an image, `[N, 4]`; a row of NaN is an image where none was found, and never correct.
        truth: boxes of the objects: `[N, 4]`, a list of N tensors `[B, 4]`, or compressed rows `([M, 4], [N + 1])`.
        threshold: least intersection over union.
        inclusive: see `iou`.

    Returns:
        bool `[N]`.

    Raises:
        InputError: another number of images, an image without ground truth, or boxes that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.box_correct(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.0, 0, 9, 6]]), threshold=0.5)
        tensor([True])
    """
    check_share(threshold, "threshold")
    boxes = check_boxes(boxes)
    return _best_iou(boxes, padded(truth, len(boxes)), inclusive) >= threshold


def localization_error(
    boxes: Tensor,
    truth: Boxes,
    predicted: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    threshold: float = 0.5,
    inclusive: bool = True,
) -> Tensor:
    """Returns the share of images whose object is not found (Russakovsky et al., ILSVRC, 2015, section 4.2).

    Without classes this is the class-agnostic error, the complement of "GT-known Loc". With them it is the top-1
    localisation error: the class must be right as well. The two must not be compared with each other: on the
    published boxes of CNN-Fixations they are ten points and more apart.

    Args:
        boxes: one an image, `[N, 4]`, see `box_correct`.
        truth: boxes of the objects, likewise.
        predicted: class the model gave each image, int `[N]`.
        labels: right class, int `[N]`.
        threshold: least intersection over union.
        inclusive: see `iou`.

    Returns:
        Share in 0..1, a tensor without dimensions.

    Raises:
        InputError: as `box_correct`, or one of `predicted` and `labels` without the other.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]])
        >>> truth = torch.tensor([[0.0, 0, 9, 8], [50, 50, 59, 59]])
        >>> metrics.localization_error(boxes, truth)
        tensor(0.5000)
    """
    correct = box_correct(boxes, truth, threshold=threshold, inclusive=inclusive)
    if len(correct) == 0:
        raise InputError("boxes must hold at least one image, got none")
    if (predicted is None) != (labels is None):
        missing = "labels" if labels is None else "predicted"
        raise InputError(f"predicted and labels must be given together, got no {missing}")
    if predicted is not None and labels is not None:
        right = check_classes(labels, len(correct), "labels").to(correct.device)
        correct = correct & (check_classes(predicted, len(correct), "predicted").to(correct.device) == right)
    return 1 - correct.float().mean()


def _best_iou(boxes: Tensor, truth: Tensor, inclusive: bool = True) -> Tensor:
    """Returns the best IoU of each box `[N, 4]` with a ground-truth box `[N, B, 4]` of its image."""
    return iou(boxes[:, None], truth.to(boxes.device), inclusive=inclusive).amax(1)


class MaxBoxAcc:
    """Accuracy of the boxes that a threshold on the heat maps gives, at the best threshold (Choe et al., 2020).

    The threshold is one for the data set, so a method cannot win by its calibration. Thresholds are shares of the
    range of each map, as in `localize.largest_segment`. The authors' code rounds maps to 8 bits, takes the largest
    outline and ends boxes a pixel later, which moves accuracies by tenths of a point.

    Args:
        thresholds: candidates, each between 0 and 1.
        iou: least intersections over union; accuracies at several are averaged, each at its own best threshold.
        segments: "largest" takes the box of the largest 8-connected segment, "all" the best of the boxes of all.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> heatmaps = torch.zeros(1, 16, 16)
        >>> heatmaps[0, 4:12, 4:12] = 1
        >>> metric = metrics.MaxBoxAcc()
        >>> metric.update(heatmaps, torch.tensor([[4.0, 4, 11, 11]]))
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(
        self,
        thresholds: Sequence[float] = THRESHOLDS,
        iou: Sequence[float] = (0.5,),
        segments: Literal["largest", "all"] = "largest",
    ) -> None:
        if segments not in ("largest", "all"):
            raise InputError(f"segments must be 'largest' or 'all', got {segments!r}")
        for least in iou:
            check_share(least, "iou")
        for threshold in thresholds:
            if not 0 < threshold < 1:
                raise InputError(f"thresholds must lie between 0 and 1, got {threshold}")
        if not len(iou) or not len(thresholds):
            raise InputError(f"iou and thresholds must not be empty, got {len(iou)} and {len(thresholds)}")
        self.thresholds, self.iou, self.segments = tuple(thresholds), tuple(iou), segments
        self.correct = torch.zeros(len(self.iou), len(self.thresholds), dtype=torch.int64)
        self.count = 0

    def update(self, heatmaps: Tensor, truth: Boxes) -> None:
        """Adds a batch.

        Args:
            heatmaps: `[N, H, W]`; a constant map has no box and counts as wrong.
            truth: boxes of the objects in pixels of the maps: `[N, 4]`, a list of N tensors `[B, 4]`, or compressed
                rows `([M, 4], [N + 1])`.

        Raises:
            InputError: boxes outside of the maps, NaN in a map, or an image without ground truth.
        """
        maps = check_maps(heatmaps)
        boxes = padded(truth, len(maps)).to(maps.device)
        _check_inside(boxes, maps)
        if self.segments == "largest":
            best = iou(localize.largest_segments(maps, self.thresholds)[:, :, None], boxes).amax(2)
        else:
            best = torch.stack([_best_of_all(maps, boxes, threshold) for threshold in self.thresholds])
        least = torch.tensor(self.iou, device=maps.device, dtype=best.dtype)
        self.correct = self.correct.to(maps.device) + (best >= least[:, None, None]).sum(2)
        self.count += len(maps)

    @property
    def accuracy(self) -> Tensor:
        """Returns the share of images whose box is right, at each of `iou` and each of `thresholds`, `[I, T]`."""
        _check_updated(self.count)
        return self.correct / self.count

    def compute(self) -> Tensor:
        """Returns the accuracy at the best threshold, a tensor without dimensions."""
        return self.accuracy.amax(1).mean()


class MaxBoxAccV2(MaxBoxAcc):
    """`MaxBoxAcc` at intersections over union of 0.3, 0.5 and 0.7, any segment counts (Choe et al., 2022).

    Args:
        thresholds: candidates, each between 0 and 1.
        iou: least intersections over union, averaged.
        segments: "all" is the published measure; "largest" is comparable to `MaxBoxAcc`.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> heatmaps = torch.zeros(1, 16, 16)
        >>> heatmaps[0, 4:12, 4:12] = 1
        >>> metric = metrics.MaxBoxAccV2()
        >>> metric.update(heatmaps, torch.tensor([[4.0, 4, 11, 11]]))
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(
        self,
        thresholds: Sequence[float] = THRESHOLDS,
        iou: Sequence[float] = (0.3, 0.5, 0.7),
        segments: Literal["largest", "all"] = "all",
    ) -> None:
        super().__init__(thresholds, iou, segments)


def _best_of_all(maps: Tensor, truth: Tensor, threshold: float) -> Tensor:
    """Returns the best intersection over union of the segments of each map, `[N]`, at a threshold."""
    boxes, owner = _all_segments(maps, threshold)
    best = boxes.new_zeros(len(maps))
    return best.scatter_reduce(0, owner, _best_iou(boxes, truth[owner]), "amax")


def _all_segments(maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns the boxes `[S, 4]` of all 8-connected segments, and the map each lies in, int64 `[S]`."""
    low, top = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    labels = localize.segments((maps >= low + threshold * (top - low)) & (top > low))
    owner, y, x = labels.nonzero().unbind(1)
    number = labels[owner, y, x] - 1
    count = int(number.max()) + 1 if len(number) else 0
    # Segments have consecutive numbers, so every slot is written.
    ends = x.new_zeros(5, count)
    for slot, (values, how) in enumerate(((x, "amin"), (y, "amin"), (x, "amax"), (y, "amax"), (owner, "amax"))):
        ends[slot].scatter_reduce_(0, number, values, how, include_self=False)
    return ends[:4].T.float(), ends[4]


class _PixelCounts:
    """Pixels of objects and of background, counted by how hot they are: what pixel precision and recall need.

    Args:
        bins: steps in which a map is read.
    """

    def __init__(self, bins: int = 1000) -> None:
        if bins < 1:
            raise InputError(f"bins must be at least 1, got {bins}")
        self.bins = bins
        # The hottest pixel of each map, 1, has a bin of its own.
        self.counts = torch.zeros(2, bins + 1, dtype=torch.int64)

    def update(self, heatmaps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            heatmaps: `[N, H, W]`, each stretched to 0..1 first; a constant one is cold everywhere.
            masks: the objects, bool `[N, H, W]`.
            ignore: pixels that do not count, bool `[N, H, W]`.

        Raises:
            InputError: masks of another size or dtype, or NaN in a map.
        """
        maps = check_maps(heatmaps)
        masks = check_masks(masks, maps)
        counted = torch.ones_like(masks) if ignore is None else ~check_masks(ignore, maps, "ignore")
        scores = render.normalize(maps)
        edges = torch.arange(self.bins + 1, dtype=torch.float64).div(self.bins).to(scores)
        bins = torch.bucketize(scores, edges, right=True) - 1
        counts = [torch.bincount(bins[selected & counted], minlength=self.bins + 1) for selected in (masks, ~masks)]
        self.counts = self.counts.to(maps.device) + torch.stack(counts)

    def _hottest_first(self) -> tuple[Tensor, Tensor]:
        """Returns the object pixels and all pixels in each bin, float64 `[bins + 1]`."""
        if int(self.counts[0].sum()) == 0:
            raise InputError("masks must hold at least one pixel of an object before compute, got none")
        hits, other = self.counts.flip(1).double().unbind(0)
        return hits, hits + other

    def curve(self) -> tuple[Tensor, Tensor]:
        """Returns precision and recall of the pixels from each bin upwards, hottest bin first, float64 `[bins + 1]`."""
        hits, counts = self._hottest_first()
        # A bin that nothing has reached yet has no precision; 1 is the limit.
        counts = counts.cumsum(0)
        precision = torch.where(counts > 0, hits.cumsum(0) / counts.clamp_min(1), 1.0)
        return precision, hits.cumsum(0) / hits.sum()


class PxAP(_PixelCounts):
    """Pixel average precision: area under precision and recall of pixels over a data set (Choe et al., 2020, PxAP).

    Args:
        bins: steps in which a map is read; the authors' default of 0.001.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> masks = torch.zeros(1, 16, 16, dtype=torch.bool)
        >>> masks[0, 4:12, 4:12] = True
        >>> metric = metrics.PxAP()
        >>> metric.update(masks.float(), masks)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Returns the average precision in 0..1, a tensor without dimensions."""
        hits, _ = self._hottest_first()
        precision, _ = self.curve()
        return (precision * hits).sum() / hits.sum()


class PrecisionAtEER(_PixelCounts):
    """Pixel precision at equal error rate, where it equals recall: the measure of Graz-02 (Marszalek & Schmid, 2007).

    The two are equal where as many pixels are taken as the objects have; within a bin pixels count as equally hot.
    CNN-Fixations (Table II) takes one such object a class, and the mean over classes.

    Args:
        bins: steps in which a map is read.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> masks = torch.zeros(1, 16, 16, dtype=torch.bool)
        >>> masks[0, 4:12, 4:12] = True
        >>> metric = metrics.PrecisionAtEER()
        >>> metric.update(masks.float(), masks)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Returns the precision in 0..1, a tensor without dimensions."""
        hits, counts = self._hottest_first()
        size = hits.sum()
        share = ((size - (counts.cumsum(0) - counts)) / counts.clamp_min(1)).clamp(0, 1)
        return (share * hits).sum() / size


def pointing_hit(points: Tensor, truth: Boxes | Tensor, *, tolerance: float = 15) -> Tensor:
    """Returns whether each point lies on the object or within `tolerance` pixels of it (Zhang et al., 2018).

    Args:
        points: (y, x) pixels, `[N, 2]`, as `Explanation.peak` gives them.
        truth: the objects of the explained class: masks, bool `[N, H, W]`, or boxes `[N, 4]`, a list of N
            tensors `[B, 4]`, or compressed rows `([M, 4], [N + 1])`.
        tolerance: radius of the disc around the point that must meet the object, in pixels; 15 as in TorchRay, 0 for
            the point itself.

    Returns:
        bool `[N]`.

    Raises:
        InputError: another number of images, points outside of the masks, or an image without ground truth.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.pointing_hit(torch.tensor([[5, 5], [40, 40]]), torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]]))
        tensor([ True, False])
    """
    if not isinstance(points, Tensor) or points.dim() != 2 or points.shape[1] != 2:
        received = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise InputError(f"points must have shape [N, 2], got {received}")
    if tolerance < 0:
        raise InputError(f"tolerance must not be negative, got {tolerance}")
    points = points.detach().float()
    if bool((~torch.isfinite(points)).any()):
        raise InputError(f"points must be finite, got {points[~torch.isfinite(points).all(1)][0].tolist()}")
    is_mask = isinstance(truth, Tensor) and truth.dim() == 3
    distance = _to_mask(points, truth) if is_mask and isinstance(truth, Tensor) else _to_boxes(points, truth)
    # Strictly within, as TorchRay has it; the pixel itself is at no distance.
    return (distance < tolerance**2) | (distance == 0)


def _to_mask(points: Tensor, masks: Tensor) -> Tensor:
    """Returns the squared distance of each point to the nearest pixel of its mask."""
    if masks.dtype != torch.bool or len(masks) != len(points):
        raise InputError(f"truth must be {len(points)} bool masks [H, W], got {list(masks.shape)} of {masks.dtype}")
    masks = masks.to(points.device)
    height, width = masks.shape[1:]
    size = torch.tensor([height, width], device=points.device)
    if bool(((points < 0) | (points >= size)).any()):
        worst = points[((points < 0) | (points >= size)).any(1)][0].tolist()
        raise InputError(f"points must lie within the masks of {height} x {width} pixels, got {worst}")
    empty = ~masks.flatten(1).any(1)
    if bool(empty.any()):
        raise InputError(f"truth must hold an object for every image, got none for image {int(empty.int().argmax())}")
    dy = (torch.arange(height, device=points.device) - points[:, :1]).square()
    dx = (torch.arange(width, device=points.device) - points[:, 1:]).square()
    return torch.where(masks, dy[:, :, None] + dx[:, None], torch.inf).amin((1, 2))


def _to_boxes(points: Tensor, truth: Boxes) -> Tensor:
    """Returns the squared distance of each point to the nearest pixel of its boxes."""
    boxes = padded(truth, len(points)).to(points.device)
    at = points.flip(1)[:, None]
    nearest = torch.maximum(torch.minimum(at, boxes[..., 2:]), boxes[..., :2])
    return (nearest - at).square().sum(2).nan_to_num(nan=torch.inf).amin(1)


class PointingGame:
    """Share of hits of each class, and their mean (Zhang et al., 2018).

    Args:
        classes: number of classes.
        tolerance: in pixels, see `pointing_hit`.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> game = metrics.PointingGame()
        >>> game.update(torch.tensor([[5, 5], [40, 40]]), torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]]))
        >>> game.compute()
        tensor(0.5000)
    """

    def __init__(self, classes: int = 1, *, tolerance: float = 15) -> None:
        self.tolerance = tolerance
        self.hits = torch.zeros(classes, dtype=torch.int64)
        self.misses = torch.zeros(classes, dtype=torch.int64)

    def update(self, points: Tensor, truth: Boxes | Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch: one row for each class present in each image.

        Args:
            points: (y, x) pixels, `[N, 2]`.
            truth: the objects of that class, see `pointing_hit`.
            labels: the class, int `[N]`; None where there is one only.

        Raises:
            InputError: as `pointing_hit`, or a class that does not exist.
        """
        hit = pointing_hit(points, truth, tolerance=self.tolerance)
        labels = torch.zeros(len(hit), dtype=torch.int64) if labels is None else labels
        labels = check_classes(labels, len(hit), "labels", len(self.hits)).to(hit.device)
        hits, misses = (torch.bincount(labels[selected], minlength=len(self.hits)) for selected in (hit, ~hit))
        self.hits, self.misses = self.hits.to(hit.device) + hits, self.misses.to(hit.device) + misses

    @property
    def accuracy(self) -> Tensor:
        """Returns the share of hits of each class, `[classes]`; NaN for a class that never came."""
        return self.hits / (self.hits + self.misses)

    def compute(self) -> Tensor:
        """Returns the mean of the classes that came, a tensor without dimensions."""
        _check_updated(int((self.hits + self.misses).sum()))
        return self.accuracy.nanmean()


class RecallPrecision(NamedTuple):
    """Means over classes, tensors without dimensions.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> recall, precision = metrics.RecallPrecision(torch.tensor(0.5), torch.tensor(0.8))
        >>> recall, precision
        (tensor(0.5000), tensor(0.8000))
    """

    recall: Tensor
    precision: Tensor


class SingleProposal:
    """Mean recall and precision over classes of one proposal an image (CNN-Fixations, section IV-G, Table III).

    Of each class present in an image, the image's proposal is right if it overlaps an object of that class. Recall is
    the share of the objects of a class found so (a proposal finds one at most), precision the share of proposals.

    Args:
        classes: number of classes; 20 in PASCAL VOC.
        threshold: least intersection over union.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metric = metrics.SingleProposal(classes=20)
        >>> objects, labels = [torch.tensor([[0.0, 0, 9, 9], [30, 30, 39, 39]])], [torch.tensor([7, 11])]
        >>> metric.update(torch.tensor([[0.0, 0, 9, 8]]), objects, labels)
        >>> metric.compute().recall
        tensor(0.5000)
    """

    def __init__(self, classes: int, *, threshold: float = 0.5) -> None:
        self.threshold = check_share(threshold, "threshold")
        self.hits, self.images, self.objects = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))

    def update(self, boxes: Tensor, truth: Boxes, labels: Tensor | Sequence[Tensor]) -> None:
        """Adds a batch.

        Args:
            boxes: one proposal an image, `[N, 4]`; a row of NaN for none.
            truth: boxes of all objects, see `box_correct`.
            labels: class of each of them, int: all `[M]` in one tensor, or a list of N tensors `[B]`.

        Raises:
            InputError: as `box_correct`, not a class for each object, or one that does not exist.
        """
        boxes = check_boxes(boxes)
        objects, lengths = compressed(truth, len(boxes))
        flat = labels if isinstance(labels, Tensor) else torch.cat(list(labels))
        classes = len(self.hits)
        kinds = check_classes(flat, len(objects), "labels", classes).to(boxes.device)
        owner = torch.arange(len(boxes), device=boxes.device).repeat_interleave(lengths.to(boxes.device))
        overlaps = iou(boxes[owner], objects.to(boxes.device)) >= self.threshold
        pairs = owner * classes + kinds
        hit = overlaps.new_zeros(len(boxes) * classes).index_fill_(0, pairs[overlaps], True)
        present = torch.zeros_like(hit).index_fill_(0, pairs, True)
        self.hits = self.hits.to(boxes.device) + hit.view(-1, classes).sum(0)
        self.images = self.images.to(boxes.device) + present.view(-1, classes).sum(0)
        self.objects = self.objects.to(boxes.device) + torch.bincount(kinds, minlength=classes)

    def compute(self) -> RecallPrecision:
        """Returns the means over the classes that came."""
        _check_updated(int(self.images.sum()))
        return RecallPrecision((self.hits / self.objects).nanmean(), (self.hits / self.images).nanmean())


class LesionSensitivity:
    """Share of the images with lesions in which one is found (Gondal et al., 2017; FGVis, Table 3).

    A lesion is found where the proposed regions cover enough of it. FGVis reports 25 % and 50 %. Images without lesions
    of the kind do not count.

    Args:
        overlaps: least shares of a lesion's pixels.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metric = metrics.LesionSensitivity()
        >>> regions = torch.zeros(1, 16, 16, dtype=torch.bool)
        >>> regions[0, :8] = True
        >>> metric.update(regions, torch.tensor([[0.0, 5, 9, 14]]))
        >>> metric.compute()
        tensor([1., 0.])
    """

    def __init__(self, overlaps: Sequence[float] = (0.25, 0.5)) -> None:
        self.overlaps = tuple(check_share(overlap, "overlaps") for overlap in overlaps)
        self.hits = torch.zeros(len(self.overlaps), dtype=torch.int64)
        self.images = 0

    def update(self, regions: Tensor, lesions: Boxes) -> None:
        """Adds a batch.

        Args:
            regions: proposed, bool `[N, H, W]`, for example a heat map cut at a threshold.
            lesions: lesions of one kind; boxes in inclusive pixels, see `box_correct`, or a list of N masks, bool `[L,
                H, W]`. Here an image may have none.

        Raises:
            InputError: another number of images, or lesions outside of the regions.
        """
        if not isinstance(regions, Tensor) or regions.dtype != torch.bool or regions.dim() != 3:
            received = (
                f"{list(regions.shape)} of {regions.dtype}" if isinstance(regions, Tensor) else type(regions).__name__
            )
            raise InputError(f"regions must be bool [N, H, W], got {received}")
        masks = not isinstance(lesions, Tensor) and len(lesions) > 0 and lesions[0].dtype == torch.bool
        covered = _covered_masks(regions, lesions) if masks else _covered_boxes(regions, lesions)
        least = torch.tensor(self.overlaps, device=regions.device)
        best = covered.nan_to_num(nan=-1.0).amax(1)
        self.hits = self.hits.to(regions.device) + (best >= least[:, None]).sum(1)
        self.images += int((best >= 0).sum())

    def compute(self) -> Tensor:
        """Returns the sensitivity at each of `overlaps`, `[O]`."""
        _check_updated(self.images)
        return self.hits / self.images


def _covered_boxes(regions: Tensor, lesions: Boxes) -> Tensor:
    """Returns the share of the pixels of each box within the regions, `[N, B]`, NaN where there is no box."""
    boxes = padded(lesions, len(regions), empty=True).to(regions.device)
    _check_inside(boxes, regions, "lesions")
    height, width = regions.shape[1:]
    sums = torch.zeros(len(regions), height + 1, width + 1, dtype=torch.int64, device=regions.device)
    sums[:, 1:, 1:] = regions.long().cumsum(1).cumsum(2)
    limit = torch.tensor([width, height] * 2, device=regions.device)
    whole = boxes.nan_to_num(nan=0.0).round().long().clamp_min(0).minimum(limit - 1)
    x1, y1, x2, y2 = (whole + torch.tensor([0, 0, 1, 1], device=regions.device)).unbind(2)
    image = torch.arange(len(regions), device=regions.device)[:, None]
    inside = sums[image, y2, x2] - sums[image, y1, x2] - sums[image, y2, x1] + sums[image, y1, x1]
    return torch.where(boxes.isnan().any(2), torch.nan, inside / ((y2 - y1) * (x2 - x1)))


def _covered_masks(regions: Tensor, lesions: Boxes) -> Tensor:
    """Returns the share of the pixels of each mask within the regions, `[N, L]`, NaN where there is no mask."""
    if len(lesions) != len(regions):
        raise InputError(f"lesions must be those of {len(regions)} images, got {len(lesions)}")
    shares = regions.new_full((len(regions), max([1, *map(len, lesions)])), torch.nan, dtype=torch.float32)
    for i, masks in enumerate(lesions):
        if masks.dtype != torch.bool or masks.shape[1:] != regions.shape[1:]:
            expected = ["L", *regions.shape[1:]]
            raise InputError(
                f"lesions must be bool masks {expected}, got {list(masks.shape)} of {masks.dtype} for image {i}"
            )
        masks = masks.to(regions.device)
        # A mask without a pixel is no lesion.
        shares[i, : len(masks)] = (masks & regions[i]).flatten(1).sum(1) / masks.flatten(1).sum(1)
    return shares


def _check_inside(boxes: Tensor, maps: Tensor, name: str = "truth") -> None:
    """Refuses boxes in pixels of another size than that of the maps."""
    height, width = maps.shape[1:]
    limit = torch.tensor([width, height] * 2, device=boxes.device)
    # Less than a pixel outside is rounding, or an annotation that counts from one.
    outside = ((boxes <= -1) | (boxes > limit)).any(2)
    if bool(outside.any()):
        worst = boxes[outside][0].tolist()
        raise InputError(f"{name} must lie within the maps of {height} x {width} pixels, got box {worst}")


def _check_updated(count: int) -> None:
    if count == 0:
        raise InputError("update must be called before compute, got no image yet")
