"""The loop of Captum's methods that change parts of the inputs, some changes at a time."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyfast_xai.acceleration.local_replay import Box
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Target,
    baselines_for,
    further,
    refuse,
    repeated,
    repeated_further,
    select,
)
from pyfast_xai.compat.captum.attribution import AwaitedAttribution
from pyfast_xai.compat.replayed import Replayed
from pyfast_xai.tape import Tape, record

T = TypeVar("T")


class Ablation(AwaitedAttribution):
    """Base of methods that say how far the output drops where parts of the inputs have other values."""

    _multiply_by_inputs = True

    def _drops(
        self,
        inputs: tuple[Tensor, ...],
        changes: Sequence[T],
        changed: Callable[[Sequence[T]], list[Tensor]],
        target: Target,
        additional_forward_args: Any,
        perturbations_per_eval: int,
        show_progress: bool,
        box_of: Callable[[T], Box | None] | None = None,
    ) -> tuple[Tensor, Iterator[tuple[T, Tensor]]]:
        """Returns the output for the inputs, and how far its numbers drop with each change, at least float32.

        Unless `compat.accelerate` is switched off a model is replayed where that pays. Where changes of images lie in
        boxes, what does not depend on a box is not computed again.

        Args:
            inputs: `[N, ...]` each.
            changes: whatever `changed` understands.
            changed: returns the inputs once for each of some changes, `[changes * N, ...]` each.
            target: see `Occlusion.attribute`.
            additional_forward_args: further arguments of the forward function.
            perturbations_per_eval: changes that go through the model at once.
            show_progress: write how far it is to stderr.
            box_of: returns the box `[h, w]` of the only input that a change lies in; None where it may lie anywhere.
        """
        check_at_once(perturbations_per_eval)
        more = further(additional_forward_args)
        call, whole, tape = recorded(self.forward_func, (*inputs, *more))
        boxes = [None if box_of is None else box_of(change) for change in changes]
        replayed = Replayed.of(self.forward_func, None if more else tape, inputs[0], boxes)
        before = number(select_or_number(whole, target))
        kind = torch.promote_types(before.dtype, torch.float32)

        def drops() -> Iterator[tuple[T, Tensor]]:
            chunks = range(0, len(changes), perturbations_per_eval)
            report = reporter(f"{self.get_name()} attribution", len(chunks) + 1) if show_progress else None
            for first in chunks:
                if report is not None:
                    report(first // perturbations_per_eval + 1)
                part = changes[first : first + perturbations_per_eval]
                times = len(part)
                if replayed is not None:
                    answer = replayed(changed(part)[0], boxes[first : first + times])
                else:
                    answer = call(*changed(part), *(more if times == 1 else repeated_further(more, times)))
                after = number(select_or_number(answer, repeated(target, times)))
                check_growth(before, after, times, perturbations_per_eval)
                yield from zip(part, before.reshape(1, -1).to(kind) - after.reshape(times, -1).to(kind), strict=True)
            if report is not None:
                report(len(chunks) + 1)

        return before, drops()


def hidden_values(baselines: Baselines, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the values of hidden features, of the shape of each input."""
    return [
        _tensor(one, tensor).expand_as(tensor)
        for one, tensor in zip(baselines_for(baselines, inputs), inputs, strict=True)
    ]


def check_at_once(perturbations_per_eval: int) -> None:
    """Refuses a value that is no number of changes in one forward pass."""
    if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
        refuse(f"perturbations_per_eval must be an int of at least 1, got {perturbations_per_eval!r}")


def check_growth(before: Tensor, after: Tensor, times: int, perturbations_per_eval: int) -> None:
    """Refuses an output that has not as many times more rows as the inputs have."""
    grows = before.dim() > 0 and after.dim() > 0 and len(after) == times * len(before)
    if perturbations_per_eval > 1 and not grows:
        refuse(
            "perturbations_per_eval must be 1 for a forward_func whose output does not grow with the batch, got "
            f"{perturbations_per_eval} and outputs of shape {list(before.shape)} and {list(after.shape)}"
        )


def select_or_number(output: Any, target: Target) -> Any:
    """Selects as `select` does; a forward function may also return a plain number for the batch."""
    return output if isinstance(output, (int, float)) and target is None else select(output, target)


def number(output: Any) -> Tensor:
    """Returns an output as a tensor."""
    if isinstance(output, Tensor):
        return output
    return torch.tensor(output, dtype=torch.float64 if isinstance(output, float) else torch.int64)


def recorded(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], Any, Tape | None]:
    """Returns a function to call again, the first result, and the recording of a model that can be repeated.

    It is the function itself, or one that restores the state of a model that writes to it.
    """
    if not isinstance(function, nn.Module):
        return function, function(*args), None
    tape = record(function, *args)
    if tape.not_replayable is None:
        return function, tape.result, tape
    return lambda *tensors: record(function, *tensors).result, tape.result, None


def _tensor(baseline: Tensor | float, tensor: Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        return baseline.to(tensor.device)
    return torch.full((), baseline, dtype=common_dtype(tensor, baseline), device=tensor.device)


def common_dtype(tensor: Tensor, baseline: Tensor | float) -> torch.dtype:
    """Returns the dtype of an input with a baseline in it: its own, but for a fraction among integers."""
    if tensor.dtype == torch.bool and not isinstance(baseline, Tensor) and baseline in (0, 1):
        return torch.bool
    return torch.result_type(tensor, baseline)


def reporter(title: str, total: int) -> Callable[[int], None]:
    """Returns a function that writes to stderr how many steps are done."""

    def report(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{title}: {100 * done // total}% {done}/{total}", end=end, file=sys.stderr, flush=True)  # noqa: T201

    return report
