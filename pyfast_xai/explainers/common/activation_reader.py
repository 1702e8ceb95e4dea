"""Reading the activations of some layers: the forward stops at each of them, and no gradient is taken."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyfast_xai.explainers.common.layer_explainer import LayerExplainer
from pyfast_xai.explainers.common.layer_recorder import first_ends, one_row_an_image
from pyfast_xai.explainers.common.layer_search import Place
from pyfast_xai.explainers.common.model_cache import ModelCache, one_of_batch

logger = logging.getLogger("pyfast_xai")


@dataclass(frozen=True)
class Source:
    """A layer, and what makes it.

    Attributes:
        place: of the layer.
        operation: name of the operation whose result it is; "" for none, or one that is not known.
        output: which of the results.
    """

    place: Place
    operation: str = ""
    output: int = 0


class ActivationReader:
    """Reads what a model makes of images at some layers, and remembers where these are.

    Args:
        explainer: whose model and layers they are.
    """

    def __init__(self, explainer: LayerExplainer) -> None:
        self._explainer = explainer
        self._known: ModelCache[list[Source]] = ModelCache(explainer, list)

    def __call__(self, images: Tensor, args: Any, kwargs: Any) -> Iterator[tuple[Place, Tensor]]:
        """Yields each layer with its activation, of as many rows as there are images.

        Args:
            images: `[N, C, H, W]`.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.

        Raises:
            InputError: a layer that is not there, or has not one row an image.
        """
        for source in self.sources(images, args, kwargs):
            place = source.place
            tape = self._explainer.record(images, *args, until=place.name, **kwargs)
            assert tape.reached is not None
            one_row_an_image(place.name, tape.reached, images)
            yield place, tape.reached

    def sources(self, images: Tensor, args: Any, kwargs: Any) -> Iterator["Source"]:
        """Yields where the layers are for inputs of a kind, and what makes them; see a call."""
        with self._known.entry(images, args, kwargs, tuple(self._explainer.layers)) as known:
            known[:] = known or self._find(images, args, kwargs)
            yield from known

    def _find(self, images: Tensor, args: Any, kwargs: Any) -> "list[Source]":
        """Returns where the layers are, which is known after a whole forward of one image."""
        explainer = self._explainer
        try:
            tape = explainer.record_itself(one_of_batch(images, args, kwargs), *args, **kwargs)
        except Exception as error:
            if "auto" in explainer.layers:
                raise
            # A model that cannot run to its end still reaches the layer.
            logger.info("%s: the model does not run beyond its layers (%s)", explainer.method, error)
            return [Source(Place(name)) for name in explainer.layers]
        sources = []
        for place in explainer.places(tape, first_ends(tape)):
            value = tape.find(place.name)
            maker = tape.producer(value)
            made = ("", 0) if maker is None else (maker.name, maker.outputs.index(value))
            sources.append(Source(place, *made))
        return sources
