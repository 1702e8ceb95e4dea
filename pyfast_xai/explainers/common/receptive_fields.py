"""The places of the cells of a map on the images, by the strides and the padding of what made it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
        moved = windows or [(0.0, 1), (0.0, 1)]
        cells[value] = [
            (first + step * centre, step * stride)
            for (first, step), (centre, stride) in zip(cells[source], moved, strict=True)
        ]
        last = value
    offsets = (
        (size - 1) / 2 - (first + step * (count - 1) / 2)
        for size, count, (first, step) in zip(images.shape[2:], last.shape[2:], cells[last], strict=True)
    )
    down, right = offsets
    return down, right


def _windows(node: Node) -> list[tuple[float, int]] | None:
    """Returns along each axis the centre of the first window of a node and its stride; None where it has no windows."""
    name = key(node.op)
    if name in _PADS:
        left, _, *rest = argument(node, "pad")
        top = rest[0] if rest else 0
        return [(-float(top), 1), (-float(left), 1)]
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
    return [(span / 2 - pad, stride) for span, pad, stride in zip(spans, before, strides, strict=True)]


def _pair(numbers: int | Sequence[Any]) -> list[int]:
    """Returns a number for each of two axes."""
    sizes = [numbers] if isinstance(numbers, int) else list(numbers)
    return sizes * 2 if len(sizes) == 1 else sizes
