"""Reference of `points_union`."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks


def points_union(points: Tensor, size: int) -> Tensor:
    """Sorted distinct values of `points` [P], each in [0, size)."""
    checks.points_within(points, size)
    return torch.unique(points)
