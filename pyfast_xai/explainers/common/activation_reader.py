"""Reads the activations of some layers, in forwards that stop there or in one that runs to its end."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer
from pyfast_xai.explainers.common.layer_recorder import first_ends, one_row_an_image
from pyfast_xai.explainers.common.layer_search import Place
from pyfast_xai.explainers.common.model_cache import ModelCache, one_of_batch
from pyfast_xai.explainers.common.targets import Targets, rows_returned, targets_of
from pyfast_xai.tape import Node, Tape
from pyfast_xai.tape.record import SaveTensor

logger = logging.getLogger("pyfast_xai")


@dataclass(frozen=True)
class Source:
    """A layer, and the operation that makes it.

    Attributes:
        place: place of the layer.
        operation: name of the operation whose result it is; "" for none, or one that is not known.
        output: which of the results.
    """

    place: Place
    operation: str = ""
    output: int = 0


@dataclass(frozen=True)
class Activations:
    """The activations of images at some layers.

    Attributes:
        layers: each layer with its activation, of as many rows as there are images; to be read through one time.
        tape: tape of the whole forward; None where it stopped at the layers.
    """

    layers: Iterable[tuple[Place, Tensor]]
    tape: Tape | None = None


class ActivationReader:
    """Reads what a model makes of images at some layers, and remembers where these are.

    Args:
        explainer: whose model and layers they are.
    """

    def __init__(self, explainer: LayerExplainer) -> None:
        self._explainer = explainer
        self._known: ModelCache[list[Source]] = ModelCache(explainer, list)

    def __call__(self, images: Tensor, args: Any, kwargs: Any, *, run_whole_model: bool = False) -> Activations:
        """Returns the activations of the layers.

        Args:
            images: `[N, C, H, W]`.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.
            run_whole_model: run the model to its end, where it runs beyond the layers, for its `outputs`.

        Raises:
            InputError: a layer that is not there, or has not one row an image; where the forward stops at the layers,
                once they are read.
        """
        whole = self._whole(images, args, kwargs) if run_whole_model else None
        return Activations(self._stopping(images, args, kwargs)) if whole is None else whole

    def _stopping(self, images: Tensor, args: Any, kwargs: Any) -> Iterator[tuple[Place, Tensor]]:
        """Yields each layer with its activation; the forward stops there."""
        for source in self.sources(images, args, kwargs):
            place = source.place
            tape = self._explainer.record(images, *args, until=place.name, **kwargs)
            assert tape.reached is not None
            one_row_an_image(place.name, tape.reached, images)
            yield place, tape.reached

    def _whole(self, images: Tensor, args: Any, kwargs: Any) -> Activations | None:
        """Returns the activations and the outputs of one whole forward; None where a layer is no operation's result."""
        sources = list(self.sources(images, args, kwargs))
        policy = _KeepResults({source.operation for source in sources})
        if "" in policy.names:
            return None
        tape = self._explainer.record(images, *args, policy=policy, **kwargs)
        layers = []
        for source in sources:
            value = tape.find(source.place.name)
            producer = tape.producer(value)
            if producer is None or producer.name != source.operation:
                return None
            activation = producer.saved[_result(producer.outputs.index(value))].tensor
            one_row_an_image(source.place.name, activation, images)
            layers.append((source.place, activation))
        return Activations(layers, tape)

    def outputs(self, tape: Tape | None, count: int) -> Targets:
        """Returns the outputs of the model for so many images, without a target; nothing without a tape."""
        if tape is None:
            return Targets()
        try:
            targets = targets_of(tape, None, self._explainer.outputs)
        except InputError:  # no scores of classes
            return Targets(rows_returned(tape, count))
        return Targets(targets.logits, kinds=targets.kinds)

    def sources(self, images: Tensor, args: Any, kwargs: Any) -> Iterator["Source"]:
        """Yields the sources of the layers for inputs of a kind; see `__call__`."""
        with self._known.entry(images, args, kwargs, tuple(self._explainer.layers)) as known:
            known[:] = known or self._find(images, args, kwargs)
            yield from known

    def _find(self, images: Tensor, args: Any, kwargs: Any) -> "list[Source]":
        """Returns the sources of the layers, which a whole forward pass of one image tells."""
        explainer = self._explainer
        try:
            tape = explainer.record_unaccelerated(one_of_batch(images, args, kwargs), *args, **kwargs)
        except Exception as error:
            if "auto" in explainer.layers:
                raise
            # A model that cannot run to its end still reaches the layer.
            logger.info("%s: the model does not run beyond its layers (%s)", explainer.method, error)
            return [Source(Place(name)) for name in explainer.layers]
        sources = []
        for place in explainer.places(tape, first_ends(tape)):
            value = tape.find(place.name)
            producer = tape.producer(value)
            made = ("", 0) if producer is None else (producer.name, producer.outputs.index(value))
            sources.append(Source(place, *made))
        return sources


class _KeepResults:
    """A recording policy that keeps what some operations return, and nothing else.

    Args:
        names: names of the operations.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def handles(self, op: OpOverload) -> bool:
        """Returns True: nothing is taken apart, as without a policy."""
        return True

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps nothing before an operation runs."""

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of the operation, and keeps it if it is a layer."""
        result = node(*args, **kwargs)
        if node.name in self.names:
            for number, tensor in enumerate(result if isinstance(result, (list, tuple)) else (result,)):
                if isinstance(tensor, Tensor):
                    keep(_result(number), tensor)
        return result


def _result(number: int) -> str:
    return f"result.{number}"
