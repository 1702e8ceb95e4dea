"""The gradient and the curvature of scores at a layer, by autograd through what depends on it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import InputError, UnsupportedOpError
from pyfast_xai.rules.kinds import kind_of
from pyfast_xai.tape import Tape, Value
from pyfast_xai.tape.suffix import recorded_value, replay_suffix, suffix_nodes


def gradient_less_half_curvature(tape: Tape, value: Value, scores: Callable[[Any], Tensor]) -> Tensor:
    """Returns `g - H A / 2` for the activation A of a layer, its gradient g and the Hessian H of each score.

    Args:
        tape: recorded with `KeepSuffix` for the layer.
        value: the layer.
        scores: gives `[N, K]` in what the model returned.

    Returns:
        `[K, *shape]` of the layer, K scores an image.

    Raises:
        InputError: the model cannot be replayed, see `replay_suffix`, or no gradient arrives at the layer.
        UnsupportedOpError: an operation above the layer has no second derivative.
    """
    activation = recorded_value(tape, value).detach().clone()
    results = []
    with torch.inference_mode(False), torch.enable_grad(), _attention_spelled_out(tape, value):
        start = activation.clone().requires_grad_()
        totals = scores(replay_suffix(tape, value, start.clone())).sum(0)
        if not totals.requires_grad:
            raise InputError(
                "model must let gradients of its scores pass to the layer, got one without, as behind argmax, detach "
                "or a comparison: explain what goes into it, or take a method that perturbs the image (occlusion, RISE)"
            )
        for k, total in enumerate(totals):
            (slope,) = torch.autograd.grad(total, start, create_graph=True)
            curvature = None
            if slope.requires_grad:
                try:
                    # The graph below the slope is shared by the scores that follow.
                    last = k == len(totals) - 1
                    (curvature,) = torch.autograd.grad(
                        slope, start, activation, retain_graph=not last, allow_unused=True
                    )
                except RuntimeError as error:
                    raise UnsupportedOpError(
                        f"an operation above the layer has no second derivative, which the curvature needs ({error})"
                    ) from error
            results.append(slope.detach() if curvature is None else (slope - curvature / 2).detach())
    return torch.stack(results)


@contextlib.contextmanager
def _attention_spelled_out(tape: Tape, value: Value) -> Iterator[None]:
    """Replays fused attention, which has no second derivative, as products of matrices, which have.

    PyTorch's own switch for this is one of the process, which other threads would see.
    """
    fused = [node for node in suffix_nodes(tape, value) if kind_of(node) == "attention"]
    for node in fused:
        node.kernel = _attention
    try:
        yield
    finally:
        for node in fused:
            node.kernel = None


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
