"""The leading singular triplets of a whole batch by batched products alone: no number is read, no library solver waits.

A basis holds one vector a row, `[B, width, size]`. It is iterated on the Gram matrix of the small side, or multiplied
by the matrix and its transpose in turn. Either way the triplets are those of the matrix inside the span of the basis
(Rayleigh and Ritz), whose product with itself is diagonalised. Backends bring the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast_xai.kernels.enums import Solver
from pyfast_xai.kernels.reference.normals import normals

OVERSAMPLE = 8
# Above this many rows and columns on the small side, the Gram matrix costs more than the iteration.
GRAM_LIMIT = 1024
NEGLIGIBLE = 0.1  # share of a vector that is left by a second orthogonalisation


@dataclass(frozen=True)
class Parts:
    """The parts of a decomposition that backends have kernels for.

    Attributes:
        product: of `[B, M, K]` and `[B, K, N]`, any strides.
        diagonalise: gives the eigenvectors, one a row, and eigenvalues of symmetric matrices `[B, width, width]`.
        orthonormalise: gives rows that span what those of a basis do, orthonormal but for what rounding hides.
        iterate: takes Gram matrices, a basis and how many vectors are wanted, and gives the basis after iterations;
            None where there are no Gram matrices.
    """

    product: Callable[[Tensor, Tensor], Tensor]
    diagonalise: Callable[[Tensor], tuple[Tensor, Tensor]]
    orthonormalise: Callable[[Tensor], Tensor]
    iterate: Callable[[Tensor, Tensor, int], Tensor] | None


def has_gram(matrices: Tensor, k: int, solver: int) -> bool:
    """Returns whether a solver takes the Gram matrices of `[B, M, N]`, which give all but rounding hides."""
    small = min(matrices.shape[1:])
    return solver == Solver.GRAM or (solver == Solver.AUTO and small <= GRAM_LIMIT) or small <= k + OVERSAMPLE


def triplets(
    matrices: Tensor, k: int, *, width: int, passes: int, seed: int, dtype: torch.dtype, parts: Parts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the `k` leading singular triplets of `matrices` [B, M, N] and residuals; see `ops.leading_singular`.

    Args:
        matrices: at least one.
        k: how many triplets.
        width: vectors of a basis, at least k.
        passes: of the iteration without Gram matrices.
        seed: of the random start.
        dtype: to compute in.
        parts: of a backend.
    """
    product = parts.product
    # No square of an element may overflow, nor may those of the largest vanish.
    scale = torch.linalg.vector_norm(matrices, torch.inf, dim=(1, 2), dtype=dtype)[:, None]
    wide = matrices / torch.where(scale > 0, scale, 1)[:, :, None]
    tall = wide.shape[1] > wide.shape[2]
    if tall:
        wide = wide.mT
    if parts.iterate is not None:
        basis = parts.iterate(product(wide, wide.mT), _start(wide, width, wide.shape[1], seed), k)
    else:
        basis = _by_subspace(wide, width, passes, seed, parts)
    inside = product(basis, wide)
    rotations, ritz = parts.diagonalise(product(inside, inside.mT))
    leading = ritz.topk(k).indices[:, :, None]
    left = _in_turn(product(rotations.take_along_dim(leading, 1), basis), product)
    image = product(left, wide)
    # Values that are equal but for rounding come out in another order than their squares above.
    singular, order = torch.linalg.vector_norm(image, dim=2).sort(descending=True)
    left, image = (part.take_along_dim(order[:, :, None], 1) for part in (left, image))
    right = _in_turn(image, product)  # where a value is zero its image is rounding
    values = singular[:, :, None]
    backward = torch.linalg.vector_norm(product(right, wide.mT) - left * values, dim=2)
    error = torch.linalg.vector_norm(image - right * values, dim=2)
    residual = torch.maximum(error, backward) / singular[:, :1].clamp_min(torch.finfo(dtype).tiny)
    if tall:
        left, right = right, left
    # The sign of a triplet is chosen so that its left vector sums to a positive number.
    sign = torch.where(left.sum(2, keepdim=True) < 0, -1, 1)
    return (left * sign).mT.contiguous(), singular * scale, (right * sign).mT.contiguous(), residual


def _by_subspace(wide: Tensor, width: int, passes: int, seed: int, parts: Parts) -> Tensor:
    """Returns the basis after randomized subspace iteration (Halko, Martinsson and Tropp, 2011, Algorithm 4.4)."""
    start = _start(wide, width, wide.shape[2], seed)
    start[:, wide.shape[1] :] = 0  # no room for more in the small side
    basis = parts.orthonormalise(parts.product(start, wide.mT))
    for _ in range(passes):
        basis = parts.orthonormalise(parts.product(basis, wide))
        basis = parts.orthonormalise(parts.product(basis, wide.mT))
    return basis


def _start(like: Tensor, width: int, size: int, seed: int) -> Tensor:
    """Draws vectors `[B, width, size]`, the same for every matrix; rows beyond the rank are zero."""
    start = torch.zeros(width, size, dtype=like.dtype, device=like.device)
    start[: min(width, size)] = normals(size, width, seed, like.device).mT[: min(width, size)]
    return start.expand(len(like), -1, -1).contiguous()


def _in_turn(rows: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Orthonormalises a few long rows `[B, k, size]`, the largest first; one within those before it becomes zero."""
    basis = torch.zeros_like(rows)
    for i, row in enumerate(rows.split(1, dim=1)):
        before = basis[:, :i]
        previous = norm = torch.linalg.vector_norm(row, dim=2, keepdim=True)
        for _ in range(2 if i else 0):
            row = row - product(product(row, before.mT), before)
            previous, norm = norm, torch.linalg.vector_norm(row, dim=2, keepdim=True)
        independent = norm > NEGLIGIBLE * previous
        basis[:, i : i + 1] = torch.where(independent, row / torch.where(independent, norm, 1), 0)
    return basis


# Plain PyTorch

SWEEPS = 12  # of rotations: a random matrix takes six; rounding is reached when the values are squares of others
PASSES = 64  # of the iteration on the Gram matrix


def of_a_batch(
    matrices: Tensor, k: int, solver: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the `k` leading singular triplets of `matrices` [B, M, N] in float64, without waiting for a device."""
    width = 1 << (k + OVERSAMPLE - 1).bit_length()
    iterate = _iterate if has_gram(matrices, k, solver) else None
    parts = Parts(torch.bmm, diagonalise, orthonormalise, iterate)
    return triplets(matrices, k, width=width, passes=iterations, seed=seed, dtype=torch.float64, parts=parts)


def _iterate(gram: Tensor, basis: Tensor, _: int) -> Tensor:
    basis = orthonormalise(basis)
    for _ in range(PASSES):
        basis = _orthonormalise_roughly(torch.bmm(basis, gram))
    return orthonormalise(basis)


def orthonormalise(basis: Tensor) -> Tensor:
    """Returns orthonormal rows that span what those of `[B, width, size]` do; twice, since squares lose digits."""
    return _orthonormalise_roughly(_orthonormalise_roughly(basis))


def _orthonormalise_roughly(basis: Tensor) -> Tensor:
    """By the Cholesky factor of the products of rows, shifted by their rounding, for rows that lie within others."""
    info = torch.finfo(basis.dtype)
    basis = basis / torch.linalg.vector_norm(basis, dim=2, keepdim=True).clamp_min(info.tiny)
    products = torch.bmm(basis, basis.mT)
    products.diagonal(dim1=1, dim2=2).add_(10 * len(products[0]) * info.eps)
    factor = torch.linalg.cholesky_ex(products).L  # which, unlike `cholesky`, looks at no error
    return torch.linalg.solve_triangular(factor, basis, upper=False)


def diagonalise(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eigenvectors, one a row, and eigenvalues of symmetric matrices `[B, width, width]`, in no order.

    By Jacobi's rotations, width / 2 disjoint ones at a time: i with i ^ mask, for every mask of a sweep; the width is a
    power of two.
    """
    width = matrices.shape[1]
    index = torch.arange(width, device=matrices.device)
    vectors = torch.eye(width, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    for mask in [*range(1, width)] * SWEEPS:
        partner = index ^ mask
        diagonal = matrices.diagonal(dim1=1, dim2=2)
        across = 2 * matrices[:, index, partner]
        apart = diagonal[:, partner] - diagonal
        # tan of the angle that makes the pair's element zero (Golub and Van Loan, 8.5.2), the smaller of two; the
        # partner finds its negative.
        turn = torch.where((apart > 0) | ((apart == 0) & (index < partner)), 1.0, -1.0)
        length = apart.abs() + torch.hypot(apart, across)
        tangent = turn * across / torch.where(length > 0, length, 1)
        cosine = (1 + tangent.square()).rsqrt()
        sine = -tangent * cosine
        vectors = cosine[:, :, None] * vectors + sine[:, :, None] * vectors[:, partner]
        matrices = cosine[:, :, None] * matrices + sine[:, :, None] * matrices[:, partner]
        matrices = cosine[:, None] * matrices + sine[:, None] * matrices[:, :, partner]
        # Rounding must not tear the pair apart: both take the angle from their own half.
        matrices = (matrices + matrices.mT) / 2
    return vectors, matrices.diagonal(dim1=1, dim2=2)
