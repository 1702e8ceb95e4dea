"""RISE (Petsiuk, Das and Saenko, 2018): the mean of random masks, each weighted by the score it leaves."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.answers import Answers, Score, wide
from pyfast_xai.explainers.perturbation import Perturbation, at_least, together
from pyfast_xai.explainers.progress import Progress, Told


class RISE(Perturbation):
    """Random masks, averaged with the scores they leave as weights (Petsiuk et al., 2018, Eq. 6).

    A mask is a grid of cells that are open with probability `p1`, enlarged by bilinear interpolation and cropped at
    random. All images, and all targets of an image, share the masks and the forwards.

    Args:
        model: in evaluation mode.
        masks: how many; the paper takes 4000 for VGG-16 and 8000 for ResNet-50.
        cells: along each side of the grid.
        p1: probability that a cell is open.
        score: the weight of a mask: the "probability" of the class, or its "logit".
        batch: images that go through the model at once; results do not depend on it but for rounding.
        seed: of the masks; the process's own random numbers are not touched.
        progress: True shows a bar on stderr, None does on a terminal; or a function called with (done, total).
        labels: names of the classes.

    An explanation has `map`, the weighted mean `[N, H, W]`, and `heatmap`, its positive part: probabilities have no
    other. Where a mask hides nothing of importance the score stays, so no pixel is at zero; boxes are cut in the middle
    of a map's range.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "rise"
    paper = "RISE: randomized input sampling for explanation of black-box models (Petsiuk, Das and Saenko, 2018)"

    def __init__(
        self,
        model: nn.Module,
        *,
        masks: int = 4000,
        cells: int = 7,
        p1: float = 0.5,
        score: Score = "probability",
        batch: int = 32,
        seed: int = 0,
        progress: Told = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, score=score, batch=batch, progress=progress, labels=labels)
        self.masks, self.cells = at_least(1, "masks", masks), at_least(2, "cells", cells)
        if not 0 < p1 <= 1:
            raise InputError(f"p1 must lie between 0 and 1, got {p1}")
        self.p1, self.seed = p1, seed

    def _explain(self, images: Tensor, answers: Answers, args: Any, kwargs: Any) -> dict[str, Any]:
        draw = _Masks(self.cells, self.p1, self.seed, wide(images[:1]))
        sums = wide(images).new_zeros(len(images), answers.each, *images.shape[2:])
        with Progress(self.progress, self.method, self.masks * len(images)) as progress:
            for start in range(0, self.masks, self.batch):
                masks = draw(min(self.batch, self.masks - start))
                shown = masks[:, None].to(images.dtype)
                for rows in together(images, self.batch, len(masks)):
                    changed = (images[rows][:, None] * shown).flatten(0, 1)
                    scores = answers(changed, rows.repeat_interleave(len(masks))).view(len(rows), len(masks), -1)
                    with torch.autocast(images.device.type, enabled=False):
                        sums[rows] += torch.einsum("nmk,mhw->nkhw", scores.to(masks.dtype), masks)
                    progress.advance(len(changed))
        mean = sums.flatten(0, 1) / (self.masks * self.p1)
        return {"heatmap": mean.clamp_min(0).float(), "map": mean, "threshold": 0.5}


class _Masks:
    """Draws masks one after the other, so that they do not depend on how many are drawn at once.

    As the authors do, grids of s x s cells are enlarged to s + 1 cells' length, with edges mirrored, and cropped.

    Args:
        cells: s.
        p1: probability that a cell is open.
        seed: of the draws.
        like: `[1, C, H, W]`, of the dtype and on the device that masks are to have.
    """

    def __init__(self, cells: int, p1: float, seed: int, like: Tensor) -> None:
        self._grid, self._p1 = (cells, cells), p1
        self._generator = torch.Generator().manual_seed(seed)
        self._size = tuple(like.shape[2:])
        self._cell = [math.ceil(size / cells) for size in self._size]
        self._enlarge = [_enlargement(cells, (cells + 1) * cell).to(like) for cell in self._cell]

    def __call__(self, count: int) -> Tensor:
        """The next masks, `[count, H, W]`."""
        drawn = [self._draw() for _ in range(count)]
        rows, columns = self._enlarge
        grids = torch.stack([grid for grid, _ in drawn]).to(rows)
        height, width = self._size
        vertical = torch.stack([rows[y : y + height] for _, (y, _) in drawn])
        horizontal = torch.stack([columns[x : x + width] for _, (_, x) in drawn])
        with torch.autocast(rows.device.type, enabled=False):
            return vertical @ grids @ horizontal.mT

    def _draw(self) -> tuple[Tensor, list[int]]:
        """Which cells of a mask are open, and where it is cropped."""
        grid = torch.rand(self._grid, generator=self._generator) < self._p1
        return grid, [int(torch.randint(cell, (), generator=self._generator)) for cell in self._cell]


def _enlargement(cells: int, size: int) -> Tensor:
    """Linear interpolation of `cells` numbers at `size` places, with mirrored edges, float64 `[size, cells]`."""
    last = cells - 1
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * cells / size - 0.5).abs()
    at = last - (last - at).abs()
    weights = 1 - (at[:, None] - torch.arange(cells)).abs()
    return weights.clamp_min(0)
