"""Operations that only move elements: index arithmetic."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.evidence.backward import Step, rule
from pyfast_xai.rules.evidence.points import broadcast, ravel, unravel
from pyfast_xai.tape import Value
from pyfast_xai.tape.alias import Geometry


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "_reshape_alias", "flatten", "unflatten")
@rule("squeeze", "unsqueeze", "ravel")
def same_order(step: Step, input: Value, *rest: Any, **_: Any) -> None:
    """The row-major order of the elements is unchanged, and so are flat indices."""
    step.send(input, step.points)


def _permuted(step: Step, input: Value, order: list[int]) -> None:
    """Dimension i of the result is dimension `order[i]` of the input."""
    found = unravel(step.points.index, step.shape)
    coordinates = [found[order.index(d)] for d in range(len(order))]
    step.send(input, step.points.to(ravel(coordinates, input.shape)))


@rule("permute")
def permute(step: Step, input: Value, dims: Any) -> None:
    _permuted(step, input, [d % len(dims) for d in dims])


@rule("transpose", "swapaxes", "swapdims")
def transpose(step: Step, input: Value, dim0: int, dim1: int) -> None:
    order = list(range(len(input.shape)))
    dim0, dim1 = dim0 % len(order), dim1 % len(order)
    order[dim0], order[dim1] = order[dim1], order[dim0]
    _permuted(step, input, order)


@rule("t", "numpy_T", "mT", "adjoint")
def t(step: Step, input: Value) -> None:
    if len(input.shape) < 2:
        step.send(input, step.points)
    else:
        transpose(step, input, -2, -1)


@rule("expand", "expand_as", "broadcast_to")
def expand(step: Step, input: Value, *rest: Any, **_: Any) -> None:
    step.send(input, step.points.to(broadcast(step.points.index, step.shape, input.shape)))


@rule("slice")
def slice_(step: Step, input: Value, dim: int = 0, start: Any = None, end: Any = None, stride: int = 1) -> None:
    begin = range(input.shape[dim])[slice(start, end, stride)].start
    coordinates = unravel(step.points.index, step.shape)
    coordinates[dim] = begin + coordinates[dim] * stride
    step.send(input, step.points.to(ravel(coordinates, input.shape)))


@rule("narrow")
def narrow(step: Step, input: Value, dim: int, start: int, length: int) -> None:
    slice_(step, input, dim, start % input.shape[dim] if start else 0)


@rule("select")
def select(step: Step, input: Value, dim: int, index: int) -> None:
    dim, index = dim % len(input.shape), index % input.shape[dim]
    coordinates = unravel(step.points.index, step.shape)
    coordinates.insert(dim, torch.full_like(step.points.index, index))
    step.send(input, step.points.to(ravel(coordinates, input.shape)))


@rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def split(step: Step, input: Value, sections: Any, dim: int = 0) -> None:
    begin = 0
    for value, points in zip(step.node.outputs, step.results, strict=True):
        assert value is not None
        if points is not None:
            coordinates = unravel(points.index, value.shape)
            coordinates[dim] = coordinates[dim] + begin
            step.send(input, points.to(ravel(coordinates, input.shape)))
        begin += value.shape[dim]


@rule("unbind")
def unbind(step: Step, input: Value, dim: int = 0) -> None:
    dim %= len(input.shape)
    for i, (value, points) in enumerate(zip(step.node.outputs, step.results, strict=True)):
        if points is not None:
            assert value is not None
            coordinates = unravel(points.index, value.shape)
            coordinates.insert(dim, torch.full_like(points.index, i))
            step.send(input, points.to(ravel(coordinates, input.shape)))


@rule("cat", "concat", "concatenate")
def cat(step: Step, tensors: list[Any], dim: int = 0) -> None:
    """Each element comes from exactly one of the parts."""
    dim %= len(step.shape)
    coordinates = unravel(step.points.index, step.shape)
    along, begin = coordinates[dim], 0
    for part in tensors:
        if len(part.shape) != len(step.shape):
            continue  # an empty tensor, which `cat` ignores
        end = begin + part.shape[dim]
        here = (along >= begin) & (along < end)
        coordinates[dim] = along - begin
        step.send(part, step.points.to(ravel(coordinates, part.shape), here))
        begin = end


@rule("stack")
def stack(step: Step, tensors: list[Any], dim: int = 0) -> None:
    coordinates = unravel(step.points.index, step.shape)
    along = coordinates.pop(dim % len(step.shape))
    index = ravel(coordinates, [s for d, s in enumerate(step.shape) if d != dim % len(step.shape)])
    for i, part in enumerate(tensors):
        step.send(part, step.points.to(index, along == i))


@rule("constant_pad_nd", "pad")
def pad(step: Step, input: Value, widths: Any, mode: Any = "constant", value: Any = None) -> None:
    if mode != "constant" and isinstance(mode, str):
        moved(step, input, widths, mode)
        return
    coordinates = unravel(step.points.index, step.shape)
    inside = torch.ones_like(step.points.index, dtype=torch.bool)
    for i in range(0, len(widths), 2):
        d = len(step.shape) - 1 - i // 2
        coordinates[d] = coordinates[d] - widths[i]
        inside &= (coordinates[d] >= 0) & (coordinates[d] < input.shape[d])
    step.send(input, step.points.to(ravel(coordinates, input.shape), inside))


@rule("roll", "flip", "fliplr", "flipud", "rot90", "repeat", "tile", "repeat_interleave", "index", "index_select")
@rule("gather", "take_along_dim", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "unfold")
@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d")
@rule("replication_pad3d", "circular_pad", "movedim", "moveaxis", "tril", "triu", "diagonal")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d")
def moved(step: Step, input: Value, *rest: Any, **kwargs: Any) -> None:
    """Any other movement: run it on the flat indices themselves and look up where each point came from.

    Counted from 1 in float64, which every op accepts and which is exact to 2**53; 0 is what an op fills in.
    """
    if any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((rest, kwargs))):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for indices that depend on the input, {step.node.name!r}")
    numbers = torch.arange(1, input.numel + 1, dtype=torch.float64, device=input.device).view(input.shape)
    source = step.node.op(numbers, *rest, **kwargs).flatten()[step.points.index].long() - 1
    step.send(input, step.points.to(source, source >= 0))


@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d")
def interpolated(step: Step, input: Value, *rest: Any, **_: Any) -> None:
    """The nearest source, which has the largest share."""
    coordinates = unravel(step.points.index, step.shape)
    for d in range(2, len(step.shape)):
        size, out = input.shape[d], step.shape[d]
        coordinates[d] = torch.div((2 * coordinates[d] + 1) * size, 2 * out, rounding_mode="floor")
    step.send(input, step.points.to(ravel(coordinates, input.shape)))


def _in_memory(index: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Memory offsets of flat logical indices."""
    offset = torch.zeros_like(index)
    for coordinate, step in zip(unravel(index, shape), stride, strict=True):
        offset += coordinate * step
    return offset


def _from_memory(offset: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Flat logical indices of memory offsets, and whether the offset belongs to the tensor at all."""
    coordinates: dict[int, Tensor] = {}
    rest, inside = offset, offset >= 0
    for d in sorted(range(len(shape)), key=lambda d: -stride[d]):
        if shape[d] == 1 or stride[d] == 0:
            coordinates[d] = torch.zeros_like(offset)
            continue
        coordinates[d] = torch.div(rest, stride[d], rounding_mode="floor")
        inside = inside & (coordinates[d] < shape[d])
        rest = rest - coordinates[d] * stride[d]
    index = ravel([coordinates[d] for d in range(len(shape))], shape) if shape else torch.zeros_like(offset)
    return index, inside & (rest == 0)


@rule("alias::refresh")
def refresh(step: Step, owner: Value, geometry: Geometry) -> None:
    offset = _in_memory(step.points.index, geometry.size, geometry.stride) + geometry.offset
    index, inside = _from_memory(offset, owner.shape, owner.stride)
    step.send(owner, step.points.to(index, inside))


@rule("as_strided")
def as_strided(step: Step, input: Value, size: Any, stride: Any, storage_offset: Any = None) -> None:
    offset = 0 if storage_offset is None else storage_offset - input.offset
    refresh(step, input, Geometry(tuple(size), tuple(stride), offset))


@rule("alias::overwrite")
def overwrite(step: Step, owner: Value, part: Value, geometry: Geometry) -> None:
    """Inside the part the new contents, elsewhere the old."""
    offset = _in_memory(step.points.index, owner.shape, owner.stride) - geometry.offset
    index, inside = _from_memory(offset, geometry.size, geometry.stride)
    step.send(part, step.points.to(index, inside))
    step.send(owner, step.points.to(step.points.index, ~inside))
