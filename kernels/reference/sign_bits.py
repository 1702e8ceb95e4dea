"""Reference of `sign_bits`."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks

WORD = 64


def _pack(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    words = -(-columns // WORD)
    padded = torch.zeros(rows, words * WORD, dtype=torch.bool, device=mask.device)
    padded[:, :columns] = mask
    # The shift of bit 63 lands on the sign bit, which is what a two's complement word holds there.
    weights = torch.ones(WORD, dtype=torch.int64, device=mask.device) << torch.arange(WORD, device=mask.device)
    return (padded.view(rows, words, WORD) * weights).sum(-1)


def sign_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packs signs: bit j % 64 of word j // 64 of row o says `weight[o, j] > 0` (first result) or `< 0` (second)."""
    checks.sign_bits(weight)
    return _pack(weight > 0), _pack(weight < 0)
