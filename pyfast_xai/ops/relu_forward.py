"""A rectifier that remembers one bit an element."""

import math

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op


def _fake(input: Tensor, upper: float, bound: Tensor | None, clamp: bool, out: Tensor) -> Tensor:
    return input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)


_op = Op("relu_forward(Tensor input, float upper, Tensor? bound, bool clamp, Tensor(a!) out) -> Tensor", _fake)


def relu_forward(
    input: Tensor,
    *,
    upper: float = math.inf,
    bound: Tensor | None = None,
    clamp: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rectify, and write down where a gradient passes: all that a backward pass needs, in 1/32 of the memory.

    The output is `min(max(x, 0), upper)`, and NaN where x is NaN. An element passes where `0 < x < upper`, or `x > 0`
    without an upper end. A bound, the activation of an unperturbed image, is FGVis' defence against adversarial
    evidence (Wagner et al., 2019): nothing passes where the output exceeds it (Eq. 6; a tie passes), and with `clamp`
    the output itself is cut there (Eq. 5).

    Args:
        input: x of any shape, float16, bfloat16, float32 or float64. Not dense in memory, it is copied first.
        upper: the upper end, 6 for ReLU6, rounded to the dtype of `input`.
        bound: shape and dtype of `input`; in another memory order it is copied.
        clamp: cut the output at `bound`.
        out: where the output goes: `input` itself, or a tensor of its shape, dtype and memory order; None for a new
            one.

    Returns:
        The output, and uint8 `[ceil(M / 8)]` for M elements: bit `i % 8`, lowest first, of byte `i // 8` says whether
        the i-th element in memory passes. The bits of a channels-last tensor therefore belong to its channels-last
        gradient. Bits past the last element are 0.

    Raises:
        RuntimeError: an upper end that is not positive, a bound or an `out` that does not fit, an `out` for an input
            that is not dense, or `clamp` without a bound.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> output, bits = ops.relu_forward(torch.tensor([[-1.0, 1.0, 2.0]]))
        >>> output, bits
        (tensor([[0., 1., 2.]]), tensor([6], dtype=torch.uint8))
    """
    if out is None:
        out = torch.empty_like(input)
        # Only a dense tensor keeps its strides; another is rectified in place, in its copy.
        if out.stride() != input.stride():
            input = out.copy_(input.detach())
    if bound is not None and bound.shape == input.shape and bound.stride() != input.stride():
        bound = torch.empty_like(input, dtype=bound.dtype).copy_(bound.detach())
    return out, _op(input, upper, bound, clamp, out)
