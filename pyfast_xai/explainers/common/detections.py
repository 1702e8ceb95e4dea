"""Detections read from what a detector returned: torchvision's, DETR's of Transformers, Ultralytics'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError

Activation = Literal["softmax", "sigmoid"]
ACTIVATIONS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Detections:
    """The detections in one image.

    Attributes:
        boxes: corners (x0, y0, x1, y1) in pixels, `[M, 4]`.
        probabilities: probabilities of the classes, `[M, C]`.
        objectness: objectness of each, `[M]`: the probability that there is an object, where the detector says it, else
            the largest of its classes.
        all_classes: whether the detector has C classes, and not only names those of its detections.
    """

    boxes: Tensor
    probabilities: Tensor
    objectness: Tensor
    all_classes: bool = True

    def of_classes(self, classes: Tensor) -> Tensor:
        """Returns the probabilities of some classes `[K]`, `[M, K]`; zero of one that no detection names.

        Raises:
            InputError: a class that the detector does not have.
        """
        missing = int(classes.max()) + 1 - self.probabilities.shape[1]
        if missing > 0 and self.all_classes:
            raise InputError(f"classes must lie in [0, {self.probabilities.shape[1]}), got {int(classes.max())}")
        return functional.pad(self.probabilities, (0, max(0, missing)))[:, classes]


def detections_in(
    output: Any,
    size: tuple[int, int] | None = None,
    activation: Activation = "softmax",
    classes: int | None = None,
) -> list[Detections]:
    """Returns the detections in each image, from what a detector returned.

    Args:
        output: a list of dicts with "boxes", "scores" and "labels" (torchvision); an object or a dict with "logits"
            `[N, Q, C]` and "pred_boxes" `[N, Q, 4]`, centre and sides as shares of the image (Transformers); or a
            tensor, also first in a tuple, `[N, 4 + C, anchors]` of centre, sides and probabilities, or
            `[N, M, 6 + ...]` of corners, score and class (Ultralytics without suppression). Of the last two the latter
            is the one whose last dimension is the shorter and holds whole numbers where classes are.
        size: height and width of the images in pixels, for boxes that are shares of them.
        activation: what makes probabilities of "logits": a "softmax" with "no object" as the last class (DETR, YOLOS),
            or a "sigmoid" (Deformable DETR, RT-DETR).
        classes: number of classes in `[N, 4 + C + ..., anchors]`, where other numbers follow; None for all.

    Raises:
        InputError: an output of another kind, or no size where it is needed.
    """
    if isinstance(output, (list, tuple)) and all(isinstance(one, Mapping) and "boxes" in one for one in output):
        return [_labelled(one["boxes"], one["scores"], one["labels"]) for one in output]
    logits, shares = (_field(output, name) for name in ("logits", "pred_boxes"))
    if logits is not None and shares is not None:
        return _of_queries(logits, shares, size, activation)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not leaves or leaves[0].dim() != 3 or min(leaves[0].shape[1:]) < 5:
        received = list(leaves[0].shape) if leaves else type(output).__name__
        raise InputError(
            "model must return detections, as dicts with 'boxes', 'scores' and 'labels', as 'logits' and 'pred_boxes', "
            f"or as [N, 4 + classes, anchors] or [N, detections, 6], got {received}"
        )
    return _of_anchors(leaves[0], classes)


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _labelled(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """Returns detections with one class each, whose score is also its objectness."""
    labels = labels.long()
    count = int(labels.max()) + 1 if len(labels) else 1
    return Detections(boxes, functional.one_hot(labels, count) * scores[:, None], scores, all_classes=False)


def _of_queries(
    logits: Tensor, shares: Tensor, size: tuple[int, int] | None, activation: Activation
) -> list[Detections]:
    if size is None:
        raise InputError("size must be the (height, width) of the images for boxes that are shares of them, got None")
    height, width = size
    corners = _corners(shares) * torch.as_tensor([width, height, width, height]).to(shares)
    if activation == "softmax":
        whole = logits.softmax(-1)
        probabilities, objectness = whole[..., :-1], 1 - whole[..., -1]
    else:
        probabilities = logits.sigmoid()
        objectness = probabilities.amax(-1)
    return [Detections(*parts) for parts in zip(corners, probabilities, objectness, strict=True)]


def _of_anchors(numbers: Tensor, classes: int | None) -> list[Detections]:
    if 6 <= numbers.shape[2] < numbers.shape[1] and bool((numbers[..., 5] == numbers[..., 5].round()).all()):
        return [_labelled(image[:, :4], image[:, 4], image[:, 5]) for image in numbers]
    rows = numbers.mT
    probabilities = rows[..., 4:] if classes is None else rows[..., 4 : 4 + classes]
    parts = zip(_corners(rows[..., :4]), probabilities, probabilities.amax(-1), strict=True)
    return [Detections(*part) for part in parts]


def _corners(boxes: Tensor) -> Tensor:
    """Returns the corners of boxes given by centre and sides, `[..., 4]`."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Returns the intersections over unions of boxes `[M, 4]` and `[K, 4]`, `[M, K]`; 0 for two without an area."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - shared
    return shared / union.clamp_min(torch.finfo(union.dtype).tiny)


def largest(numbers: Tensor, detections: Detections) -> Tensor:
    """Returns the largest of numbers `[M, K]` over M detections, `[K]`; zeros, which depend on them, where M is 0."""
    return numbers.amax(0) if len(numbers) else detections.probabilities.sum().expand(numbers.shape[1])


def check_boxes(boxes: Tensor | Sequence[Any]) -> Tensor:
    """Returns boxes as a floating-point tensor.

    Raises:
        InputError: not `[4]`, `[N, 4]` or `[N, K, 4]`, or a corner that is not below and right of the other.
    """
    made = torch.as_tensor(boxes)
    made = made if made.is_floating_point() else made.float()
    if made.dim() not in (1, 2, 3) or made.shape[-1] != 4 or not made.numel():
        raise InputError(f"boxes must be [4], [N, 4] or [N, K, 4], got {list(made.shape)}")
    if not bool((made[..., 2:] > made[..., :2]).all()):
        raise InputError("boxes must be corners (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got another order")
    return made
