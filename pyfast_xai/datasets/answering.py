"""Batches through an explainer: what the model answered, memory that runs out, and images that spoil a batch."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.datasets.swapping import Swapped
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, is_distribution, ordinary
from pyfast_xai.explainers.heard import hearing
from pyfast_xai.explanation import Explanation

_TOLD = ("not enough memory", "out of memory", "can't allocate memory", "failed to allocate")


@dataclass
class Answered:
    """Some images of a batch, explained, or why not.

    Attributes:
        rows: which images of the batch.
        explanation: of these, in order; None where there is an error.
        top: classes `[N, k]` and their probabilities `[N, k]`; None where the model gives no classes, or none were
            asked for.
        swapped: what `swapping.Swapped` found; None where that was not asked for, or the model gives no classes.
        error: what came instead.
        limit: images at a time when this was made.
    """

    rows: list[int]
    explanation: Explanation | None = None
    top: tuple[Tensor, Tensor] | None = None
    swapped: tuple[Tensor, Tensor] | None = None
    error: Exception | None = None
    limit: int = 1


class Asker:
    """Explains batches, smaller ones once memory has run out.

    Args:
        explainer: what explains.
        top_k: how many classes are told; 0 for none.
        batch: images at a time, at most.
        swapped: asked about every image with its colours swapped; None asks nothing.
    """

    def __init__(self, explainer: Explainer, top_k: int, batch: int, swapped: Swapped | None = None) -> None:
        self._explainer, self._top_k, self.batch, self._swapped = explainer, top_k, batch, swapped

    def __call__(self, images: Tensor, target: int | Sequence[int] | None) -> list[Answered]:
        """Explain images of one shape.

        A batch for which memory does not suffice is halved, and so are all that follow. One that fails in another way
        is halved until the images that fail stand alone. So every image comes back once.

        Args:
            images: `[N, C, H, W]`.
            target: see `Explainer`.
        """
        found: list[Answered] = []
        waiting = [
            list(range(start, min(start + self.batch, len(images)))) for start in range(0, len(images), self.batch)
        ]
        while waiting:
            rows = waiting.pop(0)
            if len(rows) > self.batch:
                waiting[:0] = [rows[: self.batch], rows[self.batch :]]
                continue
            part = images if len(rows) == len(images) else images[rows]
            of_part = target if target is None or isinstance(target, int) else [target[row] for row in rows]
            error = None
            try:
                found.append(self._ask(rows, part, of_part))
            except Exception as failure:  # explainers and models raise what they like
                # Its frames hold the tensors that must go.
                error = failure.with_traceback(None)
                error.__context__ = error.__cause__ = None
            if error is None:
                continue
            gone = out_of_memory(error)
            if gone:
                free()
            if len(rows) == 1:
                found.append(Answered(rows, error=error, limit=self.batch))
                continue
            half = (len(rows) + 1) // 2
            if gone:
                self.batch = half
            waiting[:0] = [rows[:half], rows[half:]]
        return found

    def _ask(self, rows: list[int], images: Tensor, target: Any) -> Answered:
        with hearing(images) as heard:
            explanation = self._explainer(images, target)
            if len(explanation) != len(images):
                raise InputError(f"method must give one row for each of {len(images)} images, got {len(explanation)}")
            if self._top_k and heard.logits is None:
                # The method stopped before the answer, or asked about something else.
                self._explainer.record(images)
        top = self._top(heard.logits, len(images)) if self._top_k else None
        swapped = None if self._swapped is None or top is None else self._swapped(images, top[0][:, 0])
        # Nobody needs them any more, and they are the largest.
        explanation.images = explanation.attribution = None
        return Answered(rows, explanation, top, swapped, limit=self.batch)

    def _top(self, logits: Tensor | None, count: int) -> tuple[Tensor, Tensor] | None:
        if logits is None or logits.dim() != 2 or len(logits) != count or not logits.is_floating_point():
            return None
        with torch.inference_mode():
            logits = logits.float()
            shares = logits if is_distribution(logits) else logits.softmax(1)
            scores, classes = shares.topk(min(self._top_k, shares.shape[1]), 1)
        return ordinary(classes), ordinary(scores)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, in any of the ways in which PyTorch and Python say it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error).lower() for told in _TOLD)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
