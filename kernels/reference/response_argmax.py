"""Reference of `response_argmax`."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks


def response_argmax(responses: Tensor, classes: Tensor, best: Tensor, winner: Tensor) -> None:
    """Replace `best` and `winner`, class by class, where the sum over the channels is larger."""
    checks.response_argmax(responses, classes, best, winner)
    for response, index in zip(responses.detach(), classes, strict=True):
        total = torch.zeros_like(best)
        for channel in response.unbind(1):
            total += channel
        index = index[:, None, None]
        wins = (total > best) & (index >= 0)
        best.copy_(torch.where(wins, total, best))
        winner.copy_(torch.where(wins, index, winner))
