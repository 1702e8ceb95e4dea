"""Consensus: where excitation backprop, LayerCAM and CNN-Fixations agree."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.cam import LayerCAM
from pyfast_xai.explainers.common.explainer import Explainer, Settings
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, fused
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.explainers.excitation import ExcitationBackprop, passed_layers
from pyfast_xai.explainers.fixations import CNNFixations
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.tape import Tape, Value

# Strides up to this are rounded to 8: maps that lost a row to missing padding are a little coarser.
_STRIDE = 8 * math.sqrt(2)


class _Fine(LayerExplainer):
    """Base of maps of the last layer of stride 8 or less through which everything passes."""

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        layers, strides = passed_layers(tape, ends, normalised=not self.accelerated)
        fine = [stride for stride in strides if stride <= _STRIDE]
        stride = max(fine) if fine else min(strides)
        return [layers[len(strides) - 1 - strides[::-1].index(stride)].name]


class _FineExcitation(_Fine, ExcitationBackprop):
    pass


class _FineLayerCAM(_Fine, LayerCAM):
    pass


class Consensus(Explainer):
    """Explains by the places where three methods agree: excitation backprop, LayerCAM and CNN-Fixations.

    The heat map is the geometric mean of the three heat maps, each scaled to a maximum of one before: of excitation
    backprop and of LayerCAM at a layer of stride 8, and of the density of CNN-Fixations. Each is blurred or scattered
    in a way of its own, and a pixel that one of them leaves out is left out. It was chosen on one half of the pictures
    of `docs/localization.md` among products and means of the maps of this library. Three forward passes are recorded.

    An explanation has the `points` of CNN-Fixations.

    Args:
        model: in evaluation mode; one that CNN-Fixations can trace.
        layer: of excitation backprop and LayerCAM: a module, its path or the name of an operation; "auto" takes the
            last map of stride 8 or less through which everything passes.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist.
        UnsupportedOpError: CNN-Fixations has no rule for an op of the model.

    Example:
        >>> import torch
        >>> from pyfast_xai import Consensus, demo
        >>> explanation = Consensus(demo.load())(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape, len(explanation.points)
        (torch.Size([2, 96, 96]), 2)
    """

    method = "consensus"
    paper = "no paper: a geometric mean of Zhang et al. (2016), Jiang et al. (2021) and Mopuri et al. (2018)"
    default_box_rule = Mass(0.01, 3)
    takes_functions = takes_gradients = False

    def __init__(self, model: nn.Module, *, layer: LayerName = "auto", **settings: Unpack[Settings]) -> None:
        shared: Any = {name: value for name, value in settings.items() if name in ("outputs", "labels", "accelerate")}
        self.fixations = CNNFixations(model, **shared)
        self.maps = [kind(model, layer=layer, **shared) for kind in (_FineExcitation, _FineLayerCAM)]
        super().__init__(model, **settings)
        self._trial = None  # the parts have their own

    def accelerate(self, **settings: Any) -> "Consensus":
        """Replays the model from now on, see `Explainer.accelerate`."""
        super().accelerate(**settings)
        for explainer in (self.fixations, *self.maps):
            explainer.accelerate(**settings)
        return self

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        traced = self.fixations(images, target, *args, **kwargs)
        assert traced.target is not None
        classes = traced.target.view(len(images), -1)
        heatmaps = [explainer(images, classes, *args, **kwargs).heatmap for explainer in self.maps]
        heatmap = fused([traced.heatmap, *heatmaps], "product").pow(1 / 3)
        return replace(traced, method=self.method, heatmap=heatmap, box_rule=self.box_rule)
