"""Reference of `winograd_conv2d`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast_xai.kernels import checks

# Lavin and Gray's transforms of windows and of products, for the points 0, +-a, +-b and infinity.
_A, _B = 0.75, 1.5
_A2, _B2 = _A * _A, _B * _B
WINDOW = (
    (_A2 * _B2, 0, -_A2 - _B2, 0, 1, 0),
    (0, -_A * _B2, -_B2, _A, 1, 0),
    (0, _A * _B2, -_B2, -_A, 1, 0),
    (0, -_B * _A2, -_A2, _B, 1, 0),
    (0, _B * _A2, -_A2, -_B, 1, 0),
    (0, _A2 * _B2, 0, -_A2 - _B2, 0, 1),
)
PRODUCT = (
    (1, 1, 1, 1, 1, 0),
    (0, _A, -_A, _B, -_B, 0),
    (0, _A2, _A2, _B2, _B2, 0),
    (0, _A**3, -(_A**3), _B**3, -(_B**3), 1),
)


def winograd_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], lower: float, upper: float
) -> Tensor:
    """Computes the convolution, tile by tile of 4 x 4 outputs."""
    checks.winograd_conv2d(input, weight, bias, padding, lower, upper)
    to_window, to_tile = (torch.tensor(rows, dtype=input.dtype, device=input.device) for rows in (WINDOW, PRODUCT))
    height, width = (input.shape[2 + d] + 2 * padding[d] - 2 for d in range(2))
    bottom, right = -height % 4, -width % 4
    padded = F.pad(input, (padding[1], padding[1] + right, padding[0], padding[0] + bottom))
    windows = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [N, I, rows, columns, 6, 6]
    windows = torch.einsum("ya,xb,nirjab->yxnrji", to_window, to_window, windows)
    kernels = weight.transpose(1, 2).reshape(6, 6, input.shape[1], -1)  # [6, 6, I, O]
    products = torch.einsum("yxnrji,yxio->yxnrjo", windows, kernels)
    tiles = torch.einsum("ya,xb,abnrjo->noryjx", to_tile, to_tile, products)
    output = tiles.flatten(4, 5).flatten(2, 3)[..., :height, :width]
    if bias is not None:
        output = output + bias[:, None, None]
    return output.clamp(lower, upper).contiguous(memory_format=torch.channels_last)
