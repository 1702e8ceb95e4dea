"""Arguments of all of Captum's methods: inputs in tuples, further arguments, baselines, and targets of every kind."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyfast_xai.errors import InputError

Inputs = Tensor | tuple[Tensor, ...]
Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Baselines = None | Tensor | float | tuple[Tensor | float, ...]


class CaptumInputError(InputError, AssertionError):
    """An argument that does not fit; also what Captum raises there, so that code which catches that still does."""


def refuse(message: str) -> NoReturn:
    """Raises an error that callers of both libraries expect."""
    raise CaptumInputError(message)


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    """Returns the inputs as a tuple.

    Raises:
        InputError: neither a tensor nor a tuple of tensors.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for one in tensors:
        if not isinstance(one, Tensor):
            refuse(f"inputs must be a tensor or a tuple of tensors, got {type(one).__name__}")
    return tensors


def like(inputs: Inputs, results: Sequence[Tensor]) -> Any:
    """Returns the results in a tuple if the inputs were."""
    return tuple(results) if isinstance(inputs, tuple) else results[0]


def further(additional_forward_args: Any) -> tuple[Any, ...]:
    """Returns the additional arguments as a tuple."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def select(output: Any, target: Target) -> Tensor:
    """Returns the entries of an output that a target means.

    Args:
        output: `[N, ...]`.
        target: None for all; an int or a tuple that indexes behind the first dimension of every row; or one int or
            tuple a row, in a list or (ints) a tensor.

    Raises:
        InputError: a target that does not fit the output.
    """
    if not isinstance(output, Tensor):
        refuse(f"forward_func must return a tensor, got {type(output).__name__}")
    if target is None:
        return output
    if isinstance(target, Tensor) and target.numel() == 1 and not target.is_floating_point():
        target = int(target)
    if isinstance(target, (int, tuple)):
        index = target if isinstance(target, tuple) else (target,)
        if len(index) > output.dim() - 1:
            refuse(f"target must index an output of shape {list(output.shape)} behind its first dimension, got {index}")
        at: Any = (slice(None), *index)
        return output[at]
    if isinstance(target, list):
        if len(target) != len(output):
            refuse(f"target must have one entry for each of {len(output)} rows of the output, got {len(target)}")
        if all(isinstance(one, tuple) for one in target):
            places = [(i, *one) for i, one in enumerate(target) if isinstance(one, tuple)]
            return torch.stack([output[place] for place in places])
        if not all(isinstance(one, int) for one in target):
            kinds = sorted({type(one).__name__ for one in target})
            refuse(f"target must hold ints or tuples of ints, got {' and '.join(kinds)}")
        target = torch.tensor(target, device=output.device)
    if not isinstance(target, Tensor) or target.is_floating_point():
        received = target.dtype if isinstance(target, Tensor) else type(target).__name__
        refuse(f"target must be None, an int, a tuple, a tensor of ints, or a list of ints or tuples, got {received}")
    if output.dim() != 2 or target.shape != output.shape[:1]:
        refuse(
            f"target must have one int for each row of an output [N, classes], got {list(target.shape)} for an output "
            f"of shape {list(output.shape)}"
        )
    return output.gather(1, target.to(output.device)[:, None])[:, 0]


def one_number_a_row(target: Target) -> Callable[[Any], Tensor]:
    """Returns the scores that a target means, of which there must be one a row.

    Raises:
        InputError: more than one number a row.
    """

    def scores(output: Any) -> Tensor:
        chosen = select(output, target)
        if chosen.dim() and chosen[0].numel() != 1:
            refuse(f"target must leave one number of each row of the output, got {list(chosen.shape)}")
        return chosen

    return scores


def repeated(argument: Any, times: int, *, each: bool = False) -> Any:
    """Repeats an argument for a batch that holds every row several times.

    Args:
        argument: a tensor `[N, ...]` or a list of N; of others the same serves all rows.
        times: copies of each row.
        each: the copies of a row lie together, instead of those of a batch.
    """
    if isinstance(argument, Tensor) and argument.dim() and argument.numel() > 1:
        return argument.repeat_interleave(times, 0) if each else torch.cat([argument] * times)
    if isinstance(argument, list):
        return [one for one in argument for _ in range(times)] if each else argument * times
    return argument


def repeated_further(arguments: tuple[Any, ...], times: int, *, each: bool = False) -> tuple[Any, ...]:
    """Returns `repeated` for further arguments, of which only tensors belong to rows."""
    if each:
        return tuple(a.repeat_interleave(times, 0) if isinstance(a, Tensor) and a.dim() else a for a in arguments)
    return tuple(torch.cat([a] * times) if isinstance(a, Tensor) and a.dim() else a for a in arguments)


def baselines_for(baselines: Baselines, inputs: tuple[Tensor, ...]) -> tuple[Tensor | float, ...]:
    """Returns one baseline an input: 0 for None.

    Raises:
        InputError: another number of them, no number or tensor, or a shape that does not fit.
    """
    if baselines is None:
        return (0,) * len(inputs)
    result = baselines if isinstance(baselines, tuple) else (baselines,)
    if len(result) != len(inputs):
        refuse(f"baselines must be one for each of {len(inputs)} inputs, got {len(result)}")
    for baseline, tensor in zip(result, inputs, strict=True):
        if not isinstance(baseline, (Tensor, int, float)):
            refuse(f"baselines must be tensors or numbers, got {type(baseline).__name__}")
        if isinstance(baseline, Tensor) and not _broadcasts(baseline.shape, tensor.shape):
            refuse(f"baselines must broadcast to the input, {list(tensor.shape)}, got {list(baseline.shape)}")
    return result


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))
