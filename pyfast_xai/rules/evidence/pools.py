"""Pooling: the strongest activation of the window, for maximum and average pools alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.rules.dimensions import per_dimension, reduced
from pyfast_xai.rules.evidence.arithmetic import extremum
from pyfast_xai.rules.evidence.backward import TraceContext, rule
from pyfast_xai.rules.evidence.points import Points, gather, memory, ravel, unravel
from pyfast_xai.tape import Node, Value

CHUNK = 1 << 24  # candidates looked at together


@dataclass(frozen=True, slots=True)
class _Along:
    """The windows of the points along one dimension.

    Attributes:
        start: first coordinate `[P]`.
        end: `[P]`, exclusive.
        most: the longest window that there can be, in taps.
        step: between taps.
    """

    start: Tensor
    end: Tensor
    most: int
    step: int = 1


def _strongest(
    ctx: TraceContext,
    input: Value,
    activation: Tensor,
    windows: Sequence[_Along],
    mean: bool,
    least: bool = False,
) -> None:
    """Sends each point to the largest activation in its window, the first of equals.

    Args:
        activation: the input of the pool.
        windows: for every input dimension.
        mean: the pool averages, so a negative point looks for the least activation instead.
        least: the pool takes the least activation.
    """
    points = ctx.points
    device = points.index.device
    counts = [window.most for window in windows]
    size = math.prod(counts)
    if not size:
        return  # of nothing, nothing is the largest
    taps = torch.cartesian_prod(*[torch.arange(count, device=device) for count in counts]).view(size, len(counts))
    # Flat index and memory offset of a window's first element, and the offset of each tap.
    first = ravel([window.start for window in windows], activation.shape)
    place = torch.zeros_like(first)
    added = torch.zeros(size, dtype=torch.int64, device=device)
    moved = torch.zeros_like(added)
    below = 1
    for d in reversed(range(activation.dim())):
        place += windows[d].start * activation.stride(d)
        added += taps[:, d] * (windows[d].step * below)
        moved += taps[:, d] * (windows[d].step * activation.stride(d))
        below *= activation.shape[d]
    cells = memory(activation)
    exact = torch.promote_types(cells.dtype, torch.float32)
    best = []
    for chunk in torch.arange(len(points), device=device).split(max(1, CHUNK // size)):
        values = cells[(place[chunk, None] + moved).clamp_(max=len(cells) - 1)].to(exact)  # [P, K]
        if least:
            values = -values
        if mean and points.negative is not None:
            values = torch.where(points.negative[chunk, None], -values, values)
        for d, window in enumerate(windows):
            if counts[d] > 1:
                outside = window.start[chunk, None] + taps[:, d] * window.step >= window.end[chunk, None]
                values = values.masked_fill_(outside, -math.inf)
        best.append(values.argmax(1))
    ctx.propagate(input, points.to(first + added[torch.cat(best)]))


def _fixed(coordinates: Sequence[Tensor]) -> list[_Along]:
    return [_Along(c, c + 1, 1) for c in coordinates]


def _contributors(
    ctx: TraceContext, input: Value, activation: Tensor, reduced: Sequence[int], outer: Sequence[Tensor]
) -> None:
    """Traces an explained neuron that is an average over a map, as a fully connected layer with equal weights.

    Without this, a classifier that is a convolution and an average (SqueezeNet, all-convolutional nets) would
    leave a single pixel.
    """
    points = ctx.points
    sizes = [activation.shape[d] for d in reduced]
    cells = torch.cartesian_prod(*[torch.arange(s, device=points.index.device) for s in sizes])
    cells = cells.view(-1, len(sizes))
    coordinates = []
    for d in range(activation.dim()):
        along = cells[None, :, reduced.index(d)] if d in reduced else outer[d][:, None]
        coordinates.append(along.expand(len(points), len(cells)))
    index = ravel(coordinates, activation.shape)
    values = gather(activation, index.flatten()).view(index.shape)
    positive = (points.signed(values) > 0) & (points.index[:, None] >= 0)
    # Other points than these: each becomes as many as there are cells.
    negative = None if points.negative is None else points.negative[:, None].expand_as(positive).flatten()
    everywhere = Points(index.flatten(), negative)
    ctx.propagate(input, everywhere.to(everywhere.index, positive.flatten()))


def _pool(
    ctx: TraceContext, input: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, rank: int, mean: bool
) -> None:
    activation = ctx.tensor("input" if "input" in ctx.node.saved else "self")
    kernel, padding, dilation = (per_dimension(value, rank) for value in (kernel, padding, dilation))
    stride = per_dimension(stride, rank) if stride else kernel
    coordinates = unravel(ctx.points.index, ctx.shape)
    lead = activation.dim() - rank
    spatial = activation.shape[lead:]
    if mean and ctx.points.start and math.prod(ctx.shape[lead:]) == 1 and list(spatial) == kernel:
        _contributors(ctx, input, activation, range(lead, activation.dim()), coordinates)
        return
    windows = _fixed(coordinates[:lead])
    for d in range(rank):
        start = coordinates[lead + d] * stride[d] - padding[d]
        end = (start + (kernel[d] - 1) * dilation[d] + 1).clamp(max=spatial[d])
        # A window that begins in the padding starts at its first tap inside.
        short = torch.div(dilation[d] - 1 - start.clamp(max=0), dilation[d], rounding_mode="floor")
        most = min(kernel[d], -(-spatial[d] // dilation[d]))
        windows.append(_Along(start + short * dilation[d], end, most, dilation[d]))
    _strongest(ctx, input, activation, windows, mean)


@rule("max_pool1d", "max_pool2d", "max_pool3d", saves=["self"])
@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", saves=["self"])
def max_pool(
    ctx: TraceContext,
    self: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> None:
    """Traces a max-pool to the index that the forward chose, also for a negative point."""
    _pool(ctx, self, kernel, stride, padding, dilation, _rank(ctx), mean=False)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", saves=["self"])
def avg_pool(
    ctx: TraceContext, self: Value, kernel: Any, stride: Any = (), padding: Any = 0, *rest: Any, **_: Any
) -> None:
    _pool(ctx, self, kernel, stride, padding, 1, _rank(ctx), mean=True)


def _rank(ctx: TraceContext) -> int:
    return int(ctx.node.op._schema.name.split("pool")[1][0])


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", saves=["self"])
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", saves=["self"])
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", saves=["self"])
def adaptive_pool(ctx: TraceContext, self: Value, output_size: Any) -> None:
    activation = ctx.tensor("self")
    rank = _rank(ctx)
    mean = "avg" in ctx.node.op._schema.name
    coordinates = unravel(ctx.points.index, ctx.shape)
    lead = activation.dim() - rank
    if mean and ctx.points.start and math.prod(ctx.shape[lead:]) == 1:
        _contributors(ctx, self, activation, range(lead, activation.dim()), coordinates)
        return
    windows = _fixed(coordinates[:lead])
    for d in range(lead, activation.dim()):
        size, out, at = activation.shape[d], ctx.shape[d], coordinates[d]
        start = torch.div(at * size, out, rounding_mode="floor")
        end = torch.div((at + 1) * size + out - 1, out, rounding_mode="floor")
        most = max(((i + 1) * size + out - 1) // out - i * size // out for i in range(out))
        windows.append(_Along(start, end, most))
    _strongest(ctx, self, activation, windows, mean)


def _operands(node: Node) -> tuple[str, ...]:
    """Returns the operands of a maximum: of one tensor, or of two element by element."""
    return ("self", "other") if node.op._overloadname == "other" else ("self",)


@rule("max", "min", saves=_operands)
def largest(ctx: TraceContext, self: Any, dim: Any = None, keepdim: bool = False) -> None:
    """Traces the largest or least element of a tensor, along a dimension, or of two tensors."""
    if ctx.node.op._overloadname == "other":
        extremum(ctx, self, dim)
    else:
        reduction(ctx, self, dim, keepdim)


@rule("mean", "sum", "amax", "amin", "logsumexp", saves=["self"])
def reduction(ctx: TraceContext, self: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> None:
    """Traces a pool over whole dimensions."""
    _reduced(ctx, self, ctx.tensor("self"), dim, keepdim)


@rule("linalg_vector_norm", saves=["self"])
def norm(ctx: TraceContext, self: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> None:
    """Traces a length, as in global response normalisation, as a pool of magnitudes."""
    _reduced(ctx, self, ctx.tensor("self").abs(), dim, keepdim)


def _reduced(ctx: TraceContext, self: Value, activation: Tensor, dim: Any, keepdim: bool) -> None:
    rank = activation.dim()
    if not rank:
        ctx.propagate(self, ctx.points)
        return
    dims = reduced(dim, rank)
    left = iter(unravel(ctx.points.index, ctx.shape))
    zero = torch.zeros_like(ctx.points.index)
    coordinates = []
    for d in range(rank):
        # A reduced dimension is absent from the result, or there with one entry.
        coordinates.append(next(left) if d not in dims or keepdim else zero)
    least = "min" in ctx.node.op._schema.name
    mean = not least and "max" not in ctx.node.op._schema.name
    if mean and ctx.points.start:
        _contributors(ctx, self, activation, dims, coordinates)
        return
    fixed = _fixed(coordinates)
    windows = [
        _Along(zero, zero + activation.shape[d], activation.shape[d]) if d in dims else fixed[d] for d in range(rank)
    ]
    _strongest(ctx, self, activation, windows, mean, least)
