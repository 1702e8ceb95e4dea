"""Layers with weights: convolution, fully connected, and the normalisations that may turn a point's sign."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyfast_xai import ops
from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.ops import Location
from pyfast_xai.rules.dimensions import per_dimension
from pyfast_xai.rules.evidence.backward import TraceContext, rule, weighted
from pyfast_xai.rules.evidence.points import Points, gather, marks, noted, ravel, unravel
from pyfast_xai.tape import Node, Value

# Elements of a weight that are compared to see that its packed signs are still those of the weight.
_SAMPLE = 4096
_sign_bits = WeakTensorKeyDictionary()  # weight -> (version, sample, bits)


def sign_bits(ctx: TraceContext, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the packed signs of a weight `[O, I]`, kept for as long as the weight lives and stays as it is.

    A change is noticed by the tensor's version and by a strided sample of its elements (for changes through `.data`,
    which leave the version alone). On a device a sample cannot be looked at without waiting: there they are packed in
    every walk.
    """
    if marks(weight):
        return ctx.sign_bits(weight)
    version = None if weight.is_inference() else weight._version
    sample = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLE)].clone()
    known = _sign_bits.get(weight)
    if known is not None and known[0] == version and torch.equal(known[1], sample):
        return known[2]
    bits = ops.sign_bits(weight)
    _sign_bits[weight] = (version, sample, bits)
    return bits


def contributions(
    ctx: TraceContext, activation: Tensor, weight: Tensor, points: Tensor, negative: Tensor | None
) -> Points:
    """Returns the contributors to points `[P]` on `[R, O]` (Algorithm 1): activations `[R, I]`, weight `[O, I]`."""
    rows, features = activation.shape
    capacity = min(rows, len(points)) * features if marks(points) else None
    index = ops.linear_trace(activation, *sign_bits(ctx, weight), points, negative, capacity)
    return evidence_on(ctx, activation, Points(index, distinct=True))


def fully_connected(ctx: TraceContext, input: Value, activation: Tensor, weight: Tensor, every: bool) -> None:
    """Traces a layer of activations `[..., I]` and weight `[O, I]` to all positive contributions, or the largest."""
    rows = activation.reshape(-1, activation.shape[-1])
    points = ctx.points
    if every:
        ctx.propagate(input, contributions(ctx, rows, weight, points.index, points.negative))
        return
    index = ops.conv_trace(
        rows.unsqueeze(-1),
        weight.unsqueeze(-1),
        points.index,
        points.negative,
        [1],
        [1],
        [0],
        [1],
        1,
        Location.CENTER,
    )
    ctx.propagate(input, evidence_on(ctx, rows, replace(points, index=index, distinct=False)))


def evidence_on(ctx: TraceContext, activation: Tensor, points: Points) -> Points:
    """Returns the points on what a layer read; a negative activation counts by being low, where signs are followed."""
    negative = noted(gather(activation, points.index) < 0) if ctx.options.signed else None
    return replace(points, negative=negative, start=False)


def _flattened_map(ctx: TraceContext, value: Value) -> bool:
    """Returns whether a vector is a map with height and width, laid out in a row."""
    while (producer := ctx.producer(value)) is not None and producer.inputs and not weighted(producer):
        before = producer.inputs[0]
        if before.numel != value.numel:
            return False
        if len(before.shape) > 2 >= len(value.shape):
            return math.prod(before.shape[2:]) > 1
        value = before
    return False


def _every(ctx: TraceContext, input: Value, rows: int) -> bool:
    """Returns whether all positive contributions to a neuron of a fully connected layer are its evidence."""
    if ctx.points.start or rows == ctx.batch:
        return ctx.options.first_fc == "all" or not _flattened_map(ctx, input)
    # One of many tokens: a 1x1 convolution in all but name.
    return False


@rule("linear", saves=["input"], weighted=True)
def linear(ctx: TraceContext, input: Value, weight: Tensor, bias: Any = None) -> None:
    if not isinstance(input, Value) or isinstance(weight, Value):
        raise UnsupportedOpError(f"CNN-Fixations traces linear layers with fixed weights only, not {ctx.node.name!r}")
    activation = ctx.tensor("input")
    rows = activation.numel() // activation.shape[-1]
    fully_connected(ctx, input, activation, weight, _every(ctx, input, rows))


def _activations(*names: str) -> Callable[[Node], list[str]]:
    """Returns which of the last arguments, by their names, depend on the inputs."""
    return lambda node: [
        name for name, value in zip(names, node.args[-len(names) :], strict=True) if isinstance(value, Value)
    ]


@rule("mm", saves=_activations("self", "mat2"), weighted=True)
def mm(ctx: TraceContext, self: Any, mat2: Any) -> None:
    """Traces a product with a fixed weight, or of two activations."""
    _product(ctx, self, mat2, "self")


@rule("addmm", saves=_activations("mat1", "mat2"), weighted=True)
def addmm(ctx: TraceContext, self: Any, mat1: Any, mat2: Any, **scales: Any) -> None:
    _product(ctx, mat1, mat2, "mat1")


def _product(ctx: TraceContext, self: Any, mat2: Any, name: str) -> None:
    """Traces `self @ mat2`. Of two activations, as images and texts that are compared, each is the other's weight."""
    left = ctx.tensor(name) if isinstance(self, Value) else self
    right = ctx.tensor("mat2") if isinstance(mat2, Value) else mat2
    if not isinstance(mat2, Value):
        fully_connected(ctx, self, left, right.t(), _every(ctx, self, len(left)))
        return
    row, column = unravel(ctx.points.index, ctx.shape)
    products = ctx.points.signed(left[row] * right.t()[column])  # [P, K]
    # All that contributes to what is explained; below it, as in attention, the most.
    chosen = products > 0 if ctx.points.start else products == products.amax(1, keepdim=True)
    chosen &= (ctx.points.index >= 0)[:, None]
    inner = torch.arange(left.shape[1], device=left.device).expand_as(chosen)
    for value, activation, at in (
        (self, left, [row[:, None].expand_as(inner), inner]),
        (mat2, right, [inner, column[:, None].expand_as(inner)]),
    ):
        if ctx.leads(value):
            every = Points(ravel(at, activation.shape).flatten())
            ctx.propagate(value, evidence_on(ctx, activation, every.to(every.index, chosen.flatten())))


def _fixed_weights(ctx: TraceContext, input: Any, weight: Any) -> Tensor:
    """Returns the activation `[N, I, ...]` that a convolution reads; a map without a batch has the same indices."""
    if not isinstance(input, Value) or isinstance(weight, Value):
        raise UnsupportedOpError(f"CNN-Fixations traces convolutions with fixed weights only, not {ctx.node.name!r}")
    activation = ctx.tensor("input")
    return activation[None] if activation.dim() == weight.dim() - 1 else activation


@rule("conv1d", "conv2d", "conv3d", saves=["input"], weighted=True)
def conv(
    ctx: TraceContext,
    input: Value,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    activation = _fixed_weights(ctx, input, weight)
    rank = weight.dim() - 2
    stride, dilation = per_dimension(stride, rank), per_dimension(dilation, rank)
    kernel = weight.shape[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    padding = per_dimension(padding, rank)
    spatial = activation.shape[2:]
    if groups == 1 and kernel == spatial and not any(padding):
        # The kernel covers the whole map: a fully connected layer written as a convolution.
        every = ctx.options.first_fc == "all" or math.prod(spatial) == 1
        fully_connected(ctx, input, activation.flatten(1), weight.detach().flatten(1), every)
        return
    index = ops.conv_trace(
        activation,
        weight,
        ctx.points.index,
        ctx.points.negative,
        ctx.shape[-rank:],
        stride,
        padding,
        dilation,
        groups,
        ctx.options.location,
    )
    ctx.propagate(input, evidence_on(ctx, activation, replace(ctx.points, index=index, distinct=False)))


@rule("convolution", saves=["input"], weighted=True)
def convolution(
    ctx: TraceContext,
    input: Value,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> None:
    if transposed:
        _transposed(ctx, input, weight, stride, padding, dilation, output_padding, groups)
    else:
        conv(ctx, input, weight, bias, stride, padding, dilation, groups)


def _transposed(
    ctx: TraceContext,
    input: Value,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    groups: int,
) -> None:
    """Traces a transposed convolution: a convolution of the map with zeros between its pixels, by the turned kernel.

    A point that lands between pixels, as the center of a receptive field may, moves to the nearest one.
    """
    activation = _fixed_weights(ctx, input, weight)
    rank = weight.dim() - 2
    stride, padding, dilation = (per_dimension(value, rank) for value in (stride, padding, dilation))
    outside = per_dimension(output_padding, rank)
    spatial, kernel = activation.shape[2:], weight.shape[2:]
    # How far a kernel reaches beyond the map; where that is less than nothing, the map is cut.
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    cut = [max(0, -r) for r in reach]
    sizes = [(n - 1) * s + 1 + o for n, s, o in zip(spatial, stride, outside, strict=True)]
    spread = activation.new_zeros(*activation.shape[:2], *sizes)
    maps = (slice(None), slice(None))
    pixels = tuple(slice(0, (n - 1) * s + 1, s) for n, s in zip(spatial, stride, strict=True))
    spread[maps + pixels] = activation
    inside = spread[maps + tuple(slice(c, n - c) for c, n in zip(cut, sizes, strict=True))]
    # [I, O / groups, ...] to [O, I / groups, ...]
    turned = weight.detach().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(*range(2, rank + 2))
    index = ops.conv_trace(
        inside.contiguous(),
        turned.contiguous(),
        ctx.points.index,
        ctx.points.negative,
        ctx.shape[-rank:],
        [1] * rank,
        [max(0, r) for r in reach],
        dilation,
        groups,
        ctx.options.location,
    )
    image, channel, *at = unravel(index, inside.shape)
    pixel = [
        torch.div(a + c + s // 2, s, rounding_mode="floor").clamp(0, n - 1)
        for a, c, s, n in zip(at, cut, stride, spatial, strict=True)
    ]
    landed = ctx.points.to(torch.where(index < 0, index, ravel([image, channel, *pixel], activation.shape)))
    ctx.propagate(input, evidence_on(ctx, activation, landed))


def _scaled(ctx: TraceContext, input: Value, weight: Tensor | None, channel: Tensor) -> None:
    """Keeps the points; below a negative scale the evidence for a high output is a low input."""
    points = ctx.points
    ctx.propagate(input, points if weight is None else points.flip(weight.flatten()[channel] < 0))


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "group_norm")
def channel_norm(
    ctx: TraceContext, input: Value, second: Any, third: Any = None, fourth: Any = None, *rest: Any, **_: Any
) -> None:
    # `group_norm` takes the number of groups before its weight.
    weight = third if isinstance(second, int) else second
    _scaled(ctx, input, weight, unravel(ctx.points.index, ctx.shape)[1])


@rule("layer_norm", "rms_norm")
def layer_norm(
    ctx: TraceContext, input: Value, normalized_shape: Any, weight: Tensor | None = None, *rest: Any, **_: Any
) -> None:
    _scaled(ctx, input, weight, ctx.points.index % math.prod(normalized_shape))
