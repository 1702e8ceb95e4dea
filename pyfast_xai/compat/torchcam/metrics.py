"""The metrics of torch-cam 0.5 (`torchcam.metrics`) with its signatures and numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.compat.recording import evaluating
from pyfast_xai.compat.torchcam.extractors import InputTypeError, OutputTarget, scores_of
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import broadcast
from pyfast_xai.explainers.common.layer_explainer import resized

Chosen = int | list[int] | None


class NotUpdatedError(InputError, AssertionError):
    """A metric has seen no image yet; an AssertionError as well, as torch-cam raises.

    Example:
        >>> from pyfast_xai.compat.torchcam.metrics import ClassificationMetric
        >>> ClassificationMetric(None).summary()
        Traceback (most recent call last):
        pyfast_xai.compat.torchcam.metrics.NotUpdatedError: update must be called before summary, got no image yet
    """


@dataclass
class _Batch:
    """The images that have a map without NaN, with that and their scores."""

    images: Tensor
    cams: Tensor  # at the size of the images
    scores: Tensor
    classes: list[int] | None
    targets: list[OutputTarget] | None
    rows: Tensor  # their places among all images of the call
    count: int  # of all images of the call


class _Metric:
    """Base of metrics that add up over batches.

    Args:
        cam_extractor: whose model and maps are measured.
        logits_fn: makes scores of what the model returns, as a softmax; None for that itself.
    """

    def __init__(self, cam_extractor: Any, logits_fn: Callable[[Any], Any] | None = None) -> None:
        self.cam_extractor, self.logits_fn = cam_extractor, logits_fn
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.total = self.nan_count = 0

    def update(
        self,
        input_tensor: Tensor,
        class_idx: Chosen = None,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
    ) -> None:
        """Measures a batch of images.

        Args:
            input_tensor: `[N, C, ...]`, as the model takes them.
            class_idx: the class, or one an image; None for the largest score of each.
            targets: instead of a class, a function of the output for an image, or one an image.

        Raises:
            InputError: classes and targets, or ones that do not fit.
        """
        if targets is not None and class_idx is not None:
            raise InputError("class_idx or targets must be given, not both")
        if input_tensor.dim() not in (3, 4, 5):
            raise InputError(f"input_tensor must be [N, C, ...] with 1D, 2D or 3D maps, got {list(input_tensor.shape)}")
        if isinstance(class_idx, list):
            if not all(isinstance(index, int) and not isinstance(index, bool) for index in class_idx):
                raise InputTypeError(f"class_idx must hold ints, got {class_idx!r}")
            if len(class_idx) != len(input_tensor):
                raise InputError(
                    f"class_idx must have one class for each of {len(input_tensor)} images, got {class_idx}"
                )
        with evaluating(self.cam_extractor.model):
            batch = self._batch(input_tensor, class_idx, targets)
            if batch is not None:
                self._measure(batch)
                self.total += len(batch.images)

    def _batch(self, images: Tensor, class_idx: Chosen, targets: Any) -> _Batch | None:
        answers = self._answers(images)
        functions = [targets] * len(images) if callable(targets) else targets
        classes: list[int] | None = None
        if functions is None:
            if class_idx is None:
                class_idx = answers.argmax(-1).tolist()
            assert class_idx is not None
            classes = class_idx if isinstance(class_idx, list) else [class_idx] * len(images)
            cams = self.cam_extractor(class_idx, answers)
        else:
            cams = self.cam_extractor(scores=answers, targets=functions)
        cam = self.cam_extractor.fuse_cams(cams)
        scores = scores_of(classes, answers, functions, len(images)).flatten().detach()
        valid = (~cam.flatten(1).isnan().any(1)).nonzero()[:, 0]
        rows = valid.tolist()
        self.nan_count += len(images) - len(rows)
        if not rows:
            return None
        return _Batch(
            images[valid].detach(),
            resized(cam[valid][:, None], images.shape[2:])[:, 0],
            scores[valid],
            None if classes is None else [classes[row] for row in rows],
            None if functions is None else [functions[row] for row in rows],
            valid,
            len(images),
        )

    def _answers(self, images: Tensor) -> Any:
        answers = self.cam_extractor.model(images)
        return answers if self.logits_fn is None else self.logits_fn(answers)

    def _scores(self, batch: _Batch, images: Tensor, rows: list[int]) -> Tensor:
        """Returns the scores of changed images made of some rows, `[M]`, without a gradient and unseen by hooks."""
        classes = None if batch.classes is None else [batch.classes[row] for row in rows]
        functions = None if batch.targets is None else [batch.targets[row] for row in rows]
        with self.cam_extractor._hooks_off(), torch.no_grad():
            return scores_of(classes, self._answers(images), functions, len(images)).flatten()

    def _measure(self, batch: _Batch) -> None:
        raise NotImplementedError

    def _check_updated(self) -> None:
        if not self.total:
            raise NotUpdatedError("update must be called before summary, got no image yet")


class ClassificationMetric(_Metric):
    """Average drop and increase in confidence (Chattopadhay et al., 2018).

    The drop is the share of the score that is lost on the image times its map, with 1e-7 below; the increase counts the
    images that gain.

    Args:
        cam_extractor: whose model and maps are measured.
        logits_fn: makes scores of what the model returns, as a softmax; None for that itself.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import LayerCAM
        >>> from pyfast_xai.compat.torchcam.metrics import ClassificationMetric
        >>> with LayerCAM(demo.load(), "block") as extractor:
        ...     metric = ClassificationMetric(extractor, lambda logits: logits.softmax(-1))
        ...     metric.update(torch.rand(2, 3, 96, 96, requires_grad=True))
        >>> sorted(metric.summary())
        ['avg_drop', 'conf_increase']
    """

    def reset(self) -> None:
        """Forgets all images."""
        super().reset()
        self.drop = self.increase = 0.0

    def _measure(self, batch: _Batch) -> None:
        masked = self._scores(batch, batch.cams[:, None] * batch.images, list(range(len(batch.images))))
        self.drop += float(((batch.scores - masked).clamp_min(0) / (batch.scores + 1e-7)).sum())
        self.increase += float((batch.scores < masked).sum())

    def summary(self) -> dict[str, float]:
        """Returns "avg_drop" and "conf_increase" over all images.

        Raises:
            NotUpdatedError: there was no image.
        """
        self._check_updated()
        return {"avg_drop": self.drop / self.total, "conf_increase": self.increase / self.total}


class DeletionInsertionMetric(_Metric):
    """The areas under the scores as pixels are deleted or inserted, largest first (Petsiuk et al., 2018).

    Args:
        cam_extractor: whose model and maps are measured.
        logits_fn: makes scores of what the model returns, as a softmax; None for that itself.
        steps: at most so many.
        baseline: baseline of deleted pixels, a tensor that broadcasts to the images or a function of them; None for 0.
        batch_size: images that go through the model at once.

    Raises:
        InputError: a setting out of range.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.torchcam import LayerCAM
        >>> from pyfast_xai.compat.torchcam.metrics import DeletionInsertionMetric
        >>> with LayerCAM(demo.load(), "block") as extractor:
        ...     metric = DeletionInsertionMetric(extractor, lambda logits: logits.softmax(-1), steps=4)
        ...     metric.update(torch.rand(2, 3, 96, 96, requires_grad=True))
        >>> sorted(metric.summary())
        ['deletion_auc', 'insertion_auc']
    """

    def __init__(
        self,
        cam_extractor: Any,
        logits_fn: Callable[[Any], Any] | None = None,
        *,
        steps: int = 20,
        baseline: Tensor | Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 32,
    ) -> None:
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputTypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if baseline is not None and not isinstance(baseline, Tensor) and not callable(baseline):
            raise InputTypeError(f"baseline must be a tensor, a function or None, got {type(baseline).__name__}")
        self.steps, self.baseline, self.batch_size = steps, baseline, batch_size
        super().__init__(cam_extractor, logits_fn)

    def reset(self) -> None:
        """Forgets all images."""
        super().reset()
        self.deletion = self.insertion = 0.0

    def _measure(self, batch: _Batch) -> None:
        images, baseline = batch.images.flatten(2), self._baseline(batch).flatten(2)
        positions = images.shape[2]
        step = -(-positions // self.steps)
        counts = torch.tensor([*range(0, positions, step), positions], device=images.device)
        ranks = batch.cams.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        curves = batch.scores.new_empty(2, len(images), len(counts))  # deletion, insertion
        curves[0, :, 0] = curves[1, :, -1] = batch.scores
        # The image without any pixel ends the one and begins the other.
        places = torch.cartesian_prod(*(torch.arange(size) for size in (2, len(images), len(counts))))
        inner = (places[:, 2] > 0) & ((places[:, 0] == 0) | (places[:, 2] < len(counts) - 1))
        for part in places[inner].to(images.device).split(self.batch_size):
            kind, row, point = part.unbind(1)
            shown = (ranks[row] < counts[point, None]) == (kind[:, None] == 1)
            changed = torch.where(shown[:, None], images[row], baseline[row]).view(-1, *batch.images.shape[1:])
            curves[kind, row, point] = self._scores(batch, changed, row.tolist())
        curves[1, :, 0] = curves[0, :, -1]
        areas = torch.trapezoid(curves, (counts.float() / positions).to(curves), dim=2).sum(1)
        self.deletion += float(areas[0])
        self.insertion += float(areas[1])

    def _baseline(self, batch: _Batch) -> Tensor:
        images = batch.images
        if self.baseline is None:
            return torch.zeros_like(images)
        with torch.no_grad():
            baseline = self.baseline if isinstance(self.baseline, Tensor) else self.baseline(images)
        if not isinstance(baseline, Tensor):
            raise InputTypeError(f"baseline must return a tensor, got {type(baseline).__name__}")
        if isinstance(self.baseline, Tensor) and baseline.dim() == images.dim() and len(baseline) == batch.count:
            baseline = baseline[batch.rows.to(baseline.device)]
        return broadcast(baseline, images)

    def summary(self) -> dict[str, float]:
        """Returns "deletion_auc" and "insertion_auc", means over all images.

        Raises:
            NotUpdatedError: there was no image.
        """
        self._check_updated()
        return {"deletion_auc": self.deletion / self.total, "insertion_auc": self.insertion / self.total}
