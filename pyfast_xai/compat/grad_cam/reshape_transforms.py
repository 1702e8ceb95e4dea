"""Activations that are no maps, laid out as maps `[N, C, h, w]`."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def fasterrcnn_reshape_transform(x: Mapping[str, Tensor]) -> Tensor:
    """Returns the magnitudes of all levels of a feature pyramid, at the size of its level "pool".

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import fasterrcnn_reshape_transform
        >>> pyramid = {"0": torch.rand(1, 8, 16, 16), "pool": torch.rand(1, 8, 4, 4)}
        >>> fasterrcnn_reshape_transform(pyramid).shape
        torch.Size([1, 16, 4, 4])
    """
    size = x["pool"].shape[-2:]
    return torch.cat([functional.interpolate(level.abs(), size, mode="bilinear") for level in x.values()], 1)


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:  # noqa: N802
    """Returns the tokens `[N, height * width, C]`.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import swinT_reshape_transform
        >>> swinT_reshape_transform(torch.rand(2, 49, 8)).shape
        torch.Size([2, 8, 7, 7])
    """
    return tensor.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """Returns the tokens `[N, 1 + height * width, C]`, of which the first is the class token.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.grad_cam import vit_reshape_transform
        >>> vit_reshape_transform(torch.rand(2, 197, 8)).shape
        torch.Size([2, 8, 14, 14])
    """
    return tensor[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
