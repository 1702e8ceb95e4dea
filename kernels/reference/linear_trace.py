"""Reference of `linear_trace`: Algorithm 1 of CNN-Fixations as a product of Boolean matrices."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks

WORD = 64


def _unpack(words: Tensor, columns: int) -> Tensor:
    bits = (words[:, :, None] >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten(1)[:, :columns].bool()


def linear_trace(
    input: Tensor, weight_positive: Tensor, weight_negative: Tensor, points: Tensor, negative: Tensor | None
) -> Tensor:
    """Union over the points of a row of `{j : input[r, j] * weight[o, j] > 0}` (`< 0` for a negative point)."""
    checks.linear_trace(input, weight_positive, weight_negative, points, negative)
    rows, features = input.shape
    outputs = weight_positive.shape[0]
    if negative is None:
        negative = torch.zeros_like(points, dtype=torch.bool)
    reached = []
    for flip in (False, True):
        chosen = points[negative == flip]
        selected = torch.zeros(rows, outputs, dtype=torch.float64, device=input.device)
        selected[chosen // outputs, chosen % outputs] = 1
        # How many selected neurons hold a weight of the wanted sign on input j.
        excited = selected @ _unpack(weight_negative if flip else weight_positive, features).double() > 0
        inhibited = selected @ _unpack(weight_positive if flip else weight_negative, features).double() > 0
        reached.append((excited & (input > 0)) | (inhibited & (input < 0)))
    return (reached[0] | reached[1]).flatten().nonzero().flatten()
