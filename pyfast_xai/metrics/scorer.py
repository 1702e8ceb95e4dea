"""The model as the metrics see it: images in, the score of one class an image out."""

from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.checks import check_images
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores, Score
from pyfast_xai.explainers.common.targets import Target, class_columns
from pyfast_xai.tape import Tape, record
from pyfast_xai.tape.module_hooks import unwrap


class Scorer(PerturbationScores):
    """Scores of one class an image, by a model that is called as it is, without gradients.

    Args:
        model: in evaluation mode; compiled and data-parallel ones are called as such.
        images: `[N, C, H, W]`, as the model takes them.
        target: None for the class with the largest output of each image, an int for all, or one an image.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, see `Explainer`.

    Attributes:
        columns: outputs for the images, float32 `[N, classes]`.
        target: the classes, int64 `[N]`.
        score: their probabilities, or values, float32 `[N]`.

    Raises:
        InputError: images or a target that do not fit, or a model in training mode.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, target: Target = None, batch_size: int = 64, outputs: Outputs = "auto"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_images(unwrap(model), images)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if callable(target):
            raise InputError(f"target must be None, an int or N ints, got {type(target).__name__}")
        super().__init__(_Unchanged(model), images.detach(), target, batch_size=batch_size, outputs=outputs)
        targets = self.targets
        assert targets.target is not None
        assert targets.score is not None
        assert targets.logits is not None
        if targets.each != 1:
            raise InputError(f"target must be one class an image, got shape {list(targets.target.shape)}")
        self.columns = class_columns(targets.logits).float()
        self.target, self.score = targets.target[:, 0], targets.score[:, 0]

    def _on_images(self) -> Tensor:
        # The recorded pass is one like the others: nothing else is run on the images.
        assert self.targets.score is not None
        return self.targets.score

    def __call__(self, images: Tensor, rows: Tensor, score: Score | None = None) -> Tensor:
        """Returns scores of the classes of some rows, int64 `[M]`, on other images `[M, C, H, W]`: float32 `[M]`."""
        return super().__call__(images, rows, score)[:, 0].float()


class _Unchanged:
    """Runs a model as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def record(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        return record(self.model, images, *args, **kwargs)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # the model can train with what it keeps
            return self.model(images.clone(), *args, **kwargs)  # a model may write to its input
