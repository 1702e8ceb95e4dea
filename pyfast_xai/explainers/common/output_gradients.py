"""The start of a backward pass: the gradient of the target with respect to the model's outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.targets import (
    UNRELATED,
    Goal,
    Targets,
    class_columns,
    logits_of,
    numbers_of,
    rows_returned,
    targets_of,
    zero_reasons,
)
from pyfast_xai.rules.gradient import has_gradient
from pyfast_xai.tape import Tape, Value


@dataclass
class OutputGradients(Targets):
    """Targets, and the gradients to start from.

    Attributes:
        grads: `[K, *shape]` by the output they belong to.
    """

    grads: dict[Value, Tensor] = field(default_factory=dict)

    @property
    def each(self) -> int:
        """Returns the targets of an image."""
        return len(next(iter(self.grads.values())))


def output_gradients(
    tape: Tape, target: Goal, outputs: Outputs = "auto", labels: Sequence[str] | None = None
) -> OutputGradients:
    """Returns the gradients to start from for a target.

    Args:
        tape: tape of the model on N images.
        target: None for the largest output, classes as an int, N ints or `[N, K]` ints; a floating-point tensor of
            the shape of the output, which is the start itself; or a function of what the model returned that gives
            one number an image (or one in all), or K, whose gradients are the start.
        outputs: the kind of the outputs, see `outputs.kinds_of`.
        labels: names of the classes, one for each output.

    Raises:
        InputError: a target that does not fit the output, or another number of labels than of outputs.
    """
    if callable(target):
        grads, numbers = _of_function(tape, target)
        reasons = zero_reasons(target, tape.result, numbers)
        return OutputGradients(rows_returned(tape, tape.inputs[0].shape[0]), grads=grads, zero_reasons=reasons)
    value, logits = logits_of(tape)
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.shape != logits.shape:
            raise InputError(
                f"target must have the shape of the output, {list(logits.shape)}, where it is floating-point, "
                f"got {list(target.shape)}"
            )
        return OutputGradients(rows_returned(tape, len(logits)), grads={value: target[None]})
    targets = targets_of(tape, target, outputs, labels)
    assert targets.target is not None
    return OutputGradients(**vars(targets), grads={value: one_hot(targets.target, logits)})


def output_gradients_without_sync(tape: Tape, classes: Tensor | None) -> OutputGradients:
    """Returns the gradients to start from for classes without reading a number, and so without their scores.

    Args:
        tape: tape of the model on N images.
        classes: int64 `[N, K]`, None for the largest output; one that does not exist is taken for the nearest.

    Raises:
        InputError: the model returned something else than scores of classes.
    """
    value, logits = logits_of(tape)
    columns = class_columns(logits)
    chosen = columns.argmax(1)[:, None] if classes is None else classes.clamp(0, columns.shape[1] - 1)
    return OutputGradients(target=chosen, grads={value: one_hot(chosen, logits)})


def one_hot(chosen: Tensor, logits: Tensor) -> Tensor:
    """Returns ones at the classes `[N, K]` of outputs, `[K, *shape]` of these."""
    grads = torch.zeros(chosen.shape[1], *class_columns(logits).shape, dtype=logits.dtype, device=logits.device)
    return grads.scatter_(2, chosen.T[..., None], 1).view(-1, *logits.shape)


def _without_gradient(tape: Tape, leaves: Sequence[Tensor]) -> str:
    """Returns why what a function as target gave has no gradient."""
    returned = [leaf for leaf in pytree.tree_leaves(tape.outputs) if isinstance(leaf, Value)]
    if returned and not leaves:
        return (
            f"model must return floating-point outputs for a method that reads gradients, got {returned[0].dtype}, as "
            "argmax returns: make it return the scores that these were made of, or take a method that perturbs the "
            "image (occlusion, RISE)"
        )
    if not returned:
        return UNRELATED
    return (
        "target must return something that depends on the model's output by a gradient, got a constant, as counts and "
        "argmax are: multiply scores by it, or take a method that perturbs the image (occlusion, RISE)"
    )


def _of_function(tape: Tape, function: Callable[[Any], Tensor]) -> tuple[dict[Value, Tensor], Tensor]:
    """Returns the gradients of what a function as target gives, and what it gives."""
    leaves: list[tuple[Value, Tensor]] = []

    def leaf(value: Any, tensor: Any) -> Any:
        if not isinstance(value, Value) or not has_gradient(value):
            return tensor
        leaves.append((value, tensor.detach().clone().requires_grad_()))
        return leaves[-1][1]

    with torch.inference_mode(False), torch.enable_grad():
        answer = numbers_of(function, pytree.tree_map(leaf, tape.outputs, tape.result))
        if not answer.requires_grad:
            raise InputError(_without_gradient(tape, [tensor for _, tensor in leaves]))
        totals = answer.sum(0).view(-1) if answer.dim() == 2 else answer.sum()[None]
        tensors = [tensor for _, tensor in leaves]
        by_number = [torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True) for total in totals]
    grads: dict[Value, Tensor] = {}
    for (value, tensor), parts in zip(leaves, zip(*by_number, strict=True), strict=True):
        if any(part is not None for part in parts):
            grads[value] = torch.stack([torch.zeros_like(tensor) if part is None else part for part in parts])
    return grads, answer.detach()
