"""Smooth Grad-CAM++ (Omeiza et al., 2019): derivatives of Grad-CAM++ as means over noisy images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.cam import GradCAM, GradCAMSettings
from pyfast_xai.explainers.common.cam_rules import smoothed_derivatives, weighted_sum
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.layer_explainer import LayerName
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explanation import Explanation


class SmoothGradCAMPlusPlus(GradCAM):
    """Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noisy copies of the image (Omeiza et al., 2019).

    With means over the copies, and the activation A of the image itself,

        alpha_kp = mean g_kp^2 / (2 mean g_kp^2 + (sum_q A_kq) mean g_kp^3)
        w_k = sum_p alpha_kp max(mean g_kp, 0)

    with 0/0 = 0, and the map is `sum_k w_k A_k`. The classes are those of the image without noise. Every image gets the
    same noise, scaled to its own range, so that a row does not depend on the others.

    Args:
        model: in evaluation mode.
        layer: see `GradCAM`.
        n_samples: noisy copies of each image.
        noise: standard deviation, as a share of the image's range.
        seed: seed of the noise; the process's own random numbers are not touched.
        **settings: those of `GradCAM`.

    Raises:
        InputError: a setting that does not exist or is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import SmoothGradCAMPlusPlus
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> SmoothGradCAMPlusPlus(net, layer="1", n_samples=3)(torch.randn(2, 3, 8, 8)).signed_map.shape
        torch.Size([2, 6, 6])
    """

    method = "smooth-grad-cam++"
    paper = "Smooth Grad-CAM++: an enhanced inference level visualization technique (Omeiza et al., 2019)"
    slow = True

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        n_samples: int = 25,
        noise: float = 0.15,
        seed: int = 0,
        **settings: Unpack[GradCAMSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        if noise < 0:
            raise InputError(f"noise must not be negative, got {noise}")
        self.n_samples, self.noise, self.seed = at_least(1, "n_samples", n_samples), noise, seed

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        def walk(images: Tensor, target: Goal) -> Any:
            return self._record.gradients(
                images, target, args, kwargs, policy=self._plain, key=tuple(self.layers), starts=self._starts
            )

        recorded, seeds, gradients = walk(images, target)
        fixed: Goal = target if seeds.target is None else seeds.target
        powers = [[torch.zeros_like(at_least_float32(gradient)) for gradient in gradients] for _ in range(3)]
        generator = torch.Generator().manual_seed(self.seed)
        flat = images.flatten(1)
        spread = (self.noise * (flat.amax(1) - flat.amin(1))).view(-1, *[1] * (images.dim() - 1))
        for _ in range(self.n_samples):
            drawn = torch.randn(1, *images.shape[1:], generator=generator).to(images)
            for i, noisy in enumerate(walk(images + spread * drawn, fixed)[2]):
                noisy = at_least_float32(noisy)
                for power, sums in enumerate(powers, 1):
                    sums[i] += noisy**power / self.n_samples
        maps, size = [], images.shape[2:]
        for place, activation, *means in zip(recorded.places, recorded.activations, *powers, strict=True):
            cells = at_least_float32(self.grid(activation, size, place.name, place.layout))
            gradient, square, cube = (
                self.grid(mean.flatten(0, 1), size, place.name, place.layout).unflatten(0, mean.shape[:2])
                for mean in means
            )
            space = tuple(range(2, gradient.dim() - 1))
            third = cells.sum(tuple(d - 1 for d in space), keepdim=True) * cube
            weights = smoothed_derivatives(square, third, gradient, space)
            maps.append(targets_to_rows(weighted_sum(weights, cells)))
        return self.explanation(images, seeds, maps, self.heat(maps, size))
