"""Baselines: the values that replace hidden pixels."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import one_of

Baseline = Literal["blur", "mean"] | float | Tensor


def check_baseline(baseline: Baseline, known: tuple[str, ...] = ("blur", "mean")) -> Baseline:
    """Refuses values that cannot be a baseline.

    Raises:
        InputError: a name that is not known, or a number that is not finite.
    """
    if isinstance(baseline, (str, type(None))):
        return one_of("baseline", baseline, known)
    if not isinstance(baseline, Tensor) and not math.isfinite(baseline):
        raise InputError(f"baseline must be finite, got {baseline}")
    return baseline


def baseline_for(baseline: Baseline, images: Tensor, sigma: float) -> Tensor:
    """Returns the images with everything taken away, `[N, C, H, W]`.

    Args:
        baseline: a number (0 is the mean colour of normalised images), a tensor that broadcasts to the images,
            "mean", the mean colour of each image, or "blur".
        images: `[N, C, H, W]`.
        sigma: standard deviation of the blur, in pixels.

    Raises:
        InputError: a tensor that does not fit.
    """
    if isinstance(baseline, str):
        places = tuple(range(2, images.dim()))
        baseline = blurred(images, sigma) if baseline == "blur" else images.mean(places, keepdim=True)
    return broadcast(baseline, images)


def broadcast(baseline: float | Tensor, images: Tensor, rows: int | None = None) -> Tensor:
    """Returns a number or a tensor in the shape of the images.

    Args:
        baseline: a tensor must broadcast to the images.
        images: `[N, C, ...]`.
        rows: number of rows of the result; None for N.

    Raises:
        InputError: a tensor that does not fit.
    """
    tensor = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    try:
        return tensor.expand(len(images) if rows is None else rows, *images.shape[1:])
    except RuntimeError:
        shapes = f"{list(images.shape)}, got {list(tensor.shape)}"
        raise InputError(f"baseline must broadcast to the images, {shapes}") from None


def blurred(images: Tensor, sigma: float, *, mirrored: bool = True) -> Tensor:
    """Returns Gaussian blur of images, channel by channel; can be differentiated.

    Args:
        images: `[N, C, H, W]`, volumes `[N, C, D, H, W]` or signals `[N, C, L]`.
        sigma: standard deviation in pixels.
        mirrored: edges are mirrored, and the Gaussian reaches 3 deviations, at most as far as the images; otherwise
            zeros lie around the images, and it reaches 4 deviations.
    """
    with torch.autocast(images.device.type, enabled=False):
        for dim in (d for d in range(2, images.dim()) if images.shape[d] > 1):
            reach = min(math.ceil(3 * sigma), images.shape[dim] - 1) if mirrored else math.ceil(4 * sigma)
            taps = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float64)
            weights = torch.exp(-0.5 * (taps / sigma) ** 2)
            weights = (weights / weights.sum()).to(images.dtype)
            if images.dim() == 4:
                shape = [1, 1, 1, 1]
                shape[dim] = -1
                pad = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
                padded = functional.pad(images, pad, mode="reflect" if mirrored else "constant")
                images = functional.conv2d(padded.flatten(0, 1)[:, None], weights.view(shape)).view(images.shape)
            else:
                lines = images.movedim(dim, -1)
                padded = functional.pad(
                    lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="reflect" if mirrored else "constant"
                )
                images = functional.conv1d(padded, weights.view(1, 1, -1)).view(lines.shape).movedim(-1, dim)
    return images
