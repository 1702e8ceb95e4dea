"""FORGrad (Muzellec et al., 2024): gradients without their high frequencies."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.backprop import BASES, REDUCTIONS, GradientShaped, Reduction
from pyfast_xai.explainers.common.explainer import Settings, one_of
from pyfast_xai.explainers.common.perturbation_explainer import positive
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.gradient import GradientRules


class FORGrad(GradientShaped):
    """Gradient without the high frequencies that strides and pools put into it (Muzellec et al., 2024).

    The heat map of a gradient method goes through an ideal low-pass filter of its spectrum, and its magnitude is shown,
    as in the authors' code; the attribution goes through the same filter, channel by channel, and keeps its signs.

    Args:
        model: in evaluation mode.
        base: whose heat map is filtered: "saliency", "deconvnet" or "guided-backprop".
        cutoff: the highest frequency that stays, in waves over the width (or the height) of the image; 15 is what the
            paper recommends at 224 x 224.
        reduction: makes the heat map from the channels, before the filter; see `Saliency`.
        **settings: those of `Explainer`.

    Raises:
        InputError: a base that does not exist, or a cutoff that is not positive.

    Example:
        >>> import torch
        >>> from pyfast_xai import FORGrad, demo
        >>> explanation = FORGrad(demo.load(), cutoff=8)(torch.rand(2, 3, 96, 96))
        >>> explanation.attribution.shape, explanation.heatmap.shape
        (torch.Size([2, 3, 96, 96]), torch.Size([2, 96, 96]))
    """

    method = "forgrad"
    paper = "Saliency strikes back: how filtering out high frequencies improves white-box explanations (2024)"

    def __init__(
        self,
        model: nn.Module,
        *,
        base: Literal["saliency", "deconvnet", "guided-backprop"] = "saliency",
        cutoff: float = 15.0,
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, reduction=reduction, **settings)
        self.policy = GradientRules(BASES[one_of("base", base, BASES)], self.warned)
        self.cutoff = positive("cutoff", cutoff)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        gradients, seeds = self._attribute(images, target, args, kwargs)
        gradients = at_least_float32(targets_to_rows(gradients))
        return Explanation(
            **self._fields(images, seeds),
            heatmap=low_pass(REDUCTIONS[self.reduction](gradients), self.cutoff, images.dim() - 2).abs().float(),
            attribution=low_pass(gradients, self.cutoff, images.dim() - 2).to(images.dtype),
        )


def low_pass(maps: Tensor, cutoff: float, dims: int) -> Tensor:
    """Returns maps without the frequencies above a cutoff.

    Args:
        maps: `[..., H, W]` with any dimensions of space.
        cutoff: the radius of the disk of frequencies that stay, in waves over each length.
        dims: how many dimensions are space.

    Example:
        >>> import torch
        >>> from pyfast_xai.explainers.forgrad import low_pass
        >>> waves = torch.cos(torch.arange(32) / 32 * 2 * torch.pi * 9).expand(32, 32)
        >>> bool(low_pass(waves, 8, 2).abs().max() < 1e-5), torch.allclose(low_pass(waves, 9, 2), waves, atol=1e-5)
        (True, True)
    """
    shape = maps.shape[-dims:]
    axes = [*range(-dims, 0)]
    waves = [torch.fft.fftfreq(size, 1 / size, device=maps.device) for size in shape[:-1]]
    waves.append(torch.fft.rfftfreq(shape[-1], 1 / shape[-1], device=maps.device))
    radius = torch.stack(torch.meshgrid(*waves, indexing="ij")).square().sum(0)
    spectrum = torch.fft.rfftn(maps, dim=axes) * (radius <= cutoff**2 * (1 + 1e-6))
    return torch.fft.irfftn(spectrum, s=shape, dim=axes)
