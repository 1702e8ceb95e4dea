"""The model as the metrics see it: images in, the probability of one class an image out."""

from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, Target, choose, is_distribution, ordinary


class Scorer:
    """Probability of the classes in question, by a model that is called as it is, in inference mode.

    Args:
        model: in evaluation mode; compiled and data-parallel ones are called as such.
        images: `[N, C, H, W]`, as the model takes them.
        target: None for the class with the largest output of each image, an int for all, or one an image.
        batch: images the model is given at once.

    Attributes:
        logits: outputs for the images, float32 `[N, classes]`.
        target: the classes, int64 `[N]`.
        before: their probabilities, float32 `[N]`.
        distribution: whether the model returns probabilities already.

    Raises:
        InputError: images or a target that do not fit, or a model in training mode.
    """

    def __init__(self, model: nn.Module, images: Tensor, target: Target = None, batch: int = 64) -> None:
        Explainer(model).check(images)
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        self._model, self._batch = model, batch
        self.logits = self.outputs(images)
        self.target = choose(self.logits, target)
        if self.target.dim() != 1:
            raise InputError(f"target must be one class an image, got shape {list(self.target.shape)}")
        # Said once, of images as they are: what is left of a perturbed one must not change how outputs are read.
        self.distribution = is_distribution(self.logits)
        self.before = self._probability(self.logits, self.target)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        """Probability `[M]` of the classes of some rows, int64 `[M]`, on other images `[M, C, H, W]`."""
        return self._probability(self.outputs(images), self.target[rows])

    def outputs(self, images: Tensor) -> Tensor:
        """What the model returns for images `[M, C, H, W]`: float32 `[M, classes]`."""
        with torch.inference_mode():
            parts = [logits_of(self._model(part)).float() for part in images.split(self._batch)]
            return ordinary(torch.cat(parts))

    def _probability(self, logits: Tensor, target: Tensor) -> Tensor:
        shares = logits if self.distribution else logits.softmax(1)
        return shares.gather(1, target[:, None])[:, 0]


def logits_of(output: Any) -> Tensor:
    """The output that classes are read from: the tensor, the first of several, or the one named "logits" or "out"."""
    if isinstance(output, dict):
        named = [output[name] for name in ("logits", "out") if name in output]
        output = named or list(output.values())
    if isinstance(output, (tuple, list)):
        output = next((part for part in output if isinstance(part, Tensor)), None)
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"model must return [N, classes], got {got}")
    return output
