"""Methods of pytorch-grad-cam that are made of another one: Finer-CAM, RefineCAM, SESS; and Shapley-CAM."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.cams import BaseCAM, GradCAM, GradCAMPlusPlus, Targets
from pyfast_xai.compat.grad_cam.perturbation import record_from
from pyfast_xai.compat.grad_cam.pictures import scaled
from pyfast_xai.compat.grad_cam.rows import rows_of
from pyfast_xai.compat.grad_cam.targets import ClassifierOutputTarget, FinerWeightedTarget
from pyfast_xai.compat.recording import evaluating
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.curvature import gradient_less_half_curvature
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.windows import PatchFusion, blurred, patches_of, top_windows, window_scales
from pyfast_xai.tape.isolation import isolated
from pyfast_xai.tape.module_hooks import unwrap


class FinerCAM:
    """Maps of what tells a class from those of the nearest scores, weighed by probability (Zhang et al., 2025).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        base_method: the class whose maps are made.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import FinerCAM
        >>> model = demo.load()
        >>> FinerCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        base_method: type[BaseCAM] = GradCAM,
    ) -> None:
        self.base_cam = base_method(model, target_layers, reshape_transform)
        self.compute_input_gradient = self.base_cam.compute_input_gradient
        self.uses_gradients = self.base_cam.uses_gradients

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Calls `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        eigen_smooth: bool = False,
        alpha: float = 1,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
    ) -> np.ndarray:
        """Explains a batch of images.

        Args:
            input_tensor: `[N, C, H, W]`.
            targets: one an image; None to compare the largest output, or `target_idx`, with others.
            eigen_smooth: see `BaseCAM`.
            alpha: how much of the others is taken off.
            comparison_categories: ranks of the classes to compare with by the distance of their scores, of which 0 is
                the class itself; 1, 2 and 3 by default, as far as there are.
            target_idx: a class for all images.

        Returns:
            Float32 `[N, H, W]`.
        """
        if targets is None:
            with evaluating(self.base_cam.model), isolated():
                scores = unwrap(self.base_cam.model)(input_tensor.clone())
            target_scores = scores.max(1).values if target_idx is None else scores[:, target_idx]
            nearest = (scores - target_scores[:, None]).abs().argsort(dim=1, stable=True)
            ranks = [rank for rank in comparison_categories or (1, 2, 3) if rank < scores.shape[1]]
            targets = [FinerWeightedTarget(int(row[0]), [int(row[rank]) for rank in ranks], alpha) for row in nearest]
        return self.base_cam(input_tensor, targets, eigen_smooth=eigen_smooth)

    def __enter__(self) -> "FinerCAM":
        return self

    def __exit__(self, *exc: object) -> None:
        """Releases nothing, for nothing is held; exceptions go on."""


class RefineCAM:
    """The product of the maps of several layers (2026), all from one forward.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        base_method: the class whose maps are multiplied.
        **kwargs: settings of that class.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import RefineCAM
        >>> model = demo.load()
        >>> RefineCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        base_method: type[BaseCAM] = GradCAMPlusPlus,
        **kwargs: Any,
    ) -> None:
        class Product(base_method):  # type: ignore[valid-type, misc]
            def fused(self, maps: list[Tensor]) -> Tensor:
                return scaled(torch.stack([scaled(heatmaps) for heatmaps in maps]).prod(0))

        self.base_cam = Product(model, target_layers, reshape_transform, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Calls `forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False) -> np.ndarray:
        """Explains a batch of images, see `BaseCAM`; float32 `[N, H, W]`."""
        heatmaps: np.ndarray = self.base_cam(input_tensor, targets, eigen_smooth=eigen_smooth)
        return heatmaps


class ShapleyCAM(BaseCAM):
    """Channels weighed by the gradient less half of the curvature along the activation (Cai et al., 2025).

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import ShapleyCAM
        >>> model = demo.load()
        >>> ShapleyCAM(model, [model.block])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: Targets, activations: Tensor, grads: Tensor | None
    ) -> Tensor:
        with evaluating(self.model):
            tape, value = record_from(self.model, input_tensor, target_layer)
        self.outputs = tape.result
        chosen = self._targets(targets)
        assert chosen is not None

        def scores(result: Any) -> Tensor:
            pairs = zip(chosen, rows_of(result), strict=True)
            return torch.cat([target(row).flatten() for target, row in pairs])[:, None]

        return self._laid_out(gradient_less_half_curvature(tape, value, scores)[0]).flatten(2).mean(2)


class SESS:
    """Another method over windows of the image at several scales, weighed by their scores (Tursun et al., 2022).

    The windows of all images go through the model together.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        base_method: the class whose maps are made.
        scales: lengths of the shorter side; None for `num_scales` that grow from the window by a share of it,
            `scale_step_ratio`.
        num_scales: how many.
        scale_step_ratio: see `scales`.
        window_size: side of the square window; None for the shorter side of the images.
        step_size: between windows; None for their size.
        pre_filter_ratio: share of the windows, those of the lowest scores, that is left out.
        theta: values below it do not count in the mean.
        pool: "mean" or "max".
        smooth: blur the map.
        use_softmax_scores: weigh windows by targets on the softmax of the output, not on the output.
        batch_size: windows that go through the model at once.
        **kwargs: settings of `base_method`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import SESS
        >>> model = demo.load()
        >>> SESS(model, [model.block], num_scales=2)(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        base_method: type[BaseCAM] = GradCAM,
        scales: Sequence[int] | None = None,
        num_scales: int = 12,
        scale_step_ratio: float = 2.0 / 7.0,
        window_size: int | None = None,
        step_size: int | None = None,
        pre_filter_ratio: float = 0.0,
        theta: float = 0.0,
        pool: str = "mean",
        smooth: bool = True,
        use_softmax_scores: bool = True,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        one_of("pool", pool, ("mean", "max"))
        if not 0.0 <= pre_filter_ratio < 1.0:
            raise InputError(f"pre_filter_ratio must lie in [0, 1), got {pre_filter_ratio}")
        if num_scales < 1:
            raise InputError(f"num_scales must be at least 1, got {num_scales}")
        self.base_cam = base_method(model, target_layers, reshape_transform, **kwargs)
        self.model = self.base_cam.model
        self.scales, self.num_scales, self.scale_step_ratio = scales, num_scales, scale_step_ratio
        self.window_size, self.step_size, self.pre_filter_ratio = window_size, step_size, pre_filter_ratio
        self.theta, self.pool, self.smooth = theta, pool, smooth
        self.use_softmax_scores, self.batch_size = use_softmax_scores, batch_size

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Calls `forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False) -> np.ndarray:
        """Explains a batch of images.

        Args:
            input_tensor: `[N, C, H, W]`.
            targets: one an image; None for the largest output of each.
            eigen_smooth: see `BaseCAM`.

        Returns:
            Float32 `[N, H, W]`.
        """
        if targets is None:
            best = self._answers(input_tensor).argmax(-1)
            targets = [ClassifierOutputTarget(int(c)) for c in best]
        if len(targets) != len(input_tensor):
            raise InputError(f"targets must be one for each of {len(input_tensor)} images, got {len(targets)}")
        pairs = zip(input_tensor.split(1), targets, strict=True)
        return scaled(torch.stack([self._one(image, target, eigen_smooth) for image, target in pairs])).numpy()

    def _one(self, image: Tensor, target: Callable[[Any], Tensor], eigen_smooth: bool) -> Tensor:
        size = tuple(image.shape[2:])
        window = min(size) if self.window_size is None else self.window_size
        scales = window_scales(window, self.num_scales, self.scale_step_ratio) if self.scales is None else self.scales
        patches, places = patches_of(image, list(scales), window, self.step_size or window)
        scores = torch.cat([self._scores(part, target) for part in patches.split(self.batch_size)]).clamp_min(0)
        order, weights = top_windows(scores, self.pre_filter_ratio)
        fusion = PatchFusion(size, self.pool, self.theta)
        for part in order.split(self.batch_size):
            maps = self.base_cam.maps(patches[part], [target] * len(part), eigen_smooth=eigen_smooth)
            for heatmap, index in zip(maps, part.tolist(), strict=True):
                fusion.add(heatmap * weights[index], places[index])
        return blurred(fusion.result()) if self.smooth else fusion.result()

    def _scores(self, patches: Tensor, target: Callable[[Any], Tensor]) -> Tensor:
        answers = self._answers(patches)
        answers = answers.softmax(-1) if self.use_softmax_scores else answers
        return target(answers).float()

    def _answers(self, images: Tensor) -> Tensor:
        with evaluating(self.model), isolated():
            answers: Tensor = unwrap(self.model)(images.clone())
        return answers

    def __enter__(self) -> "SESS":
        return self

    def __exit__(self, *exc: object) -> None:
        """Releases nothing, for nothing is held; exceptions go on."""
