"""The forward function from the result of a layer on, by the operations that depend on that layer alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.acceleration.packed_replay import close
from pyfast_xai.errors import InputError, UnsupportedOpError
from pyfast_xai.tape import Tape, Value, module_hooks, record
from pyfast_xai.tape.suffix import KeepSuffix, recorded_value, replay_suffix


class AboveLayer:
    """The outputs of a model for other numbers in place of what a layer returned, of any number of copies of the rows.

    Args:
        tape: a recording of the model with `KeepSuffix` at the layer.
        value: what the layer returned on it, `[N, ...]`.
    """

    def __init__(self, tape: Tape, value: Value) -> None:
        self._tape, self._value = tape, value

    @classmethod
    def of(cls, function: Callable[..., Any], layer: nn.Module, inputs: tuple[Tensor, ...]) -> "AboveLayer | None":
        """Returns None where the layer ran several times, or what lies above it cannot be run by itself."""
        if not isinstance(function, nn.Module):
            return None
        modules = module_hooks.modules_of(module_hooks.unwrap(function))
        if module_hooks.any_forward_hooks(modules):
            return None
        # One row tells which operation the layer ends in.
        path = modules.get(module_hooks.unwrap(layer))
        if path is None:
            return None
        ahead = record(function, *(tensor[:1] for tensor in inputs))
        calls = ahead.modules.get(path, [])
        if len(calls) != 1 or len(calls[0]) != 1:
            return None
        producer = ahead.producer(calls[0][0])
        if producer is None:
            return None
        policy = KeepSuffix(producer.name, producer.outputs.index(calls[0][0]))
        tape = record(function, *inputs, policy=policy)
        calls = tape.modules.get(path, [])
        if len(calls) != 1 or not isinstance(tape.result, Tensor) or len(tape.result) != len(inputs[0]):
            return None
        (value,) = calls[0]
        try:
            result = replay_suffix(tape, value, recorded_value(tape, value).clone())
        except (InputError, UnsupportedOpError):
            return None
        return cls(tape, value) if close(result, tape.result) else None

    def __call__(self, activation: Tensor) -> Tensor:
        """Returns the outputs for `[copies * N, ...]`, the activation once for each copy of the rows."""
        rows = self._value.shape[0]
        results = [replay_suffix(self._tape, self._value, part.clone()) for part in activation.split(rows)]
        return results[0] if len(results) == 1 else torch.cat(results)
