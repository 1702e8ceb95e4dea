"""Small operations on tensors that several explainers share."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half precision as float32, and float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def repeat_rows(tensor: Tensor, count: int) -> Tensor:
    """Returns a copy of `[N, ...]` with every row repeated, `[N * count, ...]`, which shares no memory with it."""
    with torch.inference_mode(False):
        tensor = tensor.detach()
        return tensor.clone() if count == 1 else tensor.repeat_interleave(count, 0)


def targets_to_rows(by_target: Tensor) -> Tensor:
    """Returns `[K, N, ...]` as rows of an explanation, image by image, `[N * K, ...]`."""
    return by_target.transpose(0, 1).flatten(0, 1).contiguous()


def take_rows(arguments: T, count: int, rows: Tensor) -> T:
    """Returns further arguments of a model for some of the images that they were given for.

    Args:
        arguments: nested in tuples, lists and dicts. A tensor with `count` rows has one for each image; everything
            else goes with all of them.
        count: images that the arguments were given for.
        rows: the image that each row is to belong to, int64 `[M]`.
    """

    def take(leaf: Any) -> Any:
        by_image = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count
        return leaf[rows.to(leaf.device)] if by_image else leaf

    return pytree.tree_map(take, arguments)


def outside_inference_mode(tensor: Any) -> Any:
    """Returns a copy of a tensor that was made in inference mode, and anything else as it is."""
    if not isinstance(tensor, Tensor) or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
