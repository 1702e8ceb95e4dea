"""Non-negative matrix factorization of a batch, by coordinate descent as in scikit-learn."""

import numpy as np
import torch
from torch import Tensor


def nonnegative_factors(
    matrices: Tensor, count: int, *, n_iterations: int = 200, tolerance: float = 1e-4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the factors of non-negative matrices, `X ~ W H` with the least squared error.

    The coordinates of W and of H descend in turn (hierarchical alternating least squares, Cichocki and Phan, 2009) from
    random numbers that are the same for all matrices. With the start, the order and the end of scikit-learn's
    `NMF(init="random", solver="cd")`, a matrix has the factors that it has there.

    Args:
        matrices: X `[R, M, P]`, float32 or float64, not negative.
        count: factors, k.
        n_iterations: at most.
        tolerance: a matrix is done when its projected gradient is smaller than this share of what it was at first.
        seed: seed of the start, by NumPy's generator of old.

    Returns:
        W `[R, M, k]` and H `[R, k, P]`, not negative.
    """
    rows, length = matrices.shape[1:]
    random = np.random.RandomState(seed)
    scale = (matrices.mean((1, 2)) / count).sqrt()[:, None, None]
    right = scale * torch.from_numpy(np.abs(random.standard_normal((count, length)))).to(matrices)
    left = scale * torch.from_numpy(np.abs(random.standard_normal((rows, count)))).to(matrices)
    transposed = matrices.mT.contiguous()
    moves = torch.ones(len(matrices), dtype=torch.bool, device=matrices.device)
    first: Tensor | None = None
    for _ in range(n_iterations):
        new_left, left_error = _descended(matrices, left, right.mT)
        new_right, right_error = _descended(transposed, right.mT, new_left)
        left = torch.where(moves[:, None, None], new_left, left)
        right = torch.where(moves[:, None, None], new_right.mT, right)
        error = left_error + right_error
        first = error if first is None else first
        moves = moves & (error > tolerance * first)
        if not bool(moves.any()):
            break
    return left, right


def _descended(matrices: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns W after a step of each of its columns, `X ~ W right^T`, and the size of the projected gradient `[R]`."""
    gram, cross = right.mT @ right, matrices @ right
    left, errors = left.clone(), []
    for t in range(left.shape[2]):
        column = left[..., t]
        gradient = (left @ gram[..., t : t + 1])[..., 0] - cross[..., t]
        errors.append(torch.where(column == 0, gradient.clamp_max(0), gradient).abs().sum(1))
        curvature = gram[:, t, t, None]
        left[..., t] = torch.where(curvature == 0, column, (column - gradient / curvature).clamp_min(0))
    return left, torch.stack(errors).sum(0)
