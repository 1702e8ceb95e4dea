"""What explainers share that change the image and ask the model again."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.answers import SCORES, Answers, Score
from pyfast_xai.explainers.base import Explainer, one_of, rows_of
from pyfast_xai.explainers.progress import Told
from pyfast_xai.explainers.seeds import Goal
from pyfast_xai.explanation import Explanation


class Perturbation(Explainer):
    """Asks the model about changed copies of the images.

    Args:
        model: in evaluation mode.
        score: what is asked: "probability" of the class, or its "logit".
        batch: images that go through the model at once; results do not depend on it but for rounding.
        progress: True shows a bar on stderr, None does on a terminal; or a function called with (done, total).
        labels: names of the classes.
    """

    slow = True

    def __init__(
        self,
        model: nn.Module,
        *,
        score: Score,
        batch: int,
        progress: Told,
        labels: Sequence[str] | None,
    ) -> None:
        super().__init__(model, labels=labels)
        self.score: Score = one_of("score", score, SCORES)
        self.batch = at_least(1, "batch", batch)
        self.progress = progress

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the largest output, an int, N ints or `[N, K]` ints (a row for each, from the same
                forwards); or a function of what the model returned that gives one number an image.
            *args: further arguments of the model, the same for every batch.
            **kwargs: further keyword arguments of the model.

        Raises:
            InputError: images or a target that do not fit.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            images = images.detach()
            answers = Answers(self, images, target, self.score, self.batch, args, kwargs)
            fields = self._explain(images, answers, args, kwargs)
            kind = fields.pop("kind", Explanation)
            return kind(
                method=self.method,
                target=None if answers.target is None else answers.target.flatten(),
                score=None if answers.probability is None else answers.probability.flatten(),
                images=rows_of(images, answers.each),
                labels=self.labels,
                **fields,
            )

    def _explain(self, images: Tensor, answers: Answers, args: Any, kwargs: Any) -> dict[str, Any]:
        """The fields of the explanation that are the method's own, with its `kind` where it is a special one."""
        raise NotImplementedError


def together(images: Tensor, batch: int, changes: int) -> Iterator[Tensor]:
    """Rows of the images that, with so many changes each, make up a batch."""
    yield from torch.arange(len(images), device=images.device).split(max(1, batch // changes))


def at_least(low: int, argument: str, given: int) -> int:
    if given < low:
        raise InputError(f"{argument} must be at least {low}, got {given}")
    return given


def positive(argument: str, given: float) -> float:
    if not 0 < given < float("inf"):
        raise InputError(f"{argument} must be positive, got {given}")
    return given
