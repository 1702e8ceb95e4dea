"""Reference of `leading_singular`: a full SVD in float64 for the Gram route, Halko's iteration for the other.

The solvers of PyTorch wait for a device, matrix by matrix. There the whole batch is iterated instead.
"""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.reference.normals import normals
from pyfast_xai.kernels.reference.triplets import OVERSAMPLE, has_gram, of_a_batch


def _solvers_wait(device: torch.device) -> bool:
    return device.type != "cpu"


def leading_singular(
    matrices: Tensor, k: int, solver: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the `k` leading singular triplets of `matrices` [B, M, N] and residuals; see `ops.leading_singular`."""
    checks.leading_singular(matrices, k, solver, iterations, seed)
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    if _solvers_wait(matrices.device) and len(matrices):
        left, singular, right, residual = of_a_batch(matrices, k, solver, iterations, seed)
        return left.to(dtype), singular.to(dtype), right.to(dtype), residual.to(dtype)
    exact = matrices.double()
    if has_gram(matrices, k, solver):
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
    return left.to(dtype), singular.to(dtype), right.to(dtype), residual.to(dtype)
