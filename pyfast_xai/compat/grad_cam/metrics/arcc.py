"""Coherency, complexity and ROAD in one number, as pytorch-grad-cam calls it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.metrics.perturbation_confidence import Target
from pyfast_xai.compat.grad_cam.metrics.road import ROADCombined

BaseMethod = Callable[..., np.ndarray]


def batch_pearson_coherency(A: np.ndarray, B: np.ndarray) -> np.ndarray:  # noqa: N803
    """Returns the correlation of maps `[N, H, W]` with others, `[N]`.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam.metrics import batch_pearson_coherency
        >>> maps = np.random.default_rng(0).random((2, 8, 8))
        >>> np.allclose(batch_pearson_coherency(maps, 2 * maps + 1), 1)
        True
    """
    one, other = (maps.reshape(len(maps), -1) for maps in (A, B))
    one, other = (maps - maps.mean(1, keepdims=True) for maps in (one, other))
    degrees = one.shape[1] - 1
    spreads = [np.sqrt((maps**2).sum(1) / degrees) for maps in (one, other)]
    correlation: np.ndarray = (one * other).sum(1) / degrees / (spreads[0] * spreads[1] + 1e-8)
    return correlation


class Complexity:
    """The mean magnitude of a map.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam.metrics import Complexity
        >>> Complexity()(np.full((2, 4, 4), 0.25))
        array([0.25, 0.25])
    """

    def __call__(self, grayscale_cams: np.ndarray) -> np.ndarray:
        """Returns one number for each of the maps `[N, H, W]`."""
        flat = np.abs(grayscale_cams.reshape(len(grayscale_cams), -1))
        mean: np.ndarray = np.sum(flat, axis=1) / flat.shape[1]
        return mean


class Coherency:
    """The correlation of a map with that of the image times the map, from 0 to 1.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import GradCAM
        >>> from pyfast_xai.compat.grad_cam.metrics import Coherency
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> cam = GradCAM(model, [model.block])
        >>> Coherency()(images, cam(images), None, model, cam).shape
        (2,)
    """

    def __call__(
        self,
        input_tensor: Tensor,
        grayscale_cams: np.ndarray,
        targets: Sequence[Target] | None,
        model: nn.Module,
        base_method: BaseMethod,
    ) -> np.ndarray:
        """Measures a batch of images.

        Args:
            input_tensor: `[N, C, H, W]`.
            grayscale_cams: their maps `[N, H, W]`.
            targets: targets of the maps.
            model: without effect, as there.
            base_method: makes maps of images and targets.
        """
        masks = torch.from_numpy(grayscale_cams)[:, None].to(input_tensor.device)
        mixed = base_method(input_tensor=input_tensor * masks, targets=targets)
        return (batch_pearson_coherency(mixed, grayscale_cams) + 1) / 2


class ARCC:
    """The harmonic mean of coherency, one less complexity, and ROAD doubled and cut to [0, 1].

    Args:
        base_method: makes maps of images and targets.
        road_percentiles: percentiles of ROAD.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget, GradCAM
        >>> from pyfast_xai.compat.grad_cam.metrics import ARCC
        >>> model, images = demo.load(), torch.rand(1, 3, 96, 96)
        >>> cam, targets = GradCAM(model, [model.block]), [ClassifierOutputSoftmaxTarget(3)]
        >>> ARCC(cam, road_percentiles=[20, 80])(images, cam(images, targets), targets, model).shape
        (1,)
    """

    def __init__(self, base_method: BaseMethod, road_percentiles: Sequence[float] = (20, 40, 60, 80)) -> None:
        self.complexity, self.coherency = Complexity(), Coherency()
        self.road = ROADCombined(percentiles=road_percentiles)
        self.base_method = base_method

    def __call__(
        self, input_tensor: Tensor, grayscale_cams: np.ndarray, targets: Sequence[Target], model: nn.Module
    ) -> np.ndarray:
        """Measures a batch of images, see `Coherency`."""
        coherency = self.coherency(input_tensor, grayscale_cams, targets, model, self.base_method)
        simplicity = 1 - self.complexity(grayscale_cams)
        road: Any = (self.road(input_tensor, grayscale_cams, targets, model) * 2).clip(0, 1)
        mean: np.ndarray = 3 / (1 / (coherency + 1e-8) + 1 / (simplicity + 1e-8) + 1 / (road + 1e-8))
        return mean
