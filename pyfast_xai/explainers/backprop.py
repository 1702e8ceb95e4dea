"""Saliency, DeconvNet and guided backprop: one gradient walk, three rules for rectifiers; and what is built on them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, one_of, rows_of
from pyfast_xai.explainers.seeds import Goal, Seeds, seeds_for
from pyfast_xai.explainers.walking import Start, walked
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.response import DECONVNET, GUIDED, Response, Table, rectifies, walk
from pyfast_xai.tape import Tape

logger = logging.getLogger("pyfast_xai")

Reduction = Literal["max", "mean", "norm", "sum"]

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda attribution: attribution.abs().amax(1),
    "mean": lambda attribution: attribution.abs().mean(1),
    "norm": lambda attribution: torch.linalg.vector_norm(attribution, dim=1),
    "sum": lambda attribution: attribution.sum(1).clamp_min(0),
}


class _Backprop(Explainer):
    """A gradient-shaped attribution `[N, C, H, W]` of each image."""

    overlay: ClassVar[Table] = {}
    default_reduction: ClassVar[Reduction] = "max"

    def __init__(
        self, model: nn.Module, *, reduction: Reduction | None = None, labels: Sequence[str] | None = None
    ) -> None:
        super().__init__(model, labels=labels)
        self.reduction = one_of("reduction", reduction or self.default_reduction, REDUCTIONS)
        self.reading = Response(self.overlay)
        self._said = False

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the largest output, an int, N ints or `[N, K]` ints (a row for each, in one pass); a
                floating-point tensor of the shape of the output as the gradient to start from; or a function of
                what the model returned that gives one number an image.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Raises:
            InputError: images or a target that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self._explain(images, target, args, kwargs)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        self.check(images)
        attribution, seeds = self._attribute(images, target, args, kwargs)
        attribution = attribution.transpose(0, 1).flatten(0, 1).contiguous()
        return Explanation(
            method=self.method,
            heatmap=REDUCTIONS[self.reduction](attribution.float()),
            attribution=attribution,
            target=None if seeds.target is None else seeds.target.flatten(),
            score=None if seeds.score is None else seeds.score.flatten(),
            images=rows_of(images, seeds.each),
            labels=self.labels,
        )

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, Seeds]:
        """Attributions `[K, N, C, H, W]` and what they started from."""
        return self._walk(images, target, args, kwargs)

    def _walk(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, Seeds]:
        reading = self.reading
        tape, seeds, gradient = walked(self, self._step, images, target, reading, args, kwargs, key=_Backprop._step)
        if self.overlay and not self._said and not any(map(rectifies, tape)):
            self._said = True
            logger.warning("%s found no rectifier in the model: this is its plain gradient", self.method)
        return gradient, seeds

    def _step(self, start: Start, images: Tensor, reading: Response, args: Any, kwargs: Any) -> tuple[Tape, Tensor]:
        tape = self.record(images, *args, reading=reading, **kwargs)
        return tape, walk(reading, tape, start(tape).grads, [tape.inputs[0]])[0]


class Saliency(_Backprop):
    """Gradient of a class score with respect to the pixels (Simonyan et al., 2014).

    Args:
        model: in evaluation mode.
        reduction: how the heat map is made of the channels: "max", largest magnitude, as in the paper; "mean"
            magnitude; "norm", Euclidean; "sum", signed, of which the positive part is shown.
        labels: names of the classes.
    """

    method = "saliency"
    paper = "Deep inside convolutional networks (Simonyan, Vedaldi and Zisserman, 2014)"


class DeconvNet(_Backprop):
    """The signal of a class, projected down through rectifiers that see only the signal (Zeiler and Fergus, 2014).

    At every rectifier the gradient R becomes max(R, 0); see `rules.response.rectifiers` for other than ReLU.

    Args:
        model: in evaluation mode.
        reduction: how the heat map is made of the channels, see `Saliency`.
        labels: names of the classes.
    """

    method = "deconvnet"
    paper = "Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014)"
    overlay = DECONVNET


class GuidedBackprop(_Backprop):
    """Gradient that is negative neither above nor below any rectifier (Springenberg et al., 2015).

    At every rectifier of x the gradient R becomes max(R, 0) where x > 0; see `rules.response.rectifiers` for other
    than ReLU. Every rectifier is seen: functional, in-place, reused, in front of a skip.

    Args:
        model: in evaluation mode.
        reduction: how the heat map is made of the channels, see `Saliency`.
        labels: names of the classes.
    """

    method = "guided-backprop"
    paper = (
        "A theoretical explanation for perplexing behaviors of backpropagation-based visualizations (Nie et al., 2018)"
    )
    overlay = GUIDED


class InputXGradient(_Backprop):
    """Gradient times input: a first-order account of the score (Shrikumar et al., 2016).

    Args:
        model: in evaluation mode.
        reduction: how the heat map is made of the channels, see `Saliency`.
        labels: names of the classes.
    """

    method = "input-x-gradient"
    paper = "Not just a black box: learning important features through propagating activation differences (2016)"
    default_reduction = "sum"

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, Seeds]:
        grads, seeds = self._walk(images, target, args, kwargs)
        return grads * images.detach(), seeds


_OF: Mapping[str, Table] = {"saliency": {}, "deconvnet": DECONVNET, "guided-backprop": GUIDED}


class SmoothGrad(_Backprop):
    """Mean gradient over noisy copies of the image (Smilkov et al., 2017).

    The classes are those of the image without noise. Every image gets the same noise, scaled to its own range, so
    that a row does not depend on the others.

    Args:
        model: in evaluation mode.
        of: whose attribution is averaged: "saliency", "deconvnet" or "guided-backprop".
        samples: noisy copies of each image.
        noise: standard deviation, as a share of the image's range.
        squared: average squares, as in the VarGrad family.
        seed: of the noise; the process's own random numbers are not touched.
        reduction: how the heat map is made of the channels, see `Saliency`.
        labels: names of the classes.
    """

    method = "smoothgrad"
    paper = "SmoothGrad: removing noise by adding noise (Smilkov et al., 2017)"
    slow = True

    def __init__(
        self,
        model: nn.Module,
        *,
        of: Literal["saliency", "deconvnet", "guided-backprop"] = "saliency",
        samples: int = 25,
        noise: float = 0.15,
        squared: bool = False,
        seed: int = 0,
        reduction: Reduction | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, reduction=reduction, labels=labels)
        self.reading = Response(_OF[one_of("of", of, _OF)])
        if samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}")
        if noise < 0:
            raise InputError(f"noise must not be negative, got {noise}")
        self.samples, self.noise, self.squared, self.seed = samples, noise, squared, seed

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, Seeds]:
        seeds = seeds_for(self.record(images, *args, **kwargs), target)
        fixed: Goal = target if seeds.target is None else seeds.target
        generator = torch.Generator().manual_seed(self.seed)
        spread = self.noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
        total: Tensor | None = None
        for _ in range(self.samples):
            drawn = torch.randn(1, *images.shape[1:], generator=generator).to(images)
            grads = self._walk(images.detach() + spread * drawn, fixed, args, kwargs)[0]
            grads = grads.square() if self.squared else grads
            total = grads if total is None else total.add_(grads)
        assert total is not None
        return total / self.samples, seeds


class IntegratedGradients(_Backprop):
    """Gradients summed on the way from a baseline to the image: they add up to the change of the score.

    The integral is taken by Gauss-Legendre quadrature (Sundararajan et al., 2017, equation 1).

    Args:
        model: in evaluation mode.
        steps: places on the way.
        baseline: where the way starts: a number (0 is the mean colour of normalised images) or a tensor that
            broadcasts to the images.
        reduction: how the heat map is made of the channels, see `Saliency`.
        labels: names of the classes.
    """

    method = "integrated-gradients"
    paper = "Axiomatic attribution for deep networks (Sundararajan, Taly and Yan, 2017)"
    slow = True
    default_reduction = "sum"

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 50,
        baseline: float | Tensor = 0.0,
        reduction: Reduction | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, reduction=reduction, labels=labels)
        if steps < 1:
            raise InputError(f"steps must be at least 1, got {steps}")
        self.steps, self.baseline = steps, baseline

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, Seeds]:
        images = images.detach()
        baseline = torch.as_tensor(self.baseline, dtype=images.dtype, device=images.device)
        try:
            way = images - baseline.expand(images.shape)
        except RuntimeError:
            raise InputError(
                f"baseline must broadcast to the images, {list(images.shape)}, got {list(baseline.shape)}"
            ) from None
        seeds = seeds_for(self.record(images, *args, **kwargs), target)
        fixed: Goal = target if seeds.target is None else seeds.target
        places, weights = np.polynomial.legendre.leggauss(self.steps)
        total: Tensor | None = None
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
            grads = self._walk(images - (1 - place) * way, fixed, args, kwargs)[0] * weight
            total = grads if total is None else total.add_(grads)
        assert total is not None
        return total * way, seeds
