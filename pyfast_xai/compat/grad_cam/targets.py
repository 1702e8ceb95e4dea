"""The target classes of pytorch-grad-cam: the score to explain of the output for one image."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class ClassifierOutputTarget:
    """The score of a class.

    Args:
        category: its index.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputTarget
        >>> ClassifierOutputTarget(1)(torch.tensor([0.0, 3.0]))
        tensor(3.)
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category]


class ClassifierOutputSoftmaxTarget:
    """The probability of a class.

    Args:
        category: its index.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> ClassifierOutputSoftmaxTarget(1)(torch.zeros(4))
        tensor(0.2500)
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)[..., self.category]


class ClassifierOutputReST:
    """The score of a class plus its log-probability (arXiv 2501.06261).

    Args:
        category: its index.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputReST
        >>> ClassifierOutputReST(1)(torch.zeros(4)).shape
        torch.Size([])
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category] + functional.log_softmax(model_output, -1)[..., self.category]


class BinaryClassifierOutputTarget:
    """The only score of a binary classifier, for one class or against.

    Args:
        category: 1, or anything else for the other class.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import BinaryClassifierOutputTarget
        >>> BinaryClassifierOutputTarget(0)(torch.tensor([2.0]))
        tensor([-2.])
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """All probabilities.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import SoftmaxOutputTarget
        >>> SoftmaxOutputTarget()(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output as it is.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import RawScoresOutputTarget
        >>> RawScoresOutputTarget()(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output


class SemanticSegmentationTarget:
    """The scores of a class, added up over some pixels.

    Args:
        category: its index.
        mask: mask of the pixels, `[H, W]`.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import SemanticSegmentationTarget
        >>> SemanticSegmentationTarget(1, np.ones((2, 2), np.float32))(torch.ones(3, 2, 2))
        tensor(4.)
    """

    def __init__(self, category: int, mask: np.ndarray) -> None:
        self.category, self.mask = category, torch.from_numpy(mask)

    def __call__(self, model_output: Tensor) -> Tensor:
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


class FasterRCNNBoxScoreTarget:
    """The agreement with known boxes: overlap and score of the best new box of the same label.

    A box that overlaps with none by enough, or with one of another label, counts nothing.

    Args:
        labels: labels of the boxes.
        bounding_boxes: each `[4]`, corners (x0, y0, x1, y1).
        iou_threshold: the overlap from which a box is found.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import FasterRCNNBoxScoreTarget
        >>> boxes = torch.tensor([[0.0, 0, 10, 10]])
        >>> output = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.75])}
        >>> float(FasterRCNNBoxScoreTarget([1], [[0, 0, 10, 10]])(output))
        1.75
    """

    def __init__(
        self, labels: Sequence[int], bounding_boxes: Sequence[np.ndarray] | np.ndarray, iou_threshold: float = 0.5
    ) -> None:
        self.labels, self.bounding_boxes, self.iou_threshold = labels, bounding_boxes, iou_threshold

    def __call__(self, model_outputs: Mapping[str, Tensor]) -> Tensor:
        boxes = model_outputs["boxes"]
        total = boxes.new_zeros(1)
        if len(boxes) == 0:
            return total
        for box, label in zip(self.bounding_boxes, self.labels, strict=False):
            overlaps = _overlaps(torch.as_tensor(box, device=boxes.device, dtype=boxes.dtype), boxes)
            best = int(overlaps.argmax())
            if overlaps[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlaps[best] + model_outputs["scores"][best]
        return total


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Returns the intersection over union of a box `[4]` with others `[M, 4]`."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp_min(0)
    shared = sides.prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared)


class FinerWeightedTarget:
    """The score of a class over those of others, each weighed by its probability.

    Args:
        main_category: index of the class.
        comparison_categories: indices of the others.
        alpha: how much of theirs is taken off.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import FinerWeightedTarget
        >>> FinerWeightedTarget(0, [1, 2], alpha=0.6)(torch.tensor([2.0, 1.0, 1.0])).shape
        torch.Size([])
    """

    def __init__(self, main_category: int, comparison_categories: Sequence[int], alpha: float) -> None:
        self.main_category, self.comparison_categories, self.alpha = main_category, comparison_categories, alpha

    def __call__(self, model_output: Tensor) -> Tensor:
        others = list(self.comparison_categories)
        weights = model_output.softmax(-1)[..., others]
        over = model_output[..., [self.main_category]] - self.alpha * model_output[..., others]
        return (weights * over).sum(-1) / (weights.sum(-1) + 1e-9)
