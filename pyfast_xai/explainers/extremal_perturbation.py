"""Extremal perturbation (Fong, Patrick and Vedaldi, 2019): the smooth mask of a given area that matters most."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import blurred
from pyfast_xai.explainers.common.explainer import Settings, at_least, one_of
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, positive
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores, Score
from pyfast_xai.explainers.common.progress_bar import ProgressBar, ShowProgress
from pyfast_xai.explainers.common.score_gradients import of_target, score_gradient
from pyfast_xai.explainers.common.tensors import at_least_float32, repeat_rows
from pyfast_xai.explainers.fgvis import MaskExplanation

# Constants of the authors' code: the penalty of the area at first and its growth, the momentum (which also damps), and
# how cold the maximum is that joins the points of the grid.
PENALTY, GROWTH, MOMENTUM, COLDNESS = 300.0, 1.0035, 0.9, 20.0


class ExtremalPerturbation(Perturbation):
    """Smooth mask of a given area that keeps, or takes away, as much of the score as it can (Fong et al., 2019).

    The mask is a smooth maximum of bells around the points of a grid (Eq. 7 and 8), so that it has no detail finer than
    the bells. Gradient descent with momentum makes the score large (or small) while the sorted values of the mask are
    drawn, ever harder, to those of a mask of the area (Eq. 5). Where the mask is lower, the image is more blurred.
    Numbers are those of TorchRay; images and targets are optimised together, each for itself.

    Args:
        model: in evaluation mode.
        area_share: how much of the image the mask covers.
        game: "preservation", where the image is kept under the mask, or "deletion", where it is blurred there.
        n_iterations: steps of the descent.
        lr: its rate.
        step: pixels between points of the grid.
        sigma: width of the bells in pixels.
        blur: standard deviation of the strongest blur, in pixels.
        n_levels: blurs between which the image is interpolated, the weakest being none.
        flip: the image is mirrored in every second step, from the first on.
        score: the class's "logit", or its "probability".
        progress: see `Perturbation`.
        **settings: those of `Explainer`; 8 rows go through the model at once by default.

    An explanation is that of a game of `FGVis`, with a mask `[N, 1, H, W]` for all colours; `heatmap` is the region of
    the given area, which is kept or deleted.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import ExtremalPerturbation, demo
        >>> explanation = ExtremalPerturbation(demo.load(), n_iterations=2)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([1, 96, 96])
    """

    method = "extremal-perturbation"
    paper = "Understanding deep networks via extremal perturbations and smooth masks (Fong, Patrick and Vedaldi, 2019)"
    default_batch_size = 8

    def __init__(
        self,
        model: nn.Module,
        *,
        area_share: float = 0.1,
        game: Literal["preservation", "deletion"] = "preservation",
        n_iterations: int = 800,
        lr: float = 0.01,
        step: int = 7,
        sigma: float = 21.0,
        blur: float = 20.0,
        n_levels: int = 8,
        flip: bool = True,
        score: Score = "logit",
        progress: ShowProgress = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, score=score, progress=progress, **settings)
        if not 0 < area_share < 1:
            raise InputError(f"area_share must lie between 0 and 1, got {area_share}")
        self.area_share, self.flip = area_share, flip
        self.game: Literal["preservation", "deletion"] = one_of("game", game, ("preservation", "deletion"))
        self.n_iterations, self.step = at_least(1, "n_iterations", n_iterations), at_least(1, "step", step)
        self.n_levels = at_least(2, "n_levels", n_levels)
        self.lr, self.sigma, self.blur = positive("lr", lr), positive("sigma", sigma), positive("blur", blur)

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> MaskExplanation:
        each = scores.each
        source = repeat_rows(torch.arange(len(images), device=images.device), each)
        which = torch.arange(each, device=images.device).repeat(len(images))
        levels = [(1 - i / (self.n_levels - 1)) * self.blur for i in range(self.n_levels)]
        pyramid = torch.stack([blurred(images, sigma, mirrored=False) if sigma else images for sigma in levels], 1)
        bells = Bells(images.shape[2:], self.step, self.sigma, at_least_float32(images[:1]))
        masks, perturbed, complement, after = [], [], [], []
        with ProgressBar(self.progress, self.method, self.n_iterations * len(source)) as progress:
            for rows, targets in zip(source.split(self.batch_size), which.split(self.batch_size), strict=True):
                region = self._optimised(bells, pyramid[rows], rows, targets, scores, progress)
                visible = region if self.game == "preservation" else 1 - region
                masks.append(visible)
                perturbed.append(_interpolated(pyramid[rows], visible)[0])
                complement.append(_interpolated(pyramid[rows], 1 - visible)[0])
                if scores.function is None:
                    # A copy, as the model may write to what it is given.
                    after.append(of_target(scores(perturbed[-1].clone(), rows, "probability"), targets))
        mask = torch.cat(masks)
        return MaskExplanation(
            **self._fields(images, scores.targets),
            heatmap=(mask if self.game == "preservation" else 1 - mask)[:, 0].float(),
            mask=mask,
            perturbed=torch.cat(perturbed),
            complement=torch.cat(complement),
            after=torch.cat(after).float() if after else None,
            iterations=torch.full_like(source, self.n_iterations),
            game=self.game,
        )

    def _optimised(
        self,
        bells: "Bells",
        pyramid: Tensor,
        rows: Tensor,
        targets: Tensor,
        scores: PerturbationScores,
        progress: ProgressBar,
    ) -> Tensor:
        """Returns the regions of the area, as they are before the last step, `[R, 1, H, W]`."""
        grid = bells.grid.expand(len(rows), -1, -1, -1).clone()
        momentum = torch.zeros_like(grid)
        preserves = self.game == "preservation"
        for t in range(self.n_iterations):
            with torch.enable_grad():
                leaf = grid.detach().requires_grad_()
                region, whole = bells(leaf)
                values = whole.flatten(1).sort(1)[0]
                ideal = torch.ones_like(values[0])
                ideal[: int(values.shape[1] * (1 - self.area_share))] = 0
                penalty = PENALTY * GROWTH**t * (values - ideal).square().mean(1)
            changed, slope = _interpolated(pyramid, region.detach() if preserves else 1 - region.detach())
            flipped = self.flip and t % 2 == 0
            inputs = changed.flip(3) if flipped else changed.clone()
            gradient = score_gradient(self, inputs, rows, targets, scores)
            gradient = at_least_float32(gradient.flip(3) if flipped else gradient)
            # Deletion turns both the reward and the mask round.
            reward = (gradient * slope).sum(1, keepdim=True)
            (downhill,) = torch.autograd.grad([region, penalty], leaf, [-reward, torch.ones_like(penalty)])
            momentum = downhill if t == 0 else MOMENTUM * momentum + (1 - MOMENTUM) * downhill
            grid = (grid - self.lr * momentum).clamp(0, 1)
            progress.advance(len(rows))
        return region.detach()


class Bells:
    """Masks from the values of a grid: at each pixel the smooth maximum of the bells around it.

    Args:
        size: height and width of a mask.
        step: pixels between points of the grid.
        sigma: width of the bells in pixels; a bell is flat up to half of it. Masks have such a margin on each side.
        like: of the dtype and on the device that masks are to have.

    Attributes:
        grid: the values at first, ones, `[1, 1, h, w]`.
    """

    def __init__(self, size: Sequence[int], step: int, sigma: float, like: Tensor) -> None:
        self._size, self._step, self._margin = size, step, round(sigma)
        self._padding, radius = 1 + math.ceil(2 * sigma / step), 1 + math.ceil(sigma / step)
        self._taps = 2 * radius + 1
        self.grid = like.new_ones(1, 1, *(math.ceil(side / step) for side in size))
        self._cells = [side + 2 * self._padding - self._taps + 1 for side in self.grid.shape[2:]]
        distances = []
        for cells in self._cells:
            place = torch.arange(step * (cells - 1) + 1, device=like.device, dtype=torch.float64)
            first = place.div(step, rounding_mode="floor") - self._padding
            points = first + torch.arange(self._taps, device=like.device)[:, None]
            distances.append(place - (sigma + step * points))
        rows, columns = distances
        far = (rows[:, None, :, None].square() + columns[None, :, None, :].square()).sqrt() / sigma
        self._weights = (-2 * (far - 0.5).clamp_min(0).square()).exp().flatten(0, 1).to(like)

    def __call__(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Returns masks `[R, 1, H, W]` of a grid `[R, 1, h, w]`, and the same with their margins."""
        values = functional.unfold(grid, self._taps, padding=self._padding).unflatten(2, self._cells)
        values = values.repeat_interleave(self._step, 2).repeat_interleave(self._step, 3)
        height, width = self._weights.shape[1:]
        values = self._weights * values[:, :, :height, :width]
        whole = (values * (COLDNESS * values).softmax(1)).sum(1, keepdim=True).clamp(0, 1)
        rows, columns = (slice(self._margin, self._margin + side) for side in self._size)
        return whole[:, :, rows, columns], whole


def _interpolated(pyramid: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns images `[R, C, H, W]` between the levels `[R, L, C, H, W]` that a mask tells, and their slope in it."""
    last = pyramid.shape[1] - 1
    place = mask.to(pyramid.dtype) * last
    level = place.floor().long()
    part = place - level
    below, above = (
        pyramid.gather(1, at.clamp_max(last)[:, None].expand(-1, -1, *pyramid.shape[2:]))[:, 0]
        for at in (level, level + 1)
    )
    return below + part * (above - below), last * (above - below)
