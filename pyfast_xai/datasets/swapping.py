"""How far answers depend on colour: the same images with their channels swapped (FGVis, section 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.explainers.base import Explainer, ordinary, probability
from pyfast_xai.images import Preprocess
from pyfast_xai.metrics.faithfulness import SWAPS
from pyfast_xai.metrics.scorer import logits_of


class Swapped:
    """What a model answers once red, green and blue have traded places.

    Args:
        explainer: whose model is asked; it has seen images before.
        preprocess: of the model, which sees colours; so that these are swapped and not normalised values.
    """

    def __init__(self, explainer: Explainer, preprocess: Preprocess) -> None:
        self._explainer = explainer
        self._mean, self._std = preprocess.mean, preprocess.std

    def __call__(self, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ask about each swap of a batch.

        Args:
            images: inputs of the model `[N, 3, H, W]`.
            answers: class of each as it is, int64 `[N]`.

        Returns:
            After each swap the class with the largest output, int64 `[N, S]`, and the probability of the class that
            was answered before, float32 `[N, S]`; None for inputs without three channels.
        """
        if images.shape[1] != 3:
            return None
        found = [self._asked(images, swap, answers) for swap in SWAPS]
        classes, scores = (torch.stack(own, 1) for own in zip(*found, strict=True))
        return ordinary(classes), ordinary(scores)

    def _asked(self, images: Tensor, swap: Sequence[int], answers: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (images.new_tensor(list(own)).view(-1, 1, 1) for own in (self._mean, self._std))
        where = list(swap)
        # What was normalised as one channel is normalised as another.
        shown = images[:, where].mul_(std[where]).add_(mean[where]).sub_(mean).div_(std)
        logits = logits_of(self._explainer.forward(shown))
        with torch.inference_mode():
            return logits.argmax(1), probability(logits, answers)
