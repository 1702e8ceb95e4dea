"""Activations projected on their own first principal direction, which Eigen-CAM is and `eigen_smooth` uses."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyfast_xai import ops
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import one_of
from pyfast_xai.ops import Method

Sign = Literal["fixed", "lapack"]
SIGNS = ("fixed", "lapack")


def check_sign(sign: Sign) -> Sign:
    """Refuse a sign rule that does not exist."""
    return one_of("sign", sign, SIGNS)


def project(activation: Tensor, sign: Sign = "fixed", along: Tensor | None = None) -> Tensor:
    """The centred activations on their first principal direction.

    The direction of a principal component is known but for its sign.

    Args:
        activation: `[N, C, ...]`; NaN counts as 0.
        sign: "fixed" turns every map to rise with `along`; "lapack" leaves the sign that NumPy's SVD happens to give,
            which pytorch-grad-cam takes.
        along: a map `[N, ...]`; None for the energy of the activation at every position.

    Returns:
        `[N, ...]`, signed, float32.

    Raises:
        InputError: activations that are infinite.
    """
    whole = activation.to(torch.promote_types(activation.dtype, torch.float32))
    whole = torch.where(whole.isnan(), 0, whole)
    if bool(whole.isinf().any()):
        raise InputError("activations must not be infinite for principal components, got infinity")
    matrices = whole.flatten(2).mT  # [N, positions, C]
    if along is None:
        along = matrices.square().sum(2)
    matrices = matrices - matrices.mean(1, keepdim=True)
    if sign == "lapack":
        return torch.stack([_by_lapack(matrix) for matrix in matrices]).view(-1, *activation.shape[2:]).float()
    left, singular, _, _ = ops.leading_singular(matrices.contiguous(), 1, Method.AUTO, 4, 0)
    maps = (left * singular[:, None])[..., 0]  # [N, positions]
    along = along.flatten(1).to(maps.dtype)
    rises = (maps * (along - along.mean(1, keepdim=True))).sum(1, keepdim=True)
    return torch.where(rises < 0, -maps, maps).view(-1, *activation.shape[2:]).float()


def _by_lapack(matrix: Tensor) -> Tensor:
    # With full matrices, as there: the thin decomposition may come with the other sign.
    direction = np.linalg.svd(matrix.cpu().numpy(), full_matrices=True)[2][0]
    return matrix @ torch.from_numpy(direction).to(matrix)


def get_2d_projection(activation_batch: np.ndarray, sign: Sign = "fixed") -> np.ndarray:
    """As `project`, on arrays: `[N, C, ...]` to `[N, ...]`, float32."""
    return project(torch.from_numpy(np.array(activation_batch)), check_sign(sign)).numpy()
