"""Recordings of a model that runs faster: a replay in the model's place, with folded and packed weights."""

import functools
import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyfast_xai.tape import alias, watch
from pyfast_xai.tape.captured import Again, Captured
from pyfast_xai.tape.fold import fold_batch_norm
from pyfast_xai.tape.nodes import Node, Tape, Value
from pyfast_xai.tape.once import Once
from pyfast_xai.tape.pack import pack
from pyfast_xai.tape.record import Keep, Reading, record, tensors_in
from pyfast_xai.tape.replay import record_again
from pyfast_xai.tape.signature import signature

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")

# Of the largest output. Rounding in another order is far below, a decision that went another way far above.
_AGREES = {torch.float64: 1e-9, torch.float32: 1e-2}


@dataclass(frozen=True)
class _Template:
    """A tape to be replayed.

    Attributes:
        tape: None where the model must run itself.
        until: the value at which it stops.
        understood: what the reading said of each composite operation that it was asked about.
        seen: whether readings may look at it.
    """

    tape: Tape | None
    until: Value | None
    understood: dict[OpOverload, bool]
    seen: bool

    def serves(self, reading: Reading | None) -> bool:
        if reading is not None and not self.seen:
            return False
        return all(_understands(reading, op) == answer for op, answer in self.understood.items())


class Accelerated:
    """Records a model by replaying it: without its Python, batch norm folded, weights packed, dead branches dropped.

    The first recording for a shape of inputs is of the model itself. It is made into a replay, and that must give what
    the model gives, on these inputs and on their mirrored negatives, up to rounding. A model that takes decisions from
    data, draws random numbers or writes to its state is recorded as it is, which is logged once. Whenever a parameter,
    buffer, submodule, hook or mode of the model has changed since, all begins anew. Decisions that the model takes from
    anything else, its own Python attributes for example, are not seen: make a new one, or call `forget`.

    What reads no number on the way can be handed to `run`, which makes a CUDA graph of it on a device.

    Args:
        model: any module.
        fold: fold batch norm into convolutions.
    """

    def __init__(self, model: nn.Module, *, fold: bool = True) -> None:
        self._model = watch.unwrap(model)
        self._fold = fold
        self._lock = threading.RLock()
        self._told = False
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        # Replays and packed weights are made again where a copy lands.
        return functools.partial(Accelerated, fold=self._fold), (self._model,)

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._templates: dict[Any, list[_Template]] = {}
            self._once = Once()
            self._captured = Captured()
            self._state: Any = None

    def record(self, *args: Any, reading: Reading | None = None, until: str | None = None, **kwargs: Any) -> Tape:
        """As `tape.record` of the model."""
        with self._lock:
            self._look()
            known = (*signature(args, kwargs), until)
            templates = self._templates.setdefault(known, [])
            template = next((template for template in templates if template.serves(reading)), None)
            if template is None:
                template = self._template(args, kwargs, reading, until)
                templates.append(template)
        if template.tape is None:
            return record(self._model, *args, reading=reading, until=until, **kwargs)
        return record_again(template.tape, *tensors_in((args, kwargs)), reading=reading, until=template.until)

    def run(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> T:
        """`function(*arguments)`, which records this model: as a CUDA graph where it can be one, see `Captured`."""
        return self._graphs()(function, *arguments, key=key)

    def repeating(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> AbstractContextManager[Again[T]]:
        """The same for a function that is called again and again on the same tensors, to which it writes."""
        return self._graphs().repeating(function, *arguments, key=key)

    def _graphs(self) -> Captured:
        with self._lock:
            self._look()
            return self._captured

    def _look(self) -> None:
        """Begin anew if the model has changed."""
        state = _state_of(self._model)
        if state != self._state:
            self.forget()
            self._state = state

    def _template(self, args: Any, kwargs: Any, reading: Reading | None, until: str | None) -> _Template:
        asked = _Asked(reading)
        tape = record(self._model, *args, reading=asked, until=until, **kwargs)
        end = None if until is None else tape.find(until)
        reason = tape.not_replayable
        if len({value.device for node in tape for value in node.outputs if value is not None}) > 1:
            self._captured.stop()  # a graph is of one
        if reason is None:
            result = _answers(tape)
            reason = self._speed_up(tape, end, args, kwargs, seen=reading is not None)
            reason = reason or self._differs(tape, end, result, args, kwargs, until)
        if reason is None:
            tape.result = tape.reached = None
            return _Template(tape, end, asked.answers, seen=reading is not None)
        if not self._told:
            self._told = True
            logger.warning("accelerate: the model runs as it is: %s", reason)
        self._captured.stop()  # a graph is a replay, too
        return _Template(None, end, asked.answers, seen=True)

    def _speed_up(self, tape: Tape, until: Value | None, args: Any, kwargs: Any, *, seen: bool) -> str | None:
        """Fold and pack, and write down the memory layouts that come of it."""
        if any(node.op in (alias.overwrite, alias.refresh) for node in tape.nodes):
            return None  # where a view lies depends on the layout of what it is of: a plain replay
        if self._fold:
            fold_batch_norm(tape, until, self._once)
        pack(tape, self._once, until=until, seen=seen)
        try:
            record_again(tape, *tensors_in((args, kwargs)), reading=_Layouts(), until=until)
        except RuntimeError as error:
            return f"its replay failed ({error})"
        return None

    def _differs(
        self, tape: Tape, until: Value | None, result: list[Tensor], args: Any, kwargs: Any, name: str | None
    ) -> str | None:
        """Why the replay is not the model, if it is not."""
        mirrored = pytree.tree_map_only(Tensor, _mirrored, (args, kwargs))
        try:
            also = record(self._model, *mirrored[0], reading=_Asked(None), until=name, **mirrored[1])
        except Exception as error:  # whatever the model says to what it did not expect
            return f"it cannot be compared on other inputs ({error})"
        for given, expected in (((args, kwargs), result), (mirrored, _answers(also))):
            again = _answers(record_again(tape, *tensors_in(given), until=until))
            for came, wanted in zip(again, expected, strict=True):
                if came.shape != wanted.shape or not _agree(came, wanted):
                    return "its replay gives other results"
        return None


class _Asked:
    """Answers for a reading, remembers the answers, and saves nothing."""

    def __init__(self, reading: Reading | None) -> None:
        self._reading = reading
        self.answers: dict[OpOverload, bool] = {}

    def understands(self, op: OpOverload) -> bool:
        self.answers[op] = _understands(self._reading, op)
        return self.answers[op]

    def save(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass

    def run(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node(*args, **kwargs)


class _Layouts(_Asked):
    """Puts on the tape how results lie in memory, which other kernels may have changed."""

    def __init__(self) -> None:
        super().__init__(None)

    def run(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = node(*args, **kwargs)
        for value, tensor in zip(node.outputs, result if isinstance(result, (list, tuple)) else [result], strict=True):
            if value is not None and tensor.layout == torch.strided:
                value.stride = tensor.stride()
        return result


def _understands(reading: Reading | None, op: OpOverload) -> bool:
    # Without a reading nothing is taken apart.
    return reading is None or reading.understands(op)


def _state_of(model: nn.Module) -> list[Any]:
    """What would have to change for the model to give something else."""
    state: list[Any] = []
    for module in watch.modules_of(model):
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        state.append((id(module), module.training, hooks))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                version = -1 if tensor.is_inference() else tensor._version
                state.append((id(tensor), version, tensor.data_ptr()))
    return state


def _mirrored(tensor: Tensor) -> Tensor:
    """Other numbers of the same kind."""
    other = tensor.flip(-1) if tensor.dim() else tensor.clone()
    return -other if tensor.is_floating_point() else other


def _answers(tape: Tape) -> list[Tensor]:
    return tensors_in(tape.result if tape.reached is None else tape.reached)


def _agree(came: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(came, wanted)
    if not wanted.numel():
        return True
    both = torch.isfinite(wanted)
    if not torch.equal(torch.isfinite(came), both):
        return False
    zero = torch.zeros((), dtype=wanted.dtype, device=wanted.device)
    difference = torch.where(both, came - wanted, zero).abs().max()
    largest = torch.where(both, wanted, zero).abs().max()
    return bool(difference <= _AGREES.get(wanted.dtype, 0.1) * largest)
