"""Robustness: how far attributions move when images hardly do."""

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.explain import Explain, classes_of, shown


def max_sensitivity(
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Tensor:
    """Measures how far an attribution moves when the image hardly does (max-sensitivity, Yeh et al., 2019).

    The largest distance over random perturbations, as a share of the length of the attribution, as in Captum's
    `sensitivity_max`.

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        target: an int for all, or one an image; None leaves the choice to the explainer, at each call.
        radius: of the perturbation of each number, in units of the images.
        samples: perturbations; they are the same for all images.
        seed: of the perturbations.

    Returns:
        float32 `[N]`; where an attribution is zero the distance itself.

    Raises:
        InputError: a target that does not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> metrics.max_sensitivity(Saliency(demo.load()), torch.rand(2, 3, 96, 96), target=3, samples=2).shape
        torch.Size([2])
    """
    if radius <= 0 or samples < 1:
        raise InputError(f"radius and samples must be positive, got {radius} and {samples}")
    classes = classes_of(target, images)
    before = shown(explain(images, classes), images, signed=True).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    farthest = before.new_zeros(len(images))
    for _ in range(samples):
        noise = (2 * torch.rand(1, *images.shape[1:], generator=generator) - 1) * radius
        after = shown(explain(images + noise.to(images), classes), images, signed=True).flatten(1)
        farthest = torch.maximum(farthest, torch.linalg.vector_norm(after - before, dim=1))
    length = torch.linalg.vector_norm(before, dim=1)
    return farthest / torch.where(length > 0, length, 1)
