"""Recordings of a module or a function of the caller, on tensors of any number and shape.

The explainers of this library take images `[N, C, H, W]`; the peers take anything that can be called. Both read the
same kind of tape.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from pyfast_xai.compat.acceleration import Kind, Replays
from pyfast_xai.compat.called import PROBES, Called, Forward
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.memory_format import in_channels_last, kind_of_call, run_in_channels_last
from pyfast_xai.explainers.common.output_gradients import output_gradients
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.rules.gradient import GradientRules, Rule, Table, backward_pass
from pyfast_xai.tape import Node, Tape, Value, record
from pyfast_xai.tape.module_hooks import unwrap
from pyfast_xai.tape.record import SaveTensor, tensors_in

T = TypeVar("T")


@dataclass
class Recording:
    """A forward pass that can be walked back.

    Attributes:
        tape: tape of the pass.
        policy: the one it was recorded with.
        rules: what that policy saves for.
        inputs: the values of the arguments, None for those that are no tensors.
        layers: the values that each layer returned (or was given) in its last call.
        activations: their numbers, before anything wrote to them.
        names: the keys of each layer that returned a dict.
    """

    tape: Tape
    policy: "_Above"
    rules: GradientRules
    inputs: list[Value | None]
    layers: list[list[Value]] = field(default_factory=list)
    activations: list[list[Tensor]] = field(default_factory=list)
    names: list[list[str] | None] = field(default_factory=list)

    @property
    def output(self) -> Any:
        """Returns the output of the forward pass."""
        return self.tape.result[0]

    def gradients(
        self,
        score: Callable[[Any], Tensor],
        to: Sequence[Value],
        policy: GradientRules | None = None,
        *,
        retain: bool = False,
    ) -> list[Tensor]:
        """Returns the gradients of a sum of scores, each of the shape of its value; zeros if it does not affect them.

        Args:
            score: computes the score from the result; a tensor of any shape, which is summed.
            to: values to arrive at.
            reading: to walk with instead of the one it was recorded with; must need no more.
            retain: keep what was saved, so that it can be walked again.

        Raises:
            InputError: a score that does not depend on the output.
            UnsupportedOpError: an op on the way has no derivative.
        """
        gradients = backward_pass(policy or self.policy, self.tape, self.seeds(score), to, retain=retain)
        return [grad[0].contiguous() for grad in gradients]

    def seeds(self, score: Callable[[Any], Tensor]) -> dict[Value, Tensor]:
        """Returns the gradients of a sum of scores with respect to what was returned, `[1, *shape]` each."""
        return output_gradients(self.tape, lambda result: score(result[0]).flatten()).grads


class _Above(GradientRules):
    """Rules for which nothing is saved before the first probe: what lies below a layer is not walked."""

    def __init__(self, rules: GradientRules, reached: bool) -> None:
        super().__init__(rules.overlay, rules.warned)
        self.rules = rules
        self._reached = reached
        self._below = -1  # the last operation without saved tensors

    def rule_of(self, node: Node) -> Rule:
        # A layer of several tensors ends in several operations, and a walk that reaches the first passes the others.
        return _STOP if node.index <= self._below else self.rules.rule_of(node)

    def handles(self, op: OpOverload) -> bool:
        return self.rules.handles(op)

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._reached = self._reached or node.path.startswith(PROBES)
        if self._reached:
            self.rules.save(node, keep, args, kwargs)
        else:
            self._below = node.index

    def run(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.rules.run(node, keep, args, kwargs) if self._reached else node(*args, **kwargs)

    def with_rules(self, rules: GradientRules) -> "_Above":
        """Returns a policy of other rules, for a walk that ends where this one does."""
        other = _Above(rules, self._reached)
        other._below = self._below
        return other


_STOP = Rule(lambda ctx, *args, **kwargs: None)

_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _warned_of(function: Forward) -> set[str]:
    """Returns the warnings of earlier calls of a function."""
    try:
        return _warned.setdefault(function, set())
    except TypeError:  # it cannot be hashed, or not be referred to weakly
        return set()


def record_call(
    function: Forward,
    args: Sequence[Any],
    *,
    overlay: Table | None = None,
    rules: GradientRules | None = None,
    layers: Sequence[nn.Module] = (),
    at_input: bool = False,
    to_inputs: bool = True,
    stop: bool = False,
    kind: Kind | None = None,
) -> Recording:
    """Records `function(*args)`.

    Nothing is changed: not the model, its hooks and flags, the arguments or the random numbers, also not on an
    exception.

    Args:
        function: a module, whose wrappers are looked through, or a function.
        args: what it is called with.
        overlay: rules that replace those of the gradient.
        rules: to save for instead of those.
        layers: modules whose results are kept, too.
        at_input: keep what the layers are given instead.
        to_inputs: save the tensors of a backward pass to the inputs; False for one to the layers.
        stop: go no further than the layers; nothing is returned then, and nothing can be walked.
        kind: kind of calls that may be replayed, of the same function, layers and settings; None to record.

    Raises:
        InputError: no tensor among the arguments, or a layer that did not run.
        Exception: the exceptions of the function.
    """
    layers = [unwrap(layer) for layer in layers]

    def recorded(values: list[Any], to_inputs: bool = to_inputs, kind: Kind | None = kind) -> Recording:
        gradient_rules = GradientRules(overlay or {}, _warned_of(function)) if rules is None else rules
        policy = _Above(gradient_rules, (to_inputs or not layers) and not stop)
        called = Called(function, layers, at_input, stop) if kind is None else kind.called
        return _record(called, values, policy, functools.partial(record, called) if kind is None else kind.record)

    if not isinstance(function, nn.Module):
        return recorded(list(args))
    function = unwrap(function)
    convolves = any(isinstance(module, nn.Conv2d) for module in function.modules())
    # A tensor that comes twice stays one.
    faster = {id(arg): in_channels_last(function, arg) if convolves else arg for arg in args}
    return run_in_channels_last(
        function,
        run=recorded,
        compared=lambda values: _answers(recorded(values, to_inputs=False, kind=None)),
        answers=_answers,
        arguments=args,
        faster=[faster[id(arg)] for arg in args],
        key=kind_of_call(*args, tuple(map(id, layers)), at_input, stop),
    )


def _answers(recording: Recording) -> list[Tensor]:
    return [*tensors_in(recording.output), *tensors_in(recording.activations)]


def _record(called: Called, args: list[Any], policy: _Above, recording: Callable[..., Tape]) -> Recording:
    tensors = list({id(arg): arg for arg in args if isinstance(arg, Tensor)}.values())
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    places = tuple(index.get(id(arg)) for arg in args)
    others = tuple(arg if place is None else None for arg, place in zip(args, places, strict=True))
    with torch.inference_mode(False), torch.no_grad():
        tape = recording(*tensors, policy=policy, places=places, others=others)
    result = Recording(tape, policy, policy.rules, [None if place is None else tape.inputs[place] for place in places])
    _, copies, result.names = tape.result
    for i, (layer, layer_calls) in enumerate(zip(called.layers, copies, strict=True)):
        calls = tape.modules.get(f"{PROBES}{i}", [])
        if layer_calls is None:
            raise InputError(f"layer must run in the forward pass, got {type(layer).__name__}, which did not")
        if not calls or len(calls[-1]) != len(layer_calls):
            raise InputError(f"layer must depend on the inputs, got {type(layer).__name__}, which does not")
        # The probe's copies lead nowhere; what they were made of does.
        producers = [tape.producer(value) for value in calls[-1]]
        result.layers.append([producer.inputs[0] for producer in producers if producer is not None])
        result.activations.append([outside_inference_mode(copy) for copy in layer_calls])
    return result


def read_call(
    function: Forward,
    args: Sequence[Any],
    read: Callable[[Recording], T],
    replays: Replays,
    *,
    layers: Sequence[nn.Module] = (),
    at_input: bool = False,
    stop: bool = False,
    **settings: Any,
) -> T:
    """Returns the result of `read` on a recording of `function(*args)`, which may be a replay (`compat.accelerate`).

    Args:
        function: see `record_call`.
        args: see `record_call`.
        read: takes the recording; may be called twice.
        replays: those of the object that calls.
        layers: see `record_call`.
        at_input: see `record_call`.
        stop: see `record_call`.
        **settings: settings of `record_call`.
    """
    kind = replays.kind(function, [unwrap(layer) for layer in layers], at_input, stop)

    def run() -> T:
        recording = record_call(function, args, layers=layers, at_input=at_input, stop=stop, kind=kind, **settings)
        return read(recording)

    return run() if kind is None else kind(run, args)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Yields the model in evaluation mode, and its flags as they were afterwards.

    The flags are set one by one: some models start a training in their own `eval`.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
