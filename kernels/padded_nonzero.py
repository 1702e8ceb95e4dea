"""A `nonzero` with a fixed output size, padded with -1."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks


def padded_nonzero(mask: Tensor, capacity: int | None) -> Tensor:
    """Returns the indices of the True entries of a mask, in rising order.

    Args:
        mask: bool `[P]`.
        capacity: entries of the result, those beyond the last index -1; nothing is read then. None for as many as
            there are, which waits for the device.

    Raises:
        RuntimeError: more True entries than `capacity`.
    """
    if capacity is None:
        return mask.nonzero().flatten()
    order = torch.arange(1, capacity + 1, device=mask.device)
    if not len(mask):
        return order.fill_(-1)
    counts = mask.cumsum(0)
    if mask.device.type == "cpu":
        checks.capacity_suffices(capacity, int(counts[-1]))
    else:
        torch._assert_async(counts[-1] <= capacity, f"capacity must be at least the number of points, got {capacity}")
    return torch.searchsorted(counts, order).masked_fill_(order > counts[-1], -1)
