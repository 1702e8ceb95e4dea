"""The score of a box and its class as a target, for detectors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.detections import (
    ACTIVATIONS,
    Activation,
    Detections,
    check_boxes,
    detections_in,
    largest,
    overlaps,
)
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.targets import TargetByImage

WAY_OUT = "explain a box and a class that the model detects, as DetectionTarget.strongest(model(images)) takes them"


class DetectionTarget(TargetByImage):
    """The score of a class at a box: the largest product of overlap and probability over all detections.

    With `b_j` the boxes that a detector returns for an image and `p_j` their probabilities, the target of box b and
    class c is `max_j IoU(b, b_j) p_j(c)`. Where nothing overlaps the box, or nothing has the class, it is zero. The
    gradient is that of the probability: the overlap of a box with itself has its maximum there, and no direction.

    It is the `target` of every explainer that takes functions: gradients, class activation maps, perturbations. K boxes
    an image are K rows of the explanation, image by image, from one forward and one walk.

    Args:
        boxes: corners (x0, y0, x1, y1) in pixels of the images: `[N, 4]`, `[N, K, 4]`, or `[4]` for all images.
        classes: `[N]` or `[N, K]` indices, or one for all boxes, as the detector counts them.
        probabilities: probabilities of the classes in each box, `[N, C]` or `[N, K, C]`, which D-RISE compares; None
            where each is certain.
        size: height and width of the images in pixels; needed for detectors whose boxes are shares of them (DETR).
        activation: what makes probabilities of "logits" beside "pred_boxes": a "softmax" with "no object" as the last
            class (DETR, YOLOS), or a "sigmoid" (Deformable DETR, RT-DETR).
        n_classes: classes of a detector that returns `[N, 4 + classes + ..., anchors]` with other numbers behind them
            (masks, key points); None where there are none.

    What a detector may return is a list of dicts with "boxes", "scores" and "labels" (torchvision), an object or dict
    with "logits" and "pred_boxes" (Transformers), `[N, 4 + classes, anchors]` or `[N, detections, 6]` (Ultralytics).

    Raises:
        InputError: boxes or classes of another shape; when called, an output of another kind or number of images.

    Example:
        >>> import torch
        >>> from pyfast_xai import DetectionTarget
        >>> found = {"boxes": [[0.0, 0, 8, 8]], "scores": [0.5], "labels": [2]}
        >>> output = [{name: torch.tensor(numbers) for name, numbers in found.items()}]
        >>> DetectionTarget([[0, 0, 8, 4]], [2])(output)
        tensor([0.2500])
    """

    def __init__(
        self,
        boxes: Tensor | Sequence[Any],
        classes: Tensor | Sequence[int] | int,
        probabilities: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        activation: Activation = "softmax",
        n_classes: int | None = None,
    ) -> None:
        self.boxes = check_boxes(boxes)
        self.classes = torch.as_tensor(classes)
        if self.classes.is_floating_point() or self.classes.is_complex() or bool((self.classes < 0).any()):
            raise InputError(f"classes must be indices of 0 or larger, got {classes!r}")
        if self.classes.dim() and self.classes.shape != self.boxes.shape[:-1]:
            raise InputError(
                f"classes must be one for each box, {list(self.boxes.shape[:-1])}, got {list(self.classes.shape)}"
            )
        self.classes = self.classes.long().expand(self.boxes.shape[:-1])
        if probabilities is not None and probabilities.shape[:-1] != self.boxes.shape[:-1]:
            raise InputError(
                f"probabilities must be one row for each box, {[*self.boxes.shape[:-1], 'C']}, "
                f"got {list(probabilities.shape)}"
            )
        self.probabilities = probabilities
        self.size, self.activation, self.n_classes = size, one_of("activation", activation, ACTIVATIONS), n_classes

    @classmethod
    def strongest(
        cls,
        output: Any,
        *,
        count: int | None = None,
        size: tuple[int, int] | None = None,
        activation: Activation = "softmax",
        n_classes: int | None = None,
    ) -> "DetectionTarget":
        """Returns the target of the detection of each image whose class has the largest probability.

        Args:
            output: what a detector returned for images.
            count: K for the K such detections of each image, as boxes `[N, K, 4]`; None for one, `[N, 4]`.
            size: height and width of the images in pixels, see the class.
            activation: what makes probabilities of "logits", see the class.
            n_classes: classes of the detector, see the class.

        Raises:
            InputError: an image with fewer detections, or an output of another kind.
        """
        images = detections_in(output, size, activation, n_classes)
        needed = at_least(1, "count", 1 if count is None else count)
        for place, detections in enumerate(images):
            if len(detections.boxes) < needed:
                raise InputError(
                    f"output must have {'a detection' if needed == 1 else f'{needed} detections'} for every image, "
                    f"got {len(detections.boxes) or 'none'} for image {place}"
                )
        best = [detections.probabilities.amax(1).topk(needed).indices for detections in images]
        boxes = torch.stack(
            [detections.boxes[places].detach() for detections, places in zip(images, best, strict=True)]
        )
        rows = [detections.probabilities[places].detach() for detections, places in zip(images, best, strict=True)]
        width = max(row.shape[1] for row in rows)
        vectors = torch.stack([functional.pad(row, (0, width - row.shape[1])) for row in rows])
        if count is None:
            boxes, vectors = boxes[:, 0], vectors[:, 0]
        return cls(boxes, vectors.argmax(-1), vectors, size=size, activation=activation, n_classes=n_classes)

    def rows(self, rows: Tensor) -> "DetectionTarget":
        """Returns the target of some of the images, int64 `[M]`."""
        if self.boxes.dim() == 1:
            return self
        rows = rows.to(self.boxes.device)
        return DetectionTarget(
            self.boxes[rows],
            self.classes[rows],
            None if self.probabilities is None else self.probabilities[rows.to(self.probabilities.device)],
            size=self.size,
            activation=self.activation,
            n_classes=self.n_classes,
        )

    def detections(self, output: Any) -> list[Detections]:
        """Returns the detections of each image in what the detector returned.

        Raises:
            InputError: there are more or fewer images than boxes.
        """
        images = detections_in(output, self.size, self.activation, self.n_classes)
        if self.boxes.dim() > 1 and len(self.boxes) != len(images):
            raise InputError(f"boxes must be one for each of {len(images)} images, got {len(self.boxes)}")
        return images

    def of_each_image(self, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the boxes `[K, 4]`, their classes `[K]` and probabilities `[K, C]` of each of so many images."""
        vectors = functional.one_hot(self.classes) if self.probabilities is None else self.probabilities
        lead = (*self.boxes.shape[:-1], 1, 1)[:2]
        parts = (part.view(*lead, *part.shape[self.boxes.dim() - 1 :]) for part in (self.boxes, self.classes, vectors))
        return zip(*(part.expand(count, *part.shape[1:]) for part in parts), strict=True)

    def __call__(self, output: Any) -> Tensor:
        """Returns the score of the box of each image, `[N]`, or of its K, `[N, K]`, in what the detector returned."""
        images = self.detections(output)
        scores = []
        for detections, (boxes, classes, _) in zip(images, self.of_each_image(len(images)), strict=True):
            at = overlaps(detections.boxes.detach(), boxes.to(detections.boxes))
            scores.append(largest(at * detections.of_classes(classes), detections))
        return self.as_given(torch.stack(scores))

    def zero_reasons(self, output: Any) -> dict[int, str]:
        """Returns which boxes no detection overlaps, or none of their class, in what the detector returned."""
        images = self.detections(output)
        reasons: dict[int, str] = {}
        for n, (detections, (boxes, classes, _)) in enumerate(
            zip(images, self.of_each_image(len(images)), strict=True)
        ):
            at = overlaps(detections.boxes, boxes.to(detections.boxes))
            for k, row in enumerate(range(n * len(boxes), (n + 1) * len(boxes))):
                if not bool(at[:, k].any()):
                    reasons[row] = f"no detection overlaps its box; {WAY_OUT}"
                elif not bool((at * detections.of_classes(classes))[:, k].any()):
                    reasons[row] = f"no detection that overlaps its box has its class; {WAY_OUT}"
        return reasons

    def as_given(self, numbers: Tensor) -> Tensor:
        """Returns numbers `[N, K]` of boxes `[N, K, 4]` as they are, and those of one box an image as `[N]`."""
        return numbers if self.boxes.dim() == 3 else numbers[:, 0]
