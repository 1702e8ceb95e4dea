"""Consensus: where excitation backprop, LayerCAM and CNN-Fixations agree."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from typing_extensions import Unpack

from pyfast_xai.explainers.common.cam_rules import RULES
from pyfast_xai.explainers.common.explainer import Settings
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, fused
from pyfast_xai.explainers.common.layer_recorder import Above, LayerRecorder
from pyfast_xai.explainers.common.receptive_fields import offset_of_cells, period_of_cells, without_dots
from pyfast_xai.explainers.common.targets import Target, logits_of
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explainers.excitation import coarsest_layers
from pyfast_xai.explainers.fixations import CNNFixations
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.rules import evidence
from pyfast_xai.rules.gradient import EXCITATION, GradientRules
from pyfast_xai.rules.gradient.table import Table
from pyfast_xai.tape import Node, Tape, Value
from pyfast_xai.tape.record import SaveTensor

# Strides up to this are rounded to 8: maps that lost a row to missing padding are a little coarser.
_STRIDE = 8 * math.sqrt(2)


class _ThreeReadings(Above):
    """Keeps the evidence of all operations, and what the gradient and excitation backprop read above a layer."""

    def __init__(self, overlay: Table, layers: Collection[str], warned: set[str]) -> None:
        super().__init__(overlay, layers, warned)
        self._excitation = GradientRules(EXCITATION, warned)

    def handles(self, op: OpOverload) -> bool:
        # Gradients have autograd to fall back on, evidence has nothing.
        return evidence.policy.handles(op)

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        evidence.policy.save(node, keep, args, kwargs)
        if self._reached:
            self._excitation.save(node, keep, args, kwargs)
        super().save(node, keep, args, kwargs)  # last: `run` takes the rule that was looked up last


class Consensus(LayerExplainer):
    """Explains by the places where three methods agree: excitation backprop, LayerCAM and CNN-Fixations.

    The heat map is the geometric mean of the three heat maps, each scaled to a maximum of one before: of excitation
    backprop and of LayerCAM at a layer of stride 8, and of the density of CNN-Fixations. Each is blurred or scattered
    in a way of its own, and a pixel that one of them leaves out is left out. It was chosen on one half of the pictures
    of `docs/localization.md` among products and means of the maps of this library. All three read one forward pass.

    The points of CNN-Fixations follow the centres of receptive fields, which strides and padding put off the middle of
    the image: by 15.5 pixels in a ResNet. The density is moved back by as many whole pixels, so that it lies where the
    other two maps do. An explanation has the `points` where CNN-Fixations has them.

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
    ranks = (4,)
    default_box_rule = Mass(0.01, 3)
    takes_functions = takes_gradients = False

    def __init__(self, model: nn.Module, *, layer: LayerName = "auto", **settings: Unpack[Settings]) -> None:
        super().__init__(model, layer=layer, **settings)
        self.fixations = CNNFixations(model, outputs=self.outputs, labels=self.labels, accelerate=False)
        self._record = LayerRecorder(self, {}, self.places, reading=_ThreeReadings)

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        """Returns the last of the coarsest maps of stride 8 or less through which everything passes, by its name.

        Raises:
            InputError: there is no such map.
        """
        return [coarsest_layers(tape, ends, _STRIDE, normalised=not self.accelerated)[-1].name]

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        key = (Consensus._step, tuple(self.layers))
        tape, targets, (maps, traced) = run_step(self, self._step, images, target, args, kwargs, key=key)
        down, right = offset_of_cells(tape)
        explanation = self.fixations.explanation(traced, images, targets, (int(down), int(right)))
        heatmaps = [self.heat([layer_map], images.shape[2:]) for layer_map in maps]
        heatmap = fused([explanation.heatmap, *heatmaps], "product").pow(1 / 3)
        return replace(explanation, method=self.method, heatmap=heatmap, box_rule=self.box_rule)

    def _step(
        self, start: Start, images: Tensor, args: Any, kwargs: Any
    ) -> tuple[Tape, tuple[list[Tensor], list[Tensor]]]:
        """Returns the tape, the maps `[N * K, h, w]` of excitation backprop and LayerCAM, and the traced pixels."""
        recorded = self._record(images, args, kwargs)
        tape, seeds = recorded.tape, start(recorded.tape)
        traced = self.fixations.traced(tape, logits_of(tape)[0], seeds, images)
        (wins,) = recorded.gradients(seeds.grads, GradientRules(EXCITATION, self.warned))
        (gradient,) = recorded.gradients(seeds.grads)
        (activation,), (place,) = recorded.activations, recorded.places

        def cells(tensor: Tensor) -> Tensor:
            return at_least_float32(self.grid(tensor, images.shape[2:], place.name, place.layout))

        shares, slopes = (cells(each.flatten(0, 1)).unflatten(0, each.shape[:2]) for each in (wins, gradient))
        maps = shares.sum(-1), RULES["layer-cam"].map(slopes, cells(activation))
        period = period_of_cells(tape, recorded.layers[0])
        return tape, ([without_dots(targets_to_rows(layer_map), period) for layer_map in maps], traced)
