"""Eigen-CAM (Muhammad and Yeasin, 2020): activations projected on their own first principal direction."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai import ops
from pyfast_xai.acceleration.cuda_graphs import is_capturing
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.activation_reader import ActivationReader
from pyfast_xai.explainers.common.axes import Layout
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.gradient_pass import bare
from pyfast_xai.explainers.common.layer_explainer import (
    LayerExplainer,
    LayerName,
    LayerSettings,
    fused,
    resized,
)
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.ops import Solver
from pyfast_xai.tape import Tape

logger = logging.getLogger("pyfast_xai")


class EigenCAM(LayerExplainer):
    """Eigen-CAM: the first principal component of the last feature map; no class, no gradient, no classifier.

    The activation of each image is a matrix `A [h w, C]` with a row a position; its leading right singular vector v
    is the direction in channel space that explains most of it, and `A v` is the map (Eq. 3). The forward stops at the
    layer.

    A target is accepted, so that explainers can be swapped, and ignored: Eigen-CAM knows no classes.

    The sign of a singular vector is arbitrary; here it is the one that makes the map rise with the strength of the
    activation: `sum_p (A v)_p |a_p|^2 >= 0`, taken about the means when `center` is set. After a ReLU, without
    centring, the whole map then is >= 0.

    Args:
        model: in evaluation mode; classifiers, detectors and their backbones alike.
        layer: a module, its path or the name of an operation; several give the mean of their maps; of a module
            that runs several times the last call is taken, "path@0" is the first; "auto" takes the last map of
            features before they are pooled, of a detector all levels of its pyramid, the maps that enter its heads.
        component: which principal direction, 1 for the first; several give a row each.
        center: subtract the mean over positions first, as pytorch-grad-cam does; the paper does not.
        solver: "auto", "gram" or "subspace"; see `ops.leading_singular`.
        power_iterations: passes of the subspace iteration.
        seed: seed of its random start.
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import EigenCAM, demo
        >>> explanation = EigenCAM(demo.load(), layer="block")(torch.rand(2, 3, 96, 96))
        >>> explanation.heatmap.shape
        torch.Size([2, 96, 96])
    """

    method = "eigen-cam"
    ranks = (3, 4, 5)
    default_box_rule = Mass()
    paper = "Eigen-CAM: class activation map using principal components (Muhammad and Yeasin, 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        component: int | Sequence[int] = 1,
        center: bool = False,
        solver: Literal["auto", "gram", "subspace"] = "auto",
        power_iterations: int = 4,
        seed: int = 0,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.components = [component] if isinstance(component, int) else list(component)
        if not self.components or min(self.components) < 1:
            raise InputError(f"component must be 1 or larger, got {component!r}")
        self.solver = Solver[one_of("solver", solver, ("auto", "gram", "subspace")).upper()]
        self.center, self.power_iterations, self.seed = center, power_iterations, seed
        self._read = ActivationReader(self)

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        key = (EigenCAM._step, tuple(self.layers), self.tokens, self.layout, tuple(self.components), self.center)
        tape, result, names, maps, diagnostics, heatmap = self.captured(
            *(self._step, images, self._runs_whole_model, args, kwargs),
            key=(*key, self.solver, self.power_iterations, self.seed),
        )
        _log_diagnostics(names, diagnostics)
        outputs = self._read.outputs(None if tape is None else dataclasses.replace(tape, result=result), len(images))
        return Explanation(
            **self._fields(images, outputs, len(self.components)),
            heatmap=heatmap,
            signed_map=maps[0] if len(maps) == 1 else None,
        )

    def _step(
        self, images: Tensor, run_whole_model: bool, args: Any, kwargs: Any
    ) -> tuple[Tape | None, Any, list[str], list[Tensor], list[Tensor], Tensor]:
        """Returns all that an explanation needs without a number being read.

        These are the tape and what the model returned, None where it stopped at the layers; names, maps and diagnostic
        numbers of the layers; and the heat map.
        """
        size = images.shape[2:]
        names, maps, heatmaps, diagnostics = [], [], [], []
        read = self._read(images, args, kwargs, run_whole_model=run_whole_model)
        for place, activation in read.layers:
            with torch.inference_mode():
                projected, diagnostic = self._project(activation, size, place.name, place.layout)  # [N, K, h, w]
                heat = resized(projected, size)
            names.append(place.name)
            maps.append(outside_inference_mode(projected.flatten(0, 1)))
            heatmaps.append(outside_inference_mode(heat.clamp_min(0).flatten(0, 1)))
            diagnostics.append(diagnostic)
        whole = (None, None) if read.tape is None else (bare(read.tape), read.tape.result)
        return *whole, names, maps, diagnostics, fused(heatmaps)

    def project(self, activation: Tensor, size: Sequence[int], name: str = "activation") -> Tensor:
        """Returns the maps of one activation.

        Args:
            activation: `[N, C, h, w]`, `[N, h, w, C]` or `[N, T, C]`, any float dtype.
            size: (H, W) of the images, to tell the layouts apart.
            name: name of the layer, for messages.

        Returns:
            Signed maps `[N, K, h, w]`, float32 (float64 for float64), K components.

        Raises:
            InputError: no spatial map, fewer channels or positions than components, or values that are not finite.
        """
        maps, diagnostic = self._project(activation, size, name)
        _log_diagnostics([name], [diagnostic])
        return maps

    def _project(
        self, activation: Tensor, size: Sequence[int], name: str, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the maps and two diagnostic numbers, without waiting for the device."""
        grid = self.grid(activation, size, name, layout)  # [N, h, w, C]
        matrices = grid.flatten(1, -2)
        k = max(self.components)
        if k > min(matrices.shape[1:]):
            raise InputError(
                f"component must be at most {min(matrices.shape[1:])} on layer {name!r}, whose activation is "
                f"{list(activation.shape)}, got {k}"
            )
        finite = torch.isfinite(matrices).flatten(1).all(1)
        # The first image that is not, or -1.
        non_finite = torch.where(finite.all(), -1, finite.byte().argmin())
        if matrices.device.type == "cpu" and not is_capturing():
            _require_finite(name, int(non_finite))
        else:  # reported at the end, which costs a pass here but no wait
            matrices = torch.where(finite[:, None, None], matrices, 0)
        if self.center:
            matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            matrices = matrices - matrices.mean(1, keepdim=True)
        left, singular, _, residual = ops.leading_singular(matrices, k, self.solver, self.power_iterations, self.seed)
        maps = left * singular[:, None]  # [N, hw, k]
        energy = matrices.to(maps.dtype).square().sum(2, keepdim=True)
        if self.center:
            energy = energy - energy.mean(1, keepdim=True)
        maps = torch.where((maps * energy).sum(1, keepdim=True) < 0, -maps, maps)
        chosen = torch.stack([maps[..., component - 1] for component in self.components], 1)
        diagnostic = torch.stack([non_finite.to(residual.dtype), residual.max()])
        return chosen.unflatten(2, grid.shape[1:-1]), diagnostic


def _require_finite(name: str, non_finite: int) -> None:
    if non_finite >= 0:
        raise InputError(f"activations of layer {name!r} must be finite, got NaN or infinity for image {non_finite}")


def _log_diagnostics(names: Sequence[str], diagnostics: Sequence[Tensor]) -> None:
    """Warns of inaccurate maps and refuses non-finite ones; the one place that waits for a device."""
    for name, (non_finite, residual) in zip(
        names, torch.stack([diagnostic.to(diagnostics[0]) for diagnostic in diagnostics]).tolist(), strict=True
    ):
        _require_finite(name, int(non_finite))
        if residual > 1e-2:
            logger.warning(
                "eigen-cam: the components of layer %r are known to %.0e of the largest only; raise power_iterations",
                *(name, residual),
            )
