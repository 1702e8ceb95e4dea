"""Activations projected on their own first principal direction, which Eigen-CAM is and `eigen_smooth` uses."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.kernel_component import KERNELS, Kernel, first_kernel_component
from pyfast_xai.explainers.common.principal_component import first_component

Sign = Literal["fixed", "lapack"]
SIGNS = ("fixed", "lapack")


def check_sign(sign: Sign) -> Sign:
    """Refuses a sign rule that does not exist."""
    return one_of("sign", sign, SIGNS)


def project(activation: Tensor, sign: Sign = "fixed", along: Tensor | None = None) -> Tensor:
    """Returns the centred activations on their first principal direction.

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
    matrices = _finite(activation).flatten(2).mT  # [N, positions, C]
    if sign == "lapack":
        centred = matrices - matrices.mean(1, keepdim=True)
        return torch.stack([_by_lapack(matrix) for matrix in centred]).view(-1, *activation.shape[2:]).float()
    along = matrices.square().sum(2) if along is None else along.flatten(1)
    return first_component(matrices, along).view(-1, *activation.shape[2:]).float()


def project_by_kernel(activation: Tensor, kernel: Kernel = "sigmoid", gamma: float | None = None) -> Tensor:
    """Returns the centred activations on their first kernel principal component, with the sign of scikit-learn.

    Args:
        activation: `[N, C, ...]`; NaN counts as 0.
        kernel: "sigmoid", "rbf", "poly", "cosine" or "linear".
        gamma: gamma of the kernel; None for one divided by the number of channels.

    Returns:
        `[N, ...]`, signed, float32.

    Raises:
        InputError: activations that are infinite, or a kernel that does not exist.
    """
    rows = _finite(activation).flatten(2).mT
    maps = first_kernel_component(rows, one_of("kernel", kernel, KERNELS), gamma)
    return maps.view(-1, *activation.shape[2:]).float()


def with_larger_peak_positive(maps: Tensor) -> Tensor:
    """Maps `[N, ...]`, each turned so that no value is further below zero than the largest is above."""
    space = tuple(range(1, maps.dim()))
    down = maps.amin(space, keepdim=True).abs() > maps.amax(space, keepdim=True).abs()
    return torch.where(down, -maps, maps)


def _finite(activation: Tensor) -> Tensor:
    whole = activation.to(torch.promote_types(activation.dtype, torch.float32))
    whole = torch.where(whole.isnan(), 0, whole)
    if bool(whole.isinf().any()):
        raise InputError("activations must not be infinite for principal components, got infinity")
    return whole


def _by_lapack(matrix: Tensor) -> Tensor:
    # With full matrices, as there: the thin decomposition may come with the other sign.
    direction = np.linalg.svd(matrix.cpu().numpy(), full_matrices=True)[2][0]
    return matrix @ torch.from_numpy(direction).to(matrix)


def get_2d_projection(activation_batch: np.ndarray, sign: Sign = "fixed") -> np.ndarray:
    """Projects arrays as `project` does tensors: `[N, C, ...]` to `[N, ...]`, float32.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import get_2d_projection
        >>> get_2d_projection(np.random.default_rng(0).normal(size=(2, 8, 4, 4))).shape
        (2, 4, 4)
    """
    return project(torch.from_numpy(np.array(activation_batch)), check_sign(sign)).numpy()


def get_2d_projection_kernel(
    activation_batch: np.ndarray, kernel: Kernel = "sigmoid", gamma: float | None = None
) -> np.ndarray:
    """Returns the result of `project_by_kernel`, on arrays: `[N, C, ...]` to `[N, ...]`, float32.

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import get_2d_projection_kernel
        >>> get_2d_projection_kernel(np.random.default_rng(0).random((2, 8, 7, 7))).shape
        (2, 7, 7)
    """
    return project_by_kernel(torch.from_numpy(np.array(activation_batch)), kernel, gamma).numpy()


def get_2d_projection_with_sign_correction(activation_batch: np.ndarray) -> np.ndarray:
    """Returns `get_2d_projection` with the larger peak positive (Seg-Eigen-CAM, Eq. 13).

    Example:
        >>> import numpy as np
        >>> from pyfast_xai.compat.grad_cam import get_2d_projection_with_sign_correction
        >>> get_2d_projection_with_sign_correction(np.random.default_rng(0).random((2, 8, 7, 7))).shape
        (2, 7, 7)
    """
    return with_larger_peak_positive(project(torch.from_numpy(np.array(activation_batch)))).numpy()
