"""One forward pass of whatever the caller hands over: a module or a function, on tensors of any number and shape.

The explainers of this library take images `[N, C, H, W]`; the peers take anything that can be called. Both read the
same kind of tape.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import ordinary
from pyfast_xai.explainers.seeds import seeds_for
from pyfast_xai.rules.response import Response, Rule, Table, walk
from pyfast_xai.tape import Node, Tape, Value, record
from pyfast_xai.tape.record import Keep
from pyfast_xai.tape.watch import unwrap

Forward = Callable[..., Any]


@dataclass
class Recording:
    """A forward pass that can be walked back.

    Attributes:
        tape: of the pass.
        reading: the one it was recorded with.
        inputs: the values of the arguments, None for those that are no tensors.
        layers: of each layer, the values that it returned (or was given) in its last call.
        activations: their numbers, before anything wrote to them.
        names: of each layer, the keys of what it returned in a dict.
    """

    tape: Tape
    reading: Response
    inputs: list[Value | None]
    layers: list[list[Value]] = field(default_factory=list)
    activations: list[list[Tensor]] = field(default_factory=list)
    names: list[list[str] | None] = field(default_factory=list)

    @property
    def output(self) -> Any:
        """What was returned."""
        return self.tape.result

    def gradients(
        self,
        score: Callable[[Any], Tensor],
        to: Sequence[Value],
        reading: Response | None = None,
        *,
        retain: bool = False,
    ) -> list[Tensor]:
        """Gradients of a sum of scores, each of the shape of its value; zeros where the scores do not depend on it.

        Args:
            score: of what was returned; a tensor of any shape, which is summed.
            to: values to arrive at.
            reading: to walk with instead of the one it was recorded with; must need no more.
            retain: keep what was saved, so that it can be walked again.

        Raises:
            InputError: a score that does not depend on the output.
            UnsupportedOpError: an op on the way has no derivative.
        """
        seeds = seeds_for(self.tape, lambda output: score(output).flatten())
        found = walk(reading or self.reading, self.tape, seeds.grads, to, retain=retain)
        return [grad[0].contiguous() for grad in found]


class _Above(Response):
    """A dense reading that saves nothing before it is told to: what lies below a layer is not walked."""

    def __init__(self, overlay: Table, begun: bool) -> None:
        super().__init__(overlay)
        self.begun = begun
        self._below = -1  # the last operation of which nothing was saved

    def rule_of(self, node: Node) -> Rule:
        # A layer of several tensors ends in several operations, and a walk that reaches the first passes the others.
        return _STOP if node.index <= self._below else super().rule_of(node)

    def save(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.begun:
            super().save(node, keep, args, kwargs)
        else:
            self._below = node.index

    def run(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().run(node, keep, args, kwargs) if self.begun else node(*args, **kwargs)


_STOP = Rule(lambda step, *args, **kwargs: None, saves=lambda node: ())


class _Enough(BaseException):
    """Leaves the forward early; not an Exception, so that no model catches it by accident."""


class _Probe(nn.Module):
    """Its place on the tape tells which values some tensors were; the copies are safe from in-place operations."""

    names: list[str] | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.copies: list[Tensor] = [tensor.clone() for tensor in tensors]
        return tuple(self.copies)


class _Called(nn.Module):
    """What is recorded: the function, the modules it is known to run, and a probe for each layer.

    The layers are watched through PyTorch's process-wide hooks, for the length of the call and on this thread only.
    """

    def __init__(
        self, function: Forward, layers: Sequence[nn.Module], at_input: bool, stop: bool, reading: _Above
    ) -> None:
        super().__init__()
        self._function, self._layers, self._at_input, self._stop = function, layers, at_input, stop
        self._reading = reading
        self.watching = [_Probe() for _ in layers]
        self.probes = nn.ModuleList(self.watching)  # their paths on the tape
        self.models = nn.ModuleList(modules_behind(function))

    def forward(self, *args: Any) -> Any:
        if not self._layers:
            return self._function(*args)
        try:
            with self._watching():
                return self._function(*args)
        except _Enough:
            return None

    @contextmanager
    def _watching(self) -> Iterator[None]:
        thread = threading.get_ident()

        def seen(module: nn.Module, tensors: Any) -> None:
            if threading.get_ident() != thread:
                return
            for layer, probe in zip(self._layers, self.watching, strict=True):
                if layer is module:
                    probe.names = list(tensors) if isinstance(tensors, dict) else None
                    probe(*tensors_of(tensors))
                    self._reading.begun = True
            if self._stop and all(hasattr(probe, "copies") for probe in self.watching):
                raise _Enough

        if self._at_input:
            handle = register_module_forward_pre_hook(lambda module, args: seen(module, args))
        else:
            handle = register_module_forward_hook(lambda module, args, output: seen(module, output))
        try:
            yield
        finally:
            handle.remove()


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors a layer returned or was given: one, or some in a tuple, list or dict."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [part for part in parts if isinstance(part, Tensor)] if isinstance(result, (dict, list, tuple)) else []


def modules_behind(function: Forward) -> list[nn.Module]:
    """The modules that a function is seen to use: itself, the object it is bound to, what it closes over."""
    if isinstance(function, nn.Module):
        return [unwrap(function)]
    held: list[Any] = [getattr(function, "__self__", None)]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    if isinstance(function, functools.partial):
        held += [function.func, *function.args, *function.keywords.values()]
    found = [unwrap(one) for one in held if isinstance(one, nn.Module)]
    if isinstance(function, functools.partial):
        found += [module for module in modules_behind(function.func) if module not in found]
    return found


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def record_call(
    function: Forward,
    args: Sequence[Any],
    *,
    overlay: Table | None = None,
    layers: Sequence[nn.Module] = (),
    at_input: bool = False,
    everything: bool = True,
    stop: bool = False,
) -> Recording:
    """Record `function(*args)`.

    Nothing is changed: not the model, its hooks and flags, the arguments or the random numbers, also not on an
    exception.

    Args:
        function: a module, whose wrappers are looked through, or a function.
        args: what it is called with.
        overlay: rules that replace those of the gradient.
        layers: modules whose results are kept, too.
        at_input: keep what the layers are given instead.
        everything: save what a walk to the inputs needs; False for what lies above the layers.
        stop: go no further than the layers; nothing is returned then, and nothing can be walked.

    Raises:
        InputError: no tensor among the arguments, or a layer that did not run.
        Exception: whatever the function raises.
    """
    function = unwrap(function) if isinstance(function, nn.Module) else function
    layers = [unwrap(layer) for layer in layers]
    given = list(args)
    faster = [_channels_last(arg) for arg in given] if _convolves(function) else given
    try:
        return _record(function, faster, overlay or {}, layers, at_input, everything, stop)
    except RuntimeError:
        if all(one is other for one, other in zip(faster, given, strict=True)):
            raise
        # A model that takes views of its input cannot have it in channels_last.
        return _record(function, given, overlay or {}, layers, at_input, everything, stop)


def _record(
    function: Forward,
    args: list[Any],
    overlay: Table,
    layers: list[nn.Module],
    at_input: bool,
    everything: bool,
    stop: bool,
) -> Recording:
    reading = _Above(overlay, begun=(everything or not layers) and not stop)
    called = _Called(function, layers, at_input, stop, reading)
    with torch.inference_mode(False), torch.no_grad():
        tape = record(called, *args, reading=reading)
    placed = tape.input_structure[0]  # in which a tensor that was given twice is one value
    found = Recording(tape, reading, [value if isinstance(value, Value) else None for value in placed])
    for i, probe in enumerate(called.watching):
        calls = tape.modules.get(f"probes.{i}", [])
        if not hasattr(probe, "copies"):
            raise InputError(f"layer must run in the forward pass, got {type(layers[i]).__name__}, which did not")
        if not calls or len(calls[-1]) != len(probe.copies):
            raise InputError(f"layer must depend on the inputs, got {type(layers[i]).__name__}, which does not")
        # The probe's copies lead nowhere; what they were made of does.
        makers = [tape.producer(value) for value in calls[-1]]
        found.layers.append([maker.inputs[0] for maker in makers if maker is not None])
        found.activations.append([ordinary(copy) for copy in probe.copies])
        found.names.append(probe.names)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and its flags as they were afterwards.

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


def _convolves(function: Forward) -> bool:
    return isinstance(function, nn.Module) and any(isinstance(module, nn.Conv2d) for module in function.modules())


def _channels_last(arg: Any) -> Any:
    """On a CPU convolutions are faster in this layout, but in float64."""
    picture = isinstance(arg, Tensor) and arg.dim() == 4 and arg.is_floating_point() and arg.device.type == "cpu"
    if not picture or arg.dtype == torch.float64 or arg.is_contiguous(memory_format=torch.channels_last):
        return arg
    return arg.detach().contiguous(memory_format=torch.channels_last)
