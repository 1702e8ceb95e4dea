"""The gradient pass: one step from images to the gradients of a target, which on a CUDA device may be a graph."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from pyfast_xai.acceleration.cuda_graphs import device_of
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.common.output_gradients import (
    Goal,
    OutputGradients,
    output_gradients,
    output_gradients_without_sync,
)
from pyfast_xai.explainers.common.targets import as_class_indices
from pyfast_xai.tape import Tape

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Start = Callable[[Tape], OutputGradients]


class Step(Protocol[T_co]):
    """Records some images and runs a backward pass; returns the tape and tensors, nested in any structure."""

    def __call__(self, start: Start, images: Tensor, *more: Any) -> tuple[Tape, T_co]: ...


def run_step(
    explainer: Explainer, step: Step[T], images: Tensor, target: Goal, *more: Any, key: Hashable | None
) -> tuple[Tape, OutputGradients, T]:
    """Runs a step for a target.

    The step becomes a CUDA graph from the second time on, where the explainer is accelerated, the images lie on a CUDA
    device and the target is classes. Code that reads numbers (the check of the target, the probability of a class)
    runs outside it.

    Args:
        explainer: the explainer whose model is recorded.
        step: a method of the explainer, or of one of its parts.
        images: `[N, C, H, W]`.
        target: target of the explainer.
        *more: further arguments of the step.
        key: identifies the step and everything it depends on besides its arguments; None for a step that is never a
            graph.

    Returns:
        The tape, with nothing saved on it where it was a graph; the output gradients; and the result of the step.

    Raises:
        InputError: a target that does not fit the output.
    """
    if explainer.accelerated_model is None or key is None or callable(target) or device_of((images, more)) is None:
        return _run_eagerly(explainer, step, images, target, *more)
    if isinstance(target, Tensor) and target.is_floating_point():
        return _run_eagerly(explainer, step, images, target, *more)
    classes = (
        None if target is None else as_class_indices(target, len(images), images.device).long().view(len(images), -1)
    )

    def captured(images: Tensor, classes: Tensor | None, *more: Any) -> tuple[Tape, Any, T]:
        tape, result = step(lambda tape: output_gradients_without_sync(tape, classes), images, *more)
        return bare(tape), tape.result, result

    tape, output, result = explainer.captured(captured, images.detach(), classes, *more, key=key)
    tape = dataclasses.replace(tape, result=output)
    return tape, output_gradients(tape, target, explainer.outputs, explainer.labels), result


def _run_eagerly(
    explainer: Explainer, step: Step[T], images: Tensor, target: Goal, *more: Any
) -> tuple[Tape, OutputGradients, T]:
    started: list[OutputGradients] = []

    def start(tape: Tape) -> OutputGradients:
        started.append(output_gradients(tape, target, explainer.outputs, explainer.labels))
        return started[-1]

    tape, result = step(start, images, *more)
    return tape, started[-1], result


def bare(tape: Tape) -> Tape:
    """Returns a tape without numbers, which holds no memory of the graph."""
    nodes = [dataclasses.replace(node, saved={}) for node in tape.nodes]
    return dataclasses.replace(tape, nodes=nodes, result=None)
