"""The first principal component of weighed or plain activations, and which way it points."""

import torch
from torch import Tensor

from pyfast_xai import ops
from pyfast_xai.ops import Solver


def first_component(matrices: Tensor, along: Tensor) -> Tensor:
    """Projects centred matrices on their first principal direction.

    The direction of a principal component is known but for its sign; here each map rises with another map.

    Args:
        matrices: `[R, positions, C]`, at least float32, finite.
        along: `[R, positions]`, what the maps rise with: their covariance is not negative.

    Returns:
        Signed maps `[R, positions]`.
    """
    centred = matrices - matrices.mean(1, keepdim=True)
    left, singular, _, _ = ops.leading_singular(centred.contiguous(), 1, Solver.AUTO, 4, 0)
    maps = (left * singular[:, None])[..., 0]
    return rising(maps, along)


def rising(maps: Tensor, along: Tensor) -> Tensor:
    """Returns maps `[R, positions]`, each turned to rise with another: their covariance is not negative."""
    along = along.to(maps.dtype)
    falls = (maps * (along - along.mean(1, keepdim=True))).sum(1, keepdim=True) < 0
    return torch.where(falls, -maps, maps)
