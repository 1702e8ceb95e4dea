"""The change of a score when an image is altered by its map, as pytorch-grad-cam calls it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.rows import rows_of
from pyfast_xai.compat.recording import evaluating
from pyfast_xai.errors import InputError
from pyfast_xai.tape.isolation import isolated
from pyfast_xai.tape.module_hooks import unwrap

Target = Callable[[Any], Tensor]
Perturbation = Callable[[Tensor, Tensor], Tensor]  # of an image `[C, H, W]` and its map `[H, W]`

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


class PerturbationConfidenceMetric:
    """The change of the target when each image is altered by its map.

    Args:
        perturbation: returns an image for an image `[C, H, W]` and its map `[H, W]`, both on the CPU.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import PerturbationConfidenceMetric
        >>> metric = PerturbationConfidenceMetric(lambda image, cam: image * (cam > 0.5))
        >>> images, cams = torch.rand(2, 3, 96, 96), np.random.default_rng(0).random((2, 96, 96))
        >>> metric(images, cams, [ClassifierOutputTarget(3)] * 2, demo.load()).shape
        (2,)
    """

    def __init__(self, perturbation: Perturbation) -> None:
        self.perturbation = perturbation

    def __call__(
        self,
        input_tensor: Tensor,
        cams: np.ndarray,
        targets: Sequence[Target],
        model: nn.Module,
        return_visualization: bool = False,
        return_diff: bool = True,
    ) -> Any:
        """Measures a batch of images.

        Args:
            input_tensor: `[N, C, H, W]`, as the model takes them.
            cams: `[N, H, W]`.
            targets: one an image, called with its output.
            model: any; it is put in evaluation mode for the length of the call.
            return_visualization: also return the altered images.
            return_diff: the change; False for the score itself.

        Returns:
            Float32 `[N]`, or that and `[N, C, H, W]`.

        Raises:
            InputError: maps or targets that are not one for each image.
        """
        for name, values in (("cams", cams), ("targets", targets)):
            if len(values) != len(input_tensor):
                raise InputError(f"{name} must be one for each of {len(input_tensor)} images, got {len(values)}")
        altered = [
            self.perturbation(image.cpu(), torch.from_numpy(np.asarray(cam)))
            for image, cam in zip(input_tensor, cams, strict=True)
        ]
        changed = torch.stack(altered).to(input_tensor.device)
        result = _scores(model, changed, targets)
        if return_diff:
            result = result - _scores(model, input_tensor, targets)
        return (result, changed) if return_visualization else result


def _scores(model: nn.Module, images: Tensor, targets: Sequence[Target]) -> np.ndarray:
    with evaluating(model), isolated():
        outputs = unwrap(model)(images.detach().clone())
    return np.array(
        [target(row).cpu().numpy() for target, row in zip(targets, rows_of(outputs), strict=True)], np.float32
    )


class RemoveMostRelevantFirst:
    """Replaces the pixels of an image where its map is at and above a percentile.

    Args:
        percentile: percentile of the map; "auto" for Otsu's threshold.
        imputer: returns an image for an image and a mask, 0 where it is to be replaced.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam.metrics import RemoveMostRelevantFirst
        >>> remove = RemoveMostRelevantFirst(50, lambda image, mask: image * mask)
        >>> remove(torch.ones(3, 4, 4), torch.arange(16.0).view(4, 4)).sum()
        tensor(24.)
    """

    def __init__(self, percentile: float | str, imputer: Perturbation) -> None:
        self.percentile, self.imputer = percentile, imputer

    def __call__(self, input_tensor: Tensor, mask: Tensor) -> Tensor:
        """Returns the image `[C, H, W]` without what its map `[H, W]` shows most."""
        cam = mask.cpu().numpy()
        if self.percentile == "auto":
            levels = np.uint8(cam * 255)
            binary = levels > _otsu(levels)
        else:
            binary = cam < np.percentile(cam, float(self.percentile))
        return self.imputer(input_tensor, torch.from_numpy(np.float32(binary)).to(mask.device))


class RemoveLeastRelevantFirst(RemoveMostRelevantFirst):
    """Replaces the pixels of an image where one less its map is at and above a percentile.

    Args:
        percentile: see `RemoveMostRelevantFirst`.
        imputer: what replaces pixels, see `RemoveMostRelevantFirst`.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam.metrics import RemoveLeastRelevantFirst
        >>> remove = RemoveLeastRelevantFirst(50, lambda image, mask: image * mask)
        >>> remove(torch.ones(3, 4, 4), torch.arange(16.0).view(4, 4))[0, 0, 0]
        tensor(0.)
    """

    def __call__(self, input_tensor: Tensor, mask: Tensor) -> Tensor:
        """Returns the image `[C, H, W]` without what its map `[H, W]` shows least."""
        return super().__call__(input_tensor, 1 - mask)


class AveragerAcrossThresholds:
    """The mean of a metric over percentiles.

    Args:
        imputer: makes the metric of a percentile.
        percentiles: some.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import AveragerAcrossThresholds, ROADMostRelevantFirst
        >>> metric = AveragerAcrossThresholds(ROADMostRelevantFirst, [50, 80])
        >>> images, cams = torch.rand(1, 3, 96, 96), np.random.default_rng(0).random((1, 96, 96))
        >>> metric(images, cams, [ClassifierOutputTarget(3)], demo.load()).shape
        (1,)
    """

    def __init__(
        self, imputer: Callable[[float], PerturbationConfidenceMetric], percentiles: Sequence[float] = PERCENTILES
    ) -> None:
        self.imputer, self.percentiles = imputer, percentiles

    def __call__(
        self, input_tensor: Tensor, cams: np.ndarray, targets: Sequence[Target], model: nn.Module
    ) -> np.ndarray:
        """Measures a batch of images, see `PerturbationConfidenceMetric`."""
        scores = [self.imputer(percentile)(input_tensor, cams, targets, model) for percentile in self.percentiles]
        mean: np.ndarray = np.mean(np.array(scores, np.float32), axis=0)
        return mean


def _otsu(levels: np.ndarray) -> int:
    """Returns the level up to which a picture is dark, the first where the classes differ most (Otsu, 1979)."""
    shares = np.bincount(levels.ravel(), minlength=256) / levels.size
    at = np.arange(256)
    dark = shares.cumsum()
    mean = (shares * at).sum()
    tiny = np.finfo(np.float32).eps
    both = (np.minimum(dark, 1 - dark) >= tiny) & (np.maximum(dark, 1 - dark) <= 1 - tiny)
    first = (shares * at).cumsum() / np.where(both, dark, 1)
    second = (mean - (shares * at).cumsum()) / np.where(both, 1 - dark, 1)
    spread = np.where(both, dark * (1 - dark) * (first - second) ** 2, 0)
    return int(spread.argmax())
