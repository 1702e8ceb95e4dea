"""Excitation backprop (Zhang et al., 2016): the probability that a neuron of a layer wins, handed down from a class."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.layers import LayerExplainer, LayerRecorder, bottlenecks, is_channels_last, rows, wide
from pyfast_xai.explainers.seeds import Goal, Seeds
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.response import EXCITATION, Contrastive, last_weighted
from pyfast_xai.tape import Tape

# Strides up to this are rounded to 16: maps that lost a row to missing padding are a little coarser.
_STRIDE = 16 * math.sqrt(2)


class ExcitationBackprop(LayerExplainer):
    """Where the neurons are that win, by a probability walked back from a class (Zhang et al., 2016).

    The class wins with probability one. Every neuron hands its probability to those that excite it, in proportion to
    their activations times positive weights; the map of a layer is the sum over its channels, the
    marginal winning probability (MWP). On a network of rectified convolutions it sums to one at every layer.

    The contrastive map (cMWP) subtracts what a class gets that the last layer's negated weights
    would stand for: what excites any class cancels. `rules.response.excitation` has the rule of every operation.

    Args:
        model: in evaluation mode.
        contrastive: the difference to the negated last layer; False for the probability itself.
        layer: path of a module or name of an operation; several give the mean of their heat maps; "auto" takes the
            first of the coarsest maps of stride 16 or less through which everything passes: the fourth pool of a
            VGG (as in TorchRay's benchmark), the first block of a ResNet's third stage and the third pool of a
            GoogLeNet (as in the authors' notebooks).
        tokens: grid `(h, w)` of token activations `[N, T, C]`; None for a square one. Leading extra tokens (class
            token, registers) are dropped.
        channels: "first", "last", or "auto" to tell by the shape of the input.
        threshold: share of its range at which `Explanation.boxes` cuts the map.
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "excitation-backprop"
    paper = "Top-down neural attention by excitation backprop (Zhang et al., 2016)"

    def __init__(
        self,
        model: nn.Module,
        *,
        contrastive: bool = False,
        layer: str | Sequence[str] = "auto",
        tokens: tuple[int, int] | None = None,
        channels: Literal["auto", "first", "last"] = "auto",
        threshold: float = 0.15,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, layer=layer, tokens=tokens, channels=channels, threshold=threshold, labels=labels)
        self.contrastive = contrastive
        self._record = LayerRecorder(self, EXCITATION, self.values)

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the largest output, an int, N ints or `[N, K]` ints (a row for each, in one pass); a
                floating-point tensor of the shape of the output as the probabilities to start from; or a function of
                what the model returned that gives one number an image, whose gradient is the start.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            An explanation with `map`, the probability at the resolution of the layer (signed where contrastive, None
            of several layers), and `heatmap`, its positive part.

        Raises:
            InputError: images, a layer or a target that do not fit, or no layer with weights to contrast.
            UnsupportedOpError: an op behind the layer that cannot be differentiated.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            recorded, seeds, arrived = self._record.gradients(
                images,
                target,
                args,
                kwargs,
                reading=self._reading,
                key=(self.contrastive, self.channels, tuple(self.layers)),
            )
            maps = []
            for name, own in zip(self.names(recorded.tape), arrived, strict=True):
                cells = wide(self.grid(own.flatten(0, 1), images.shape[2:], name)).sum(3)
                maps.append(rows(cells.unflatten(0, own.shape[:2])))
            return self.explanation(images, seeds, maps, self.heat(maps, images.shape[2:]))

    def _reading(self, tape: Tape, seeds: Seeds) -> Contrastive | None:
        if not self.contrastive:
            return None
        last = last_weighted(tape, seeds.grads)
        if last is None:
            raise InputError("contrastive must be False for a model without a layer with weights, got True")
        return Contrastive(last)

    def automatic(self, tape: Tape) -> str:
        """The first of the coarsest maps of stride 16 or less through which everything passes.

        Raises:
            InputError: there is no such map.
        """
        size = tape.inputs[0].shape[2:]
        found = []
        for node in bottlenecks(tape):
            value = node.outputs[0]
            if value is not None and len(value.shape) == 4:
                last = self.channels == "last" or (self.channels == "auto" and is_channels_last(value.shape, size))
                height, width = value.shape[1:3] if last else value.shape[2:]
                if min(height, width) > 1:
                    found.append((math.sqrt(math.prod(size) / (height * width)), node.name))
        fine = [own for own in found if own[0] <= _STRIDE]
        if not found:
            raise InputError("layer must be named for a model without a map that everything passes, got 'auto'")
        stride = max(fine)[0] if fine else min(found)[0]
        return next(name for own, name in found if own == stride)
