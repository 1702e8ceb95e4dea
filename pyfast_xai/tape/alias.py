"""Two operations that ATen leaves implicit: what a write to one tensor does to others on the same memory.

A tape holds values, not memory. When a view is written to, the tensor that owns the memory changes (`overwrite`), and
so does every other view of it (`refresh`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Where a tensor lies in the memory of its owner; the offset counts elements from the owner's own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def overwrite(owner: Tensor, part: Tensor, geometry: Geometry) -> Tensor:
    """The owner of some memory after `part` was written at `geometry`, as a function of both."""
    offset = owner.storage_offset() + geometry.offset
    return torch.as_strided_scatter(owner, part, geometry.size, geometry.stride, offset)


def refresh(owner: Tensor, geometry: Geometry) -> Tensor:
    """A view of the owner, taken anew after the owner changed."""
    return owner.as_strided(geometry.size, geometry.stride, owner.storage_offset() + geometry.offset)
