"""Saliency, DeconvNet and guided backprop: one gradient walk, three rules for rectifiers; and what is built on them."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.explainer import Explainer, Settings, at_least, one_of
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.output_gradients import OutputGradients, output_gradients
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.gradient import DECONVNET, GUIDED, GradientRules, Table, backward_pass, rectifies
from pyfast_xai.tape import Tape

Reduction = Literal["max", "mean", "norm", "sum"]

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda attribution: attribution.abs().amax(1),
    "mean": lambda attribution: attribution.abs().mean(1),
    "norm": lambda attribution: torch.linalg.vector_norm(attribution, dim=1),
    "sum": lambda attribution: attribution.sum(1).clamp_min(0),
}


class GradientShaped(Explainer):
    """A gradient-shaped attribution `[N, C, H, W]` of each image."""

    ranks: ClassVar[tuple[int, ...]] = (3, 4, 5)
    overlay: ClassVar[Table] = {}
    default_reduction: ClassVar[Reduction] = "max"
    zero_reason: ClassVar[str] = (
        "its target does not depend on the image, or not measurably, as a probability that has reached 0 or 1; explain "
        "its logit or another target"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, **settings)
        self.reduction = one_of("reduction", reduction or self.default_reduction, REDUCTIONS)
        self.policy = GradientRules(self.overlay, self.warned)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        attribution, seeds = self._attribute(images, target, args, kwargs)
        attribution = targets_to_rows(attribution)
        heatmap = self.heatmap(attribution, seeds.zero_reasons)
        return Explanation(**self._fields(images, seeds), heatmap=heatmap, attribution=attribution)

    def heatmap(self, attribution: Tensor, zero_reasons: Mapping[int, str] | None = None) -> Tensor:
        """Returns the heat maps `[R, H, W]` of attributions `[R, C, H, W]`, and logs which is zero, and why.

        Args:
            attribution: `[R, C, H, W]`.
            zero_reasons: what a target says of rows in which it is zero.
        """
        heatmap = REDUCTIONS[self.reduction](attribution.float())
        if heatmap.device.type == "cpu":
            for row in heatmap.flatten(1).any(1).logical_not().nonzero().flatten().tolist():
                if bool(attribution[row].any()):
                    self.warn(
                        "the attribution of row %d is nowhere positive, so that its heat map is zero; `attribution` "
                        "has what is negative",
                        row,
                    )
                else:
                    self.warn(
                        f"the attribution of row %d is zero: {(zero_reasons or {}).get(row, self.zero_reason)}", row
                    )
        return heatmap

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        """Returns the attributions `[K, N, C, H, W]` and what they started from."""
        return self._walk(images, target, args, kwargs)

    def _walk(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        policy = self.policy
        tape, seeds, gradient = run_step(
            self, self._step, images, target, policy, args, kwargs, key=GradientShaped._step
        )
        if self.overlay and not any(map(rectifies, tape)):
            self.warn("the model has no rectifier, so that this is its plain gradient")
        return gradient, seeds

    def _step(self, start: Start, images: Tensor, policy: GradientRules, args: Any, kwargs: Any) -> tuple[Tape, Tensor]:
        tape = self.record(images, *args, policy=policy, **kwargs)
        return tape, backward_pass(policy, tape, start(tape).grads, [tape.inputs[0]])[0]


class Saliency(GradientShaped):
    """Gradient of a class score with respect to the pixels (Simonyan et al., 2014).

    Args:
        model: in evaluation mode.
        reduction: makes the heat map from the channels: "max", largest magnitude, as in the paper; "mean"
            magnitude; "norm", Euclidean; "sum", signed, of which the positive part is shown.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo
        >>> explanation = Saliency(demo.load())(torch.rand(2, 3, 96, 96))
        >>> explanation.attribution.shape, explanation.heatmap.shape
        (torch.Size([2, 3, 96, 96]), torch.Size([2, 96, 96]))
    """

    method = "saliency"
    paper = "Deep inside convolutional networks (Simonyan, Vedaldi and Zisserman, 2014)"


class DeconvNet(GradientShaped):
    """The signal of a class, projected down through rectifiers that see only the signal (Zeiler and Fergus, 2014).

    At every rectifier the gradient R becomes max(R, 0); see `rules.gradient.rectifiers` for other than ReLU.

    Args:
        model: in evaluation mode.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from pyfast_xai import DeconvNet, demo
        >>> explanation = DeconvNet(demo.load())(torch.rand(2, 3, 96, 96))
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "deconvnet"
    paper = "Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014)"
    overlay = DECONVNET


class GuidedBackprop(GradientShaped):
    """Gradient that is negative neither above nor below any rectifier (Springenberg et al., 2015).

    At every rectifier of x the gradient R becomes max(R, 0) where x > 0; see `rules.gradient.rectifiers` for other
    than ReLU. Every rectifier is seen: functional, in-place, reused, in front of a skip.

    Args:
        model: in evaluation mode.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from pyfast_xai import GuidedBackprop, demo
        >>> explanation = GuidedBackprop(demo.load())(torch.rand(2, 3, 96, 96))
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "guided-backprop"
    paper = "Striving for simplicity: the all convolutional net (Springenberg et al., 2015)"
    overlay = GUIDED


class InputXGradient(GradientShaped):
    """Gradient times input: a first-order account of the score (Shrikumar et al., 2016).

    Args:
        model: in evaluation mode.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from pyfast_xai import InputXGradient, demo
        >>> explanation = InputXGradient(demo.load())(torch.rand(2, 3, 96, 96))
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "input-x-gradient"
    paper = "Not just a black box: learning important features through propagating activation differences (2016)"
    default_reduction = "sum"

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        grads, seeds = self._walk(images, target, args, kwargs)
        return grads * images.detach(), seeds


BASES: Mapping[str, Table] = {"saliency": {}, "deconvnet": DECONVNET, "guided-backprop": GUIDED}


class SmoothGrad(GradientShaped):
    """Mean gradient over noisy copies of the image (Smilkov et al., 2017).

    The classes are those of the image without noise. Every image gets the same noise, scaled to its own range, so
    that a row does not depend on the others.

    Args:
        model: in evaluation mode.
        base: whose attribution is averaged: "saliency", "deconvnet" or "guided-backprop".
        n_samples: noisy copies of each image.
        noise: standard deviation, as a share of the image's range.
        squared: average squares, as in the VarGrad family.
        seed: seed of the noise; the process's own random numbers are not touched.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from pyfast_xai import SmoothGrad, demo
        >>> explanation = SmoothGrad(demo.load(), n_samples=4)(torch.rand(2, 3, 96, 96))
        >>> explanation.attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "smoothgrad"
    paper = "SmoothGrad: removing noise by adding noise (Smilkov et al., 2017)"
    slow = True

    def __init__(
        self,
        model: nn.Module,
        *,
        base: Literal["saliency", "deconvnet", "guided-backprop"] = "saliency",
        n_samples: int = 25,
        noise: float = 0.15,
        squared: bool = False,
        seed: int = 0,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        self.policy = GradientRules(BASES[one_of("base", base, BASES)], self.warned)
        if noise < 0:
            raise InputError(f"noise must not be negative, got {noise}")
        self.n_samples = at_least(1, "n_samples", n_samples)
        self.noise, self.squared, self.seed = noise, squared, seed

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        seeds = output_gradients(self.record(images, *args, **kwargs), target, self.outputs, self.labels)
        fixed: Goal = target if seeds.target is None else seeds.target
        generator = torch.Generator().manual_seed(self.seed)
        low, high = images.flatten(1).aminmax(dim=1)
        spread = self.noise * (high - low).view(-1, *[1] * (images.dim() - 1))
        total: Tensor | None = None
        for _ in range(self.n_samples):
            drawn = torch.randn(1, *images.shape[1:], generator=generator).to(images)
            grads = self._walk(images.detach() + spread * drawn, fixed, args, kwargs)[0]
            grads = grads.square() if self.squared else grads
            total = grads if total is None else total.add_(grads)
        assert total is not None
        return total / self.n_samples, seeds
