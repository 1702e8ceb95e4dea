"""The places of the cells of a map on the images, by what made it, and the cells that are read of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument

_CONVOLUTIONS = ("aten::conv2d", "aten::convolution", "aten::_convolution")
_POOLS = ("aten::max_pool2d", "aten::max_pool2d_with_indices", "aten::avg_pool2d")
_PADS = ("aten::pad", "aten::constant_pad_nd")


def offset_of_cells(tape: Tape) -> tuple[float, float]:
    """Returns how far from the middle of the images the receptive fields of the last map are centred.

    Padding on both sides of an even number of rows, or a stride without a window, puts the centres of the receptive
    fields nearer to the first row than to the last: by 15.5 pixels in a ResNet. Heat maps are resized as if the cells
    divided the image evenly, so what is traced down the middles of the receptive fields has to move by this much.

    Args:
        tape: of a forward pass on images `[N, C, H, W]`; of the branches of a network the first is followed.

    Returns:
        The middle of the images minus that of the centres, (y, x) in pixels; zeros without a map.
    """
    images = tape.inputs[0]
    # Along each axis the centre of the first cell and the distance of two cells, in pixels.
    cells: dict[Value, list[tuple[float, int]]] = {images: [(0.0, 1), (0.0, 1)]}
    last = images
    for node in tape:
        source = next((value for value in node.inputs if value in cells), None)
        value = node.outputs[0] if node.outputs else None
        if source is None or value is None or len(value.shape) != 4:
            continue
        windows = _windows(node)
        if windows is None and value.shape[2:] != source.shape[2:]:
            continue
        moved = windows or [_Window(), _Window()]
        cells[value] = [
            (first + step * window.centre, step * window.stride)
            for (first, step), window in zip(cells[source], moved, strict=True)
        ]
        last = value
    offsets = (
        (size - 1) / 2 - (first + step * (count - 1) / 2)
        for size, count, (first, step) in zip(images.shape[2:], last.shape[2:], cells[last], strict=True)
    )
    down, right = offsets
    return down, right


def period_of_cells(tape: Tape, layer: Value) -> tuple[int, int]:
    """Returns the distance of the cells of a map that are read, where an operation above it leaves some out.

    A convolution of one pixel with a stride of two, as in the shortcuts of a ResNet, reads every second cell in either
    direction. Gradients arrive there alone, or are larger there, and a map of them is dotted. Of branches the largest
    distance counts. It does not count where windows of several cells lie between the map and the operation, which
    spread what arrives, as those of later blocks of a stage do. Slices with a step are taken to read all.

    Args:
        tape: of a forward pass on images `[N, C, H, W]`.
        layer: a map on it; other than `[N, C, h, w]` all of it is read.

    Returns:
        The distance (y, x) in cells of the map, 1 where every cell is read.
    """
    periods, spread = {layer: (1, 1)}, set[Value]()
    for node in tape:
        sources = [periods[value] for value in node.inputs if value in periods]
        maps = [value for value in node.outputs if value is not None and len(value.shape) == 4]
        if not sources or not maps or layer in maps:
            continue
        down, right = (max(lengths) for lengths in zip(*sources, strict=True))
        windows = _windows(node) or [_Window(), _Window()]
        if spread.isdisjoint(node.inputs):
            y, x = (window.stride if window.skips else 1 for window in windows)
            down, right = max(down, y), max(right, x)
        if any(window.wide for window in windows) or not spread.isdisjoint(node.inputs):
            spread.update(maps)
        periods.update(dict.fromkeys(maps, (down, right)))
    down, right = (max(lengths) for lengths in zip(*periods.values(), strict=True))
    return down, right


def without_dots(maps: Tensor, period: tuple[int, int]) -> Tensor:
    """Returns maps without the pattern of dots that cells make which are read one in a number.

    Every cell is averaged with its neighbours nearer than the period, by weights that fall linearly with the distance:
    what lies only on cells that far apart is interpolated between them. At the border the average is that of the cells
    which are there.

    Args:
        maps: `[R, h, w]`, floating point; of any size with a period of 1.
        period: (y, x) in cells, see `period_of_cells`.

    Returns:
        Maps of the same shape; with a period of 1 as they are.
    """
    if period == (1, 1):
        return maps
    down, right = (_tent(length, maps) for length in period)
    weights = (down[:, None] * right)[None, None]
    padding = (len(down) // 2, len(right) // 2)
    sums = functional.conv2d(maps[:, None], weights, padding=padding)
    return (sums / functional.conv2d(torch.ones_like(maps[:1, None]), weights, padding=padding))[:, 0]


def _tent(period: int, like: Tensor) -> Tensor:
    """Returns the numbers 1, 2, ..., `period`, ..., 2, 1."""
    distance = torch.arange(1 - period, period, device=like.device, dtype=like.dtype).abs()
    return period - distance


@dataclass(frozen=True)
class _Window:
    """The windows of an operation along an axis.

    Attributes:
        centre: of the first one, in cells of the input.
        stride: distance of two.
        wide: they hold several cells.
        skips: some cells lie in no window.
    """

    centre: float = 0.0
    stride: int = 1
    wide: bool = False
    skips: bool = False


def _windows(node: Node) -> list[_Window] | None:
    """Returns the windows of a node along each axis; None where it has none."""
    name = key(node.op)
    if name in _PADS:
        left, _, *rest = argument(node, "pad")
        top = rest[0] if rest else 0
        return [_Window(-float(top)), _Window(-float(left))]
    if name in _POOLS:
        kernel = _pair(argument(node, "kernel_size"))
        dilation = [1, 1] if name == "aten::avg_pool2d" else _pair(argument(node, "dilation"))
        strides = _pair(argument(node, "stride") or kernel)
    elif name in _CONVOLUTIONS and not (name != "aten::conv2d" and argument(node, "transposed")):
        weight: Tensor | Value = argument(node, "weight")
        kernel, dilation = list(weight.shape[2:]), _pair(argument(node, "dilation"))
        strides = _pair(argument(node, "stride"))
    else:
        return None
    spans = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    padding = argument(node, "padding")
    before = {"same": [span // 2 for span in spans], "valid": [0, 0]}.get(padding) if isinstance(padding, str) else None
    before = _pair(padding) if before is None else before
    return [
        _Window(step * (size - 1) / 2 - pad, stride, size > 1, min(size, stride // math.gcd(step, stride)) < stride)
        for size, step, pad, stride in zip(kernel, dilation, before, strides, strict=True)
    ]


def _pair(numbers: int | Sequence[Any]) -> list[int]:
    """Returns a number for each of two axes."""
    sizes = [numbers] if isinstance(numbers, int) else list(numbers)
    return sizes * 2 if len(sizes) == 1 else sizes
