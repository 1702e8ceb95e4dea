"""The change of a score when an image is multiplied by its map, as pytorch-grad-cam calls it."""

from typing import Any

import numpy as np
from torch import Tensor

from pyfast_xai.compat.grad_cam.metrics.perturbation_confidence import PerturbationConfidenceMetric


def multiply_tensor_with_cam(input_tensor: Tensor, cam: Tensor) -> Tensor:
    """Returns an image, after normalisation, times its map.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam.metrics import multiply_tensor_with_cam
        >>> multiply_tensor_with_cam(torch.ones(3, 2, 2), torch.zeros(2, 2)).sum()
        tensor(0.)
    """
    return input_tensor * cam


class CamMultImageConfidenceChange(PerturbationConfidenceMetric):
    """The target on the image times its map, less the target on the image.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import CamMultImageConfidenceChange
        >>> images, cams = torch.rand(2, 3, 96, 96), np.ones((2, 96, 96), np.float32)
        >>> CamMultImageConfidenceChange()(images, cams, [ClassifierOutputSoftmaxTarget(3)] * 2, demo.load())
        array([0., 0.], dtype=float32)
    """

    def __init__(self) -> None:
        super().__init__(multiply_tensor_with_cam)


class DropInConfidence(CamMultImageConfidenceChange):
    """The loss of the target on the image times its map; 0 where it gains.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import DropInConfidence
        >>> images, cams = torch.rand(1, 3, 96, 96), np.ones((1, 96, 96), np.float32)
        >>> DropInConfidence()(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load())
        array([0.], dtype=float32)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Measures a batch of images, see `PerturbationConfidenceMetric`."""
        return np.maximum(-super().__call__(*args, **kwargs), 0)


class IncreaseInConfidence(CamMultImageConfidenceChange):
    """1 where the target gains on the image times its map, 0 elsewhere.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import IncreaseInConfidence
        >>> images, cams = torch.rand(1, 3, 96, 96), np.ones((1, 96, 96), np.float32)
        >>> IncreaseInConfidence()(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load())
        array([0.], dtype=float32)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Measures a batch of images, see `PerturbationConfidenceMetric`."""
        return np.float32(super().__call__(*args, **kwargs) > 0)
