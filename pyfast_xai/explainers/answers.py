"""What a model answers about changed copies of the same images: the question that perturbation methods ask."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, choose, is_distribution, logits_of, ordinary, probability
from pyfast_xai.explainers.seeds import Goal
from pyfast_xai.tape import Tape, Value

Score = Literal["probability", "logit"]
SCORES = ("probability", "logit")


class Answers:
    """The scores of some targets, on whatever is made of the images.

    The images themselves are recorded. A model that neither drew random numbers nor took decisions from the data nor
    wrote to its own tensors is then simply called, in inference mode; any other is recorded each time, which puts
    everything back.

    Args:
        explainer: whose model is asked.
        images: `[N, C, H, W]`, checked.
        target: None for the largest output, classes as an int, N ints or `[N, K]` ints; or a function of what the
            model returned that gives one number an image, which is then the score.
        score: "probability", the softmax of the outputs (or these, where they are a distribution), or "logit".
        batch: images that go through the model at once.
        args: further arguments of the model, the same for every batch.
        kwargs: likewise.

    Attributes:
        target: the classes, int64 `[N, K]`; None for a function.
        probability: of each class on the images, float32 `[N, K]`; None for a function.
        before: the scores on the images, `[N, K]`.

    Raises:
        InputError: a target that does not fit.
    """

    def __init__(
        self, explainer: Explainer, images: Tensor, target: Goal, score: Score, batch: int, args: Any, kwargs: Any
    ) -> None:
        self._explainer, self._args, self._kwargs = explainer, args, kwargs
        self._score = score
        self.function = target if callable(target) else None
        self.target: Tensor | None = None
        self.probability: Tensor | None = None
        written = _writes(explainer)
        tapes = [explainer.record(part, *args, **kwargs) for part in images.split(batch)]
        steady = written is not None and written == _writes(explainer)
        self._plain = steady and all(tape.not_replayable is None for tape in tapes)
        if not callable(target):
            found = [logits_of(tape) for tape in tapes]
            self._place = _place(tapes[0], found[0][0])
            logits = torch.cat([logits for _, logits in found])
            self.target = choose(logits, target).view(len(images), -1)
            self.probability = probability(logits, self.target)
            # Said once, of images as they are: what is left of a changed one must not change how outputs are read.
            self._distribution = is_distribution(logits)
        rows = torch.arange(len(images), device=images.device)
        # Asked in the same way as all that is compared with it.
        self.before = torch.cat([self(images[part], part) for part in rows.split(batch)])

    @property
    def each(self) -> int:
        """Targets of an image."""
        return self.before.shape[1]

    def __call__(self, images: Tensor, rows: Tensor, score: Score | None = None) -> Tensor:
        """Scores of changed images, float32, or float64 where the outputs are.

        Args:
            images: `[M, C, H, W]`; the model may write to them.
            rows: which of the images each was made of, int64 `[M]`.
            score: another than the one this was made with.

        Returns:
            `[M, K]`.
        """
        result = self._ask(images)
        if self.function is not None:
            answer = self.function(result)
            if not isinstance(answer, Tensor) or answer.shape != (len(images),):
                came = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise InputError(f"target must return a tensor of one number an image, [{len(images)}], got {came}")
            return ordinary(wide(answer))[:, None]
        return ordinary(self.scores(pytree.tree_leaves(result)[self._place], rows, score))

    def scores(self, logits: Tensor, rows: Tensor, score: Score | None = None) -> Tensor:
        """Scores `[M, K]` in outputs `[M, classes]` for some rows; can be differentiated."""
        assert self.target is not None
        logits = wide(logits)
        if (score or self._score) == "probability" and not self._distribution:
            logits = logits.softmax(1)
        return logits.gather(1, self.target[rows])

    def _ask(self, images: Tensor) -> Any:
        if self._plain:
            return self._explainer.forward(images, *self._args, **self._kwargs)
        return self._explainer.record(images, *self._args, **self._kwargs).result


def wide(tensor: Tensor) -> Tensor:
    """As float32, or as float64 where it is that: sums of many numbers want more than half a precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _writes(explainer: Explainer) -> list[int] | None:
    """How often each tensor of the model was written to, putting it back included; None where nobody counts."""
    model = explainer.model
    try:
        return [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    except RuntimeError:  # tensors that were made in inference mode
        return None


def _place(tape: Tape, value: Value) -> int:
    """Which of the tensors that the model returns this is."""
    return next(i for i, leaf in enumerate(pytree.tree_leaves(tape.outputs)) if leaf is value)
