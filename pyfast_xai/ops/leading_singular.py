"""The leading singular triplets of a batch of matrices."""

from enum import IntEnum

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op


class Method(IntEnum):
    """How the triplets are found.

    AUTO: GRAM while the small side is at most 1024, else SUBSPACE.
    GRAM: eigenvectors of the product of the matrix with its own transpose, to rounding. Backends are free not to form
        that product: the C++ finds them in a Krylov space (block Lanczos; Golub and Underwood, 1977), which takes a
        few passes over the matrix, and forms it where they lie too close to each other.
    SUBSPACE: randomized subspace iteration (Halko, Martinsson and Tropp, 2011, Algorithm 4.4).
    """

    AUTO = 0
    GRAM = 1
    SUBSPACE = 2


def _fake(matrices: Tensor, k: int, method: int, iterations: int, seed: int):
    batch, rows, columns = matrices.shape
    like = matrices.new_empty((), dtype=torch.promote_types(matrices.dtype, torch.float32))
    return (
        like.new_empty(batch, rows, k),
        like.new_empty(batch, k),
        like.new_empty(batch, columns, k),
        like.new_empty(batch, k),
    )


_op = Op(
    "leading_singular(Tensor matrices, int k, int method, int iterations, int seed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def leading_singular(
    matrices: Tensor, k: int = 1, method: Method = Method.AUTO, iterations: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leading singular triplets `(u, s, v)` of each matrix, with `A v = s u` and `A^T u = s v`.

    Of the two signs of a triplet, the one whose left vector sums to a number >= 0 is returned, on every backend.

    Args:
        matrices: `[B, M, N]`, float16, bfloat16, float32 or float64, any strides, finite.
        k: how many triplets, `1 <= k <= min(M, N)`.
        method: the route; see `Method`.
        iterations: passes of the subspace iteration (each multiplies by the matrix and by its transpose).
        seed: of the random start of the subspace iteration.

    Returns:
        `left [B, M, k]`, `singular [B, k]` in falling order, `right [B, N, k]`, and `residual [B, k]`:
        `max(|A^T u - s v|, |A v - s u|) / s_1`, which bounds the distance of s to a true singular value in units of
        the largest. Float32, or float64 for float64 matrices.

    Raises:
        RuntimeError: a k or a shape that does not fit.
    """
    return _op(matrices, k, int(method), iterations, seed)
