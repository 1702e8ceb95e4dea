"""Reference of `leading_singular`: a full SVD in float64 for the Gram route, Halko's iteration for the other."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Solver
from pyfast_xai.kernels.reference.normals import normals

AUTO, GRAM, SUBSPACE = map(int, Solver)
OVERSAMPLE = 8
# Above this many rows and columns on the small side, the Gram matrix costs more than the iteration.
GRAM_LIMIT = 1024


def leading_singular(
    matrices: Tensor, k: int, solver: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the `k` leading singular triplets of `matrices` [B, M, N] and residuals; see `ops.leading_singular`."""
    checks.leading_singular(matrices, k, solver, iterations, seed)
    small = min(matrices.shape[1:])
    exact = matrices.double()
    if solver == GRAM or (solver == AUTO and small <= GRAM_LIMIT) or small <= k + OVERSAMPLE:
        left, singular, right_t = torch.linalg.svd(exact, full_matrices=False)
        right = right_t.mT
    else:
        probe = normals(exact.shape[2], k + OVERSAMPLE, seed, exact.device)
        basis = torch.linalg.qr(exact @ probe).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(exact.mT @ basis).Q
            basis = torch.linalg.qr(exact @ basis).Q
        inner, singular, right_t = torch.linalg.svd(basis.mT @ exact, full_matrices=False)
        left, right = basis @ inner, right_t.mT
    left, singular, right = left[..., :k], singular[..., :k], right[..., :k]
    # The sign of a triplet is chosen so that its left vector sums to a positive number.
    sign = torch.where(left.sum(1, keepdim=True) < 0, -1.0, 1.0)
    left, right = left * sign, right * sign
    error = torch.linalg.vector_norm(exact.mT @ left - right * singular[:, None], dim=1)
    backward = torch.linalg.vector_norm(exact @ right - left * singular[:, None], dim=1)
    scale = singular[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    residual = torch.maximum(error, backward) / scale
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    return left.to(dtype), singular.to(dtype), right.to(dtype), residual.to(dtype)
