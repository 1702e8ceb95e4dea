"""Eigen-CAM (Muhammad and Yeasin, 2020): activations projected on their own first principal direction."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai import ops
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Target, ordinary, rows_of
from pyfast_xai.explainers.layers import LayerExplainer, mean_of_scaled, one_of_batch
from pyfast_xai.explanation import Explanation
from pyfast_xai.ops import Method

logger = logging.getLogger("pyfast_xai")


class EigenCAM(LayerExplainer):
    """Eigen-CAM: what the last feature map is mostly about, whatever the class; no gradient, no classifier.

    The activation of each image is a matrix `A [h w, C]` with a row a position; its leading right singular vector v
    is the direction in channel space that explains most of it, and `A v` is the map (Eq. 3). The forward stops at the
    layer.

    The sign of a singular vector is arbitrary; here it is the one that makes the map rise with the strength of the
    activation: `sum_p (A v)_p |a_p|^2 >= 0`, taken about the means when `center` is set. After a ReLU, without
    centring, the whole map then is >= 0.

    Args:
        model: in evaluation mode; classifiers, detectors and their backbones alike.
        layer: path of a module or name of an operation; several give the mean of their maps; "auto" takes the last
            spatial map before pooling or flattening that is not a map of classes.
        component: which principal direction, 1 for the first; several give a row each.
        center: subtract the mean over positions first, as pytorch-grad-cam does; the paper does not.
        method: "auto", "gram" or "subspace"; see `ops.leading_singular`.
        iterations: passes of the subspace iteration.
        seed: of its random start.
        tokens: grid `(h, w)` of token activations `[N, T, C]`; None for a square one. Leading extra tokens (class
            token, registers) are dropped.
        channels: "first", "last", or "auto" to tell by the shape of the input.
        threshold: share of its range at which `Explanation.boxes` cuts the map (the paper uses 5 to 15 %).
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "eigen-cam"
    paper = "Eigen-CAM: class activation map using principal components (Muhammad and Yeasin, 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | Sequence[str] = "auto",
        component: int | Sequence[int] = 1,
        center: bool = False,
        method: Literal["auto", "gram", "subspace"] = "auto",
        iterations: int = 4,
        seed: int = 0,
        tokens: tuple[int, int] | None = None,
        channels: Literal["auto", "first", "last"] = "auto",
        threshold: float = 0.15,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, layer=layer, tokens=tokens, channels=channels, threshold=threshold, labels=labels)
        self.components = [component] if isinstance(component, int) else list(component)
        if not self.components or min(self.components) < 1:
            raise InputError(f"component must be 1 or larger, got {component!r}")
        if method.upper() not in Method.__members__:
            raise InputError(f"method must be 'auto', 'gram' or 'subspace', got {method!r}")
        self.route = Method[method.upper()]
        self.center, self.iterations, self.seed = center, iterations, seed
        self._automatic: dict[tuple[int, ...], list[str]] = {}

    def __call__(self, images: Tensor, target: Target = None, *args: Any, **kwargs: Any) -> Explanation:
        """Project the activations of a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: ignored: Eigen-CAM knows no classes. Accepted so that explainers can be swapped.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Raises:
            InputError: images or a layer that does not fit, or activations that are not finite.
        """
        self.check(images)
        size = images.shape[2:]
        maps, heatmaps, doubts = [], [], []
        names = self._resolve(images, args, kwargs)
        for name in names:
            tape = self.record(images, *args, until=name, **kwargs)
            assert tape.reached is not None
            with torch.inference_mode():
                projected, doubt = self._project(tape.reached, size, name)  # [N, K, h, w]
                heat = functional.interpolate(projected, size=size, mode="bilinear", align_corners=False).clamp_min(0)
            maps.append(ordinary(projected.flatten(0, 1)))
            heatmaps.append(ordinary(heat.flatten(0, 1)))
            doubts.append(doubt)
        _look(names, doubts)
        return Explanation(
            method=self.method,
            heatmap=mean_of_scaled(heatmaps),
            map=maps[0] if len(maps) == 1 else None,
            images=rows_of(images, len(self.components)),
            threshold=self.threshold,
            labels=self.labels,
        )

    def project(self, activation: Tensor, size: Sequence[int], name: str = "activation") -> Tensor:
        """The maps of one activation.

        Args:
            activation: `[N, C, h, w]`, `[N, h, w, C]` or `[N, T, C]`, any float dtype.
            size: (H, W) of the images, to tell the layouts apart.
            name: of the layer, for messages.

        Returns:
            Signed maps `[N, K, h, w]`, float32 (float64 for float64), K components.

        Raises:
            InputError: no spatial map, fewer channels or positions than components, or values that are not finite.
        """
        maps, doubt = self._project(activation, size, name)
        _look([name], [doubt])
        return maps

    def _project(self, activation: Tensor, size: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
        """The maps, and what there is to be said about them: two numbers, which nothing waits for here."""
        grid = self.grid(activation, size, name)  # [N, h, w, C]
        images, height, width, channels = grid.shape
        matrices = grid.reshape(images, height * width, channels)
        k = max(self.components)
        if k > min(matrices.shape[1:]):
            raise InputError(
                f"component must be at most {min(matrices.shape[1:])} on layer {name!r}, whose activation is "
                f"{list(activation.shape)}, got {k}"
            )
        finite = torch.isfinite(matrices).flatten(1).all(1)
        # The first image that is not, or -1.
        spoiled = torch.where(finite.all(), -1, finite.byte().argmin())
        if matrices.device.type == "cpu":
            _require_finite(name, int(spoiled))
        else:  # said in the end, which costs a pass here but no wait
            matrices = torch.where(finite[:, None, None], matrices, 0)
        if self.center:
            matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            matrices = matrices - matrices.mean(1, keepdim=True)
        left, singular, _, residual = ops.leading_singular(matrices, k, self.route, self.iterations, self.seed)
        maps = left * singular[:, None]  # [N, hw, k]
        energy = matrices.to(maps.dtype).square().sum(2, keepdim=True)
        if self.center:
            energy = energy - energy.mean(1, keepdim=True)
        maps = torch.where((maps * energy).sum(1, keepdim=True) < 0, -maps, maps)
        chosen = torch.stack([maps[..., component - 1] for component in self.components], 1)
        doubt = torch.stack([spoiled.to(residual.dtype), residual.max()])
        return chosen.unflatten(2, (height, width)), doubt

    def _resolve(self, images: Tensor, args: Any, kwargs: Any) -> list[str]:
        if "auto" not in self.layers:
            return self.layers
        shape = tuple(images.shape[1:])
        if shape not in self._automatic:
            self._automatic[shape] = self.names(self.record(one_of_batch(images, args, kwargs), *args, **kwargs))
        return self._automatic[shape]


def _require_finite(name: str, spoiled: int) -> None:
    if spoiled >= 0:
        raise InputError(f"activations of layer {name!r} must be finite, got NaN or infinity for image {spoiled}")


def _look(names: Sequence[str], doubts: Sequence[Tensor]) -> None:
    """Say what is wrong with the maps of some layers: the one place that waits for a device."""
    for name, (spoiled, residual) in zip(
        names, torch.stack([doubt.to(doubts[0]) for doubt in doubts]).tolist(), strict=True
    ):
        _require_finite(name, int(spoiled))
        if residual > 1e-2:
            logger.warning(
                "eigen-cam: the components of layer %r are known to %.0e of the largest only; raise iterations",
                *(name, residual),
            )
