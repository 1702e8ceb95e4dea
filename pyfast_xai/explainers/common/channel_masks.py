"""The channels of an activation as masks over the images, and the scores that are left behind them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Makes the masks `[M, 1, *size]` of some of N * C channels, which are given by their places, int64 `[M]`.
Masks = Callable[[Tensor], Tensor]


def scores_behind(
    samples: Iterable[Masks],
    images: Tensor,
    places: Tensor,
    channels: int,
    batch_size: int,
    score: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Returns the mean scores of images behind masks, which are made as they are needed.

    Args:
        samples: what makes the masks, once for each sample that the mean is taken of.
        images: `[N, ...]`.
        places: which channels mask their image, int64 `[P]`: `n * channels + c`.
        channels: C.
        batch_size: masked images at once.
        score: gives `[M]` or `[M, K]` scores of `[M, ...]` images made of the rows `[M]`.

    Returns:
        `[P]` or `[P, K]`.
    """
    total: Tensor | None = None
    count = 0
    for masks in samples:
        parts = []
        for part in places.split(batch_size):
            rows = part.div(channels, rounding_mode="floor")
            parts.append(score(images[rows] * masks(part).to(images.dtype), rows))
        scores = torch.cat(parts)
        total = scores if total is None else total + scores
        count += 1
    assert total is not None
    return total / count


def stretched(maps: Tensor, epsilon: float = 0.0) -> Tensor:
    """Returns maps `[M, ...]`, each from 0 to 1, or to just below with an epsilon; flat ones are 0."""
    space = tuple(range(1, maps.dim()))
    low = maps.amin(space, keepdim=True)
    span = maps.amax(space, keepdim=True) - low + epsilon
    return torch.where(span > 0, (maps - low) / span, 0)
