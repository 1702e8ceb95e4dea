"""NumPy twin of `leading_singular`: an orthonormal basis of the small side, then the SVD of the matrix inside it."""

import numpy as np
import torch
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Solver
from pyfast_xai.kernels.numba import array

AUTO, GRAM, SUBSPACE = map(int, Solver)
OVERSAMPLE = 8
GRAM_LIMIT = 1024


def leading_singular(
    matrices: Tensor, k: int, solver: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the `k` leading singular triplets of `matrices` [B, M, N] and residuals; see `ops.leading_singular`."""
    checks.leading_singular(matrices, k, solver, iterations, seed)
    tall = matrices.shape[1] > matrices.shape[2]
    wide = array(matrices.mT if tall else matrices).astype(np.float64)
    small = wide.shape[1]
    wide_t = wide.swapaxes(1, 2)
    if solver == GRAM or (solver == AUTO and small <= GRAM_LIMIT) or small <= k + OVERSAMPLE:
        basis = np.linalg.eigh(wide @ wide_t)[1][:, :, : -k - 1 : -1]
    else:
        probe = np.random.default_rng(seed % 2**64).standard_normal((wide.shape[2], k + OVERSAMPLE))
        basis = np.linalg.qr(wide @ probe)[0]
        for _ in range(iterations):
            basis = np.linalg.qr(wide_t @ basis)[0]
            basis = np.linalg.qr(wide @ basis)[0]
    # Rayleigh-Ritz: both sides come out orthonormal, also where a singular value is zero.
    inner, singular, right_t = np.linalg.svd(basis.swapaxes(1, 2) @ wide, full_matrices=False)
    left, singular, right = basis @ inner[:, :, :k], singular[:, :k], right_t.swapaxes(1, 2)[:, :, :k]
    error = np.maximum(
        np.linalg.norm(wide @ right - left * singular[:, None], axis=1),
        np.linalg.norm(wide_t @ left - right * singular[:, None], axis=1),
    )
    residual = error / np.maximum(singular[:, :1], np.finfo(np.float64).tiny)
    if tall:
        left, right = right, left
    # The sign of a triplet is chosen so that its left vector sums to a positive number.
    sign = np.where(left.sum(1, keepdims=True) < 0, -1.0, 1.0)
    dtype = torch.promote_types(matrices.dtype, torch.float32)

    def tensor(result: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(result)).to(dtype)

    return tensor(left * sign), tensor(singular), tensor(right * sign), tensor(residual)
