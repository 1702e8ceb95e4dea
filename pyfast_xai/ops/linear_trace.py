"""Evidence of fully connected neurons."""

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op


def _fake(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None,
    capacity: int | None = None,
) -> Tensor:
    return points.new_empty(torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity)


_op = Op(
    "linear_trace(Tensor input, Tensor weight_positive, Tensor weight_negative, Tensor points, Tensor? negative,"
    " int? capacity=None) -> Tensor",
    _fake,
)


def linear_trace(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """Returns the inputs that excite any of the chosen neurons of their row (CNN-Fixations, Algorithm 1).

    For every row r, the union over its points (r, o) of `{j : input[r, j] * weight[o, j] > 0}`; for a negative point
    of `{j : input[r, j] * weight[o, j] < 0}`. Only signs matter, so the weight is read as bits.

    Args:
        input: activations below the layer `[R, I]`, float16, bfloat16, float32 or float64.
        weight_positive: bits of `weight > 0`, int64 `[O, ceil(I / 64)]`, from `sign_bits`.
        weight_negative: bits of `weight < 0`, as above.
        points: flat indices into `[R, O]`, int64 `[P]`, or -1 for no point.
        negative: bool `[P]`, True where the evidence *against* the neuron is wanted; None for nowhere.
        capacity: entries of the result, those behind the last index -1: then nothing waits for a device. `min(R, P) *
            I` always suffices. None for as many as there are.

    Returns:
        Sorted distinct flat indices into `[R, I]`, int64, `[capacity]` or `[Q]`.

    Raises:
        RuntimeError: shapes that do not fit, a point outside `[R, O]`, or more indices than `capacity`. On a device
            the last two are assertions there, as in torch's own indexing.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> input, weight = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, -1.0, 1.0]])
        >>> ops.linear_trace(input, *ops.sign_bits(weight), torch.tensor([0]))
        tensor([0])
    """
    return _op(input, weight_positive, weight_negative, points, negative, capacity)
