"""Reference of `linear_trace`: Algorithm 1 of CNN-Fixations as a product of Boolean matrices."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.padded_nonzero import padded_nonzero

WORD = 64


def _unpack(words: Tensor, columns: int) -> Tensor:
    bits = (words[:, :, None] >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten(1)[:, :columns].bool()


def linear_trace(
    input: Tensor,
    weight_positive: Tensor,
    weight_negative: Tensor,
    points: Tensor,
    negative: Tensor | None,
    capacity: int | None = None,
) -> Tensor:
    """Returns the union over a row's points of `{j : input[r, j] * weight[o, j] > 0}` (`< 0` for a negative point)."""
    checks.linear_trace(input, weight_positive, weight_negative, points, negative, capacity)
    rows, features = input.shape
    outputs = weight_positive.shape[0]
    if negative is None:
        negative = torch.zeros_like(points, dtype=torch.bool)
    by_sign = []
    for flip in (False, True):
        # One place more, where those that are not chosen go.
        chosen = points.masked_fill((points < 0) | (negative != flip), rows * outputs)
        selected = torch.zeros(rows * outputs + 1, dtype=torch.float64, device=input.device)
        selected = selected.index_fill_(0, chosen, 1)[:-1].view(rows, outputs)
        # The number of selected neurons with a weight of the wanted sign on input j.
        excited = selected @ _unpack(weight_negative if flip else weight_positive, features).double() > 0
        inhibited = selected @ _unpack(weight_positive if flip else weight_negative, features).double() > 0
        by_sign.append((excited & (input > 0)) | (inhibited & (input < 0)))
    return padded_nonzero((by_sign[0] | by_sign[1]).flatten(), capacity)
