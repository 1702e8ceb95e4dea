"""Operations that only move elements: gradients move back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.dimensions import reduced
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.table import rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.aliasing import Geometry
from pyfast_xai.tape.graph import parameters


def _shifted(dim: int) -> int:
    """Returns a dimension of a value in its gradient, which has the targets in front."""
    return dim + 1 if dim >= 0 else dim


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten")
def _view(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    ctx.propagate(self, ctx.grad.reshape(len(ctx.grad), *self.shape))


@rule("permute")
def _permute(ctx: BackwardContext, self: Value, dims: Sequence[int]) -> None:
    rank = len(dims)
    order = sorted(range(rank), key=lambda d: dims[d] % rank)
    ctx.propagate(self, ctx.grad.permute(0, *[d + 1 for d in order]))


@rule("transpose")
def _transpose(ctx: BackwardContext, self: Value, dim0: int, dim1: int) -> None:
    ctx.propagate(self, ctx.grad.transpose(_shifted(dim0), _shifted(dim1)) if self.shape else ctx.grad)


@rule("t")
def _t(ctx: BackwardContext, self: Value) -> None:
    ctx.propagate(self, ctx.grad.mT if len(self.shape) == 2 else ctx.grad)


@rule("expand")
def _expand(ctx: BackwardContext, self: Value, size: Sequence[int], *, implicit: bool = False) -> None:
    ctx.propagate(self, ctx.grad)


@rule("cat")
def _cat(ctx: BackwardContext, tensors: Sequence[Any], dim: int = 0) -> None:
    # Legacy: an empty tensor of one dimension may be among tensors of any shape.
    parts = [part for part in tensors if tuple(part.shape) != (0,)]
    at = 0
    for part in parts:
        size = part.shape[dim]
        ctx.propagate(part, ctx.grad.narrow(_shifted(dim), at, size))
        at += size


@rule("stack")
def _stack(ctx: BackwardContext, tensors: Sequence[Any], dim: int = 0) -> None:
    for part, grad in zip(tensors, ctx.grad.unbind(_shifted(dim)), strict=True):
        ctx.propagate(part, grad)


@rule("slice")
def _slice(
    ctx: BackwardContext, self: Value, dim: int = 0, start: int | None = None, end: int | None = None, stride: int = 1
) -> None:
    ctx.propagate_part(self, lambda grad: torch.ops.aten.slice(grad, _shifted(dim), start, end, stride), ctx.grad)


@rule("select")
def _select(ctx: BackwardContext, self: Value, dim: int, index: int) -> None:
    ctx.propagate_part(self, lambda grad: grad.select(_shifted(dim), index), ctx.grad)


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")
def _split(ctx: BackwardContext, self: Value, *args: Any, **kwargs: Any) -> None:
    grad = ctx.grad.new_zeros(len(ctx.grad), *self.shape)
    parts = _split_views(ctx.node.op, grad, args, kwargs)
    for part, part_grad in zip(parts, ctx.grads, strict=True):
        if part_grad is not None:
            part.copy_(part_grad)
    ctx.propagate(self, grad)


def _split_views(op: Any, grad: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Tensor]:
    """Returns the parts of a gradient that the parts of its value belong to."""
    arguments = dict(zip(list(parameters(op))[1:], args, strict=False)) | kwargs
    arguments["dim"] = _shifted(arguments.get("dim", 0))
    return op(grad, **arguments)


def _rolls_flattened(node: Node) -> bool:
    return len(node.args) < 3 or not node.args[2]


@rule("roll", unless=_rolls_flattened)
def _roll(ctx: BackwardContext, self: Value, shifts: Sequence[int], dims: Sequence[int]) -> None:
    ctx.propagate(self, ctx.grad.roll([-shift for shift in shifts], [_shifted(dim) for dim in dims]))


@rule("constant_pad_nd")
def _pad(ctx: BackwardContext, self: Value, pad: Sequence[int], value: float = 0) -> None:
    ctx.propagate(self, torch.ops.aten.constant_pad_nd(ctx.grad, [-size for size in pad]))


@rule("mean")
def _mean(ctx: BackwardContext, self: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> None:
    ctx.propagate(self, _spread(_share(ctx, self), self, dim, keepdim))


def _share(ctx: BackwardContext, self: Value) -> Tensor:
    """Returns the gradient of a mean divided by the number of elements that each mean is of."""
    return ctx.grad / max(1, self.numel // max(1, ctx.grad[0].numel()))


def _several_windows(node: Node) -> bool:
    return max(node.args[1]) != 1


@rule("adaptive_avg_pool2d", unless=_several_windows)
def _average(ctx: BackwardContext, self: Value, output_size: Sequence[int]) -> None:
    ctx.propagate(self, _share(ctx, self).expand(-1, *self.shape))


@rule("sum")
def _sum(ctx: BackwardContext, self: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> None:
    ctx.propagate(self, _spread(ctx.grad, self, dim, keepdim))


def _spread(grad: Tensor, self: Value, dim: Any, keepdim: bool) -> Tensor:
    """Returns the gradient of a reduction over every element that was reduced."""
    if not keepdim:
        for d in reduced(dim, len(self.shape)):
            grad = grad.unsqueeze(d + 1)
    return grad.expand(-1, *self.shape)


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Returns the number of elements of memory that a tensor spans."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


@rule("as_strided")
def _as_strided(
    ctx: BackwardContext, self: Value, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> None:
    # The result may lie beside the argument in their memory. Of that, only the argument has a gradient.
    offset = self.offset if storage_offset is None else storage_offset
    first = min(offset, self.offset)
    end = max(offset + _extent(size, stride), self.offset + _extent(self.shape, self.stride))
    places = torch.arange(end - first, device=ctx.grad.device)
    grad = ctx.grad.new_zeros(len(ctx.grad), end - first)
    read = places.as_strided(size, stride, offset - first).flatten()
    grad.index_add_(1, read, ctx.grad.reshape(len(grad), len(read)))
    # Elements of the argument that share memory, as after `expand`, share its gradient.
    flat_places = places.as_strided(self.shape, self.stride, self.offset - first).flatten()
    grad /= torch.zeros_like(places).index_add_(0, flat_places, torch.ones_like(flat_places)).clamp(min=1)
    whole = (len(grad), *self.shape), (end - first, *self.stride), self.offset - first
    ctx.propagate(self, grad.as_strided(*whole).clone())


def _check_dtype(node: Node, owner: Value, view: Value | None) -> None:
    if view is not None and view.dtype != owner.dtype:
        raise UnsupportedOpError(
            f"a write to a view of another dtype ({view.dtype} of {owner.dtype}) cannot be differentiated, "
            f"which {node.path or 'the model'!r} does (operation {node.name!r}); let the model write to a copy"
        )


@rule("aliasing::regenerate_view")
def _regenerate(ctx: BackwardContext, owner: Value, geometry: Geometry) -> None:
    _check_dtype(ctx.node, owner, ctx.node.outputs[0])
    _as_strided(ctx, owner, geometry.size, geometry.stride, owner.offset + geometry.offset)


@rule("aliasing::scatter_view")
def _overwrite(ctx: BackwardContext, owner: Value, part: Value, geometry: Geometry) -> None:
    _check_dtype(ctx.node, owner, part)
    # In the memory layout of the owner, to which the geometry refers.
    span = _extent(owner.shape, owner.stride)
    grad = ctx.grad.new_empty(len(ctx.grad) * span)
    grad = grad.as_strided((len(ctx.grad), *owner.shape), (span, *owner.stride)).copy_(ctx.grad)
    region = grad.as_strided((len(grad), *geometry.size), (span, *geometry.stride), geometry.offset)
    ctx.propagate(part, region.clone())
    region.zero_()
    ctx.propagate(owner, grad)
