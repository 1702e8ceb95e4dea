"""Remove and debias (Rong et al., 2022) as pytorch-grad-cam calls it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.metrics.perturbation_confidence import (
    PERCENTILES,
    AveragerAcrossThresholds,
    PerturbationConfidenceMetric,
    RemoveLeastRelevantFirst,
    RemoveMostRelevantFirst,
    Target,
)
from pyfast_xai.metrics import noisy_linear_imputation


class NoisyLinearImputer:
    """Replaces pixels by the weighted mean of their neighbours, and noise.

    Args:
        noise: standard deviation of the noise, of PyTorch's generator.
        weighting: without effect, as there: direct neighbours weigh 1/6, diagonal ones 1/12.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam.metrics import NoisyLinearImputer
        >>> image, mask = torch.ones(3, 8, 8), torch.ones(8, 8)
        >>> mask[2:5, 2:5] = 0
        >>> torch.allclose(NoisyLinearImputer(noise=0.0)(image, mask), image, atol=1e-4)
        True
    """

    def __init__(self, noise: float = 0.01, weighting: Sequence[object] | None = None) -> None:
        self.noise, self.weighting = noise, weighting

    def __call__(self, img: Tensor, mask: Tensor) -> Tensor:
        """Returns an image `[C, H, W]` with new pixels where the mask `[H, W]` is 0; of nothing, its mean colour."""
        missing = mask == 0
        if bool(missing.all()):
            filled = img.mean((1, 2), keepdim=True).expand_as(img).clone()
        else:
            filled = noisy_linear_imputation(img[None], missing[None], noise=0.0)[0]
        filled[:, missing] += self.noise * torch.randn(len(img), int(missing.sum())).to(filled)
        return filled


class ROADMostRelevantFirst(PerturbationConfidenceMetric):
    """The change of the target when the most relevant pixels are made unremarkable.

    Args:
        percentile: percentile of each map, from which on pixels are replaced.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import ROADMostRelevantFirst
        >>> images, cams = torch.rand(1, 3, 96, 96), np.random.default_rng(0).random((1, 96, 96))
        >>> ROADMostRelevantFirst(80)(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load()).shape
        (1,)
    """

    def __init__(self, percentile: float | str = 80) -> None:
        super().__init__(RemoveMostRelevantFirst(percentile, NoisyLinearImputer()))


class ROADLeastRelevantFirst(PerturbationConfidenceMetric):
    """The change of the target when the least relevant pixels are made unremarkable.

    Args:
        percentile: percentile of one less each map, from which on pixels are replaced.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import ROADLeastRelevantFirst
        >>> images, cams = torch.rand(1, 3, 96, 96), np.random.default_rng(0).random((1, 96, 96))
        >>> ROADLeastRelevantFirst(20)(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load()).shape
        (1,)
    """

    def __init__(self, percentile: float | str = 20) -> None:
        super().__init__(RemoveLeastRelevantFirst(percentile, NoisyLinearImputer()))


class ROADMostRelevantFirstAverage(AveragerAcrossThresholds):
    """`ROADMostRelevantFirst`, the mean over percentiles.

    Args:
        percentiles: some.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import ROADMostRelevantFirstAverage
        >>> images, cams = torch.rand(1, 3, 96, 96), np.random.default_rng(0).random((1, 96, 96))
        >>> ROADMostRelevantFirstAverage([80])(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load()).shape
        (1,)
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        super().__init__(ROADMostRelevantFirst, percentiles)


class ROADLeastRelevantFirstAverage(AveragerAcrossThresholds):
    """`ROADLeastRelevantFirst`, the mean over percentiles.

    Args:
        percentiles: some.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import ROADLeastRelevantFirstAverage
        >>> images, cams = torch.rand(1, 3, 96, 96), np.random.default_rng(0).random((1, 96, 96))
        >>> ROADLeastRelevantFirstAverage([20])(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load()).shape
        (1,)
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        super().__init__(ROADLeastRelevantFirst, percentiles)


class ROADCombined:
    """Half of the difference of the least and the most relevant, the mean over percentiles.

    Args:
        percentiles: some.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ClassifierOutputSoftmaxTarget
        >>> from pyfast_xai.compat.grad_cam.metrics import ROADCombined
        >>> images, cams = torch.rand(1, 3, 96, 96), np.random.default_rng(0).random((1, 96, 96))
        >>> ROADCombined([20, 80])(images, cams, [ClassifierOutputSoftmaxTarget(3)], demo.load()).shape
        (1,)
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        self.percentiles = percentiles
        self.morf_averager = ROADMostRelevantFirstAverage(percentiles)
        self.lerf_averager = ROADLeastRelevantFirstAverage(percentiles)

    def __call__(
        self, input_tensor: Tensor, cams: np.ndarray, targets: Sequence[Target], model: nn.Module
    ) -> np.ndarray:
        """Measures a batch of images, see `PerturbationConfidenceMetric`."""
        least = self.lerf_averager(input_tensor, cams, targets, model)
        return (least - self.morf_averager(input_tensor, cams, targets, model)) / 2
