"""Batches through an explainer: answers of the model, memory that runs out, and images that spoil a batch."""

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.datasets.color_swap import ColorSwapProbe
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.common.outputs import OutputKinds
from pyfast_xai.explainers.common.targets import Targets, class_columns, targets_of
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.explanation import Explanation

# Error messages of PyTorch, its libraries and Python for a lack of memory.
_OUT_OF_MEMORY = (
    *("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory"),
    *("failed to allocate", "bad_alloc", "can't start new thread"),
)


@dataclass
class BatchResult:
    """Some images of a batch, explained, or the error that came instead.

    Attributes:
        rows: which images of the batch.
        explanation: of these, in order; None where there is an error.
        finite: whether the outputs of the model for each are finite, bool `[N]`; None where they are not known.
        top: classes `[N, k]` and their probabilities `[N, k]`; None where the model gives no classes, or `top_k` is 0.
        swapped: what `ColorSwapProbe` returned; None without one, or where the model gives no classes.
        error: why there is no explanation.
        limit: images at a time when this was made.
    """

    rows: list[int]
    explanation: Explanation | None = None
    finite: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    swapped: tuple[Tensor, Tensor] | None = None
    error: Exception | None = None
    limit: int = 1


class BatchExplainer:
    """Explains batches, smaller ones once memory has run out.

    Args:
        explainer: of the model.
        top_k: how many classes come with each image; 0 for none.
        batch_size: images at a time, at most.
        probe: runs the model on every image with its colours swapped; None for no such runs.
    """

    def __init__(self, explainer: Explainer, top_k: int, batch_size: int, probe: ColorSwapProbe | None = None) -> None:
        self._explainer, self._top_k, self.batch_size, self._probe = explainer, top_k, batch_size, probe

    def __call__(self, images: Tensor, target: int | Sequence[int] | None) -> list[BatchResult]:
        """Explains images of one shape.

        A batch for which memory does not suffice is halved, and so are all that follow. One that fails in another way
        is halved until the images that fail stand alone. So every image comes back exactly one time.

        Args:
            images: `[N, C, H, W]`.
            target: see `Explainer`.
        """
        results: list[BatchResult] = []
        pending = [
            list(range(start, min(start + self.batch_size, len(images))))
            for start in range(0, len(images), self.batch_size)
        ]
        while pending:
            rows = pending.pop(0)
            if len(rows) > self.batch_size:
                pending[:0] = [rows[: self.batch_size], rows[self.batch_size :]]
                continue
            part = images if len(rows) == len(images) else images[rows]
            targets = target if target is None or isinstance(target, int) else [target[row] for row in rows]
            error = None
            try:
                results.append(self._explain(rows, part, targets))
            except Exception as failure:  # explainers and models raise what they like
                # Its frames hold the tensors that must go.
                error = failure.with_traceback(None)
                error.__context__ = error.__cause__ = None
            if error is None:
                continue
            is_memory = out_of_memory(error)
            if is_memory:
                free()
            if len(rows) == 1:
                results.append(BatchResult(rows, error=error, limit=self.batch_size))
                continue
            half = (len(rows) + 1) // 2
            if is_memory:
                self.batch_size = half
            pending[:0] = [rows[:half], rows[half:]]
        return results

    def _explain(self, rows: list[int], images: Tensor, target: Any) -> BatchResult:
        # Where the method needs a layer alone, the rest of the model tells whether its answer is finite.
        with self._explainer.run_whole_model():
            explanation = self._explainer(images, target)
        if len(explanation) != len(images):
            raise InputError(f"method must give one row for each of {len(images)} images, got {len(explanation)}")
        targets = self._targets(images, explanation) if self._top_k else None
        top = swapped = None
        if targets is not None and targets.logits is not None and targets.kinds is not None:
            top = self._top(targets.logits, targets.kinds)
            if self._probe is not None:
                swapped = self._probe(images, top[0][:, 0], targets.kinds)
        outputs = explanation.logits if targets is None else targets.logits
        # The largest tensors are not needed any more.
        explanation.images = explanation.attribution = explanation.logits = None
        return BatchResult(rows, explanation, _finite(outputs, len(images)), top, swapped, limit=self.batch_size)

    def _targets(self, images: Tensor, explanation: Explanation) -> Targets | None:
        """Returns the outputs of the model for the images; None where these are no scores of classes."""
        if explanation.logits is not None and explanation.outputs is not None:
            return Targets(explanation.logits, kinds=OutputKinds.named(explanation.outputs, images.device))
        with contextlib.suppress(InputError):  # the method stopped below the outputs, or explained something else
            return targets_of(self._explainer.record(images), None, self._explainer.outputs)
        return None

    def _top(self, logits: Tensor, kinds: OutputKinds) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            shares = kinds.scores(class_columns(logits)).float()
            scores, classes = shares.topk(min(self._top_k, shares.shape[1]), 1)
        return outside_inference_mode(classes), outside_inference_mode(scores)


def _finite(logits: Tensor | None, count: int) -> Tensor | None:
    """Returns whether all outputs for each image are finite, bool `[N]`; None where they are not known."""
    if logits is None or logits.dim() == 0 or len(logits) != count or not logits.is_floating_point():
        return None
    with torch.inference_mode():
        return torch.isfinite(logits).flatten(1).all(1) if logits.dim() > 1 else torch.isfinite(logits)


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory did not suffice, in any of the ways of PyTorch and Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY)


def free() -> None:
    """Frees memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
