"""Meaningful perturbation (Fong and Vedaldi, 2017): the smallest smooth region whose blurring takes the class away."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import baseline_for, blurred, check_baseline
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, PerturbationSettings, positive
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.progress_bar import ProgressBar
from pyfast_xai.explainers.common.score_gradients import of_target, score_gradient
from pyfast_xai.explainers.common.tensors import at_least_float32, repeat_rows
from pyfast_xai.explainers.fgvis import MaskExplanation

# Adam's usual constants, which the reference code has, too.
MOMENTUM, SECOND, EPSILON = 0.9, 0.999, 1e-8
# Of the circles that a mask can start from, as shares of the shorter side: 0, 5, ... 170 of 224 pixels, with a border
# softened by 10; and the share of the score that may be left.
RADII, SOFT, LEFT = [5 * i / 224 for i in range(35)], 10 / 224, 0.01


class MeaningfulPerturbation(Perturbation):
    """Mask of the smallest smooth region whose deletion takes the class away (Fong and Vedaldi, 2017).

    Of `e = m x + (1 - m) r`, where the null image r is the blurred image, a mask m on a coarse grid is found by Adam
    so that the score of e, the size of what is deleted and the total variation of the mask are small (Eq. 4 and 5).
    Gradients of the score come from a walk over the recorded forward; each mask is optimised for itself. Settings are
    those of the authors' code.

    Args:
        model: in evaluation mode.
        n_iterations: number of iterations of Adam.
        lr: its step.
        l1: weight of the sum of 1 - m over the grid.
        tv: weight of the total variation of m over the grid.
        beta: exponent of the length of its gradient in the total variation.
        scale: pixels along each side of a cell of the grid.
        smooth: standard deviation of the Gaussian over the enlarged mask, in pixels; 0 for none.
        jitter: the image, enlarged by so many pixels, is cropped at another place in each iteration; 0 for none.
        noise: standard deviation of what is added to the mask in each iteration.
        initial_mask: "circle", for each image the smallest centred disc that leaves a hundredth of the score, as in the
            paper; "random"; or a number in 0..1, where 1 is the whole image.
        baseline: the null image: "blur"; "mean", the mean colour of each image; a number (0 is the mean colour of
            normalised images); or a tensor that broadcasts to the images.
        blur: standard deviation of the blurred null image, in pixels.
        seed: seed of jitter, noise and random starts; the process's own random numbers are not touched.
        **settings: those of `Perturbation`.

    An explanation is that of a deletion game of `FGVis`, with a mask `[N, 1, H, W]` for all colours: `heatmap` is
    what was deleted, 1 - m.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import MeaningfulPerturbation, demo
        >>> explanation = MeaningfulPerturbation(demo.load(), n_iterations=3)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([1, 96, 96])
    """

    method = "meaningful-perturbation"
    paper = "Interpretable explanations of black boxes by meaningful perturbation (Fong and Vedaldi, 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_iterations: int = 300,
        lr: float = 0.1,
        l1: float = 1e-4,
        tv: float = 1e-2,
        beta: float = 3.0,
        scale: int = 8,
        smooth: float = 5.0,
        jitter: int = 4,
        noise: float = 0.0,
        initial_mask: Literal["circle", "random"] | float = "circle",
        baseline: Literal["blur", "mean"] | float | Tensor = "blur",
        blur: float = 10.0,
        seed: int = 0,
        **settings: Unpack[PerturbationSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.n_iterations, self.scale = at_least(1, "n_iterations", n_iterations), at_least(1, "scale", scale)
        self.lr, self.beta, self.blur = positive("lr", lr), positive("beta", beta), positive("blur", blur)
        for name, number in (("l1", l1), ("tv", tv), ("smooth", smooth), ("jitter", jitter), ("noise", noise)):
            if not 0 <= number < math.inf:
                raise InputError(f"{name} must not be negative, got {number}")
        self.l1, self.tv, self.smooth, self.jitter, self.noise = l1, tv, smooth, jitter, noise
        if isinstance(initial_mask, str):
            one_of("initial_mask", initial_mask, ("circle", "random"))
        elif not 0 <= initial_mask <= 1:
            raise InputError(f"initial_mask must be 'circle', 'random' or lie in 0..1, got {initial_mask}")
        self.initial_mask = initial_mask
        self.baseline = check_baseline(baseline)
        self.seed = seed

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> MaskExplanation:
        each = scores.each
        null = baseline_for(self.baseline, images, self.blur)
        # A row for each image and target.
        source = repeat_rows(torch.arange(len(images), device=images.device), each)
        indices = torch.arange(each, device=images.device).repeat(len(images))
        masks, perturbed, after = [], [], []
        parts = list(zip(source.split(self.batch_size), indices.split(self.batch_size), strict=True))
        steps = self.n_iterations + (len(RADII) if self.initial_mask == "circle" else 0)
        with ProgressBar(self.progress, self.method, steps * len(source)) as progress:
            for rows, targets in parts:
                job = _Job(images[rows], null[rows], rows, targets)
                mask = self._optimised(job, scores, progress)
                # Weights of the blur sum to one but for rounding.
                masks.append(self._enlarged(mask, images.shape[2:]).clamp(0, 1))
                perturbed.append(_mixed(masks[-1], job.images, job.null))
                if scores.function is None:
                    # A copy, as the model may write to what it is given.
                    after.append(of_target(scores(perturbed[-1].clone(), rows, "probability"), targets))
        mask, shown = torch.cat(masks), torch.cat(perturbed)
        repeated = repeat_rows(images, each)
        return MaskExplanation(
            **self._fields(images, scores.targets),
            heatmap=(1 - mask)[:, 0].float(),
            mask=mask,
            perturbed=shown,
            complement=_mixed(1 - mask, repeated, repeat_rows(null, each)),
            after=torch.cat(after).float() if after else None,
            iterations=torch.full_like(source, self.n_iterations),
            game="deletion",
        )

    def _optimised(self, job: "_Job", scores: PerturbationScores, progress: ProgressBar) -> Tensor:
        """Returns the masks on the grid, `[R, 1, h, w]`."""
        # Each part draws the same: a row does not depend on where it stands.
        generator = torch.Generator().manual_seed(self.seed)
        mask = self._first(job, scores, generator, progress)
        images, null = self._room(job.images), self._room(job.null)
        height, width = job.images.shape[2:]
        first, second = torch.zeros_like(mask), torch.zeros_like(mask)
        for step in range(1, self.n_iterations + 1):
            top, left = (int(torch.randint(max(1, self.jitter), (), generator=generator)) for _ in range(2))
            view = (..., slice(top, top + height), slice(left, left + width))
            noise = self.noise * torch.randn(1, *mask.shape[1:], generator=generator).to(mask) if self.noise else 0
            with torch.enable_grad():
                leaf = mask.detach().requires_grad_()
                whole = self._enlarged((leaf + noise).clamp(0, 1), job.images.shape[2:])
                penalty = self.l1 * (1 - leaf).abs().sum() + self.tv * _variation(leaf, self.beta)
            gradient = score_gradient(
                self, _mixed(whole.detach(), images[view], null[view]), job.rows, job.targets, scores
            )
            slope = (at_least_float32(gradient) * at_least_float32(images[view] - null[view])).sum(1, keepdim=True)
            (gradient,) = torch.autograd.grad([whole, penalty], leaf, [slope, torch.ones_like(penalty)])
            first.mul_(MOMENTUM).add_(gradient, alpha=1 - MOMENTUM)
            second.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
            scale = (second / (1 - SECOND**step)).sqrt_().add_(EPSILON)
            mask = (mask - self.lr * (first / (1 - MOMENTUM**step)) / scale).clamp_(0, 1)
            progress.advance(len(mask))
        return mask

    def _first(
        self, job: "_Job", scores: PerturbationScores, generator: torch.Generator, progress: ProgressBar
    ) -> Tensor:
        """Returns the masks to start from, `[R, 1, h, w]`."""
        height, width = job.images.shape[2:]
        grid = (1, math.ceil(height / self.scale), math.ceil(width / self.scale))
        like = at_least_float32(job.images[:1])
        if self.initial_mask == "random":
            drawn = torch.rand(1, *grid, dtype=torch.float64, generator=generator)
            return drawn.to(like).repeat(len(job.rows), 1, 1, 1)
        if self.initial_mask != "circle":
            return like.new_full((len(job.rows), *grid), float(self.initial_mask))
        before = of_target(scores.before[job.rows], job.targets)
        least = of_target(scores(job.null.clone(), job.rows), job.targets)
        # The middle of each cell, or as near to it as the image reaches.
        rows, columns = (
            (torch.arange(cells, device=like.device) * self.scale + self.scale // 2).clamp(max=side - 1)
            for cells, side in zip(grid[1:], (height, width), strict=True)
        )
        mask = like.new_zeros(len(job.rows), *grid)
        settled = torch.zeros_like(job.rows, dtype=torch.bool)
        for radius in RADII:
            disc = _disc(radius, like)
            after = of_target(scores(_mixed(disc, job.images, job.null), job.rows), job.targets)
            enough = after - least <= LEFT * (before - least)
            # Where no disc is enough the last is the nearest.
            mask = torch.where(settled[:, None, None, None], mask, disc[:, :, rows[:, None], columns])
            settled |= enough
            progress.advance(len(mask))
        return mask

    def _enlarged(self, mask: Tensor, size: Sequence[int]) -> Tensor:
        """Returns a mask on the grid in pixels, `[R, 1, H, W]`: squares of `scale` pixels, smoothed."""
        whole = mask.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)[..., : size[0], : size[1]]
        return blurred(whole, self.smooth) if self.smooth else whole

    def _room(self, images: Tensor) -> Tensor:
        """Returns the images with room to be cropped in."""
        if not self.jitter:
            return images
        size = [side + self.jitter for side in images.shape[2:]]
        return functional.interpolate(images, size, mode="bilinear", align_corners=False)


class _Job:
    """Rows that are optimised together.

    Args:
        images: `[R, C, H, W]`.
        null: likewise.
        rows: index of the image of each, int64 `[R]`.
        targets: which of its targets, int64 `[R]`.
    """

    def __init__(self, images: Tensor, null: Tensor, rows: Tensor, targets: Tensor) -> None:
        self.images, self.null, self.rows, self.targets = images, null, rows, targets


def _mixed(mask: Tensor, images: Tensor, null: Tensor) -> Tensor:
    """Returns `e = m x + (1 - m) r`, in the dtype of the images."""
    mask = mask.to(images.dtype)
    return mask * images + (1 - mask) * null


def _variation(mask: Tensor, beta: float) -> Tensor:
    """Returns the sum of lengths of the mask's gradients to the power of beta; past the edges there is no change."""
    down = functional.pad(mask.diff(dim=2), (0, 0, 0, 1))
    right = functional.pad(mask.diff(dim=3), (0, 1))
    # Below one, powers have no derivative at zero: none is taken.
    return (down.square() + right.square()).clamp_min(torch.finfo(mask.dtype).tiny).pow(beta / 2).sum()


def _disc(radius: float, like: Tensor) -> Tensor:
    """Returns a mask that hides a soft disc `[1, 1, H, W]`, of a radius in shares of the shorter side."""
    height, width = like.shape[2:]
    side = min(height, width)
    y = torch.arange(height, device=like.device)[:, None] - height // 2
    x = torch.arange(width, device=like.device) - width // 2
    disc = (y.square() + x.square() <= (radius * side) ** 2).to(like.dtype)
    return 1 - blurred(disc[None, None], SOFT * side)
