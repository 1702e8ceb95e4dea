"""Gradients on a path to the image: integrated gradients, blur integrated gradients and guided integrated gradients."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import GradientShaped, Reduction
from pyfast_xai.explainers.common.baselines import broadcast
from pyfast_xai.explainers.common.explainer import Settings, at_least
from pyfast_xai.explainers.common.output_gradients import OutputGradients, output_gradients
from pyfast_xai.explainers.common.perturbation_explainer import positive
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, take_rows


class PathMethod(GradientShaped):
    """Base of methods that sum gradients on the way to the image, several places of it in one pass.

    Args:
        model: in evaluation mode.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`; places on the way go through the model `batch_size` at a time, 16 by default.
            Where the target is a function, which may depend on the number of rows, one place of each image does.
    """

    default_batch_size: ClassVar[int | None] = 16
    default_reduction: ClassVar[Reduction] = "sum"
    slow = True
    batch_size: int

    def _targets(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Goal, OutputGradients]:
        """Returns the target with the classes of the images themselves, and its output gradients."""
        seeds = output_gradients(self.record(images, *args, **kwargs), target, self.outputs, self.labels)
        return target if seeds.target is None else seeds.target, seeds

    def _places(self, count: int, images: Tensor, target: Goal) -> Iterator[slice]:
        """Yields parts of some places on the way whose gradients are taken in one pass; all but the last are alike."""
        at_once = 1 if callable(target) else max(1, self.batch_size // len(images))
        each = math.ceil(count / math.ceil(count / at_once))
        yield from (slice(first, min(first + each, count)) for first in range(0, count, each))

    def _gradients(self, points: Tensor, target: Goal, args: Any, kwargs: Any) -> Tensor:
        """Returns the gradients `[K, places, N, C, ...]` at some places `[places, N, C, ...]` of N images."""
        places, images = points.shape[:2]
        rows = torch.arange(images, device=points.device).repeat(places)
        args, kwargs = take_rows((args, kwargs), images, rows)
        repeated = target[rows.to(target.device)] if isinstance(target, Tensor) else target
        return self._walk(points.flatten(0, 1), repeated, args, kwargs)[0].unflatten(1, (places, images))

    def _integrated(
        self, images: Tensor, baseline: Tensor, n_steps: int, target: Goal, args: Any, kwargs: Any
    ) -> Tensor:
        """Returns the integral `[K, N, C, ...]` on the straight way from a baseline `[N, C, ...]`."""
        way = images - baseline
        quadrature = np.stack(np.polynomial.legendre.leggauss(n_steps)) / 2
        precision = torch.promote_types(images.dtype, torch.float32)
        places, weights = torch.as_tensor(quadrature, dtype=precision, device=images.device)
        total: Tensor | None = None
        for part in self._places(n_steps, images, target):
            left = (0.5 - places[part]).view(-1, *[1] * images.dim())
            gradients = self._gradients((images - left * way).to(images.dtype), target, args, kwargs)
            summed = torch.einsum("kp...,p->k...", gradients, weights[part].to(gradients.dtype))
            total = summed if total is None else total.add_(summed)
        assert total is not None
        return total * way


class IntegratedGradients(PathMethod):
    """Gradients summed on the way from a baseline to the image: they add up to the change of the score.

    The integral is taken by Gauss-Legendre quadrature (Sundararajan et al., 2017, equation 1).

    Args:
        model: in evaluation mode.
        n_steps: places on the way.
        baseline: where the way starts: a number (0 is the mean colour of normalised images) or a tensor that
            broadcasts to the images.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`; see `PathMethod` for `batch_size`.

    Example:
        >>> import torch
        >>> from pyfast_xai import IntegratedGradients, demo
        >>> model, images = demo.load(), torch.rand(1, 3, 96, 96)
        >>> explanation = IntegratedGradients(model, n_steps=32)(images, target=3)
        >>> change = (model(images) - model(torch.zeros_like(images)))[:, 3]
        >>> bool((explanation.attribution.sum((1, 2, 3)) - change).abs() < 0.5)
        True
    """

    method = "integrated-gradients"
    paper = "Axiomatic attribution for deep networks (Sundararajan, Taly and Yan, 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_steps: int = 50,
        baseline: float | Tensor = 0.0,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        self.n_steps, self.baseline = at_least(1, "n_steps", n_steps), baseline

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        images = images.detach()
        target, seeds = self._targets(images, target, args, kwargs)
        baseline = broadcast(self.baseline, images)
        return self._integrated(images, baseline, self.n_steps, target, args, kwargs), seeds


class BlurIG(PathMethod):
    """Gradients summed on the way from a strongly blurred image to the image (Xu, Venugopalan and Sundararajan, 2020).

    The way is that of scale space, so that no baseline has to be chosen and no feature is made that the image does not
    have. Of the integral (equation 3 of the paper) each step takes the gradient at the middle of two scales times the
    difference of the two images; the steps add up to the change of the score from the blurred image. Beyond its edges
    an image is zero.

    Args:
        model: in evaluation mode.
        n_steps: places on the way.
        max_sigma: standard deviation of the blur at its start, in pixels.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`; see `PathMethod` for `batch_size`.

    Example:
        >>> import torch
        >>> from pyfast_xai import BlurIG, demo
        >>> explanation = BlurIG(demo.load(), n_steps=20)(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "blur-ig"
    paper = "Attribution in scale and space (Xu, Venugopalan and Sundararajan, 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_steps: int = 100,
        max_sigma: float = 50.0,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        self.n_steps, self.max_sigma = at_least(1, "n_steps", n_steps), positive("max_sigma", max_sigma)

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        images = images.detach()
        target, seeds = self._targets(images, target, args, kwargs)
        # Ends and middles of the steps in turn, from the image to the strongest blur.
        sigmas = torch.linspace(0, self.max_sigma, 2 * self.n_steps + 1, dtype=torch.float64)
        total: Tensor | None = None
        for part in self._places(self.n_steps, images, target):
            blurred = in_scale_space(images, sigmas[2 * part.start : 2 * part.stop + 1])
            gradients = self._gradients(blurred[1::2], target, args, kwargs)
            summed = (gradients * -blurred[::2].diff(dim=0)).sum(1)
            total = summed if total is None else total.add_(summed)
        assert total is not None
        return total, seeds


def in_scale_space(images: Tensor, sigmas: Tensor) -> Tensor:
    """Returns Gaussian blurs `[S, N, C, ...]` of images `[N, C, ...]`, which are zero beyond their edges.

    Args:
        images: `[N, C, ...]` with any dimensions of space.
        sigmas: standard deviations, in pixels, float64 `[S]`; 0 leaves the images as they are. A Gaussian is cut off at
            four of them.

    Example:
        >>> import torch
        >>> from pyfast_xai.explainers.path_methods import in_scale_space
        >>> in_scale_space(torch.rand(2, 3, 8, 8), torch.tensor([0.0, 1.5])).shape
        torch.Size([2, 2, 3, 8, 8])
    """
    blurred = at_least_float32(images).expand(len(sigmas), *images.shape)
    for dim in range(3, blurred.dim()):
        size = blurred.shape[dim]
        if size == 1:
            continue  # a volume of one slice is an image
        matrices = torch.stack([_gaussian_matrix(size, float(sigma)) for sigma in sigmas]).to(blurred)
        lines = blurred.movedim(dim, -1)
        blurred = torch.bmm(lines.flatten(1, -2), matrices).view(lines.shape).movedim(-1, dim)
    return blurred.to(images.dtype)


def _gaussian_matrix(size: int, sigma: float) -> Tensor:
    """Returns the symmetric matrix, float64 `[size, size]`, that blurs a line of so many pixels."""
    reach = int(4 * sigma + 0.5)
    distances = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.ones(1, dtype=torch.float64) if not reach else torch.exp(-0.5 * (distances / sigma).square())
    places = torch.arange(size)
    apart = (places[:, None] - places).abs()
    return torch.where(apart <= reach, (weights / weights.sum())[(reach + apart).clamp_max(2 * reach)], 0.0)


class GuidedIG(PathMethod):
    """Gradients summed on a way that changes first what the score depends on least (Kapishnikov et al., 2021).

    In each step a share of the pixels whose gradients are smallest moves towards the image, until the distance to it
    has shrunk as it does on the straight line; no pixel leaves a band around the line. Noise that integrated gradients
    pick up where pixels cross steep parts of the function is less. The attribution tends to the change of the score as
    the steps grow in number, slowly where rectifiers put kinks between them.

    Args:
        model: in evaluation mode.
        n_steps: places on the way, one after the other.
        baseline: where the way starts: a number (0 is the mean colour of normalised images) or a tensor that
            broadcasts to the images.
        fraction: the share of the pixels and colours that moves at once.
        max_distance: how far from the straight line a pixel may be, as a share of its way; 0 gives integrated
            gradients, 1 leaves the way free.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`; `batch_size` images, each with all its targets, go their ways together.

    Raises:
        InputError: a share outside its range, or a baseline that does not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GuidedIG, demo
        >>> model, images = demo.load(), torch.rand(1, 3, 96, 96)
        >>> explanation = GuidedIG(model, n_steps=50)(images, target=3)
        >>> change = (model(images) - model(torch.zeros_like(images)))[:, 3]
        >>> bool((explanation.attribution.sum((1, 2, 3)) - change).abs() < 0.5)
        True
    """

    method = "guided-ig"
    paper = "Guided integrated gradients: an adaptive path method for removing noise (Kapishnikov et al., 2021)"

    def __init__(
        self,
        model: nn.Module,
        *,
        n_steps: int = 200,
        baseline: float | Tensor = 0.0,
        fraction: float = 0.25,
        max_distance: float = 0.02,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        if not 0 < fraction <= 1:
            raise InputError(f"fraction must lie in (0, 1], got {fraction}")
        if not 0 <= max_distance <= 1:
            raise InputError(f"max_distance must lie in [0, 1], got {max_distance}")
        self.n_steps, self.baseline = at_least(1, "n_steps", n_steps), baseline
        self.fraction, self.max_distance = fraction, max_distance

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        target, seeds = self._targets(images, target, args, kwargs)
        # A way of its own for each target of each image: `[K * N, ...]`, by target.
        rows = torch.arange(len(images), device=images.device).repeat(seeds.each)
        args, kwargs = take_rows((args, kwargs), len(images), rows)
        each = seeds.target.T.flatten() if seeds.target is not None else target
        start, end = broadcast(self.baseline, images)[rows].flatten(1).double(), images[rows].flatten(1).double()
        way, place, total = end - start, start.clone(), torch.zeros_like(start)
        length = way.abs().sum(1)
        for step in range(1, self.n_steps + 1):
            points = place.to(images.dtype).view(-1, *images.shape[1:])
            gradients = self._walk(points, each, args, kwargs)[0][0].flatten(1).double()
            low = start + way * max(step / self.n_steps - self.max_distance, 0.0)
            high = start + way * min(step / self.n_steps + self.max_distance, 1.0)
            # What fell behind the band is brought to its edge.
            after = torch.where((place - low) * way < 0, low, place)
            after = self._nearer(after, end, high, gradients.abs(), length * (1 - step / self.n_steps))
            total += (after - place) * gradients
            place = after
        return total.to(images.dtype).view(seeds.each, *images.shape), seeds

    def _nearer(self, place: Tensor, end: Tensor, high: Tensor, steepness: Tensor, distance: Tensor) -> Tensor:
        """Returns places moved towards the upper edge of the band until they are as near to the end as wanted.

        Args:
            place: `[M, D]`.
            end: end of the path, `[M, D]`.
            high: upper edge of the band, `[M, D]`.
            steepness: magnitudes of the gradients, by which pixels move first, `[M, D]`.
            distance: the sum of distances to the end that is wanted, `[M]`.
        """
        at_once = int(self.fraction * (place.shape[1] - 1)) + 1
        still = torch.ones_like(distance, dtype=torch.bool)
        for _ in range(math.ceil(place.shape[1] / at_once)):
            current = (end - place).abs().sum(1)
            still = still & ~torch.isclose(current, distance, rtol=1e-9, atol=1e-9)
            if not still.any():
                break
            steepness = steepness.masked_fill(place == high, torch.inf)
            threshold = steepness.kthvalue(at_once, 1, keepdim=True).values
            moves = (steepness <= threshold) & (steepness < torch.inf) & still[:, None]
            reach = ((high - place).abs() * moves).sum(1)
            share = (current - distance) / reach  # of what can be moved; over 1 where that is not enough
            part = place + share.clamp(0, 1).nan_to_num()[:, None] * (high - place)
            place = torch.where(moves, torch.where(share[:, None] > 1, high, part), place)
            still = still & (share > 1)
        return place
