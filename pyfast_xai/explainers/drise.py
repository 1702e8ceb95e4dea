"""D-RISE (Petsiuk et al., 2021): random masks, each weighted by how well it leaves a detection."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.detections import Detections, largest, overlaps
from pyfast_xai.explainers.common.perturbation_explainer import PerturbationSettings
from pyfast_xai.explainers.common.targets import Goal, TargetByImage
from pyfast_xai.explainers.detection_target import DetectionTarget
from pyfast_xai.explainers.rise import RISE
from pyfast_xai.explanation import Explanation


class DRISE(RISE):
    """Random masks, averaged with the similarity of what is detected behind them as weights (Petsiuk et al., 2021).

    A mask weighs as much as the most similar detection behind it, `max_j IoU(b, b_j) cos(P, P_j) O_j`, with b
    the box that is explained, P the probabilities of its classes, and O the objectness of a detection: the probability
    that there is an object, where the detector says it, else that of its largest class. Masks are those of `RISE`.

    Args:
        model: a detector in evaluation mode, see `DetectionTarget` for what it may return.
        n_masks: number of masks.
        cells: along each side of the grid.
        p1: probability that a cell is open.
        seed: seed of the masks; the process's own random numbers are not touched.
        **settings: those of `Perturbation`; `score` changes nothing.

    The target is a `DetectionTarget`, or None for the strongest detection of each image. Without `probabilities` the
    class counts as certain.

    An explanation has `signed_map`, the weighted mean `[N, H, W]`, never negative here, and `heatmap`.

    Raises:
        InputError: a setting that does not exist; when called, a target of another kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import DRISE, DetectionTarget
        >>> class Detector(nn.Module):
        ...     def forward(self, x):
        ...         light = x.mean((1, 2, 3))
        ...         box, label = torch.tensor([[2.0, 2, 14, 14]]), torch.tensor([1])
        ...         return [{"boxes": box, "scores": score[None], "labels": label} for score in light]
        >>> explain = DRISE(Detector().eval(), n_masks=16, cells=4)
        >>> explain(torch.rand(2, 3, 16, 16), DetectionTarget([2, 2, 14, 14], 1)).heatmap.shape
        torch.Size([2, 16, 16])
    """

    method = "d-rise"
    ranks = (4,)
    paper = "Black-box explanation of object detectors via saliency maps (Petsiuk et al., 2021)"
    needs_detections = True

    def __init__(
        self,
        model: nn.Module,
        *,
        n_masks: int = 5000,
        cells: int = 16,
        p1: float = 0.5,
        seed: int = 0,
        **settings: Unpack[PerturbationSettings],
    ) -> None:
        super().__init__(model, n_masks=n_masks, cells=cells, p1=p1, seed=seed, **settings)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        if target is None:
            output = self.record(images, *args, **kwargs).result
            height, width = images.shape[2:]
            target = DetectionTarget.strongest(output, size=(height, width))
        if not isinstance(target, DetectionTarget):
            raise InputError(f"target must be a DetectionTarget or None for d-rise, got {type(target).__name__}")
        return super()._explain(images, _Similarity(target), args, kwargs)


class _Similarity(TargetByImage):
    """Returns the similarity of the most similar detection to that of each image."""

    def __init__(self, target: DetectionTarget) -> None:
        self.target = target

    def rows(self, rows: Tensor) -> "_Similarity":
        """Returns that of some of the images."""
        return _Similarity(self.target.rows(rows))

    def zero_reasons(self, output: Any) -> dict[int, str]:
        """Returns the reasons of the target."""
        return self.target.zero_reasons(output)

    def __call__(self, output: Any) -> Tensor:
        """Returns the similarities `[N]`, or of K boxes `[N, K]`; 0 where nothing is detected."""
        images = self.target.detections(output)
        each = zip(images, self.target.of_each_image(len(images)), strict=True)
        return self.target.as_given(
            torch.stack([_similarities(detections, boxes, vectors) for detections, (boxes, _, vectors) in each])
        )


def _similarities(detections: Detections, boxes: Tensor, vectors: Tensor) -> Tensor:
    """Returns the similarity of the most similar detection to each of K boxes, `[K]`."""
    width = max(vectors.shape[1], detections.probabilities.shape[1])
    vectors, of_detections = (
        functional.pad(part.to(detections.probabilities), (0, width - part.shape[1]))
        for part in (vectors, detections.probabilities)
    )
    tiny = torch.finfo(vectors.dtype).tiny
    alike = functional.cosine_similarity(of_detections[:, None], vectors[None], dim=-1, eps=tiny)
    at = overlaps(detections.boxes, boxes.to(detections.boxes))
    return largest(at * alike * detections.objectness[:, None], detections)
