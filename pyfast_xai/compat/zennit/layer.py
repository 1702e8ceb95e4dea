"""The layer that stands for sums of branches in zennit's maps of layers."""

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """Sums along a dimension; in a map of layers it stands for every sum of two branches.

    Args:
        dim: dimension of the sum.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.zennit.layer import Sum
        >>> Sum()(torch.ones(2, 3))
        tensor([3., 3.])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Returns the sum."""
        return torch.sum(input, dim=self.dim)
