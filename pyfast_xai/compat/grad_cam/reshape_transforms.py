"""Activations that are no maps, laid out as maps `[N, C, h, w]`."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def fasterrcnn_reshape_transform(x: Mapping[str, Tensor]) -> Tensor:
    """The magnitudes of all levels of a feature pyramid, at the size of its level "pool"."""
    size = x["pool"].shape[-2:]
    return torch.cat([functional.interpolate(level.abs(), size, mode="bilinear") for level in x.values()], 1)


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:  # noqa: N802
    """Tokens `[N, height * width, C]`."""
    return tensor.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """Tokens `[N, 1 + height * width, C]`, of which the first is the class token."""
    return tensor[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
