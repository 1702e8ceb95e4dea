"""Operations that only move elements: gradients move back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import rule
from pyfast_xai.tape import Value
from pyfast_xai.tape.alias import Geometry


def _shifted(dim: int) -> int:
    """A dimension of a value in its gradient, which has the targets in front."""
    return dim + 1 if dim >= 0 else dim


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten")
def _view(step: Step, self: Value, *args: Any, **kwargs: Any) -> None:
    step.send(self, step.grad.reshape(-1, *self.shape))


@rule("permute")
def _permute(step: Step, self: Value, dims: Sequence[int]) -> None:
    rank = len(dims)
    order = sorted(range(rank), key=lambda d: dims[d] % rank)
    step.send(self, step.grad.permute(0, *[d + 1 for d in order]))


@rule("transpose")
def _transpose(step: Step, self: Value, dim0: int, dim1: int) -> None:
    step.send(self, step.grad.transpose(_shifted(dim0), _shifted(dim1)))


@rule("t")
def _t(step: Step, self: Value) -> None:
    step.send(self, step.grad.mT if len(self.shape) == 2 else step.grad)


@rule("expand")
def _expand(step: Step, self: Value, size: Sequence[int], *, implicit: bool = False) -> None:
    step.send(self, step.grad)


@rule("cat")
def _cat(step: Step, tensors: Sequence[Any], dim: int = 0) -> None:
    # Legacy: an empty tensor of one dimension may be among tensors of any shape.
    parts = [part for part in tensors if tuple(part.shape) != (0,)]
    at = 0
    for part in parts:
        size = part.shape[dim]
        step.send(part, step.grad.narrow(_shifted(dim), at, size))
        at += size


@rule("stack")
def _stack(step: Step, tensors: Sequence[Any], dim: int = 0) -> None:
    for part, grad in zip(tensors, step.grad.unbind(_shifted(dim)), strict=True):
        step.send(part, grad)


@rule("slice")
def _slice(
    step: Step, self: Value, dim: int = 0, start: int | None = None, end: int | None = None, stride: int = 1
) -> None:
    step.send_part(self, lambda grad: torch.ops.aten.slice(grad, _shifted(dim), start, end, stride), step.grad)


@rule("select")
def _select(step: Step, self: Value, dim: int, index: int) -> None:
    step.send_part(self, lambda grad: grad.select(_shifted(dim), index), step.grad)


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")
def _split(step: Step, self: Value, *args: Any, **kwargs: Any) -> None:
    grad = step.grad.new_zeros(len(step.grad), *self.shape)
    parts = _again(step.node.op, grad, args, kwargs)
    for part, own in zip(parts, step.grads, strict=True):
        if own is not None:
            part.copy_(own)
    step.send(self, grad)


def _again(op: Any, grad: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Tensor]:
    """The parts of a gradient that the parts of its value belong to."""
    given = dict(zip([a.name for a in op._schema.arguments[1:]], args, strict=False)) | kwargs
    given["dim"] = _shifted(given.get("dim", 0))
    return op(grad, **given)


@rule("mean")
def _mean(step: Step, self: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> None:
    grad = _spread(step, self, dim, keepdim)
    step.send(self, grad / max(1, self.numel // max(1, step.grad[0].numel())))


@rule("sum")
def _sum(step: Step, self: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> None:
    step.send(self, _spread(step, self, dim, keepdim))


def _spread(step: Step, self: Value, dim: Any, keepdim: bool) -> Tensor:
    """The gradient of a reduction over every element that was reduced."""
    rank = len(self.shape)
    dims = (
        list(range(rank)) if dim is None or dim == [] else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    )
    grad = step.grad
    if not keepdim:
        for d in sorted(dims):
            grad = grad.unsqueeze(d + 1)
    return grad.expand(-1, *self.shape)


@rule("alias::overwrite")
def _overwrite(step: Step, owner: Value, part: Value, geometry: Geometry) -> None:
    # In the memory layout of the owner, which the geometry speaks of.
    span = 1 + sum((size - 1) * stride for size, stride in zip(owner.shape, owner.stride, strict=True))
    grad = step.grad.new_empty(len(step.grad) * span)
    grad = grad.as_strided((len(step.grad), *owner.shape), (span, *owner.stride)).copy_(step.grad)
    region = grad.as_strided((len(grad), *geometry.size), (span, *geometry.stride), geometry.offset)
    step.send(part, region.clone())
    region.zero_()
    step.send(owner, grad)
