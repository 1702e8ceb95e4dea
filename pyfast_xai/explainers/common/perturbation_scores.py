"""The scores of some targets on changed copies of the same images, for perturbation methods and metrics."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyfast_xai.explainers.common.outputs import Outputs, is_probability
from pyfast_xai.explainers.common.targets import (
    Goal,
    Targets,
    class_columns,
    logits_of,
    numbers_of,
    rows_returned,
    take_targets,
    targets_among,
    zero_reasons,
)
from pyfast_xai.explainers.common.tensors import at_least_float32, outside_inference_mode, take_rows
from pyfast_xai.tape import Tape

Score = Literal["probability", "logit"]
SCORES = ("probability", "logit")


class RunsModel(Protocol):
    """Runs a model on images, with and without a record; every explainer does."""

    model: nn.Module

    def record(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        """Returns the tape of the model on images."""

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the outputs of the model, in inference mode."""


class PerturbationScores:
    """The scores of some targets on changed images.

    The images themselves are recorded. A model that neither drew random numbers nor took decisions from the data nor
    wrote to tensors of its own is then simply called, without gradients; any other is recorded each time, which puts
    everything back. The kind of the outputs is that for the images as they are: what is left of a changed image must
    not change how outputs are read.

    Args:
        runs: runs the model.
        images: `[N, C, H, W]`, checked.
        target: None for the largest output, classes as an int, N ints or `[N, K]` ints; or a function of what the
            model returned that gives one number an image, or K, which are then the scores.
        score: "probability" of the class (or its value, where outputs are no probabilities), or its "logit".
        batch_size: images that go through the model at once.
        args: further arguments of the model, see `tensors.take_rows`.
        kwargs: further keyword arguments of the model, likewise.
        outputs: the kind of the outputs, see `outputs.kinds_of`.
        labels: names of the classes.

    Attributes:
        targets: the classes, and their probabilities (or values) on the images.
        function: the target where it is a function; None otherwise.
        before: the scores on the images, `[N, K]`.

    Raises:
        InputError: a target that does not fit.
    """

    def __init__(
        self,
        runs: RunsModel,
        images: Tensor,
        target: Goal = None,
        score: Score = "probability",
        batch_size: int = 64,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        outputs: Outputs = "auto",
        labels: Sequence[str] | None = None,
    ) -> None:
        self._runs, self._arguments = runs, (args, kwargs or {})
        self._score, self._images, self._batch_size = score, images, batch_size
        self.function = target if callable(target) else None
        rows = torch.arange(len(images), device=images.device).split(batch_size)
        tapes = [self._record(images[part], part) for part in rows]
        self._plain = all(tape.not_replayable is None and not tape.writes for tape in tapes)
        if callable(target):
            returned = [rows_returned(tape, len(part)) for tape, part in zip(tapes, rows, strict=True)]
            self.targets = Targets(_together(returned))
        else:
            value = logits_of(tapes[0])[0]
            self._place = next(i for i, leaf in enumerate(pytree.tree_leaves(tapes[0].outputs)) if leaf is value)
            logits = torch.cat([pytree.tree_leaves(tape.result)[self._place] for tape in tapes])
            made = is_probability(tapes[0], value)
            self.targets = targets_among(logits, target, outputs, labels, made=made)
        self.before = self._on_images()
        self.targets.count = self.before.shape[1]
        if callable(target):
            for tape, part in zip(tapes, rows, strict=True):
                function = take_targets(target, len(images), part)
                for row, reason in zero_reasons(function, tape.result, self.before[part]).items():
                    self.targets.zero_reasons[int(part[0]) * self.targets.count + row] = reason

    def _on_images(self) -> Tensor:
        """Returns the scores on the images, by a pass like those that are compared with them."""
        rows = torch.arange(len(self._images), device=self._images.device)
        return torch.cat([self(self._images[part], part) for part in rows.split(self._batch_size)])

    @property
    def each(self) -> int:
        """Returns the targets of an image."""
        return self.targets.each

    @property
    def are_values(self) -> bool:
        """Returns whether the scores are values that may have any sign and any offset."""
        return self.targets.kinds is not None and self.targets.kinds.kind == "values"

    def __call__(self, images: Tensor, rows: Tensor, score: Score | None = None) -> Tensor:
        """Returns the scores of changed images.

        Args:
            images: `[M, C, H, W]`, in the dtype and on the device of those of the beginning; a model may write to them.
            rows: index of the image that each was made of, int64 `[M]`.
            score: replaces the setting of the explainer.

        Returns:
            `[M, K]`, float32 (float64 for float64).
        """
        return self.read(self._run(images, rows), rows, score)

    def read(self, result: Any, rows: Tensor, score: Score | None = None) -> Tensor:
        """Returns the scores in what the model returned for changed images; see a call."""
        if self.function is None:
            return outside_inference_mode(self.scores(self.logits(result), rows, score))
        return outside_inference_mode(self.numbers(result, rows))

    def numbers(self, result: Any, rows: Tensor) -> Tensor:
        """Returns what a function as target gives for changed images, `[M, K]`; it can be differentiated."""
        assert self.function is not None
        answer = numbers_of(take_targets(self.function, len(self._images), rows), result, len(rows))
        return at_least_float32(answer).view(len(rows), -1)

    def outputs(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns the outputs for changed images, `[M, classes]`, at least float32.

        Args:
            images: `[M, C, H, W]`, any number.
            rows: index of the image that each was made of, int64 `[M]`; needed where the model has further arguments.
        """
        rows = torch.zeros(len(images), dtype=torch.int64, device=images.device) if rows is None else rows
        parts = zip(images.split(self._batch_size), rows.split(self._batch_size), strict=True)
        return outside_inference_mode(at_least_float32(torch.cat([self.logits(self._run(*part)) for part in parts])))

    def logits(self, result: Any) -> Tensor:
        """Returns the outputs that classes are read from, `[M, classes]`, of what the model returned."""
        return class_columns(pytree.tree_leaves(result)[self._place])

    def scores(self, logits: Tensor, rows: Tensor, score: Score | None = None) -> Tensor:
        """Returns scores `[M, K]` in outputs `[M, classes]` for some rows; they can be differentiated."""
        assert self.targets.target is not None
        assert self.targets.kinds is not None
        probability = (score or self._score) == "probability"
        logits = self.targets.kinds.scores(logits, rows) if probability else at_least_float32(logits)
        return logits.gather(1, self.targets.target[rows])

    def arguments(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the further arguments of the model that belong to some rows."""
        return take_rows(self._arguments, len(self._images), rows)

    def _run(self, images: Tensor, rows: Tensor) -> Any:
        if not self._plain:
            return self._record(images, rows).result
        args, kwargs = self.arguments(rows)
        return self._runs.forward(images, *args, **kwargs)

    def _record(self, images: Tensor, rows: Tensor) -> Tape:
        args, kwargs = self.arguments(rows)
        return self._runs.record(images, *args, **kwargs)


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Returns the outputs for all images; None where they do not fit together."""
    whole = [part for part in parts if part is not None]
    fit = len(whole) == len(parts) and len({part.shape[1:] for part in whole}) == 1
    return torch.cat(whole) if fit else None
