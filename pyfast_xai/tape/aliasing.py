"""Two operations that ATen leaves implicit: the effect of a write to one tensor on others that share its memory.

A tape holds values, not memory. When a view is written to, the tensor that owns the memory changes (`scatter_view`),
and so does every other view of it (`regenerate_view`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The position of a tensor in the memory of its owner; the offset counts elements from the start of the owner."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def scatter_view(owner: Tensor, part: Tensor, geometry: Geometry) -> Tensor:
    """Returns the owner of a memory after `part` was written at `geometry`, as a function of both."""
    offset = owner.storage_offset() + geometry.offset
    return torch.as_strided_scatter(owner, part, geometry.size, geometry.stride, offset)


def regenerate_view(owner: Tensor, geometry: Geometry) -> Tensor:
    """Returns a view of the owner, recomputed after the owner changed."""
    return owner.as_strided(geometry.size, geometry.stride, owner.storage_offset() + geometry.offset)
