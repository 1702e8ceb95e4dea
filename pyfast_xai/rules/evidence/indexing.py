"""Operations that only move elements: index arithmetic."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.dimensions import per_dimension
from pyfast_xai.rules.evidence.backward import TraceContext, rule
from pyfast_xai.rules.evidence.points import broadcast, gather, ravel, unravel
from pyfast_xai.tape import Value
from pyfast_xai.tape.aliasing import Geometry


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "_reshape_alias", "flatten", "unflatten")
@rule("squeeze", "unsqueeze", "ravel")
def same_order(ctx: TraceContext, input: Value, *rest: Any, **_: Any) -> None:
    """Keeps flat indices: the row-major order of the elements does not change."""
    ctx.propagate(input, ctx.points)


def _permuted(ctx: TraceContext, input: Value, order: list[int]) -> None:
    """Traces a permutation, in which dimension i of the result is dimension `order[i]` of the input."""
    if not order:
        ctx.propagate(input, ctx.points)
        return
    permuted = unravel(ctx.points.index, ctx.shape)
    coordinates = [permuted[order.index(d)] for d in range(len(order))]
    ctx.propagate(input, ctx.points.to(ravel(coordinates, input.shape)))


@rule("permute")
def permute(ctx: TraceContext, input: Value, dims: Any) -> None:
    _permuted(ctx, input, [d % len(dims) for d in dims])


@rule("transpose", "swapaxes", "swapdims")
def transpose(ctx: TraceContext, input: Value, dim0: int, dim1: int) -> None:
    order = list(range(len(input.shape)))
    if order:
        dim0, dim1 = dim0 % len(order), dim1 % len(order)
        order[dim0], order[dim1] = order[dim1], order[dim0]
    _permuted(ctx, input, order)


@rule("t", "numpy_T", "mT", "adjoint")
def t(ctx: TraceContext, input: Value) -> None:
    if len(input.shape) < 2:
        ctx.propagate(input, ctx.points)
    else:
        transpose(ctx, input, -2, -1)


@rule("expand", "expand_as", "broadcast_to")
def expand(ctx: TraceContext, input: Value, *rest: Any, **_: Any) -> None:
    ctx.propagate(input, ctx.points.to(broadcast(ctx.points.index, ctx.shape, input.shape)))


@rule("slice")
def slice_(ctx: TraceContext, input: Value, dim: int = 0, start: Any = None, end: Any = None, stride: int = 1) -> None:
    first = range(input.shape[dim])[slice(start, end, stride)].start
    coordinates = unravel(ctx.points.index, ctx.shape)
    coordinates[dim] = first + coordinates[dim] * stride
    ctx.propagate(input, ctx.points.to(ravel(coordinates, input.shape)))


@rule("narrow")
def narrow(ctx: TraceContext, input: Value, dim: int, start: int, length: int) -> None:
    slice_(ctx, input, dim, start % input.shape[dim] if start else 0)


@rule("select")
def select(ctx: TraceContext, input: Value, dim: int, index: int) -> None:
    dim, index = dim % len(input.shape), index % input.shape[dim]
    coordinates = unravel(ctx.points.index, ctx.shape)
    coordinates.insert(dim, torch.full_like(ctx.points.index, index))
    ctx.propagate(input, ctx.points.to(ravel(coordinates, input.shape)))


@rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def split(ctx: TraceContext, input: Value, sections: Any, dim: int = 0) -> None:
    start = 0
    for value, points in zip(ctx.node.outputs, ctx.results, strict=True):
        assert value is not None
        if points is not None:
            coordinates = unravel(points.index, value.shape)
            coordinates[dim] = coordinates[dim] + start
            ctx.propagate(input, points.to(ravel(coordinates, input.shape)))
        start += value.shape[dim]


@rule("unbind")
def unbind(ctx: TraceContext, input: Value, dim: int = 0) -> None:
    dim %= len(input.shape)
    for i, (value, points) in enumerate(zip(ctx.node.outputs, ctx.results, strict=True)):
        if points is not None:
            assert value is not None
            coordinates = unravel(points.index, value.shape)
            coordinates.insert(dim, torch.full_like(points.index, i))
            ctx.propagate(input, points.to(ravel(coordinates, input.shape)))


@rule("cat", "concat", "concatenate")
def cat(ctx: TraceContext, tensors: list[Any], dim: int = 0) -> None:
    """Traces each element to the part that it comes from."""
    dim %= len(ctx.shape)
    coordinates = unravel(ctx.points.index, ctx.shape)
    along, start = coordinates[dim], 0
    for part in tensors:
        if len(part.shape) != len(ctx.shape):
            continue  # an empty tensor, which `cat` ignores
        end = start + part.shape[dim]
        inside = (along >= start) & (along < end)
        coordinates[dim] = along - start
        ctx.propagate(part, ctx.points.to(ravel(coordinates, part.shape), inside))
        start = end


@rule("stack")
def stack(ctx: TraceContext, tensors: list[Any], dim: int = 0) -> None:
    coordinates = unravel(ctx.points.index, ctx.shape)
    along = coordinates.pop(dim % len(ctx.shape))
    rest = [s for d, s in enumerate(ctx.shape) if d != dim % len(ctx.shape)]
    index = ravel(coordinates, rest) if rest else torch.zeros_like(along)  # of scalars
    for i, part in enumerate(tensors):
        ctx.propagate(part, ctx.points.to(index, along == i))


@rule("constant_pad_nd", "pad")
def pad(ctx: TraceContext, input: Value, widths: Any, mode: Any = "constant", value: Any = None) -> None:
    if mode != "constant" and isinstance(mode, str):
        moved(ctx, input, widths, mode)
        return
    coordinates = unravel(ctx.points.index, ctx.shape)
    inside = torch.ones_like(ctx.points.index, dtype=torch.bool)
    for i in range(0, len(widths), 2):
        d = len(ctx.shape) - 1 - i // 2
        coordinates[d] = coordinates[d] - widths[i]
        inside &= (coordinates[d] >= 0) & (coordinates[d] < input.shape[d])
    ctx.propagate(input, ctx.points.to(ravel(coordinates, input.shape), inside))


@rule("roll", "flip", "fliplr", "flipud", "rot90", "repeat", "tile", "repeat_interleave", "index", "index_select")
@rule("gather", "take_along_dim", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "unfold")
@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d")
@rule("replication_pad3d", "circular_pad", "movedim", "moveaxis", "tril", "triu", "diagonal")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d")
def moved(ctx: TraceContext, input: Value, *rest: Any, **kwargs: Any) -> None:
    """Traces any other movement: runs it on the flat indices and looks up where each point came from.

    Counted from 1 in float64, which every op accepts and which is exact to 2**53; 0 is what an op fills in.
    """
    if any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((rest, kwargs))):
        raise UnsupportedOpError(f"CNN-Fixations has no rule for indices that depend on the input, {ctx.node.name!r}")
    numbers = torch.arange(1, input.numel + 1, dtype=torch.float64, device=input.device).view(input.shape)
    source = ctx.node.op(numbers, *rest, **kwargs).flatten()[ctx.points.index].long() - 1
    ctx.propagate(input, ctx.points.to(source, source >= 0))


@rule("col2im", saves=["self"])
def col2im(
    ctx: TraceContext, self: Value, output_size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> None:
    """Traces a sum of overlapping patches to the patch that contributes most to the pixel."""
    columns = ctx.tensor("self")  # [N, C * kH * kW, L] or without N
    kernel, dilation, padding, stride = (per_dimension(value, 2) for value in (kernel, dilation, padding, stride))
    *lead, y, x = unravel(ctx.points.index, ctx.shape)
    image, channel = (torch.zeros_like(y), lead[0]) if len(lead) == 1 else lead
    device = y.device
    taps = torch.cartesian_prod(*(torch.arange(k, device=device) for k in kernel)).view(-1, 2)
    inside = torch.ones(len(y), len(taps), dtype=torch.bool, device=device)
    patch = torch.zeros_like(inside, dtype=torch.int64)
    for d, at in enumerate((y, x)):
        first = at[:, None] + padding[d] - taps[:, d] * dilation[d]  # where the patch begins
        count = (output_size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        number = torch.div(first, stride[d], rounding_mode="floor")
        inside &= (first % stride[d] == 0) & (number >= 0) & (number < count)
        patch = patch * count + number
    row = channel[:, None] * len(taps) + torch.arange(len(taps), device=device)
    places = [row, patch] if columns.dim() == 2 else [image[:, None].expand_as(row), row, patch]
    index = ravel([place.masked_fill(~inside, 0) for place in places], columns.shape)
    values = gather(columns, index.flatten()).view(index.shape)
    values = ctx.points.signed(values.to(torch.promote_types(values.dtype, torch.float32)))
    best = values.masked_fill(~inside, -math.inf).argmax(1, keepdim=True)
    ctx.propagate(self, ctx.points.to(index.gather(1, best)[:, 0], inside.any(1)))


@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d")
def interpolated(ctx: TraceContext, input: Value, *rest: Any, **_: Any) -> None:
    """Traces an interpolated element to the nearest source, which has the largest share."""
    coordinates = unravel(ctx.points.index, ctx.shape)
    for d in range(2, len(ctx.shape)):
        size, out = input.shape[d], ctx.shape[d]
        coordinates[d] = torch.div((2 * coordinates[d] + 1) * size, 2 * out, rounding_mode="floor")
    ctx.propagate(input, ctx.points.to(ravel(coordinates, input.shape)))


def _in_memory(index: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Returns the memory offsets of flat logical indices."""
    offset = torch.zeros_like(index)
    for coordinate, step in zip(unravel(index, shape), stride, strict=True):
        offset += coordinate * step
    return offset


def _from_memory(offset: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns the flat logical indices of memory offsets, and whether the offset belongs to the tensor at all."""
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


@rule("aliasing::regenerate_view")
def regenerate_view(ctx: TraceContext, owner: Value, geometry: Geometry) -> None:
    offset = _in_memory(ctx.points.index, geometry.size, geometry.stride) + geometry.offset
    index, inside = _from_memory(offset, owner.shape, owner.stride)
    ctx.propagate(owner, ctx.points.to(index, inside))


@rule("as_strided")
def as_strided(ctx: TraceContext, input: Value, size: Any, stride: Any, storage_offset: Any = None) -> None:
    offset = 0 if storage_offset is None else storage_offset - input.offset
    regenerate_view(ctx, input, Geometry(tuple(size), tuple(stride), offset))


@rule("aliasing::scatter_view")
def scatter_view(ctx: TraceContext, owner: Value, part: Value, geometry: Geometry) -> None:
    """Traces elements inside the part to its new contents, others to the old contents."""
    offset = _in_memory(ctx.points.index, owner.shape, owner.stride) - geometry.offset
    index, inside = _from_memory(offset, geometry.size, geometry.stride)
    ctx.propagate(part, ctx.points.to(index, inside))
    ctx.propagate(owner, ctx.points.to(ctx.points.index, ~inside))
