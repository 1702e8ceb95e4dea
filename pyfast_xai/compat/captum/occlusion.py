"""Occlusion (Zeiler and Fergus, 2014): how far the output drops where a window hides the input."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.acceleration import local_replay
from pyfast_xai.compat.captum.ablation import Ablation, hidden_values
from pyfast_xai.compat.captum.arguments import Baselines, Inputs, Target, as_tuple, like, refuse

# Of an input without its first dimension.
Box = tuple[slice, ...]


class Occlusion(Ablation):
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
        """Attributes the output to the inputs.

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
        hidden = hidden_values(baselines, tensors)
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        windows = [
            (i, box)
            for i, boxes in enumerate(
                map(_boxes, shapes, _windows(sliding_window_shapes, shapes), _strides(strides, shapes))
            )
            for box in boxes
        ]
        with torch.no_grad():
            before, drops = self._drops(
                tensors,
                windows,
                lambda part: _occluded(tensors, hidden, part),
                target,
                additional_forward_args,
                perturbations_per_eval,
                show_progress,
                lambda window: _place(window[1], shapes[0]),
            )
            kind = torch.promote_types(before.dtype, torch.float32)
            totals = [torch.zeros(before.numel(), *shape, dtype=kind, device=before.device) for shape in shapes]
            covers = [torch.zeros(shape, dtype=kind, device=before.device) for shape in shapes]
            for (i, box), drop in drops:
                at = (slice(None), *box)
                totals[i][at] += drop.view(-1, *[1] * len(box))
                covers[i][box] += 1
        return like(inputs, [total / cover for total, cover in zip(totals, covers, strict=True)])


def _place(box: Box, shape: tuple[int, ...]) -> local_replay.Box | None:
    """Returns the rows and columns of a window of images `[N, C, H, W]`; None for inputs of other shapes."""
    if len(box) != 3:
        return None
    (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(box[1:], shape[1:], strict=True))
    return local_replay.Box(top, bottom, left, right)


def _occluded(inputs: tuple[Tensor, ...], hidden: list[Tensor], windows: Sequence[tuple[int, Box]]) -> list[Tensor]:
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
