"""Recording a model from some layers on, and walking back to them."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer
from pyfast_xai.explainers.common.layer_search import LayerSearch, Place
from pyfast_xai.explainers.common.model_cache import ModelCache, one_of_batch
from pyfast_xai.explainers.common.output_gradients import Goal, OutputGradients, output_gradients
from pyfast_xai.explainers.common.targets import logits_of
from pyfast_xai.rules.gradient import GradientRules, Table, backward_pass
from pyfast_xai.tape import Node, Tape, Value
from pyfast_xai.tape.record import SaveTensor

# Which of the model's outputs are explained.
Ends = tuple[int, ...]


class Above(GradientRules):
    """A dense reading of what lies above some layers: of the operations below nothing is kept.

    It keeps the layers' own activations, too. As it knows what has run, each is for one recording.

    Args:
        overlay: rules that replace those of the gradient.
        layers: names of the operations that make the layers; it begins to save once the first of them has run, and
            with `INPUT` among them at once.
        warned: see `GradientRules`.
    """

    def __init__(self, overlay: Table, layers: Collection[str], warned: set[str]) -> None:
        super().__init__(overlay, warned)
        self._layers = layers
        self._reached = INPUT in layers

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._reached:
            super().save(node, keep, args, kwargs)

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().run(node, keep, args, kwargs) if self._reached else node(*args, **kwargs)
        if node.name in self._layers:
            self._reached = True
            for i, tensor in enumerate(result if isinstance(result, (list, tuple)) else (result,)):
                if isinstance(tensor, Tensor):
                    keep(_activation(i), tensor)
        return result


INPUT = ""  # among names of operations: what no operation made


def _activation(output: int) -> str:
    return f"activation.{output}"


@dataclass
class Recorded:
    """A forward pass, recorded from some layers on.

    Attributes:
        tape: tape of the whole forward.
        policy: the one it was recorded with.
        places: positions of the layers.
        layers: the values of the layers.
        activations: their numbers.
        input_gradient: the gradient that arrived at the images, `[K, *shape]`, by the rules of the recording; None
            where the recorder does not walk there.
    """

    tape: Tape
    policy: GradientRules
    places: list[Place]
    layers: list[Value]
    activations: list[Tensor]
    input_gradient: Tensor | None = None

    def gradients(self, seeds: Mapping[Value, Tensor], policy: GradientRules | None = None) -> list[Tensor]:
        """Returns the gradient at each layer, `[K, *shape]`; the tape can be walked again.

        Args:
            seeds: what starts, by the value it belongs to.
            policy: to walk with instead of the one it was recorded with; must need no more.

        Raises:
            InputError: a layer that does not lead to where it starts.
        """
        for layer in self.layers:
            if not _leads(self.tape, layer, seeds):
                producer = self.tape.producer(layer)
                raise InputError(
                    f"layer must lead to what is explained, got {producer.name if producer else 'the images'!r}"
                )
        return backward_pass(policy or self.policy, self.tape, seeds, self.layers, retain=True)


@dataclass
class _Known:
    """The knowledge of inputs of one kind.

    Attributes:
        places: positions of the layers; none before the first forward pass.
        begin: names of the operations that make the layers.
        for_ends: positions of the layers for some of the outputs.
        checked: the outputs for which it was looked whether their gradient arrives at the layers.
    """

    places: list[Place] = field(default_factory=list)
    begin: frozenset[str] = frozenset()
    for_ends: dict[Ends, list[Place]] = field(default_factory=dict)
    checked: set[Ends] = field(default_factory=set)


class LayerRecorder:
    """Records a model with what lies above some layers, and remembers where that begins.

    Where a layer is on the tape is known only after a forward: the first time one image is sent ahead, through the
    model itself also where it is accelerated.

    Args:
        explainer: whose model is recorded.
        overlay: rules that replace those of the gradient.
        places: finds the layers on a tape, for the outputs that are explained.
        to_inputs: keep what lies below, too, and walk on to the images.
        reading: the policy of recordings; a subclass of `Above` may keep more, for further readings.
    """

    def __init__(
        self,
        explainer: LayerExplainer,
        overlay: Table,
        places: Callable[[Tape, Collection[Value] | None], list[Place]],
        *,
        to_inputs: bool = False,
        reading: type[Above] = Above,
    ) -> None:
        self._explainer, self._overlay, self._find = explainer, overlay, places
        self._reading = reading
        self._to_inputs = to_inputs
        self._always = {INPUT} if to_inputs else set()
        self._known: ModelCache[_Known] = ModelCache(explainer, _Known)

    def __call__(self, images: Tensor, args: Any, kwargs: Any) -> Recorded:
        """Records a forward pass.

        Args:
            images: `[N, C, H, W]`.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.

        Raises:
            InputError: a layer that is not there.
        """
        with self._known.entry(images, args, kwargs, tuple(self._explainer.layers)) as known:
            return self._recorded(known, images, args, kwargs)

    def _recorded(self, known: "_Known", images: Tensor, args: Any, kwargs: Any) -> Recorded:
        if not known.places:
            empty = self._reading(self._overlay, (), self._explainer.warned)
            first_tape = self._explainer.record_unaccelerated(
                one_of_batch(images, args, kwargs), *args, policy=empty, **kwargs
            )
            ends = first_ends(first_tape)
            known.places = self._find(first_tape, ends)
            known.for_ends[_among_outputs(first_tape, ends or ())] = known.places
            known.begin = self._begin(first_tape, self._values(first_tape, known.places))
        policy, tape = self._record(images, known.begin, args, kwargs)
        try:
            layers = self._values(tape, known.places)
        except InputError:  # the model ran otherwise than on one image
            known.places = self._find(tape, first_ends(tape))
            layers = self._values(tape, known.places)
        begin = self._begin(tape, layers)
        if begin != known.begin:
            known.begin = begin
            policy, tape = self._record(images, begin, args, kwargs)
            layers = self._values(tape, known.places)
        activations = [self._activation(tape, layer, images) for layer in layers]
        for place, activation in zip(known.places, activations, strict=True):
            one_row_an_image(place.name, activation, images)
        return Recorded(tape, policy, known.places, layers, activations)

    def gradients(
        self,
        images: Tensor,
        target: Goal,
        args: Any,
        kwargs: Any,
        *,
        policy: Callable[[Tape, OutputGradients], GradientRules | None],
        key: Hashable,
        starts: Callable[[Tape, OutputGradients], Mapping[Value, Tensor]] = lambda tape, seeds: seeds.grads,
    ) -> tuple[Recorded, OutputGradients, list[Tensor]]:
        """Records a forward pass, and computes the gradients at the layers.

        A layer that was found and at which nothing arrives is given up for the last one below at which something does.

        Args:
            images: `[N, C, H, W]`.
            target: target of the explainer.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.
            policy: to walk with instead of the one it was recorded with, see `Recorded.gradients`.
            key: what the layers, `policy` and `starts` depend on besides the tape.
            starts: makes what the walk starts from, for classes that are compared with others.

        Returns:
            The recording, which is not to be walked again where it was a graph; what was started from; and what
            `Recorded.gradients` gives.

        Raises:
            InputError: a layer that is not there or does not lead to the target, or a target that does not fit.
        """
        with self._known.entry(images, args, kwargs, tuple(self._explainer.layers)) as known:
            return self._gradients(known, images, target, args, kwargs, policy=policy, key=key, starts=starts)

    def _gradients(
        self,
        known: "_Known",
        images: Tensor,
        target: Goal,
        args: Any,
        kwargs: Any,
        *,
        policy: Callable[[Tape, OutputGradients], GradientRules | None],
        key: Hashable,
        starts: Callable[[Tape, OutputGradients], Mapping[Value, Tensor]],
    ) -> tuple[Recorded, OutputGradients, list[Tensor]]:
        def step(start: Start, images: Tensor, args: Any, kwargs: Any) -> tuple[Tape, Any]:
            recorded = self._recorded(known, images, args, kwargs)
            seeds = start(recorded.tape)
            if self._moves_for(known, recorded, seeds, images, args, kwargs):
                recorded = self._recorded(known, images, args, kwargs)
                seeds = start(recorded.tape)
            gradients = recorded.gradients(starts(recorded.tape, seeds), policy(recorded.tape, seeds))
            input_gradient = None
            if self._to_inputs:
                images_value = recorded.tape.inputs[0]
                (input_gradient,) = backward_pass(recorded.policy, recorded.tape, seeds.grads, [images_value])
            return recorded.tape, (recorded.policy, recorded.activations, gradients, input_gradient)

        graph = (LayerRecorder.gradients, key)
        tape, seeds, outcome = run_step(self._explainer, step, images, target, args, kwargs, key=graph)
        policy_used, activations, gradients, input_gradient = outcome
        places = known.places
        recorded = Recorded(tape, policy_used, places, self._values(tape, places), activations, input_gradient)
        ends = _among_outputs(tape, seeds.grads)
        if images.device.type != "cpu" and ends in known.checked:
            return recorded, seeds, gradients  # another look would wait for the device
        empty = [place for place, gradient in zip(places, gradients, strict=True) if not _arrives(place, gradient)]
        if self._explainer.layers == ["auto"] and len(empty) < len(places):
            empty = []  # a level of a pyramid from which no detection is explained
        if empty and self._steps_back(known, empty[0], ends, images, target, args, kwargs, policy):
            return self._gradients(known, images, target, args, kwargs, policy=policy, key=key, starts=starts)
        known.checked.add(ends)
        return recorded, seeds, gradients

    def _moves_for(
        self, known: "_Known", recorded: Recorded, seeds: OutputGradients, images: Tensor, args: Any, kwargs: Any
    ) -> bool:
        """Returns whether the layers for some of the outputs are not those that were recorded, and remembers them."""
        ends = _among_outputs(recorded.tape, seeds.grads)
        if "auto" not in self._explainer.layers:
            return False
        if ends not in known.for_ends:
            tape = self._explainer.record_unaccelerated(
                images, *args, policy=self._reading(self._overlay, (), self._explainer.warned), **kwargs
            )
            outputs = pytree.tree_leaves(tape.outputs)
            known.for_ends[ends] = self._find(tape, [outputs[i] for i in ends])
        places = known.for_ends[ends]
        moves = places != known.places
        known.places = places
        return moves

    def _steps_back(
        self,
        known: "_Known",
        empty: Place,
        ends: Ends,
        images: Tensor,
        target: Goal,
        args: Any,
        kwargs: Any,
        policy: Callable[[Tape, OutputGradients], GradientRules | None],
    ) -> bool:
        """Returns whether something arrives at another layer than an empty one, and remembers that layer instead."""
        explainer = self._explainer
        if explainer.layers != ["auto"] or ends in known.checked:
            explainer.warn("nothing of the target arrives at layer %r: the map of an image may be zero", empty.name)
            return False
        keeps = self._reading(self._overlay, {INPUT}, self._explainer.warned)
        tape = explainer.record_unaccelerated(images, *args, policy=keeps, **kwargs)
        seeds = output_gradients(tape, target)
        search = LayerSearch(tape, seeds.grads)
        layers, scores = search.layers(), search.scores()
        sources = [layer.value for layer in layers] + scores
        gradients = backward_pass(policy(tape, seeds) or keeps, tape, seeds.grads, sources)
        reached = {
            layer.value
            for layer, gradient in zip(layers, gradients, strict=False)
            if _arrives(Place(layer.name, layer.layout), gradient)
        }
        if not reached:
            passed = [value for value, gradient in zip(sources, gradients, strict=True) if bool(gradient.any())]
            producers = [tape.producer(value) for value in passed]
            explainer.warn(
                "nothing of the target arrives at any layer, so that the maps are zero: it ends at %r",
                min((producer.index, producer.name) for producer in producers if producer is not None)[1]
                if any(producers)
                else "the output",
            )
            return False
        layer = search.last(among=reached)
        explainer.warn(
            "nothing of the target arrives at layer %r: %r is explained, the last one at which something does",
            *(empty.name, layer.name),
        )
        known.places = known.for_ends[ends] = [Place(layer.name, layer.layout)]
        return True

    def _record(self, images: Tensor, begin: Collection[str], args: Any, kwargs: Any) -> tuple[GradientRules, Tape]:
        policy = self._reading(self._overlay, begin, self._explainer.warned)
        return policy, self._explainer.record(images, *args, policy=policy, **kwargs)

    def _values(self, tape: Tape, places: Sequence[Place]) -> list[Value]:
        return [tape.find(place.name) for place in places]

    def _begin(self, tape: Tape, layers: Sequence[Value]) -> frozenset[str]:
        """Returns the names of the operations that made the layers."""
        producers = [tape.producer(layer) for layer in layers]
        return frozenset({INPUT if producer is None else producer.name for producer in producers} | self._always)

    def _activation(self, tape: Tape, layer: Value, images: Tensor) -> Tensor:
        if layer is tape.inputs[0]:
            return images
        producer = tape.producer(layer)
        saved = None if producer is None else producer.saved.get(_activation(producer.outputs.index(layer)))
        if saved is None:
            raise InputError(
                "layer must return the result of an operation, got a tensor that was written to through a view"
            )
        return saved.tensor


def _leads(tape: Tape, layer: Value, ends: Collection[Value]) -> bool:
    """Returns whether any of some values depends on a layer."""
    dependents = {layer}
    for node in tape:
        if not dependents.isdisjoint(node.inputs):
            dependents.update(value for value in node.outputs if value is not None)
    return not dependents.isdisjoint(ends)


def one_row_an_image(name: str, activation: Tensor, images: Tensor) -> None:
    """Refuses a layer whose rows are not the images.

    Raises:
        InputError: naming the layer.
    """
    if activation.dim() == 0 or len(activation) != len(images):
        raise InputError(
            f"layer must have one row an image, got {list(activation.shape)} from {name!r} for {len(images)} images"
        )


def first_ends(tape: Tape) -> list[Value] | None:
    """Returns the output that classes are read from; None where there is none."""
    try:
        return [logits_of(tape)[0]]
    except InputError:
        return None


def _among_outputs(tape: Tape, ends: Collection[Value]) -> Ends:
    """Returns the places of some values among what the model returned."""
    return tuple(
        i for i, leaf in enumerate(pytree.tree_leaves(tape.outputs)) if isinstance(leaf, Value) and leaf in ends
    )


def _arrives(place: Place, gradient: Tensor) -> bool:
    """Returns whether a gradient `[K, *shape]` is not zero at all positions."""
    cells = gradient.flatten(0, 1)
    return bool((cells if place.layout is None else place.layout.cells(cells)).any())
