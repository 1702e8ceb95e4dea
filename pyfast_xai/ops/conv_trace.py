"""Evidence of convolution outputs: the receptive-field Hadamard argmax."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.kernels.enums import Location
from pyfast_xai.ops.registry import Op


def _fake(
    input: Tensor,
    weight: Tensor,
    points: Tensor,
    negative: Tensor | None,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    location: int,
) -> Tensor:
    return torch.empty_like(points)


_op = Op(
    "conv_trace(Tensor input, Tensor weight, Tensor points, Tensor? negative, int[] output_size, int[] stride,"
    " int[] padding, int[] dilation, int groups, int location) -> Tensor",
    _fake,
)


def conv_trace(
    input: Tensor,
    weight: Tensor,
    points: Tensor,
    negative: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    location: Location = Location.PRODUCT,
) -> Tensor:
    """Traces output positions of a convolution to one position each in its input (CNN-Fixations, Algorithm 2).

    For each point the products of receptive field and filter are summed per input channel; the channel with the
    largest sum wins (the least, for a negative point), the first of equals. `location` then picks the position in
    that channel. Padding contributes nothing and is never a position; positions outside are clamped to the border.
    Sums are taken in float32 for half-precision inputs.

    Args:
        input: `[N, C, *spatial]` with one to three spatial dimensions, any float dtype, any memory format.
        weight: `[O, C / groups, *kernel]`, the dtype of `input`.
        points: flat row-major indices into `[N, O, *output_size]`, int64 `[P]`, or -1 for no point.
        negative: bool `[P]`, True to trace the strongest inhibition; None traces none.
        output_size: spatial size of the convolution's output.
        stride: steps between windows, one a dimension.
        padding: zeros before each dimension.
        dilation: distance between taps of a window, one a dimension.
        groups: groups of channels.
        location: the position rule.

    Returns:
        Flat row-major indices into `[N, C, *spatial]`, int64 `[P]`, in the order of `points`, -1 where there is no
        point.

    Raises:
        RuntimeError: shapes that do not fit, or a point outside the output; on a device the latter is an assertion
            there, as in torch's own indexing.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> input, weight = torch.zeros(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
        >>> input[0, 1, 2, 2] = 5
        >>> point = torch.tensor([2 * 16 + 1 * 4 + 1])  # filter 2 at (1, 1)
        >>> place = ops.conv_trace(input, weight, point, None, (4, 4), (1, 1), (1, 1), (1, 1))
        >>> [int(i) for i in torch.unravel_index(place, input.shape)]
        [0, 1, 2, 2]
    """
    return _op(
        input,
        weight,
        points,
        negative,
        list(output_size),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        int(location),
    )
