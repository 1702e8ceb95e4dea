"""Captum's metrics (`captum.metrics`) with its signatures: infidelity and max-sensitivity (Yeh et al., 2019)."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    baselines_for,
    further,
    refuse,
    repeated,
    repeated_further,
    select,
)


def infidelity_perturb_func_decorator(multiply_by_inputs: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator for functions that return perturbed inputs only; perturbations are worked out from these.

    Args:
        multiply_by_inputs: whether attributions hold the input already: perturbations are then the share of the way
            from the input to the baseline, else the difference.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.captum.metrics import infidelity_perturb_func_decorator
        >>> half = infidelity_perturb_func_decorator(True)(lambda inputs: inputs / 2)
        >>> half(torch.full((1, 2), 4.0))[0]
        (tensor([[0.5000, 0.5000]]),)
    """

    def decorator(perturb_func: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(perturb_func)
        def perturb(inputs: Any, baselines: Any = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            changed = as_tuple(perturb_func(inputs) if baselines is None else perturb_func(inputs, baselines))
            tensors = as_tuple(inputs)
            moves = tuple(tensor - other for tensor, other in zip(tensors, changed, strict=True))
            if not multiply_by_inputs:
                return moves, changed
            differences = [
                tensor - base for tensor, base in zip(tensors, baselines_for(baselines, tensors), strict=True)
            ]
            shares = (
                move / torch.where(difference == 0, 1, difference)
                for move, difference in zip(moves, differences, strict=True)
            )
            return tuple(shares), changed

        return perturb

    return decorator


def infidelity(
    forward_func: Callable[..., Any],
    perturb_func: Callable[..., Any],
    inputs: Inputs,
    attributions: Inputs,
    baselines: Baselines = None,
    additional_forward_args: Any = None,
    target: Target = None,
    n_perturb_samples: int = 10,
    max_examples_per_batch: int | None = None,
    normalize: bool = False,
) -> Tensor:
    """Measures the mean squared error of attributions as predictions of the change of the output.

    Args:
        forward_func: a module or a function that gives a number a row.
        perturb_func: returns perturbations and perturbed inputs for inputs (and baselines, where there are any), every
            row of which comes several times.
        inputs: a tensor `[N, ...]` or a tuple of them.
        attributions: attributions of the inputs.
        baselines: passed to `perturb_func`, one an input.
        additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
        target: which output of each row.
        n_perturb_samples: perturbations of a row.
        max_examples_per_batch: rows that go through the model at once; None for all.
        normalize: whether attributions are scaled by the factor that fits best.

    Returns:
        `[N]`.

    Raises:
        InputError: arguments that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import Saliency, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> attributions = Saliency(model).attribute(images, target=3, abs=False)
        >>> def perturb(inputs):
        ...     noise = 0.003 * torch.randn_like(inputs)
        ...     return noise, inputs - noise
        >>> metrics.infidelity(model, perturb, images, attributions, target=3).shape
        torch.Size([2])
    """
    tensors, maps = as_tuple(inputs), as_tuple(attributions)
    for tensor, attribution in zip(tensors, maps, strict=False):
        if tensor.shape != attribution.shape:
            refuse(
                f"attributions must have the shape of the inputs, {list(tensor.shape)}, got {list(attribution.shape)}"
            )
    if len(maps) != len(tensors):
        refuse(f"attributions must be one for each of {len(tensors)} inputs, got {len(maps)}")
    grounds = None if baselines is None else baselines_for(baselines, tensors)
    args, rows = further(additional_forward_args), len(tensors[0])
    with torch.no_grad():
        before = select(forward_func(*tensors, *args), target)
        parts = []
        for count in _counts(rows, n_perturb_samples, max_examples_per_batch):
            spread = tuple(tensor.repeat_interleave(count, 0) for tensor in tensors)
            shown: list[Any] = [_one_or_all(spread)]
            if grounds is not None:
                base_pairs = zip(grounds, tensors, strict=True)
                shown.append(_one_or_all(tuple(_spread_baseline(base, tensor, count) for base, tensor in base_pairs)))
            moves, changed = (as_tuple(part) for part in perturb_func(*shown))
            _check_perturbed(tensors, moves, changed)
            copies = repeated_further(args, count, each=True)
            after = select(forward_func(*changed, *copies), repeated(target, count, each=True))
            done = (before.repeat_interleave(count, 0) - after).view(rows, -1)
            pairs = zip(moves, maps, strict=True)
            predicted = sum(_rows(move * tensor.repeat_interleave(count, 0)).sum(1) for move, tensor in pairs)
            assert isinstance(predicted, Tensor)
            predicted = predicted.view(rows, -1)
            sums = ((predicted - done).square(), predicted * done, predicted.square(), done.square())
            parts.append(torch.stack([numbers.sum(1) for numbers in sums]))
        error, product, predicted_square, actual_square = torch.stack(parts).sum(0)
        if normalize:
            factor = product / torch.where(predicted_square == 0, 1, predicted_square)
            error = factor.square() * predicted_square - 2 * factor * product + actual_square
    return error / n_perturb_samples


def default_perturb_func(inputs: Inputs, perturb_radius: float = 0.02) -> tuple[Tensor, ...]:
    """Returns inputs with uniform noise in `-perturb_radius .. perturb_radius`, as a tuple.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.captum.metrics import default_perturb_func
        >>> bool((default_perturb_func(torch.zeros(2, 3))[0].abs() <= 0.02).all())
        True
    """
    noise = (torch.empty(tensor.shape).uniform_(-perturb_radius, perturb_radius) for tensor in as_tuple(inputs))
    return tuple(tensor + drawn.to(tensor.device) for tensor, drawn in zip(as_tuple(inputs), noise, strict=True))


def sensitivity_max(
    explanation_func: Callable[..., Any],
    inputs: Inputs,
    perturb_func: Callable[..., Any] = default_perturb_func,
    perturb_radius: float = 0.02,
    n_perturb_samples: int = 10,
    norm_ord: Any = "fro",
    max_examples_per_batch: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Measures the largest move of an explanation under perturbations, as a share of its own length.

    Args:
        explanation_func: the `attribute` of a method, or any function of inputs and `kwargs`.
        inputs: a tensor `[N, ...]` or a tuple of them.
        perturb_func: returns perturbed inputs for inputs, every row of which comes several times, and the radius, where
            it takes two arguments.
        perturb_radius: passed to `perturb_func`.
        n_perturb_samples: perturbations of a row.
        norm_ord: order of the norm, as in `torch.norm`.
        max_examples_per_batch: rows that are explained at once; None for all.
        **kwargs: keyword arguments of `explanation_func`; "target", "additional_forward_args" and "baselines" go with
            their rows.

    Returns:
        `[N]`.

    Raises:
        InputError: arguments that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import Saliency, metrics
        >>> metrics.sensitivity_max(Saliency(demo.load()).attribute, torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2])
    """
    tensors = as_tuple(inputs)
    takes_radius = len(inspect.signature(perturb_func).parameters) > 1
    largest = []
    with torch.no_grad():
        before = _flat(explanation_func(inputs, **kwargs))
        length = torch.norm(before, p=norm_ord, dim=1)
        length = torch.where(length == 0, 1, length)
        for count in _counts(len(tensors[0]), n_perturb_samples, max_examples_per_batch):
            spread = _one_or_all(tuple(tensor.repeat_interleave(count, 0) for tensor in tensors))
            changed = perturb_func(spread, perturb_radius) if takes_radius else perturb_func(spread)
            after = _flat(explanation_func(changed, **_repeated_settings(kwargs, tensors, count)))
            moves = torch.norm(before.repeat_interleave(count, 0) - after, p=norm_ord, dim=1)
            largest.append((moves.view(len(length), -1) / length[:, None]).amax(1))
    return torch.stack(largest).amax(0)


def _counts(rows: int, samples: int, most: int | None) -> Iterator[int]:
    """Yields how many perturbations of each row are taken at once."""
    if most is not None and not 1 <= most // rows <= samples:
        warnings.warn(
            f"max_examples_per_batch must lie in [{rows}, {rows * samples}], the rows once and with all perturbations, "
            f"got {most}",
            stacklevel=3,
        )
    at_once = samples if most is None else min(max(most // rows, 1), samples)
    for start in range(0, samples, at_once):
        yield min(at_once, samples - start)


def _one_or_all(parts: tuple[Any, ...]) -> Any:
    return parts[0] if len(parts) == 1 else parts


def _spread_baseline(base: Any, tensor: Tensor, count: int) -> Any:
    by_row = isinstance(base, Tensor) and base.dim() and len(base) == len(tensor) > 1
    return base.repeat_interleave(count, 0) if by_row else base


def _check_perturbed(tensors: tuple[Tensor, ...], moves: tuple[Tensor, ...], changed: tuple[Tensor, ...]) -> None:
    if not len(moves) == len(changed) == len(tensors):
        refuse(f"perturb_func must return {len(tensors)} perturbations and inputs, got {len(moves)} and {len(changed)}")
    for move, tensor in zip(moves, changed, strict=True):
        if move.shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, got {list(move.shape)}"
            refuse(f"perturb_func must return perturbations of the shape of the inputs, {shapes}")


def _flat(explanation: Any) -> Tensor:
    return torch.cat([_rows(tensor) for tensor in as_tuple(explanation)], 1)


def _rows(tensor: Tensor) -> Tensor:
    """Returns `[N, D]` of a tensor whose rows may also be plain numbers, `[N]`."""
    return tensor.reshape(len(tensor), -1)


def _repeated_settings(kwargs: dict[str, Any], tensors: tuple[Tensor, ...], count: int) -> dict[str, Any]:
    """Returns the arguments of an explanation, those that belong to rows repeated."""
    settings = copy.copy(kwargs)
    if "target" in kwargs:
        settings["target"] = repeated(kwargs["target"], count, each=True)
    if "additional_forward_args" in kwargs:
        settings["additional_forward_args"] = repeated_further(
            further(kwargs["additional_forward_args"]), count, each=True
        )
    if kwargs.get("baselines") is not None:
        bases = kwargs["baselines"] if isinstance(kwargs["baselines"], tuple) else (kwargs["baselines"],)
        if isinstance(bases[0], Tensor) and bases[0].shape == tensors[0].shape:  # of each row, not a set to draw from
            pairs = zip(baselines_for(bases, tensors), tensors, strict=True)
            settings["baselines"] = _one_or_all(tuple(_spread_baseline(base, tensor, count) for base, tensor in pairs))
    return settings


__all__ = ["infidelity", "infidelity_perturb_func_decorator", "sensitivity_max"]
