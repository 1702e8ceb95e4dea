"""The model as the metrics see it: images in, the score of one class an image out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.checks import check_images, check_model
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.memory_format import in_channels_last, kind_of_call, run_in_channels_last
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import SCORES, PerturbationScores, Score
from pyfast_xai.explainers.common.targets import Target, class_columns
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.tape import Tape, record
from pyfast_xai.tape.module_hooks import unwrap
from pyfast_xai.tape.record import tensors_in


class Scorer(PerturbationScores):
    """Scores of one class an image, by a model that is called as it is, without gradients.

    Args:
        model: in evaluation mode; compiled and data-parallel ones are called as such.
        images: `[N, C, H, W]`, as the model takes them.
        target: None for the class with the largest output of each image, an int for all, or one an image.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, see `Explainer`.
        score: "probability" of the class (or its value, where outputs are no probabilities), or its "logit".
        several: whether an image may have several targets, `[N, K]`; only `before` and `scores_of` serve these.

    Attributes:
        columns: outputs for the images, float32 `[N, classes]`.
        target: the first class of each image, int64 `[N]`.
        score: its probability, or value, float32 `[N]`.

    Raises:
        InputError: images or a target that do not fit, or a model in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        target: Target = None,
        batch_size: int = 64,
        outputs: Outputs = "auto",
        *,
        score: Score = "probability",
        several: bool = False,
    ) -> None:
        check_model(model)
        check_images(unwrap(model), images)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if callable(target):
            raise InputError(f"target must be None, an int or N ints, got {type(target).__name__}")
        one_of("score", score, SCORES)
        runs = _Unchanged(model)
        super().__init__(runs, images.detach(), target, score, batch_size=batch_size, outputs=outputs)
        targets = self.targets
        assert targets.target is not None
        assert targets.score is not None
        assert targets.logits is not None
        if targets.each != 1 and not several:
            raise InputError(f"target must be one class an image, got shape {list(targets.target.shape)}")
        self.columns = class_columns(targets.logits).float()
        self.target, self.score = targets.target[:, 0], targets.score[:, 0]

    def _on_images(self) -> Tensor:
        # The recorded pass is one like the others: nothing else is run on the images.
        if self._score == "probability":
            assert self.targets.score is not None
            return self.targets.score
        assert self.targets.logits is not None
        rows = torch.arange(len(self._images), device=self._images.device)
        return outside_inference_mode(self.scores(class_columns(self.targets.logits), rows))

    def __call__(self, images: Tensor, rows: Tensor, score: Score | None = None) -> Tensor:
        """Returns scores of the classes of some rows, int64 `[M]`, on other images `[M, C, H, W]`: float32 `[M]`."""
        return super().__call__(images, rows, score)[:, 0].float()

    def scores_of(self, images: Tensor, rows: Tensor) -> Tensor:
        """Returns the scores of all K targets of some rows on other images, `[M, K]`; see a call."""
        return super().__call__(images, rows)


class _Unchanged:
    """Runs a model as it is, on images in channels_last where it computes the same and no wrapper compiled it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def record(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        def recorded(inputs: Sequence[Tensor]) -> Tape:
            return record(self.model, *inputs, *args, **kwargs)

        return run_in_channels_last(
            self.model,
            run=recorded,
            compared=lambda inputs: _answers(recorded(inputs)),
            answers=_answers,
            arguments=[images],
            faster=[self._laid_out(images)],
            key=kind_of_call(images, args, kwargs),
        )

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # the model can train with what it keeps
            laid_out = self._laid_out(images)
            copy = images.clone() if laid_out is images else laid_out  # a model may write to its input
            return self.model(copy, *args, **kwargs)

    def _laid_out(self, images: Tensor) -> Tensor:
        # A compiled model would be compiled for another format, and chooses its formats itself.
        return in_channels_last(self.model, images) if unwrap(self.model) is self.model else images


def _answers(tape: Tape) -> list[Tensor]:
    return tensors_in(tape.result)
