"""Sets of positions in a tensor.

The number of points left after a choice depends on their values; reading it would synchronise with the GPU. On
the CPU, points that are not chosen are left out. On a device they stay in the list with an index of -1, *absent*: every
list has the length that shapes alone give it, and nothing is read.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyfast_xai import ops

_everywhere = ContextVar("marking", default=False)


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Keeps absent points on the CPU, too, as on a device; the results are the same."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


def marks(index: Tensor) -> bool:
    """Returns whether absent points stay in this list, as -1."""
    return index.device.type != "cpu" or _everywhere.get()


class Origin:
    """Points that were made together.

    Attributes:
        capacity: how many at most.
    """

    __slots__ = ("capacity",)

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity


@dataclass(frozen=True, slots=True)
class Points:
    """Positions whose activation is to be explained.

    Attributes:
        index: flat row-major indices of the tensor's logical shape, int64 `[P]`. The batch is part of the index, and
            `view` and `reshape` leave it unchanged in every memory format. On a device, -1 is no point.
        negative: bool `[P]`, True where a *low* activation is the evidence (below a negative batch-norm scale); None
            for nowhere.
        start: no layer with weights lies between these points and the neuron that is explained.
        origins: what the points descend from, one to one: however they are moved and shared out among branches, where
            branches meet there are no more than the origins had. Points that are given none have one of their own.
        share: other points of the same origins go elsewhere.
        distinct: no point is there twice with the same sign.
    """

    index: Tensor
    negative: Tensor | None = None
    start: bool = False
    origins: frozenset[Origin] = frozenset()
    share: bool = False
    distinct: bool = False

    def __post_init__(self) -> None:
        if not self.origins:
            object.__setattr__(self, "origins", frozenset((Origin(len(self.index)),)))

    def __len__(self) -> int:
        """Returns the number of entries, including absent ones."""
        return len(self.index)

    def to(self, index: Tensor, keep: Tensor | None = None) -> "Points":
        """Returns the same points at other indices; where `keep` is given, only those of its True entries."""
        share, distinct = self.share or keep is not None, self.distinct and index is self.index
        if marks(index):
            absent = self.index < 0 if keep is None else (self.index < 0) | ~keep
            return replace(self, index=index.masked_fill(absent, -1), share=share, distinct=distinct)
        if keep is None:
            return replace(self, index=index, distinct=distinct)
        negative = None if self.negative is None else self.negative[keep]
        return replace(self, index=index[keep], negative=negative, share=share, distinct=distinct)

    def flip(self, mask: Tensor | None = None) -> "Points":
        """Returns the same points with the opposite sign, everywhere or where a bool `[P]` says."""
        flipped = torch.ones_like(self.index, dtype=torch.bool) if mask is None else mask
        # A point that is there with either sign may be turned into one that is there twice.
        distinct = self.distinct and (mask is None or self.negative is None)
        if self.negative is not None:
            flipped = flipped ^ self.negative
        return replace(self, negative=noted(flipped), distinct=distinct)

    def signed(self, values: Tensor) -> Tensor:
        """Returns `values` [P] (or [P, K]) with the sign turned for negative points: larger is better evidence."""
        if self.negative is None:
            return values
        return torch.where(self.negative.view(-1, *[1] * (values.dim() - 1)), -values, values)


def noted(negative: Tensor) -> Tensor | None:
    """Returns signs as points carry them: None if no point is negative, as far as can be seen without waiting."""
    return negative if marks(negative) or bool(negative.any()) else None


def union(parts: Sequence[Points], size: int) -> Points:
    """Returns the distinct points of several sets on a tensor of `size` elements."""
    start = any(part.start for part in parts)
    origins = frozenset().union(*(part.origins for part in parts))
    if len(parts) == 1 and parts[0].distinct:
        return replace(parts[0], origins=origins)
    index = parts[0].index if len(parts) == 1 else torch.cat([part.index for part in parts])
    signed = any(part.negative is not None for part in parts)
    places = 2 * size if signed else size
    most = min(places, len(index), sum(origin.capacity for origin in origins)) if marks(index) else None
    if not signed:
        return Points(ops.points_union(index, size, most), None, start, origins, distinct=True)
    negative = torch.cat(
        [torch.zeros_like(part.index, dtype=torch.bool) if part.negative is None else part.negative for part in parts]
    )
    if most is not None:
        negative &= index >= 0
    both = ops.points_union(torch.where(negative, index + size, index), places, most)
    negative = both >= size
    return Points(torch.where(negative, both - size, both), negative, start, origins, distinct=True)


def _readable(index: Tensor) -> Tensor:
    return index.clamp(min=0) if marks(index) else index


def unravel(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Returns the coordinates `[P]`, one a dimension, of flat indices; absent points get those of element 0."""
    index = _readable(index)
    coordinates = []
    for size in reversed(shape[1:]):
        above = torch.div(index, size, rounding_mode="floor")
        coordinates.append(index - above * size)
        index = above
    return [index, *coordinates[::-1]] if shape else []


def ravel(coordinates: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Returns the flat row-major indices of coordinates."""
    index = torch.zeros_like(coordinates[0]) if not shape else coordinates[0]
    for coordinate, size in zip(coordinates[1:], shape[1:], strict=True):
        index = index * size + coordinate
    return index


def memory(tensor: Tensor) -> Tensor:
    """Returns the memory a tensor lies in, as a vector that starts at its first element."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,))


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Returns the elements of `tensor` at flat row-major indices of its logical shape, in every memory format.

    What comes for an absent point is some element.
    """
    index = _readable(index)
    if tensor.is_contiguous():
        return tensor.view(-1)[index]
    offset = torch.zeros_like(index)
    for coordinate, stride in zip(unravel(index, tensor.shape), tensor.stride(), strict=True):
        offset += coordinate * stride
    return memory(tensor)[offset]


def broadcast(index: Tensor, shape: Sequence[int], source: Sequence[int]) -> Tensor:
    """Returns the source elements, in an operand of shape `source`, of elements of a broadcast result of `shape`."""
    if math.prod(shape) == math.prod(source):
        return index
    coordinates = unravel(index, shape)[len(shape) - len(source) :]
    source_coordinates = [c if size > 1 else torch.zeros_like(c) for c, size in zip(coordinates, source, strict=True)]
    return ravel(source_coordinates, source) if source else torch.zeros_like(index)
