"""The base of class activation maps that run what depends on a layer again."""

import abc
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.activation_reader import ActivationReader, Source
from pyfast_xai.explainers.common.cam_rules import weighted_sum
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, LayerSettings
from pyfast_xai.explainers.common.layer_recorder import one_row_an_image
from pyfast_xai.explainers.common.layer_search import sensitive_levels
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, take_rows, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.tape import Tape, Value
from pyfast_xai.tape.suffix import KeepSuffix, recorded_value

# Records so many copies of the images, one behind the other; gives the tape and the layer on it.
Record = Callable[[int], tuple[Tape, Value]]


class SuffixCAM(LayerExplainer):
    """Base of class activation maps that run what depends on a layer again, with other numbers or for derivatives.

    The model itself is recorded, also where it is accelerated.

    Args:
        model: in evaluation mode.
        layer: see `LayerExplainer`; several give the mean of their heat maps.
        **settings: those of `LayerExplainer`.
    """

    ranks = (3, 4, 5)
    default_box_rule = Mass()
    takes_gradients = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self._read = ActivationReader(self)

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        return sensitive_levels(tape, ends)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        maps = []
        scores: PerturbationScores | None = None
        for source in self._read.sources(images, args, kwargs):
            place = source.place

            def record(copies: int, source: Source = source) -> tuple[Tape, Value]:
                rows = torch.arange(len(images), device=images.device).repeat(copies)
                more, named = take_rows((args, kwargs), len(images), rows)
                policy = KeepSuffix(source.operation, source.output)
                tape = self.record_unaccelerated(images[rows], *more, policy=policy, **named)
                return tape, tape.find(source.place.name)

            tape, value = record(1)
            activation = recorded_value(tape, value)
            one_row_an_image(place.name, activation, images)
            if scores is None:
                scores = self._scores(tape, images, target)
            dim = self.channel_dim(value.shape, images.shape[2:], place.layout)
            cells = at_least_float32(self.grid(activation, images.shape[2:], place.name, place.layout))
            weights = self._weights(tape, value, record, scores, dim)
            maps.append(targets_to_rows(weighted_sum(weights.to(cells.dtype), cells)))
        assert scores is not None
        return self.explanation(images, scores.targets, maps, self.heat(maps, images.shape[2:]))

    def _scores(self, tape: Tape, images: Tensor, target: Goal) -> PerturbationScores:
        """Returns a function that reads the scores of the target in the outputs of the model."""
        return PerturbationScores(
            _Recorded(self.model, tape), images, target, "logit", len(images), (), {}, self.outputs, self.labels
        )

    @abc.abstractmethod
    def _weights(self, tape: Tape, value: Value, record: Record, scores: PerturbationScores, dim: int) -> Tensor:
        """Returns the weights of the channels of a layer for K targets, `[K, N, C]`.

        Args:
            tape: tape of the images, with what depends on the layer.
            value: the layer.
            record: records more copies of the images.
            scores: reads scores in what the model returned.
            dim: dimension of the channels.
        """


class _Recorded:
    """A model that has been recorded on the images already."""

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        self.model, self._tape = model, tape

    def record(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        """Returns that recording."""
        return self._tape

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the outputs of the model."""
        return self._tape.result
