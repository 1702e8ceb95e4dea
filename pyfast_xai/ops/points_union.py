"""The set union of traced points."""

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op


def _fake(points: Tensor, size: int) -> Tensor:
    return points.new_empty(torch.library.get_ctx().new_dynamic_size())


_op = Op("points_union(Tensor points, int size) -> Tensor", _fake)


def points_union(points: Tensor, size: int) -> Tensor:
    """Sorted distinct values of a list of points, by a bitmap of `size` bits instead of a sort.

    Args:
        points: flat indices `[P]`, int64, each in `[0, size)`.
        size: how many places there are.

    Returns:
        The distinct points in rising order, `[Q]`, int64.

    Raises:
        RuntimeError: a point outside `[0, size)`, or another dtype or rank.

    CNN-Fixations, Algorithm 2, line 11.
    """
    return _op(points, size)
