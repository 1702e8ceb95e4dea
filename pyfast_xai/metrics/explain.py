"""Explainers as the metrics call them: any function of images and classes that returns a row an image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.explanation import Explanation

Explain = Callable[[Tensor, Any], Explanation | Tensor]


def maps_of(result: Explanation | Tensor, images: Tensor, *, signed: bool = False) -> Tensor:
    """Returns the heat maps of an explainer, or its attributions where they are requested and available."""
    maps = result
    if isinstance(result, Explanation):
        maps = result.attribution if signed and result.attribution is not None else result.heatmap
    if not isinstance(maps, Tensor) or maps.dim() < 2 or len(maps) != len(images):
        received = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"explain must return a row for each of {len(images)} images, got {received}")
    maps = maps.detach() if maps.dtype == torch.float64 else maps.detach().float()
    if not bool(torch.isfinite(maps).all()):
        raise InputError("explain must return finite maps, got NaN or infinity")
    return maps


def classes_of(target: Target, images: Tensor) -> Tensor | None:
    """Returns the classes as int64 `[N]`; None is left to the explainer."""
    if target is None:
        return None
    chosen = torch.as_tensor(target, device=images.device)
    if chosen.dim() == 0:
        chosen = chosen.expand(len(images))
    if chosen.shape != (len(images),) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        received = f"{list(chosen.shape)} of {chosen.dtype}"
        raise InputError(f"target must be an int or one for each of {len(images)} images, got {received}")
    return chosen.long()
