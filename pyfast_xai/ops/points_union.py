"""The set union of traced points."""

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op


def _fake(points: Tensor, size: int, capacity: int | None = None) -> Tensor:
    return points.new_empty(torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity)


_op = Op("points_union(Tensor points, int size, int? capacity=None) -> Tensor", _fake)


def points_union(points: Tensor, size: int, capacity: int | None = None) -> Tensor:
    """Returns the sorted distinct values of a list of points, by a bitmap of `size` bits instead of a sort.

    Args:
        points: flat indices `[P]`, int64, each in `[0, size)`, or -1 for no point.
        size: upper bound of the points.
        capacity: entries of the result, those behind the last point -1: then nothing waits for a device. None for as
            many as there are points.

    Returns:
        The distinct points in rising order, int64, `[capacity]` or `[Q]`.

    Raises:
        RuntimeError: a point outside, more distinct points than `capacity`, or another dtype or rank. On a device the
            first two are assertions there, as in torch's own indexing.

    CNN-Fixations, Algorithm 2, line 11.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> ops.points_union(torch.tensor([7, 2, -1, 7]), size=10)
        tensor([2, 7])
    """
    return _op(points, size, capacity)
