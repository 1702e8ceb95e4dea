"""The base of Captum's classes."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.futures import Future

from pyfast_xai.compat.acceleration import Replaying
from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    baselines_for,
    further,
    one_number_a_row,
    refuse,
    select,
)
from pyfast_xai.compat.recording import Recording, read_call, record_call
from pyfast_xai.rules.gradient import Table

T = TypeVar("T")


class Attribution(Replaying):
    """Base of all methods.

    Args:
        forward_func: a module, or any function of the inputs and the additional arguments.
    """

    _multiply_by_inputs = False

    def __init__(self, forward_func: Forward) -> None:
        if not callable(forward_func):
            refuse(f"forward_func must be a module or a function, got {type(forward_func).__name__}")
        self.forward_func = forward_func

    def attribute(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the attributions of the shape of the inputs."""
        raise NotImplementedError(f"attribute is not implemented for {type(self).__name__}")

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Raises an error: nothing here runs asynchronously."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    @property
    def multiplies_by_inputs(self) -> bool:
        """Returns whether attributions are in units of the output, not of the output by input."""
        return self._multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """Returns whether `attribute` can return its error of convergence."""
        return False

    @classmethod
    def get_name(cls) -> str:
        """Returns the name of the class in words."""
        return "".join(c if c.islower() or not i else f" {c}" for i, c in enumerate(cls.__name__))


class AwaitedAttribution(Attribution):
    """Base of methods whose forward function may return futures."""

    def attribute_future(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Returns a completed future of `attribute`, for a forward function that returns `torch.futures.Future`."""

        def awaited(*forward_args: Any) -> Any:
            answer = self.forward_func(*forward_args)
            if not isinstance(answer, Future):
                refuse(f"forward_func must return a torch.futures.Future, got {type(answer).__name__}")
            return answer.wait()

        explainer = copy.copy(self)
        explainer.forward_func = awaited
        result: Future[Any] = Future()
        result.set_result(explainer.attribute(*args, **kwargs))
        return result


class GradientAttribution(Attribution):
    """Base of methods that walk back from the output."""

    overlay: Table | None = None

    def _read(
        self,
        inputs: tuple[Tensor, ...],
        additional_forward_args: Any,
        read: Callable[[Recording], T],
        **settings: Any,
    ) -> T:
        """Returns the result of `read` on a recording of the forward function."""
        args = (*inputs, *further(additional_forward_args))
        return read_call(self.forward_func, args, read, self._replays, overlay=self.overlay, **settings)

    def _record(self, inputs: tuple[Tensor, ...], additional_forward_args: Any, **settings: Any) -> Recording:
        """Returns a recording of the forward function itself, which can be compared with another."""
        args = (*inputs, *further(additional_forward_args))
        return record_call(self.forward_func, args, overlay=self.overlay, **settings)

    def _gradients(self, inputs: tuple[Tensor, ...], target: Target, additional_forward_args: Any) -> list[Tensor]:
        return self._read(inputs, additional_forward_args, lambda recording: input_gradients(recording, inputs, target))

    def compute_convergence_delta(
        self,
        attributions: Inputs,
        start_point: Baselines,
        end_point: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Returns the difference between attributions and the change of the output between two points.

        Args:
            attributions: `[N, ...]`, one an input.
            start_point: inputs, a row for all of them, or numbers.
            end_point: inputs `[N, ...]`.
            target: see `arguments.select`.
            additional_forward_args: further arguments of the forward function.

        Returns:
            `[N]`.

        Raises:
            InputError: sizes that do not fit.
        """
        ends = as_tuple(end_point)
        starts = [
            start.expand_as(end) if isinstance(start, Tensor) else torch.full_like(end, start)
            for start, end in zip(baselines_for(start_point, ends), ends, strict=True)
        ]
        parts = as_tuple(attributions)
        for part in parts:  # of a layer there may be more, or fewer, than of inputs
            if len(part) != len(ends[0]):
                refuse(f"attributions must have one row for each of {len(ends[0])} inputs, got {len(part)}")
        if isinstance(target, list) and len(target) != len(ends[0]):
            refuse(f"target must have one entry for each of {len(ends[0])} rows, got {len(target)}")
        more = further(additional_forward_args)
        with torch.no_grad():
            before, after = (_sum_rows(select(self.forward_func(*points, *more), target)) for points in (starts, ends))
            return sum(map(_sum_rows, parts)) - (after - before)

    def _with_delta(
        self,
        result: Any,
        parts: Sequence[Tensor],
        start_point: Any,
        end_point: Any,
        target: Target,
        additional_forward_args: Any,
        *,
        return_delta: bool,
    ) -> Any:
        """Returns a result, as a pair with the error of convergence of its parts where that is wanted."""
        if not return_delta:
            return result
        delta = self.compute_convergence_delta(
            tuple(parts), start_point, end_point, target=target, additional_forward_args=additional_forward_args
        )
        return result, delta


def input_gradients(
    recording: Recording, inputs: Sequence[Tensor], target: Target, *, retain: bool = False
) -> list[Tensor]:
    """Returns the gradients of the scores of a target with respect to the first arguments of what was recorded.

    Raises:
        InputError: inputs that have no gradient, or a target that does not fit.
    """
    for i, tensor in enumerate(inputs):
        if not tensor.is_floating_point():
            refuse(f"inputs must have a floating-point dtype, got {tensor.dtype} for input {i}")
    values = [value for value in recording.inputs[: len(inputs)] if value is not None]
    return recording.gradients(one_number_a_row(target), values, retain=retain)


def _sum_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1).sum(1)
