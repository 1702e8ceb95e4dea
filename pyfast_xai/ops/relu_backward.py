"""Three ways back through a rectifier."""

import math

import torch
from torch import Tensor

from pyfast_xai.kernels.enums import Rectify
from pyfast_xai.ops.registry import Op


def _fake(grad: Tensor, bits: Tensor | None, rule: int, negative_slope: float, out: Tensor) -> None:
    return None


_op = Op("relu_backward(Tensor grad, Tensor? bits, int rule, float negative_slope, Tensor(a!) out) -> ()", _fake)


def relu_backward(
    grad: Tensor,
    bits: Tensor | None,
    rule: Rectify = Rectify.GRADIENT,
    *,
    negative_slope: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Propagates gradients of K targets through one rectifier, by the bits that `relu_forward` wrote.

    With bits written under a bound, GRADIENT is the clipped gradient of FGVis (Wagner et al., 2019, Eq. 6). What does
    not pass becomes exactly 0, an infinity too. A NaN is neither positive nor negative: it passes wherever the input
    lets it.

    Args:
        grad: `[K, ...]`, float16, bfloat16, float32 or float64. The elements of each `grad[k]` must lie in memory in
            the order in which the bits were written. Where `grad[0]`, `grad[1]`, ... are not dense, one behind the
            other, a copy is taken that keeps the order of their dimensions.
        bits: uint8 `[ceil(M / 8)]` for the M elements of a `grad[k]`; None for DECONVNET, which asks for none.
        rule: what passes.
        negative_slope: factor of what GRADIENT does not pass.
        out: where the result goes: `grad` itself, or a tensor of its shape, dtype and memory order; None for a new
            one.

    Returns:
        `out`.

    Raises:
        RuntimeError: bits or an `out` that do not fit, an `out` for gradients that would have to be copied, or a slope
            for a rule that has none.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> output, bits = ops.relu_forward(torch.tensor([[-1.0, 1.0, 2.0]]))
        >>> ops.relu_backward(torch.tensor([[[1.0, -1.0, 1.0]]]), bits, ops.Rectify.GUIDED)
        tensor([[[0., 0., 1.]]])
    """
    if out is None:
        out = torch.empty_like(grad)
        size = math.prod(grad.shape[1:])
        if out.stride() != grad.stride() or (grad.dim() and len(grad) > 1 and grad.stride(0) != size):
            order = torch.empty_like(grad[0]).stride()
            out = grad.new_empty_strided(grad.shape, (size, *order))
            grad = out.copy_(grad.detach())
    _op(grad, bits, int(rule), negative_slope, out)
    return out
