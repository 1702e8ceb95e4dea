"""Reference of `points_union`."""

from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.padded_nonzero import padded_nonzero


def points_union(points: Tensor, size: int, capacity: int | None = None) -> Tensor:
    """Returns the sorted distinct values of `points` [P], each in [0, size) or -1, which is left out."""
    checks.points_union(points, size, capacity)
    ordered = points.sort().values
    first = ordered >= 0
    first[1:] &= ordered[1:] != ordered[:-1]
    index = padded_nonzero(first, capacity)
    if not len(points):
        return index
    return ordered[index] if capacity is None else ordered[index.clamp(min=0)].masked_fill_(index < 0, -1)
