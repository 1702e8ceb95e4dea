"""Dimension arguments of ops as lists of numbers."""

from collections.abc import Sequence


def per_dimension(value: int | Sequence[int], rank: int) -> list[int]:
    """Returns a number for each of `rank` dimensions: of a kernel, stride or padding that is one for all or a list."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def reduced(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """Returns the dimensions that a reduction is over, in order; without any named, all. A scalar has none."""
    if dim is None or dim == [] or not rank:
        return list(range(rank))
    return sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))
