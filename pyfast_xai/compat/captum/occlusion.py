"""Occlusion (Zeiler and Fergus, 2014): how far the output drops where a window hides the input."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    baselines_for,
    further,
    like,
    refuse,
    repeated,
    repeated_further,
    select,
)
from pyfast_xai.compat.captum.attribution import Attribution
from pyfast_xai.tape import record

# Of an input without its first dimension.
Box = tuple[slice, ...]


class Occlusion(Attribution):
    """Mean drop of the output over the windows that hide an element.

    Args:
        forward_func: a module or a function that gives a number a row; or some numbers for the whole batch, which are
            then what attributions have in place of rows.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import Occlusion
        >>> window, strides = (3, 32, 32), (3, 32, 32)
        >>> Occlusion(demo.load()).attribute(torch.rand(1, 3, 96, 96), window, strides, target=3).shape
        torch.Size([1, 3, 96, 96])
    """

    def attribute(
        self,
        inputs: Inputs,
        sliding_window_shapes: tuple[int, ...] | tuple[tuple[int, ...], ...],
        strides: int | tuple[int, ...] | tuple[int | tuple[int, ...], ...] | None = None,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Attribute the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            sliding_window_shapes: size of the window in every dimension but the first; a tuple of sizes an input.
            strides: how far it moves, an int for all dimensions or one each; a tuple of these for several inputs.
                None for 1.
            baselines: what hidden elements become, one an input: a number, a row for all, or of the input's shape.
            target: which output of each row: None, an int, a tuple, N ints in a list or tensor, or N tuples.
            additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
            perturbations_per_eval: windows that go through the model at once.
            show_progress: write how far it is to stderr.

        Returns:
            Of the shape of the inputs, at least float32.

        Raises:
            InputError: arguments that do not fit.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            refuse(f"perturbations_per_eval must be an int of at least 1, got {perturbations_per_eval!r}")
        hidden = [
            _tensor(one, tensor).expand_as(tensor)
            for one, tensor in zip(baselines_for(baselines, tensors), tensors, strict=True)
        ]
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        windows = [
            (i, box)
            for i, boxes in enumerate(
                map(_boxes, shapes, _windows(sliding_window_shapes, shapes), _strides(strides, shapes))
            )
            for box in boxes
        ]
        more = further(additional_forward_args)
        with torch.no_grad():
            call, whole = _steady(self.forward_func, (*tensors, *more))
            before = _number(select_or_number(whole, target))
            count = before.numel()
            kind = torch.promote_types(before.dtype, torch.float32)
            totals = [torch.zeros(count, *shape, dtype=kind, device=before.device) for shape in shapes]
            covers = [torch.zeros(shape, dtype=kind, device=before.device) for shape in shapes]
            chunks = range(0, len(windows), perturbations_per_eval)
            report = _reporter(f"{self.get_name()} attribution", len(chunks) + 1) if show_progress else None
            for first in chunks:
                if report is not None:
                    report(first // perturbations_per_eval + 1)
                part = windows[first : first + perturbations_per_eval]
                answer = call(
                    *_occluded(tensors, hidden, part), *(more if len(part) == 1 else repeated_further(more, len(part)))
                )
                after = _number(select_or_number(answer, repeated(target, len(part))))
                if perturbations_per_eval > 1 and not _grows(before, after, len(part)):
                    refuse(
                        "perturbations_per_eval must be 1 for a forward_func whose output does not grow with the "
                        f"batch, got {perturbations_per_eval} and outputs of shape {list(before.shape)} and "
                        f"{list(after.shape)}"
                    )
                drops = before.reshape(1, count).to(kind) - after.reshape(len(part), count).to(kind)
                for (i, box), drop in zip(part, drops, strict=True):
                    at = (slice(None), *box)
                    totals[i][at] += drop.view(-1, *[1] * len(box))
                    covers[i][box] += 1
            if report is not None:
                report(len(chunks) + 1)
        return like(inputs, [total / cover for total, cover in zip(totals, covers, strict=True)])


def select_or_number(output: Any, target: Target) -> Any:
    """Selects as `select` does; a forward function may also return a plain number for the batch."""
    return output if isinstance(output, (int, float)) and target is None else select(output, target)


def _tensor(baseline: Tensor | float, tensor: Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        return baseline.to(tensor.device)
    # A number takes the dtype of the input, but for a fraction among integers.
    return torch.full((), baseline, dtype=torch.result_type(tensor, baseline), device=tensor.device)


def _number(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return torch.tensor(output, dtype=torch.float64 if isinstance(output, float) else torch.int64)


def _grows(before: Tensor, after: Tensor, times: int) -> bool:
    return before.dim() > 0 and after.dim() > 0 and len(after) == times * len(before)


def _occluded(inputs: tuple[Tensor, ...], hidden: list[Tensor], windows: list[tuple[int, Box]]) -> list[Tensor]:
    """Returns the inputs once for each window, `[windows * N, ...]`, each with its window hidden."""
    touched = {i for i, _ in windows}
    results = []
    for i, (tensor, baseline) in enumerate(zip(inputs, hidden, strict=True)):
        if i not in touched:
            results.append(tensor if len(windows) == 1 else torch.cat([tensor] * len(windows)))
            continue
        # A baseline of 0.5 makes numbers of what were integers.
        copies = tensor.to(torch.result_type(tensor, baseline)).expand(len(windows), *tensor.shape).clone()
        for place, (j, box) in enumerate(windows):
            if j == i:
                at = (slice(None), *box)
                copies[place][at] = baseline[at].to(copies.dtype)
        results.append(copies.flatten(0, 1))
    return results


def _steady(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
    """Returns the function, or one that restores the state of a model that writes to it; and its first result."""
    if not isinstance(function, nn.Module):
        return function, function(*args)
    tape = record(function, *args)
    rerun = function if tape.not_replayable is None else lambda *tensors: record(function, *tensors).result
    return rerun, tape.result


def _windows(sizes: Any, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    windows = (sizes,) if len(shapes) == 1 and isinstance(sizes, tuple) and isinstance(sizes[0], int) else sizes
    if not isinstance(windows, tuple) or len(windows) != len(shapes):
        refuse(f"sliding_window_shapes must be one for each of {len(shapes)} inputs, got {sizes!r}")
    for window, shape in zip(windows, shapes, strict=True):
        if not isinstance(window, tuple) or len(window) != len(shape):
            refuse(f"sliding_window_shapes must have {len(shape)} sizes for an input of {list(shape)}, got {window!r}")
        if any(size > whole for size, whole in zip(window, shape, strict=True)):
            refuse(f"sliding_window_shapes must fit in the input, {list(shape)}, got {list(window)}")
    return list(windows)


def _strides(steps: Any, shapes: list[tuple[int, ...]]) -> list[int | tuple[int, ...]]:
    strides = (1,) * len(shapes) if steps is None else steps
    if len(shapes) == 1 and not (isinstance(strides, tuple) and len(strides) == 1):
        strides = (strides,)
    if not isinstance(strides, tuple) or len(strides) != len(shapes):
        refuse(f"strides must be one for each of {len(shapes)} inputs, got {steps!r}")
    for stride, shape in zip(strides, shapes, strict=True):
        if not isinstance(stride, int) and not (isinstance(stride, tuple) and len(stride) == len(shape)):
            refuse(f"strides must be an int or have {len(shape)} entries for an input of {list(shape)}, got {stride!r}")
    return list(strides)


def _boxes(shape: tuple[int, ...], window: tuple[int, ...], stride: int | tuple[int, ...]) -> list[Box]:
    """Returns every place of a window, the first dimension moving fastest; the last ones are clipped at the edge."""
    steps = (stride,) * len(shape) if isinstance(stride, int) else stride
    along = []
    for whole, size, step in zip(shape, window, steps, strict=True):
        if whole > size and step > size:
            refuse(f"strides must be at most the window, {list(window)}, got {list(steps)}")
        count = math.ceil((whole - size) / step) + 1
        along.append([slice(step * k, step * k + size) for k in range(count)])
    return [places[::-1] for places in itertools.product(*along[::-1])]


def _reporter(title: str, total: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{title}: {100 * done // total}% {done}/{total}", end=end, file=sys.stderr, flush=True)  # noqa: T201

    return report
