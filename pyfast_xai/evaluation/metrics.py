"""The metrics of an explanation, by name.

Every metric here is a function of a sum over pictures: a mean, or a curve that is read once the pictures are added up.
So an interval costs a matrix product: pictures are drawn again and again, and the sums with them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai import metrics
from pyfast_xai.evaluation.annotations import Annotation
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess

NEEDS = ("boxes", "label", "mask")


@dataclass
class Part:
    """Some pictures with their explanations.

    Attributes:
        model: the model that was explained.
        make: makes the explainer for a model.
        explainer: the explainer of the pictures.
        explanation: its explanation, a row a picture.
        images: `[N, C, H, W]`, as the model took them.
        target: the explained classes, int64 `[N]`.
        predicted: the classes with the largest output, int64 `[N]`.
        labels: the right classes, int64 `[N]`; -1 where it is not known.
        truth: the annotations.
        sizes: (W, H) of the pictures.
        preprocess: how pictures became images.
    """

    model: nn.Module
    make: Callable[[nn.Module], Explainer]
    explainer: Explainer
    explanation: Explanation
    images: Tensor
    target: Tensor
    predicted: Tensor
    labels: Tensor
    truth: Sequence[Annotation]
    sizes: Sequence[tuple[int, int]]
    preprocess: Preprocess

    @cached_property
    def boxes(self) -> Tensor:
        """Returns the explanation's boxes in pixels of the pictures, `[N, 4]`."""
        boxes = self.explanation.boxes()
        placed = [self.preprocess.boxes_in(box[None], size) for box, size in zip(boxes, self.sizes, strict=True)]
        return torch.cat(placed)

    @cached_property
    def peaks(self) -> Tensor:
        """Returns the largest pixel of each map, in pixels of the pictures, (y, x) `[N, 2]`."""
        peaks = self.explanation.peak()
        placed = [self.preprocess.points_in(peak[None], size) for peak, size in zip(peaks, self.sizes, strict=True)]
        return torch.cat(placed)

    @cached_property
    def visible_boxes(self) -> list[Tensor]:
        """Returns the objects' boxes in pixels of the images, as far as they are seen."""
        return [
            self.preprocess.visible_boxes(annotation.boxes, size)
            for annotation, size in zip(self.truth, self.sizes, strict=True)
        ]

    @cached_property
    def visible_masks(self) -> Tensor:
        """Returns the objects' pixels, bool `[N, H, W]`."""
        plain = replace(self.preprocess, interpolation="nearest")
        masks = [
            plain.shown(annotation.mask(size).convert("RGB"))
            for annotation, size in zip(self.truth, self.sizes, strict=True)
        ]
        return torch.stack(masks)[:, 0] > 0.5

    def only(self, rows: list[int]) -> "Part":
        """Returns some of the pictures."""
        index = torch.tensor(rows, device=self.images.device)
        tensors = {name: getattr(self, name)[index] for name in ("images", "target", "predicted", "labels")}
        lists: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in ("truth", "sizes")}
        return replace(self, explanation=self.explanation[rows], **tensors, **lists)

    def having(self, need: str) -> Tensor:
        """Returns the pictures that have what a metric needs, bool `[N]`."""
        if need == "label":
            return self.labels >= 0
        return torch.tensor(
            [len(annotation.boxes if need == "boxes" else annotation.shapes) > 0 for annotation in self.truth]
        )


Rows = Callable[[Part], Tensor]
Reduce = Callable[[Tensor, Tensor], Tensor]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count


@dataclass(frozen=True)
class Metric:
    """A metric of explanations of annotated pictures.

    Attributes:
        name: on the command line.
        title: in tables.
        rows: numbers of each picture, `[N, ...]`; NaN for a picture that does not count.
        needs: what a picture must have to count: "boxes", "label", "mask".
        better: "lower" or "higher".
        percent: shown as a percentage.
        reduce: from sums `[R, ...]` over `[R]` pictures to R figures; a mean by default.
        slow: explains pictures again, ten times and more.
    """

    name: str
    title: str
    rows: Rows
    needs: tuple[str, ...] = ()
    better: str = "higher"
    percent: bool = False
    reduce: Reduce = _mean
    slow: bool = False

    def shown(self, value: float) -> str:
        """Returns a figure as tables have it."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"


def _box_error(part: Part) -> Tensor:
    return 1 - metrics.box_correct(part.boxes, [annotation.boxes for annotation in part.truth]).float()


def _top1_box_error(part: Part) -> Tensor:
    return torch.where(part.predicted == part.labels, _box_error(part), 1.0)


def _pointing(part: Part, tolerance: float) -> Tensor:
    truth = [annotation.boxes for annotation in part.truth]
    return metrics.pointing_hit(part.peaks, truth, tolerance=tolerance).float()


def _box_accuracy(part: Part, kind: type[metrics.MaxBoxAcc]) -> Tensor:
    """Returns whether a box is right at each least overlap and each threshold, `[N, I, T]`."""
    rows = []
    for heat, boxes in zip(part.explanation.heatmap, part.visible_boxes, strict=True):
        metric = kind()
        if len(boxes) == 0:
            # The crop shows nothing of the object.
            rows.append(torch.zeros(metric.correct.shape))
            continue
        metric.update(heat[None], [boxes])
        rows.append(metric.correct.float().cpu())
    return torch.stack(rows)


def _best_threshold(total: Tensor, count: Tensor) -> Tensor:
    return (total / count[:, None, None]).amax(2).mean(1)


def _pixels(part: Part) -> Tensor:
    rows = []
    for heat, mask in zip(part.explanation.heatmap, part.visible_masks, strict=True):
        metric = metrics.PxAP()
        metric.update(heat[None], mask[None].to(heat.device))
        rows.append(metric.counts.cpu())
    return torch.stack(rows)


def _pixel_reduce(metric: type[metrics.PxAP | metrics.PrecisionAtEER]) -> Reduce:
    def reduce(total: Tensor, count: Tensor) -> Tensor:
        figures = []
        for counts in total.round().long():
            counter = metric()
            counter.counts = counts
            figures.append(counter.compute().double() if int(counts[0].sum()) else torch.tensor(torch.nan))
        return torch.stack(figures)

    return reduce


def _on_mask(measure: Callable[[Tensor, Tensor], Tensor]) -> Rows:
    """Returns the rows of a metric of maps and masks; a crop that shows nothing of the object has no value."""
    return lambda part: measure(part.explanation.heatmap, part.visible_masks.to(part.explanation.heatmap.device))


def _attributions(part: Part) -> Tensor:
    """Returns signed attributions where the method has them, else heat maps."""
    attribution = part.explanation.attribution
    return part.explanation.heatmap if attribution is None else attribution


def _class_sensitivity(part: Part) -> Tensor:
    classes = metrics.scorer.Scorer(part.model, part.images).columns.shape[1]
    # Any two classes but the one that is seen, the same for every method.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(len(part.images), classes, generator=generator)
    pairs = drawn.scatter(1, part.predicted[:, None].cpu(), -1.0).topk(2, 1).indices
    return metrics.class_sensitivity(part.explainer, part.images, pairs.to(part.images.device))


def _randomization(part: Part) -> Tensor:
    outcome = metrics.parameter_randomization(
        part.model, part.make, part.images, part.target, layers=("",), similarities=("rank",)
    )
    return outcome.similarity["rank"][0].abs()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("box-error", "box error, %", _box_error, ("boxes",), "lower", True),
        Metric("top1-box-error", "top-1 box error, %", _top1_box_error, ("boxes", "label"), "lower", True),
        Metric(
            *("best-box-error", "box error at the best threshold, %"),
            lambda part: _box_accuracy(part, metrics.MaxBoxAcc),
            needs=("boxes",),
            better="lower",
            percent=True,
            reduce=lambda total, count: 1 - _best_threshold(total, count),
        ),
        Metric(
            *("max-box-acc", "MaxBoxAccV2, %"),
            lambda part: _box_accuracy(part, metrics.MaxBoxAccV2),
            needs=("boxes",),
            percent=True,
            reduce=_best_threshold,
        ),
        Metric("pointing", "pointing, %", lambda part: _pointing(part, 0), ("boxes",), "higher", True),
        Metric("pointing-15", "pointing within 15 px, %", lambda part: _pointing(part, 15), ("boxes",), percent=True),
        Metric("pxap", "PxAP, %", _pixels, ("mask",), "higher", True, _pixel_reduce(metrics.PxAP)),
        Metric(
            *("eer-precision", "precision at EER, %", _pixels, ("mask",), "higher", True),
            reduce=_pixel_reduce(metrics.PrecisionAtEER),
        ),
        Metric(
            *("deletion", "deletion AUC"),
            lambda part: metrics.deletion(part.model, part.images, part.explanation.heatmap, part.target).auc,
            better="lower",
        ),
        Metric(
            *("insertion", "insertion AUC"),
            lambda part: metrics.insertion(part.model, part.images, part.explanation.heatmap, part.target).auc,
        ),
        Metric(
            *("average-drop", "average drop, %"),
            lambda part: metrics.drop_increase(part.model, part.images, part.explanation.heatmap, part.target).drop,
            better="lower",
            percent=True,
        ),
        Metric(
            *("increase", "increase, %"),
            lambda part: metrics.drop_increase(
                part.model, part.images, part.explanation.heatmap, part.target
            ).increase.float(),
            percent=True,
        ),
        Metric(
            *("road", "ROAD"),
            lambda part: metrics.road(part.model, part.images, part.explanation.heatmap, part.target).combined,
        ),
        Metric(
            *("region-perturbation", "region perturbation, AOPC"),
            lambda part: (
                metrics.region_perturbation(
                    part.model, part.images, part.explanation.heatmap, part.target, patch=16, score="probability"
                ).aopc
            ),
        ),
        Metric(
            *("irof", "IROF"),
            lambda part: metrics.irof(part.model, part.images, part.explanation.heatmap, part.target),
        ),
        Metric(
            *("faithfulness-correlation", "faithfulness correlation"),
            lambda part: metrics.faithfulness_correlation(part.model, part.images, _attributions(part), part.target),
        ),
        Metric(
            *("mu-fidelity", "MuFidelity"),
            lambda part: metrics.mu_fidelity(part.model, part.images, _attributions(part), part.target),
        ),
        Metric(
            *("arcc", "ARCC"),
            lambda part: (
                metrics.arcc(part.model, part.explainer, part.images, part.explanation.heatmap, part.target).score
            ),
        ),
        Metric("relevance-mass", "relevance mass, %", _on_mask(metrics.relevance_mass), ("mask",), percent=True),
        Metric("relevance-rank", "relevance rank, %", _on_mask(metrics.relevance_rank), ("mask",), percent=True),
        Metric("mask-auc", "mask AUC", _on_mask(metrics.mask_auc), ("mask",)),
        Metric("sparseness", "sparseness", lambda part: metrics.sparseness(part.explanation.heatmap)),
        Metric("complexity", "complexity", lambda part: metrics.complexity(part.explanation.heatmap), better="lower"),
        Metric("class-sensitivity", "class sensitivity", _class_sensitivity),
        Metric(
            *("random-logit", "likeness, another class"),
            lambda part: metrics.random_logit(part.model, part.explainer, part.images, part.target),
            better="lower",
        ),
        Metric("randomization", "likeness, random weights", _randomization, better="lower"),
        Metric(
            *("max-sensitivity", "max-sensitivity"),
            lambda part: metrics.max_sensitivity(part.explainer, part.images, part.target),
            better="lower",
            slow=True,
        ),
        Metric(
            *("average-sensitivity", "average sensitivity"),
            lambda part: metrics.average_sensitivity(part.explainer, part.images, part.target),
            better="lower",
            slow=True,
        ),
    )
}
