"""The color swap probe: the same images with their channels swapped (FGVis, section 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.common.outputs import OutputKinds
from pyfast_xai.explainers.common.targets import class_columns, logits_in
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.images import Preprocess
from pyfast_xai.metrics.faithfulness import SWAPS


class ColorSwapProbe:
    """Runs a model on images whose red, green and blue have traded places.

    Args:
        explainer: of the model; it has seen images before.
        preprocess: of the model, which sees colours; so that these are swapped and not normalised values.
    """

    def __init__(self, explainer: Explainer, preprocess: Preprocess) -> None:
        self._explainer = explainer
        self._mean, self._std = preprocess.mean, preprocess.std

    def __call__(self, images: Tensor, predictions: Tensor, kinds: OutputKinds) -> tuple[Tensor, Tensor] | None:
        """Returns what the model answers to each swap of a batch.

        Args:
            images: inputs of the model `[N, 3, H, W]`.
            predictions: class of each as it is, int64 `[N]`.
            kinds: of the model's outputs for the images as they are.

        Returns:
            After each swap the class with the largest output, int64 `[N, S]`, and the probability of the class that
            was answered before, float32 `[N, S]`; None for inputs without three channels.
        """
        if images.shape[1] != 3:
            return None
        results = [self._swapped_outputs(images, swap, predictions, kinds) for swap in SWAPS]
        classes, scores = (torch.stack(column, 1) for column in zip(*results, strict=True))
        return outside_inference_mode(classes), outside_inference_mode(scores)

    def _swapped_outputs(
        self, images: Tensor, swap: Sequence[int], predictions: Tensor, kinds: OutputKinds
    ) -> tuple[Tensor, Tensor]:
        mean, std = (images.new_tensor(list(values)).view(-1, 1, 1) for values in (self._mean, self._std))
        order = list(swap)
        # What was normalised as one channel is normalised as another.
        swapped = images[:, order].mul_(std[order]).add_(mean[order]).sub_(mean).div_(std)
        logits = class_columns(logits_in(self._explainer.forward(swapped)))
        with torch.inference_mode():
            scores = kinds.scores(logits).float()
            return logits.argmax(1), scores.gather(1, predictions[:, None])[:, 0]
