"""SESS (Tursun et al., 2022): another map over windows of the image at several scales."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.cam import (
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from pyfast_xai.explainers.common.channel_masks import stretched
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, LayerSettings
from pyfast_xai.explainers.common.perturbation_explainer import positive
from pyfast_xai.explainers.common.targets import Target, targets_of
from pyfast_xai.explainers.common.tensors import take_rows
from pyfast_xai.explainers.common.windows import PatchFusion, blurred, patches_of, top_windows, window_scales
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass

_BASES: dict[str, type[GradCAM]] = {
    kind.method: kind
    for kind in (GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM, GradCAMElementWise, EigenGradCAM)
}
_OF_BASE = ("tokens", "layout", "outputs", "accelerate")  # settings that the base shares


class SESS(LayerExplainer):
    """SESS: the maps of windows of the image at several scales, each as much as its score (Tursun et al., 2022).

    The image is enlarged in steps, and at each scale windows of its own size slide over it. A window's map, stretched
    to [0, 1] and times its probability of the class as a share of the largest, is put back where it was taken; the heat
    map is the mean of those that say anything at a pixel, or their maximum, blurred. Scores and maps come from the same
    forward, `batch_size` windows at a time.

    Args:
        model: in evaluation mode; a classifier.
        layer: layer of the maps, see `GradCAM`.
        base: the method whose maps they are, such as "grad-cam".
        n_scales: number of scales, the first of which is the image as it is.
        scale_step: by how much of the window the shorter side grows from scale to scale.
        step: pixels between windows; None for the length of a window.
        drop_share: share of the windows, those of the lowest probability, that is left out.
        threshold: values up to it do not count in the mean.
        pool: "mean" or "max".
        smooth: blur the heat map.
        **settings: those of `LayerExplainer`; `batch_size` counts windows, 32 by default.

    Raises:
        InputError: a setting that does not exist or is out of range.

    Example:
        >>> import torch
        >>> from pyfast_xai import SESS, demo
        >>> SESS(demo.load(), layer="block", n_scales=2)(torch.rand(2, 3, 96, 96), target=3).heatmap.shape
        torch.Size([2, 96, 96])
    """

    method = "sess"
    paper = "SESS: saliency enhancing with scaling and sliding (Tursun et al., 2022)"
    slow = True
    default_box_rule = Mass()
    default_batch_size = 32
    takes_functions = takes_gradients = False
    batch_size: int

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        base: Literal[
            "grad-cam", "grad-cam++", "hires-cam", "layer-cam", "xgrad-cam", "grad-cam-elementwise", "eigen-grad-cam"
        ] = "grad-cam",
        n_scales: int = 12,
        scale_step: float = 2 / 7,
        step: int | None = None,
        drop_share: float = 0.0,
        threshold: float = 0.0,
        pool: Literal["mean", "max"] = "mean",
        smooth: bool = True,
        **settings: Unpack[LayerSettings],
    ) -> None:
        shared: Any = {name: value for name, value in settings.items() if name in _OF_BASE}
        self.base = _BASES[one_of("base", base, _BASES)](model, layer=layer, **shared)
        super().__init__(model, layer=layer, **settings)
        self._trial = None  # the base has its own
        self.n_scales, self.scale_step = at_least(1, "n_scales", n_scales), positive("scale_step", scale_step)
        self.step = None if step is None else at_least(1, "step", step)
        if not 0 <= drop_share < 1:
            raise InputError(f"drop_share must lie in [0, 1), got {drop_share}")
        self.drop_share, self.threshold, self.smooth = drop_share, threshold, smooth
        self.pool = one_of("pool", pool, ("mean", "max"))

    def accelerate(self, **settings: Any) -> "SESS":
        """Replays the model from now on, see `Explainer.accelerate`."""
        super().accelerate(**settings)
        self.base.accelerate(**settings)
        return self

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        targets = targets_of(self.record(images, *args, **kwargs), target, self.outputs, self.labels)
        assert targets.target is not None
        heat = []
        for n, classes in enumerate(targets.target):
            row = torch.tensor([n], device=images.device)
            more, named = take_rows((args, kwargs), len(images), row)
            heat.append(self._one(images[n : n + 1], classes, more, named))
        return Explanation(**self._fields(images, targets), heatmap=torch.cat(heat).float())

    def _one(self, image: Tensor, classes: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Returns the heat maps of an image `[1, C, H, W]` for K classes, `[K, H, W]`."""
        size = image.shape[2:]
        window = min(size)
        scales = window_scales(window, self.n_scales, self.scale_step)
        patches, places = patches_of(image, scales, window, self.step or window)
        maps, scores = [], []
        for part in patches.split(self.batch_size):
            copies = torch.zeros(len(part), dtype=torch.int64, device=image.device)
            more, named = take_rows((args, kwargs), 1, copies)
            explained = self.base(part, classes.expand(len(part), -1), *more, **named)
            assert explained.score is not None
            maps.append(stretched(explained.heatmap, 1e-7).unflatten(0, (len(part), -1)))
            scores.append(explained.score.view(len(part), -1))
        heat, score = torch.cat(maps), torch.cat(scores).clamp_min(0)  # [P, K, w, w], [P, K]
        fused = []
        for k in range(len(classes)):
            order, weights = top_windows(score[:, k], self.drop_share)
            fusion = PatchFusion(size, self.pool, self.threshold)
            for index in order.tolist():
                fusion.add(heat[index, k] * weights[index], places[index])
            fused.append(blurred(fusion.result()) if self.smooth else fusion.result())
        return torch.stack(fused)
