"""DeepLIFT and what is built on references: DeepLiftShap and GradientShap."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import GradientShaped, Reduction
from pyfast_xai.explainers.common.baselines import broadcast
from pyfast_xai.explainers.common.explainer import Settings, at_least
from pyfast_xai.explainers.common.output_gradients import OutputGradients, output_gradients
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.rules.gradient import backward_pass
from pyfast_xai.rules.rescale import RescaleRules
from pyfast_xai.rules.rescale.policy import reference_broadcasts
from pyfast_xai.tape import Tape
from pyfast_xai.tape.record import tensors_in


class DeepLift(GradientShaped):
    """Shares the difference of a score from that of a baseline among the pixels (DeepLIFT, Shrikumar et al., 2017).

    The rescale rule: the multiplier of an activation is the change of its result over that of its input. Products,
    softmax, attention, normalisation and max-pools are taken apart into operations that are shared exactly, so that the
    attribution adds up to the difference of the score on any network, however it is written. An operation that is none
    of these is integrated on the straight line between image and baseline. `rules.rescale.multipliers` has all of them.

    Args:
        model: in evaluation mode.
        baseline: a number (0 is the mean colour of normalised images) or a tensor that broadcasts to the images; one
            for all of them runs through the model as one row, where the model allows it.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`; of a function as target the gradient is taken.

    Raises:
        InputError: a baseline that does not fit, or a model that runs other operations on it.

    Example:
        >>> import torch
        >>> from pyfast_xai import DeepLift, demo
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> attribution = DeepLift(model)(images, target=3).attribution
        >>> change = (model(images) - model(torch.zeros_like(images)))[:, 3]
        >>> torch.allclose(attribution.sum((1, 2, 3)), change, atol=1e-3)
        True
    """

    method = "deep-lift"
    paper = "Learning important features through propagating activation differences (Shrikumar et al., 2017)"
    default_reduction = "sum"

    def __init__(
        self,
        model: nn.Module,
        *,
        baseline: float | Tensor = 0.0,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        self.baseline = baseline
        self.rules = RescaleRules(self.warned)

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        return self._against([self._row(self.baseline, images)], images, target, args, kwargs)

    def _row(self, baseline: float | Tensor, images: Tensor) -> Tensor:
        """Returns a baseline as one row, or a row for each image."""
        whole = isinstance(baseline, Tensor) and baseline.dim() == images.dim() and len(baseline) == len(images)
        return broadcast(baseline, images, None if whole else 1)

    def _against(
        self, baselines: list[Tensor], images: Tensor, target: Goal, args: Any, kwargs: Any
    ) -> tuple[Tensor, OutputGradients]:
        """Returns the mean attribution over some baselines."""
        tape = self.record(images, *args, policy=self.rules, **kwargs)
        seeds = output_gradients(tape, target, self.outputs, self.labels)
        total: Tensor | None = None
        for i, baseline in enumerate(baselines):
            reference = self._reference(tape, baseline, len(images), args, kwargs)
            policy = self.rules.against(tape, reference)
            retain = i + 1 < len(baselines)
            multipliers = backward_pass(policy, tape, seeds.grads, [tape.inputs[0]], retain=retain)[0]
            attribution = multipliers * (images - baseline)
            total = attribution if total is None else total.add_(attribution)
        assert total is not None
        return total / len(baselines), seeds

    def _reference(self, tape: Tape, baseline: Tensor, rows: int, args: Any, kwargs: Any) -> Tape:
        if len(baseline) == 1 and not tensors_in((args, kwargs)):
            reference = self.record(baseline, *args, policy=self.rules, **kwargs)
            if len(reference.nodes) == len(tape.nodes) and reference_broadcasts(tape, reference):
                return reference
        return self.record(baseline.expand(rows, *baseline.shape[1:]), *args, policy=self.rules, **kwargs)


class DeepLiftShap(DeepLift):
    """DeepLIFT, averaged over baselines: an approximation of Shapley values (Lundberg and Lee, 2017).

    The images are recorded once, and each baseline once.

    Args:
        model: in evaluation mode.
        baselines: `[B, C, H, W]`, images to compare with.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`.

    Raises:
        InputError: baselines that do not fit the images.

    Example:
        >>> import torch
        >>> from pyfast_xai import DeepLiftShap, demo
        >>> explain = DeepLiftShap(demo.load(), baselines=torch.rand(4, 3, 96, 96))
        >>> explain(torch.rand(2, 3, 96, 96), target=3).attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "deep-lift-shap"
    paper = "A unified approach to interpreting model predictions (Lundberg and Lee, 2017)"
    slow = True

    def __init__(
        self,
        model: nn.Module,
        *,
        baselines: Tensor | None = None,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        self.baselines = check_baselines(baselines)

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        return self._against(rows_of(self.baselines, images), images, target, args, kwargs)


class GradientShap(GradientShaped):
    """Gradients at random places between baselines and noisy images (Lundberg and Lee, 2017).

    `E[(x + noise - b) f'(b + alpha (x + noise - b))]` over the baselines b and alpha from 0 to 1. All images share the
    random numbers, so that a row does not depend on the others.

    Args:
        model: in evaluation mode.
        baselines: `[B, C, H, W]`, images to compare with; None for zeros.
        n_samples: random places.
        noise: standard deviation of what is added to the images.
        seed: seed of the random numbers; those of the process are not touched.
        reduction: makes the heat map from the channels, see `Saliency`.
        **settings: those of `Explainer`.

    Raises:
        InputError: baselines that do not fit the images, or negative noise.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradientShap, demo
        >>> explain = GradientShap(demo.load(), baselines=torch.rand(4, 3, 96, 96), n_samples=5)
        >>> explain(torch.rand(2, 3, 96, 96), target=3).attribution.shape
        torch.Size([2, 3, 96, 96])
    """

    method = "gradient-shap"
    paper = "A unified approach to interpreting model predictions (Lundberg and Lee, 2017)"
    slow = True
    default_reduction = "sum"

    def __init__(
        self,
        model: nn.Module,
        *,
        baselines: Tensor | None = None,
        n_samples: int = 20,
        noise: float = 0.0,
        seed: int = 0,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        if noise < 0:
            raise InputError(f"noise must not be negative, got {noise}")
        self.baselines = check_baselines(baselines)
        self.n_samples = at_least(1, "n_samples", n_samples)
        self.noise, self.seed = noise, seed

    def _attribute(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> tuple[Tensor, OutputGradients]:
        images = images.detach()
        baselines = rows_of(self.baselines, images)
        seeds = output_gradients(self.record(images, *args, **kwargs), target, self.outputs, self.labels)
        fixed: Goal = target if seeds.target is None else seeds.target
        generator = torch.Generator().manual_seed(self.seed)
        total: Tensor | None = None
        for _ in range(self.n_samples):
            alpha = float(torch.rand((), generator=generator))
            baseline = baselines[int(torch.randint(len(baselines), (), generator=generator))]
            offset = images - baseline
            if self.noise:
                offset = offset + self.noise * torch.randn(1, *images.shape[1:], generator=generator).to(images)
            part = self._walk(baseline + alpha * offset, fixed, args, kwargs)[0] * offset
            total = part if total is None else total.add_(part)
        assert total is not None
        return total / self.n_samples, seeds


def check_baselines(baselines: Tensor | None) -> Tensor | None:
    """Returns baselines that are images.

    Raises:
        InputError: they are none.
    """
    if baselines is not None and (not isinstance(baselines, Tensor) or baselines.dim() < 3 or not len(baselines)):
        received = list(baselines.shape) if isinstance(baselines, Tensor) else type(baselines).__name__
        raise InputError(f"baselines must be images [B, C, H, W], got {received}")
    return baselines


def rows_of(baselines: Tensor | None, images: Tensor) -> list[Tensor]:
    """Returns baselines one by one, `[1, C, H, W]` each; zeros for None.

    Raises:
        InputError: another size than that of the images.
    """
    if baselines is None:
        return [torch.zeros_like(images[:1])]
    if baselines.shape[1:] != images.shape[1:]:
        raise InputError(
            f"baselines must have the size of the images, {list(images.shape[1:])}, got {list(baselines.shape[1:])}"
        )
    return [*baselines.to(images).split(1)]
