"""Images in channels_last, where that is faster and the model computes the same.

On a CPU convolutions are faster in this format, and receptive fields lie together. Some models cannot take it, or
compute something else in it: views of a map, writes to a flattened map, strides that are looked at.
"""

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")

# Largest difference of outputs, in shares of their largest magnitude. The formats add up in another order, which makes
# 3e-6 of it on the networks of torchvision (5e-3 in bfloat16); ten times that is allowed.
_ROUNDING = {torch.float32: 3e-5, torch.float16: 7e-3, torch.bfloat16: 5e-2}
# What a model does with memory formats hardly depends on sizes; each comparison costs a forward.
_COMPARISONS = 8


class _Verdict:
    """The verdict on a model: the calls on which both formats gave the same, and whether others did not."""

    def __init__(self) -> None:
        self.same: set[Hashable] = set()
        self.differs = False


_verdicts: "weakref.WeakKeyDictionary[nn.Module, _Verdict]" = weakref.WeakKeyDictionary()


def in_channels_last(model: nn.Module, argument: Any) -> Any:
    """Returns an argument of a model in its memory format: images in channels_last, or unchanged."""
    if model in _verdicts and _verdicts[model].differs:
        return argument
    images = isinstance(argument, Tensor) and argument.dim() == 4 and argument.is_floating_point()
    # There is no fast kernel for float64.
    if not images or argument.device.type != "cpu" or argument.dtype == torch.float64:
        return argument
    if argument.is_contiguous(memory_format=torch.channels_last):
        return argument
    return argument.detach().contiguous(memory_format=torch.channels_last)


def run_in_channels_last(
    model: nn.Module,
    run: Callable[[list[Any]], T],
    compared: Callable[[list[Any]], Sequence[Tensor]],
    answers: Callable[[T], Sequence[Tensor]],
    arguments: Sequence[Any],
    faster: Sequence[Any],
    key: Hashable,
) -> T:
    """Runs a model on arguments in channels_last, or unchanged where that fails or gives other results.

    The first calls of each kind, up to eight, are compared with the model on the unchanged arguments, which costs a
    forward. A model that differs is remembered, and gets its arguments unchanged from then on.

    Args:
        model: whose verdict it is.
        run: computes the result from the arguments.
        compared: computes the outputs of the model from the arguments.
        answers: returns the outputs of the model in a result of `run`.
        arguments: the arguments of the caller.
        faster: the same with images in channels_last.
        key: tells calls of one kind from others.

    Raises:
        Exception: the exceptions of the model on the unchanged arguments.
    """
    if all(one is other for one, other in zip(faster, arguments, strict=True)):
        return run(list(arguments))
    verdict = _verdicts.setdefault(model, _Verdict())
    try:
        result = run(list(faster))
    except Exception as error:  # a model may say in any words that it wants another format
        result = run(list(arguments))
        verdict.differs = True
        logger.info("the model cannot take channels_last images (%s): it gets them unchanged", error)
        return result
    if key in verdict.same or len(verdict.same) >= _COMPARISONS:
        return result
    expected = compared(list(arguments))
    if _same(answers(result), expected, _tolerance(model, expected)):
        verdict.same.add(key)
        return result
    verdict.differs = True
    logger.info("the model gives other results on channels_last images: it gets them unchanged")
    return run(list(arguments))


def kind_of_call(*arguments: Any) -> Hashable:
    """Returns a key of the kind of call, regardless of the numbers and of how many rows there are."""
    leaves, structure = pytree.tree_flatten(arguments)
    return structure, tuple(
        (leaf.shape[1:], leaf.dtype)
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, (bool, int, float, str, type(None)))
        else type(leaf)
        for leaf in leaves
    )


def _tolerance(model: nn.Module, tensors: Sequence[Tensor]) -> float:
    """Returns the tolerance of the lowest precision that the numbers may have gone through."""
    dtypes = {tensor.dtype for tensor in tensors} | {parameter.dtype for parameter in model.parameters()}
    if torch.is_autocast_enabled("cpu"):
        dtypes.add(torch.get_autocast_dtype("cpu"))
    return max((_ROUNDING.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def _same(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    return len(results) == len(expected) and all(
        one.shape == other.shape and one.dtype == other.dtype and _close(one, other, tolerance)
        for one, other in zip(results, expected, strict=True)
    )


def _close(result: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not (expected.is_floating_point() or expected.is_complex()) or not expected.numel():
        return torch.equal(result, expected)
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(result), finite):
        return False
    zero = torch.zeros((), dtype=expected.dtype, device=expected.device)
    difference = torch.where(finite, result - expected, zero).abs().max()
    return bool(difference <= tolerance * torch.where(finite, expected, zero).abs().max())
