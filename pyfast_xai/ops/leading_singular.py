"""The leading singular triplets of a batch of matrices."""

import torch
from torch import Tensor

from pyfast_xai.kernels.enums import Solver
from pyfast_xai.ops.registry import Op


def _fake(matrices: Tensor, k: int, solver: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, columns = matrices.shape
    template = matrices.new_empty((), dtype=torch.promote_types(matrices.dtype, torch.float32))
    return (
        template.new_empty(batch, rows, k),
        template.new_empty(batch, k),
        template.new_empty(batch, columns, k),
        template.new_empty(batch, k),
    )


_op = Op(
    "leading_singular(Tensor matrices, int k, int solver, int iterations, int seed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def leading_singular(
    matrices: Tensor, k: int = 1, solver: Solver = Solver.AUTO, iterations: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the leading singular triplets `(u, s, v)` of each matrix, with `A v = s u` and `A^T u = s v`.

    Of the two signs of a triplet, the one whose left vector sums to a number >= 0 is returned, on every backend.

    Args:
        matrices: `[B, M, N]`, float16, bfloat16, float32 or float64, any strides, finite.
        k: how many triplets, `1 <= k <= min(M, N)`.
        solver: the route; see `Solver`.
        iterations: passes of the subspace iteration (each multiplies by the matrix and by its transpose).
        seed: of the random start of the subspace iteration.

    Returns:
        `left [B, M, k]`, `singular [B, k]` in falling order, `right [B, N, k]`, and `residual [B, k]`:
        `max(|A^T u - s v|, |A v - s u|) / s_1`, which bounds the distance of s to a true singular value in units of
        the largest. Float32, or float64 for float64 matrices.

    Raises:
        RuntimeError: a k or a shape that does not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> u, s, v, residual = ops.leading_singular(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]))
        >>> s.round(decimals=3), v.abs().round(decimals=3)
        (tensor([[3.]]), tensor([[[1.],
                 [0.]]]))
    """
    return _op(matrices, k, int(solver), iterations, seed)
