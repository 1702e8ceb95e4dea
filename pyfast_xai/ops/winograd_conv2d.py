"""A 3 x 3 convolution in a quarter of the multiplications."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.ops.registry import Op, current_backend

_TILE = 4  # outputs high and wide
_PANEL = 16  # filters next to each other in a transformed weight

# With fewer tiles the time goes into reading weights, which are four times as large as they were.
_LEAST_TILES = 8

# The transforms evaluate their polynomials at these points and at infinity. With the usual ones (0, 1, -1, 2 and -2)
# errors are four times as large.
_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], lower: float, upper: float) -> Tensor:
    height, width = (input.shape[2 + d] + 2 * padding[d] - 2 for d in range(2))
    size = (input.shape[0], weight.shape[1] * _PANEL, height, width)
    return input.new_empty(size).contiguous(memory_format=torch.channels_last)


_op = Op(
    "winograd_conv2d(Tensor input, Tensor weight, Tensor? bias, int[] padding, float lower, float upper) -> Tensor",
    _fake,
)


def winograd_weight(weight: Tensor) -> Tensor:
    """Returns the weight of `winograd_conv2d`: every kernel as `G g G^T`, worked out in float64.

    Args:
        weight: float32 `[O, I, 3, 3]`, O a multiple of 16.

    Returns:
        float32 `[36, O / 16, I, 16]`: for each place of a tile's window the numbers of 16 filters next to each other.

    Raises:
        RuntimeError: a weight of another shape or dtype.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> ops.winograd_weight(torch.rand(32, 8, 3, 3)).shape
        torch.Size([36, 2, 8, 16])
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or len(weight) % _PANEL or weight.dtype != torch.float32:
        raise RuntimeError(
            f"weight must be float32 of shape [O, I, 3, 3] with O a multiple of {_PANEL}, got {weight.dtype} of shape"
            f" {list(weight.shape)}"
        )
    filters, channels = weight.shape[:2]
    rows = [[p**i / math.prod(p - q for q in _POINTS if q != p) for i in range(3)] for p in _POINTS]
    transform = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64, device=weight.device)
    transformed = torch.einsum("ya,xb,oiab->yxio", transform, transform, weight.detach().double())
    panels = transformed.float().reshape(-1, channels, filters // _PANEL, _PANEL).transpose(1, 2)
    return panels.contiguous()


def winograd_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (0, 0),
    lower: float = -math.inf,
    upper: float = math.inf,
) -> Tensor:
    """Computes a 3 x 3 convolution with stride 1 by Winograd's filtering F(4 x 4, 3 x 3) (Lavin and Gray, 2016).

    36 products for every 16 outputs take the place of 144. Errors are two to three times those of a direct
    convolution in float32.

    Args:
        input: float32 `[N, I, H, W]`, I a multiple of 16; not channels_last, it is copied first.
        weight: float32 `[36, O / 16, I, 16]`, of `winograd_weight`.
        bias: float32 `[O]`.
        padding: with zeros, above and below, left and right.
        lower: smaller results become this: 0 for a ReLU.
        upper: larger results become this.

    Returns:
        float32 `[N, O, H + 2 * padding[0] - 2, W + 2 * padding[1] - 2]`, channels_last.

    Raises:
        RuntimeError: arguments of another shape or dtype, or limits in the wrong order.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> input, weight = torch.rand(1, 16, 16, 16), torch.rand(32, 16, 3, 3)
        >>> output = ops.winograd_conv2d(input, ops.winograd_weight(weight), padding=(1, 1))
        >>> torch.allclose(output, torch.conv2d(input, weight, padding=1), rtol=1e-4)
        True
    """
    maps = input.detach()
    if maps.dim() == 4:
        maps = maps.contiguous(memory_format=torch.channels_last)
    return _op(maps, weight, bias, list(padding), lower, upper)


def winograd_pays(input: Tensor, weight: Tensor, padding: Sequence[int]) -> bool:
    """Returns whether the compiled `winograd_conv2d` takes a convolution and is faster than a direct one.

    Args:
        input: `[N, I, H, W]`.
        weight: of any convolution with stride 1, as the model has it.
        padding: above and below, left and right.

    Example:
        >>> import torch
        >>> from pyfast_xai import ops
        >>> ops.winograd_pays(torch.rand(1, 8, 4, 4), torch.rand(32, 8, 5, 5), (2, 2))
        False
    """
    filters, channels, *kernel = weight.shape
    if kernel != [3, 3] or filters % _PANEL or channels % _PANEL:
        return False
    if current_backend() not in ("auto", "cpp") or _op.missing("cpp", input.device.type) is not None:
        return False
    if not input.dtype == weight.dtype == torch.float32:
        return False
    size = [input.shape[2 + d] + 2 * padding[d] - 2 for d in range(2)]
    tiles = math.prod(-(-extent // _TILE) for extent in size)
    # Tiles that reach far beyond the maps waste work, so at least half of the multiplications must be saved.
    return len(input) * tiles >= _LEAST_TILES and 2 * 36 * tiles <= 9 * math.prod(size)
