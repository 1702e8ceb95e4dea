"""The base of explainers that change the image and run the model again."""

import abc
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import Explainer, Settings, one_of
from pyfast_xai.explainers.common.perturbation_scores import SCORES, PerturbationScores, Score
from pyfast_xai.explainers.common.progress_bar import ShowProgress
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explanation import Explanation


class PerturbationSettings(Settings, total=False):
    """The keyword arguments of explainers that perturb the images, see `Perturbation`."""

    score: Score
    progress: ShowProgress


class Perturbation(Explainer):
    """Base of explainers that compare the scores of perturbed copies of the images.

    Args:
        model: in evaluation mode.
        score: the "probability" of the class, or its "logit".
        progress: True shows a bar on stderr, None shows one on a terminal; or a function called with a `Progress`.
        **settings: those of `Explainer`; perturbed copies go through the model `batch_size` at a time, 32 by default.
    """

    default_batch_size: ClassVar[int] = 32
    takes_gradients = False
    slow = True
    batch_size: int

    def __init__(
        self,
        model: nn.Module,
        *,
        score: Score = "probability",
        progress: ShowProgress = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, **settings)
        self.score: Score = one_of("score", score, SCORES)
        self.progress = progress

    def _in_batches(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        return self._explain_batch(images, target, args, kwargs)  # whose copies go through the model in batches

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        scores = PerturbationScores(
            self, images, target, self.score, self.batch_size, args, kwargs, self.outputs, self.labels
        )
        explanation = self._perturb(images, scores)
        if explanation.heatmap.device.type == "cpu":
            for row in explanation.heatmap.flatten(1).any(1).logical_not().nonzero().flatten().tolist():
                if explanation.signed_map is None or not bool(explanation.signed_map[row].any()):
                    way_out = "larger or other changes may"
                    if self.score == "probability" and not callable(target):
                        way_out = "larger or other changes may, or score='logit'"
                    unchanged = f"no change of the image changes its score; {way_out}"
                    self.warn(f"the map of row %d is zero: {scores.targets.zero_reasons.get(row, unchanged)}", row)
                else:
                    self.warn("the heat map of row %d is zero; `signed_map` has what speaks against its target", row)
        return explanation

    @abc.abstractmethod
    def _perturb(self, images: Tensor, scores: PerturbationScores) -> Explanation:
        """Returns the explanation of images by the scores of what is made of them."""


def together(images: Tensor, batch_size: int, changes: int) -> Iterator[Tensor]:
    """Yields the rows of the images that, with so many changes each, make up a batch."""
    yield from torch.arange(len(images), device=images.device).split(max(1, batch_size // changes))


def positive(argument: str, value: float) -> float:
    """Returns a number that must be finite and larger than zero."""
    if not 0 < value < float("inf"):
        raise InputError(f"{argument} must be positive, got {value}")
    return value
