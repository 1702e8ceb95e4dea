"""Sets of positions in a tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast_xai import ops


@dataclass(frozen=True, slots=True)
class Points:
    """Positions whose activation is to be explained.

    Attributes:
        index: flat row-major indices of the tensor's logical shape, int64 `[P]`. The batch is part of the index, and
            `view` and `reshape` leave it as it is, whatever the memory format.
        negative: bool `[P]`, True where a *low* activation is the evidence (below a negative batch-norm scale); None
            for nowhere.
        start: no layer with weights lies between these points and the neuron that is explained.
    """

    index: Tensor
    negative: Tensor | None = None
    start: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def to(self, index: Tensor, keep: Tensor | None = None) -> "Points":
        """The same points at other indices; where `keep` is given, only those of its True entries."""
        if keep is None:
            return Points(index, self.negative, self.start)
        return Points(index[keep], None if self.negative is None else self.negative[keep], self.start)

    def flip(self, where: Tensor | None = None) -> "Points":
        """The same points with the opposite sign, everywhere or where a bool `[P]` says."""
        flipped = torch.ones_like(self.index, dtype=torch.bool) if where is None else where
        if self.negative is not None:
            flipped = flipped ^ self.negative
        return Points(self.index, flipped if bool(flipped.any()) else None, self.start)

    def signed(self, values: Tensor) -> Tensor:
        """`values` [P] (or [P, K]) with the sign turned for negative points: larger is always better evidence."""
        if self.negative is None:
            return values
        return torch.where(self.negative.view(-1, *[1] * (values.dim() - 1)), -values, values)


def union(parts: Sequence[Points], size: int) -> Points:
    """The distinct points of several sets on a tensor of `size` elements."""
    start = any(part.start for part in parts)
    index = torch.cat([part.index for part in parts])
    if all(part.negative is None for part in parts):
        return Points(ops.points_union(index, size), None, start)
    negative = torch.cat(
        [torch.zeros_like(part.index, dtype=torch.bool) if part.negative is None else part.negative for part in parts]
    )
    both = ops.points_union(torch.where(negative, index + size, index), 2 * size)
    negative = both >= size
    return Points(torch.where(negative, both - size, both), negative, start)


def unravel(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Coordinates `[P]`, one a dimension, of flat row-major indices."""
    coordinates = []
    for size in reversed(shape[1:]):
        above = torch.div(index, size, rounding_mode="floor")
        coordinates.append(index - above * size)
        index = above
    return [index, *coordinates[::-1]] if shape else []


def ravel(coordinates: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Flat row-major indices of coordinates."""
    index = torch.zeros_like(coordinates[0]) if not shape else coordinates[0]
    for coordinate, size in zip(coordinates[1:], shape[1:], strict=True):
        index = index * size + coordinate
    return index


def memory(tensor: Tensor) -> Tensor:
    """The memory a tensor lies in, as a vector that starts at its first element."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,))


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Elements of `tensor` at flat row-major indices of its logical shape; the memory format does not matter."""
    if tensor.is_contiguous():
        return tensor.view(-1)[index]
    offset = torch.zeros_like(index)
    for coordinate, stride in zip(unravel(index, tensor.shape), tensor.stride(), strict=True):
        offset += coordinate * stride
    return memory(tensor)[offset]


def broadcast(index: Tensor, shape: Sequence[int], source: Sequence[int]) -> Tensor:
    """Where elements of a result of `shape` come from in an operand of shape `source` that was broadcast to it."""
    if math.prod(shape) == math.prod(source):
        return index
    coordinates = unravel(index, shape)[len(shape) - len(source) :]
    here = [c if size > 1 else torch.zeros_like(c) for c, size in zip(coordinates, source, strict=True)]
    return ravel(here, source) if source else torch.zeros_like(index)
