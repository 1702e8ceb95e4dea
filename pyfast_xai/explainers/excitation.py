"""Excitation backprop (Zhang et al., 2016): the probability that a neuron of a layer wins, propagated from a class."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, LayerSettings
from pyfast_xai.explainers.common.layer_recorder import LayerRecorder
from pyfast_xai.explainers.common.layer_search import Layer, LayerSearch
from pyfast_xai.explainers.common.output_gradients import OutputGradients
from pyfast_xai.explainers.common.receptive_fields import period_of_cells, without_dots
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Segment
from pyfast_xai.rules.gradient import EXCITATION, Contrastive, last_weighted
from pyfast_xai.tape import Tape, Value, key

# Strides up to this are rounded to 16: maps that lost a row to missing padding are a little coarser.
_STRIDE = 16 * math.sqrt(2)


class ExcitationBackprop(LayerExplainer):
    """Explains by the neurons that win when a probability is walked back from a class (Zhang et al., 2016).

    The class wins with probability one. Every neuron hands its probability to those that excite it, in proportion to
    their activations times positive weights; the map of a layer is the sum over its channels, the
    marginal winning probability (MWP). On a network of rectified convolutions it sums to one at every layer.

    The contrastive map (cMWP) subtracts the map of the opposite class, whose last-layer weights are
    negated: evidence common to all classes cancels. `rules.gradient.excitation` has the rule of every operation.

    An explanation has `signed_map`, the probability at the resolution of the layer (signed where contrastive, None of
    several layers), and `heatmap`, its positive part. Where the model reads only every second cell of the layer, as the
    shortcuts of a ResNet do, the probability lies on those cells and the heat map is interpolated between them.

    Args:
        model: in evaluation mode.
        contrastive: the difference to the negated last layer; False for the probability itself.
        layer: a module, its path or the name of an operation; several give the mean of their heat maps; of a module
            that runs several times the last call is taken, "path@0" is the first; "auto" takes the first of
            the coarsest maps of stride 16 or less through which everything passes: the fourth pool of a
            VGG (as in TorchRay's benchmark), the first block of a ResNet's third stage and the third pool of a
            GoogLeNet (as in the authors' notebooks).
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import ExcitationBackprop, demo
        >>> explanation = ExcitationBackprop(demo.load(), contrastive=True)(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([2, 96, 96])
    """

    method = "excitation-backprop"
    ranks = (3, 4, 5)
    default_box_rule = Segment(0.1)
    paper = "Top-down neural attention by excitation backprop (Zhang et al., 2016)"

    def __init__(
        self,
        model: nn.Module,
        *,
        contrastive: bool = False,
        layer: LayerName | Sequence[LayerName] = "auto",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.contrastive = contrastive
        self._record = LayerRecorder(self, EXCITATION, self.places)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        recorded, seeds, gradients = self._record.gradients(
            images,
            target,
            args,
            kwargs,
            policy=self._reading,
            key=(self.contrastive, self.layout, tuple(self.layers)),
        )
        maps = []
        for place, gradient in zip(recorded.places, gradients, strict=True):
            cells = self.grid(gradient.flatten(0, 1), images.shape[2:], place.name, place.layout)
            cells = at_least_float32(cells).sum(-1)
            maps.append(targets_to_rows(cells.unflatten(0, gradient.shape[:2])))
        periods = [period_of_cells(recorded.tape, layer) for layer in recorded.layers]
        smooth = [without_dots(layer_map, period) for layer_map, period in zip(maps, periods, strict=True)]
        return self.explanation(images, seeds, maps, self.heat(smooth, images.shape[2:]))

    def _reading(self, tape: Tape, seeds: OutputGradients) -> Contrastive | None:
        if not self.contrastive:
            return None
        last = last_weighted(tape, seeds.grads)
        if last is None:
            raise InputError("contrastive must be False for a model without a layer with weights, got True")
        return Contrastive(last, self.warned)

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        """Returns the first of the coarsest maps of stride 16 or less through which everything passes.

        Raises:
            InputError: there is no such map.
        """
        return [coarsest_layers(tape, ends, _STRIDE, normalised=not self.accelerated)[0].name]


def coarsest_layers(
    tape: Tape, ends: Collection[Value] | None, limit: float, *, normalised: bool = True
) -> list[Layer]:
    """Returns the layers of the coarsest stride up to a limit, or of the finest, through which everything passes.

    Args:
        tape: of a whole forward pass.
        ends: the outputs that are explained; None for all of them.
        limit: of the strides, in pixels.
        normalised: convolutions that only a batch norm reads are layers; where it is folded into them they are not.

    Raises:
        InputError: there is no such map.
    """
    search = LayerSearch(tape, ends)
    size = tape.inputs[0].shape[2:]
    axes = sum(side > 1 for side in size)
    layers = [layer for value in search.passed() if (layer := search.layer(value)) is not None]
    if not normalised:
        layers = [layer for layer in layers if not _is_normalised(tape, layer.value)]
    if not layers:
        raise InputError("layer must be named for a model without a map that everything passes, got 'auto'")
    strides = [(math.prod(size) / math.prod(layer.layout.grid)) ** (1 / axes) for layer in layers]
    chosen = max((stride for stride in strides if stride <= limit), default=min(strides))
    return [layer for layer, stride in zip(layers, strides, strict=True) if stride == chosen]


def _is_normalised(tape: Tape, value: Value) -> bool:
    """Returns whether only a batch norm reads a value."""
    readers = [key(node.op) for node in tape if value in node.inputs]
    return readers == ["aten::batch_norm"]
