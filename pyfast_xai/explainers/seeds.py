"""What a dense reading starts from: the gradient of the answer with respect to the model's outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Target, choose, logits_of, probability
from pyfast_xai.tape import Tape, Value

Goal = Target | Callable[[Any], Tensor]


@dataclass
class Seeds:
    """Gradients to start from.

    Attributes:
        grads: `[K, *shape]` by the output they belong to.
        target: classes `[N, K]`; None where something else was asked for.
        score: the model's probability of each, float32 `[N, K]`.
    """

    grads: dict[Value, Tensor]
    target: Tensor | None = None
    score: Tensor | None = None

    @property
    def each(self) -> int:
        """Targets of an image."""
        return len(next(iter(self.grads.values())))


def seeds_for(tape: Tape, target: Goal) -> Seeds:
    """The start for a target.

    Args:
        tape: of the model on N images.
        target: None for the largest output, classes as an int, N ints or `[N, K]` ints; a floating-point tensor of
            the shape of the output, which is the start itself; or a function of what the model returned that gives
            one number an image (or one in all), whose gradient is the start.

    Raises:
        InputError: a target that does not fit the output.
    """
    if callable(target):
        return Seeds(_of_function(tape, target))
    value, logits = logits_of(tape)
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.shape != logits.shape:
            raise InputError(
                f"target must have the shape of the output, {list(logits.shape)}, where it is floating-point, "
                f"got {list(target.shape)}"
            )
        return Seeds({value: target[None]})
    chosen = choose(logits, target)
    chosen = chosen.view(len(logits), -1)
    return Seeds({value: one_hot(chosen, logits)}, chosen, probability(logits, chosen))


def begin(tape: Tape, classes: Tensor | None) -> Seeds:
    """The start for classes without a look at any number, and so without their scores.

    Args:
        tape: of the model on N images.
        classes: int64 `[N, K]`, None for the largest output; one that does not exist is taken for the nearest.

    Raises:
        InputError: the model returned something else than scores of classes.
    """
    value, logits = logits_of(tape)
    if logits.dim() != 2:
        raise InputError(f"model must return [N, classes] for a target to be chosen, got {list(logits.shape)}")
    chosen = logits.argmax(1)[:, None] if classes is None else classes.clamp(0, logits.shape[1] - 1)
    return Seeds({value: one_hot(chosen, logits)}, chosen)


def one_hot(chosen: Tensor, logits: Tensor) -> Tensor:
    """Ones at the classes `[N, K]`, `[K, N, classes]`."""
    grads = torch.zeros(chosen.shape[1], *logits.shape, dtype=logits.dtype, device=logits.device)
    return grads.scatter_(2, chosen.T[..., None], 1)


def _of_function(tape: Tape, function: Callable[[Any], Tensor]) -> dict[Value, Tensor]:
    leaves: list[tuple[Value, Tensor]] = []

    def leaf(value: Any, tensor: Any) -> Any:
        if not isinstance(value, Value) or not value.dtype.is_floating_point:
            return tensor
        leaves.append((value, tensor.detach().clone().requires_grad_()))
        return leaves[-1][1]

    with torch.inference_mode(False), torch.enable_grad():
        answer = function(pytree.tree_map(leaf, tape.outputs, tape.result))
        if not isinstance(answer, Tensor) or answer.dim() > 1:
            came = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise InputError(f"target must return a tensor of one number an image, [N], got {came}")
        if not answer.requires_grad:
            raise InputError("target must return something that depends on the model's output, got a constant")
        grads = torch.autograd.grad(answer.sum(), [tensor for _, tensor in leaves], allow_unused=True)
    return {value: grad[None] for (value, _), grad in zip(leaves, grads, strict=True) if grad is not None}
