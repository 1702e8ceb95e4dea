"""From images to the gradients of a target: one step, which on a CUDA device may be a graph."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from pyfast_xai.explainers.base import Explainer, given
from pyfast_xai.explainers.seeds import Goal, Seeds, begin, seeds_for
from pyfast_xai.tape import Tape
from pyfast_xai.tape.captured import device_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Start = Callable[[Tape], Seeds]


class Step(Protocol[T_co]):
    """Records some images, asks where to start, and walks; hands back the tape and, nested in anything, tensors."""

    def __call__(self, start: Start, images: Tensor, *more: Any) -> tuple[Tape, T_co]: ...


def walked(
    explainer: Explainer, step: Step[T], images: Tensor, target: Goal, *more: Any, key: Hashable
) -> tuple[Tape, Seeds, T]:
    """Run a step for a target.

    What reads numbers, checking the target and the probability of a class, happens around the step, not in it, where
    the explainer is accelerated, the images lie on a CUDA device and the target is classes: it then is a CUDA graph
    from the second time on.

    Args:
        explainer: that is asked.
        step: a method of the explainer, or of something that is its own.
        images: `[N, C, H, W]`.
        target: of the explainer.
        *more: handed to the step.
        key: what the step is, and what it depends on besides its arguments.

    Returns:
        The tape, with nothing saved on it where it was a graph; what was started from; and what the step found.

    Raises:
        InputError: a target that does not fit the output.
    """
    accelerated = explainer.accelerated_model
    if accelerated is None or callable(target) or device_of((images, more)) is None:
        return _as_it_is(step, images, target, *more)
    if isinstance(target, Tensor) and target.is_floating_point():
        return _as_it_is(step, images, target, *more)
    classes = None if target is None else given(target, len(images), images.device).long().view(len(images), -1)

    def captured(images: Tensor, classes: Tensor | None, *more: Any) -> tuple[Tape, Any, T]:
        tape, found = step(lambda tape: begin(tape, classes), images, *more)
        return _bare(tape), tape.result, found

    tape, result, found = accelerated.run(captured, images.detach(), classes, *more, key=key)
    tape = dataclasses.replace(tape, result=result)
    explainer.tell(images, tape)
    return tape, seeds_for(tape, target), found


def _as_it_is(step: Step[T], images: Tensor, target: Goal, *more: Any) -> tuple[Tape, Seeds, T]:
    started: list[Seeds] = []

    def start(tape: Tape) -> Seeds:
        started.append(seeds_for(tape, target))
        return started[0]

    tape, found = step(start, images, *more)
    return tape, started[0], found


def _bare(tape: Tape) -> Tape:
    """Without a number, so that it holds no memory of the graph."""
    nodes = [dataclasses.replace(node, saved={}) for node in tape.nodes]
    return dataclasses.replace(tape, nodes=nodes, result=None)
