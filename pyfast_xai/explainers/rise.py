"""RISE (Petsiuk, Das and Saenko, 2018): the mean of random masks, each weighted by the score it leaves."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, PerturbationSettings, together
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.progress_bar import ProgressBar
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Segment


class RISE(Perturbation):
    """Random masks, averaged with the scores they leave as weights (Petsiuk et al., 2018, Eq. 6).

    A mask is a grid of cells that are open with probability `p1`, enlarged by bilinear interpolation and cropped at
    random. All images, and all targets of an image, share the masks and the forwards.

    Args:
        model: in evaluation mode.
        n_masks: number of masks; the paper takes 4000 for VGG-16 and 8000 for ResNet-50.
        cells: along each side of the grid.
        p1: probability that a cell is open.
        seed: seed of the masks; the process's own random numbers are not touched.
        **settings: those of `Perturbation`.

    An explanation has `signed_map`, the weighted mean `[N, H, W]`, and `heatmap`, its positive part: probabilities have
    no other. Values of a regression may have any offset: their heat map is the positive part of the map of their
    differences to the mean value. Where a mask hides nothing of importance the score stays, so no pixel is at zero;
    boxes are cut in the middle of a map's range.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import RISE, demo
        >>> explanation = RISE(demo.load(), n_masks=32)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([1, 96, 96])
    """

    method = "rise"
    ranks: ClassVar[tuple[int, ...]] = (3, 4, 5)
    default_box_rule = Segment(0.5)
    paper = "RISE: randomized input sampling for explanation of black-box models (Petsiuk, Das and Saenko, 2018)"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_masks: int = 4000,
        cells: int = 7,
        p1: float = 0.5,
        seed: int = 0,
        **settings: Unpack[PerturbationSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.n_masks, self.cells = at_least(1, "n_masks", n_masks), at_least(2, "cells", cells)
        if not 0 < p1 <= 1:
            raise InputError(f"p1 must lie between 0 and 1, got {p1}")
        self.p1, self.seed = p1, seed

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> Explanation:
        draw = _Masks(self.cells, self.p1, self.seed, at_least_float32(images[:1]))
        sums = at_least_float32(images).new_zeros(len(images), scores.each, *images.shape[2:])
        shown_at, totals = sums.new_zeros(sums.shape[2:]), sums.new_zeros(sums.shape[:2])
        with ProgressBar(self.progress, self.method, self.n_masks * len(images)) as progress:
            for start in range(0, self.n_masks, self.batch_size):
                masks = draw(min(self.batch_size, self.n_masks - start))
                shown = masks[:, None].to(images.dtype)
                shown_at += masks.sum(0)
                for rows in together(images, self.batch_size, len(masks)):
                    changed = (images[rows][:, None] * shown).flatten(0, 1)
                    left = scores(changed, rows.repeat_interleave(len(masks))).view(len(rows), len(masks), -1)
                    with torch.autocast(images.device.type, enabled=False):
                        sums[rows] += torch.einsum("nmk,m...->nk...", left.to(masks.dtype), masks)
                    totals[rows] += left.to(masks.dtype).sum(1)
                    progress.advance(len(changed))
        scale = self.n_masks * self.p1
        mean = sums.flatten(0, 1) / scale
        heat = mean
        if scores.are_values:
            mean_score = (totals / self.n_masks).view(*totals.shape, *[1] * (images.dim() - 2))
            heat = (sums - mean_score * shown_at).flatten(0, 1) / scale
        return Explanation(
            **self._fields(images, scores.targets),
            heatmap=heat.clamp_min(0).float(),
            signed_map=mean,
        )


class _Masks:
    """Draws masks one after the other, so that they do not depend on how many are drawn at once.

    As the authors do, grids of s x s cells are enlarged to s + 1 cells' length, with edges mirrored, and cropped.

    Args:
        cells: s.
        p1: probability that a cell is open.
        seed: seed of the draws.
        like: `[1, C, *size]`, of the dtype and on the device that masks are to have.
    """

    def __init__(self, cells: int, p1: float, seed: int, like: Tensor) -> None:
        self._p1 = p1
        self._generator = torch.Generator().manual_seed(seed)
        self._whole = tuple(like.shape[2:])
        self._size = [side for side in self._whole if side > 1] or [1]  # a volume of one slice is an image
        self._grid = (cells,) * len(self._size)
        self._cell = [math.ceil(size / cells) for size in self._size]
        self._enlarge = [_enlargement(cells, (cells + 1) * cell).to(like) for cell in self._cell]

    def __call__(self, count: int) -> Tensor:
        """Returns the next masks, `[count, *size]`."""
        drawn = [self._draw() for _ in range(count)]
        masks = torch.stack([grid for grid, _ in drawn]).to(self._enlarge[0])
        with torch.autocast(masks.device.type, enabled=False):
            for axis, (size, enlarge) in enumerate(zip(self._size, self._enlarge, strict=True)):
                cropped = torch.stack([enlarge[at[axis] : at[axis] + size] for _, at in drawn])  # [count, size, cells]
                before = masks.shape[1 : 1 + axis]
                if axis == len(self._size) - 1:
                    masks = (masks.view(count, -1, masks.shape[-1]) @ cropped.mT).view(count, *before, size)
                else:
                    lines = masks.view(count, math.prod(before), masks.shape[1 + axis], -1)
                    masks = (cropped[:, None] @ lines).view(count, *before, size, *masks.shape[2 + axis :])
        return masks.view(count, *self._whole)

    def _draw(self) -> tuple[Tensor, list[int]]:
        """Draws the open cells of a mask, and the place where it is cropped."""
        grid = torch.rand(self._grid, generator=self._generator) < self._p1
        return grid, [int(torch.randint(cell, (), generator=self._generator)) for cell in self._cell]


def _enlargement(cells: int, size: int) -> Tensor:
    """Returns the linear interpolation of `cells` numbers at `size` places, mirrored edges, float64 `[size, cells]`."""
    last = cells - 1
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * cells / size - 0.5).abs()
    at = last - (last - at).abs()
    weights = 1 - (at[:, None] - torch.arange(cells)).abs()
    return weights.clamp_min(0)
