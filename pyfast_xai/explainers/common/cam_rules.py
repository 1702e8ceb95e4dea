"""The rules of class activation maps: what each number of an activation weighs for a score, one rule a paper.

A rule takes the gradient `[K, N, *space, C]` of K scores and the activation `[N, *space, C]`, with any number of
dimensions of space. It returns weights: `[K, N, C]` for whole channels, or `[K, N, *space, C]` for each position by
itself. The map is what the weights and the activation make over the channels: their sum, or their first principal
component.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyfast_xai.explainers.common.principal_component import first_component
from pyfast_xai.explainers.common.tensors import at_least_float32

WeightRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """The way a class activation map is made of a gradient and an activation.

    Attributes:
        weights: computed from the gradient and the activation.
        component: take the first principal component of the weighed activation, turned to rise with its sum, instead
            of the sum.
    """

    weights: WeightRule
    component: bool = False

    def map(self, gradient: Tensor, activation: Tensor) -> Tensor:
        """Returns the signed maps `[K, N, *space]` of a gradient `[K, N, *space, C]` and its `[N, *space, C]`."""
        gradient, activation = at_least_float32(gradient), at_least_float32(activation)
        weights = self.weights(gradient, activation)
        if not self.component:
            return weighted_sum(weights, activation)
        products = weights * activation if weights.dim() == gradient.dim() else _spread(weights, activation)
        matrices = products.flatten(0, 1).flatten(1, -2)  # [K * N, positions, C]
        return first_component(matrices, along=matrices.sum(2)).view(products.shape[:-1])


def weighted_sum(weights: Tensor, activation: Tensor) -> Tensor:
    """Returns the maps `[K, N, *space]` of weights `[K, N, C]` or `[K, N, *space, C]` and `[N, *space, C]`."""
    if weights.dim() == 3:
        return torch.einsum("knc,n...c->kn...", weights, activation)
    return torch.einsum("kn...c,n...c->kn...", weights, activation)


def _spread(weights: Tensor, activation: Tensor) -> Tensor:
    return weights.view(*weights.shape[:2], *[1] * (activation.dim() - 2), -1) * activation


def _over_space(tensor: Tensor) -> tuple[int, ...]:
    """Returns the dimensions of space of `[..., *space, C]` with two dimensions in front."""
    return tuple(range(2, tensor.dim() - 1))


def mean_gradient(gradient: Tensor, activation: Tensor) -> Tensor:
    """Returns the weights of Grad-CAM, `w_k = mean_p g_kp` (Selvaraju et al., 2017, Eq. 1)."""
    return gradient.mean(_over_space(gradient))


def higher_derivatives(gradient: Tensor, activation: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Returns the weights of Grad-CAM++, with 0/0 = 0.

    They are `w_k = sum_p alpha_kp max(g_kp, 0)` (Chattopadhay et al., 2018, Eq. 19).
    """
    space = _over_space(gradient)
    sums = activation.sum(tuple(d - 1 for d in space), keepdim=True)
    positive = gradient.clamp_min(0)
    if epsilon == 0:
        # A square cancels, so that none is too small to be a number.
        below = 2 + sums * positive
        return torch.where(below == 0, 0, positive / below).sum(space)
    below = 2 * positive**2 + sums * positive**3 + epsilon
    return torch.where(below == 0, 0, positive**3 / below).sum(space)


def smoothed_derivatives(
    square: Tensor, third: Tensor, gradient: Tensor, space: Sequence[int], epsilon: float = 0.0
) -> Tensor:
    """Returns the weights of Smooth Grad-CAM++, with 0/0 = 0.

    They are `w_k = sum_p alpha_kp max(g_kp, 0)` with alpha of means over noisy images.

    Args:
        square: mean of g².
        third: what alpha's denominator has beside `2 square`.
        gradient: g, of whichever image.
        space: dimensions of positions.
        epsilon: added to the denominator.
    """
    below = 2 * square + third + epsilon
    alpha = torch.where(below == 0, 0, square / below)
    return (alpha * gradient.clamp_min(0)).sum(tuple(space))


def activation_share(gradient: Tensor, activation: Tensor, epsilon: float = 0.0) -> Tensor:
    """Returns the weights of XGrad-CAM, `w_k = sum_p g_kp A_kp / sum_p A_kp` (Fu et al., 2020, Eq. 8), with 0/0 = 0."""
    space = _over_space(gradient)
    below = activation.sum(tuple(d - 1 for d in space)) + epsilon
    above = (gradient * activation).sum(space)
    return torch.where(below == 0, 0, above / below)


def gradient_unchanged(gradient: Tensor, activation: Tensor) -> Tensor:
    """Returns the weights of HiResCAM, `w_kp = g_kp` (Draelos and Carin, 2020, Eq. 5)."""
    return gradient


def positive_gradient(gradient: Tensor, activation: Tensor) -> Tensor:
    """Returns the weights of LayerCAM, `w_kp = max(g_kp, 0)` (Jiang et al., 2021, Eq. 6)."""
    return gradient.clamp_min(0)


def positive_product(gradient: Tensor, activation: Tensor) -> Tensor:
    """Returns the weights of element-wise Grad-CAM: the map is `sum_k max(g_kp A_kp, 0)`."""
    return torch.where(gradient * activation > 0, gradient, 0)


def magnitude(gradient: Tensor, activation: Tensor) -> Tensor:
    """Returns the weights of Seg-Eigen-CAM, `w_kp = |g_kp|` (Chung and Ying, 2025, Eq. 10)."""
    return gradient.abs()


CamRule = Literal[
    "grad-cam",
    "grad-cam++",
    "xgrad-cam",
    "hires-cam",
    "layer-cam",
    "grad-cam-elementwise",
    "eigen-grad-cam",
    "seg-eigen-cam",
]
RULES: dict[str, Rule] = {
    "grad-cam": Rule(mean_gradient),
    "grad-cam++": Rule(higher_derivatives),
    "xgrad-cam": Rule(activation_share),
    "hires-cam": Rule(gradient_unchanged),
    "layer-cam": Rule(positive_gradient),
    "grad-cam-elementwise": Rule(positive_product),
    "eigen-grad-cam": Rule(gradient_unchanged, component=True),
    "seg-eigen-cam": Rule(magnitude, component=True),
}


def unusual_share(activation: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Returns where each channel of `[N, *space, C]` exceeds its mean by k standard deviations, and that mean (FEM)."""
    space = tuple(range(1, activation.dim() - 1))
    mean = activation.mean(space, keepdim=True)
    return activation > mean + k * activation.std(space, correction=0, keepdim=True), mean


def grad_cam_plus_plus(epsilon: float) -> Rule:
    """Returns the rule of Grad-CAM++ with an epsilon of its own."""
    return Rule(functools.partial(higher_derivatives, epsilon=epsilon))
