"""Layers with weights: convolution, fully connected, and the normalisations that may turn a point's sign."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyfast_xai import ops
from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.ops import Location
from pyfast_xai.rules.evidence.backward import Step, rule, weighted
from pyfast_xai.rules.evidence.points import Points, gather, marks, noted, unravel
from pyfast_xai.tape import Value

# Elements of a weight that are compared to see that its packed signs are still those of the weight.
_SAMPLE = 4096
_sign_bits = WeakTensorKeyDictionary()  # weight -> (version, sample, bits)


def sign_bits(step: Step, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The packed signs of a weight `[O, I]`, kept for as long as the weight lives and stays as it is.

    A change is noticed by the tensor's version and by a strided sample of its elements (for changes through `.data`,
    which leave the version alone). On a device a sample cannot be looked at without waiting: there they are packed in
    every walk.
    """
    if marks(weight):
        return step.sign_bits(weight)
    version = None if weight.is_inference() else weight._version
    sample = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLE)].clone()
    known = _sign_bits.get(weight)
    if known is not None and known[0] == version and torch.equal(known[1], sample):
        return known[2]
    bits = ops.sign_bits(weight)
    _sign_bits[weight] = (version, sample, bits)
    return bits


def contributions(step: Step, activation: Tensor, weight: Tensor, points: Tensor, negative: Tensor | None) -> Points:
    """Algorithm 1 on activations `[R, I]` and a weight `[O, I]`: all that contributes to points `[P]` on `[R, O]`."""
    rows, features = activation.shape
    capacity = min(rows, len(points)) * features if marks(points) else None
    index = ops.linear_trace(activation, *sign_bits(step, weight), points, negative, capacity)
    return evidence_on(step, activation, Points(index, distinct=True))


def fully_connected(step: Step, input: Value, activation: Tensor, weight: Tensor, every: bool) -> None:
    """Activations `[..., I]` and a weight `[O, I]`: all positive contributions, or the largest."""
    rows = activation.reshape(-1, activation.shape[-1])
    points = step.points
    if every:
        step.send(input, contributions(step, rows, weight, points.index, points.negative))
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
    step.send(input, evidence_on(step, rows, replace(points, index=index, distinct=False)))


def evidence_on(step: Step, activation: Tensor, points: Points) -> Points:
    """Points on what a layer read; a negative activation counts by being low, where signs are followed."""
    negative = noted(gather(activation, points.index) < 0) if step.options.signed else None
    return replace(points, negative=negative, start=False)


def _flattened_map(step: Step, value: Value) -> bool:
    """Whether a vector is a map with height and width, laid out in a row."""
    while (producer := step.producer(value)) is not None and producer.inputs and not weighted(producer):
        before = producer.inputs[0]
        if before.numel != value.numel:
            return False
        if len(before.shape) > 2 >= len(value.shape):
            return math.prod(before.shape[2:]) > 1
        value = before
    return False


def _every(step: Step, input: Value, rows: int) -> bool:
    """Whether all positive contributions to a neuron of a fully connected layer are its evidence."""
    if step.points.start or rows == step.batch:
        return step.options.first_fc == "all" or not _flattened_map(step, input)
    # One of many tokens: a 1x1 convolution in all but name.
    return False


@rule("linear", saves=["input"])
def linear(step: Step, input: Value, weight: Tensor, bias: Any = None) -> None:
    if not isinstance(input, Value) or isinstance(weight, Value):
        raise UnsupportedOpError(f"CNN-Fixations traces linear layers with fixed weights only, not {step.node.name!r}")
    activation = step.tensor("input")
    rows = activation.numel() // activation.shape[-1]
    fully_connected(step, input, activation, weight, _every(step, input, rows))


@rule("mm", saves=["self"])
def mm(step: Step, self: Value, mat2: Tensor) -> None:
    if isinstance(mat2, Value) or not isinstance(self, Value):
        raise UnsupportedOpError(f"CNN-Fixations traces products with fixed weights only, not {step.node.name!r}")
    activation = step.tensor("self")
    fully_connected(step, self, activation, mat2.t(), _every(step, self, len(activation)))


@rule("addmm", saves=["mat1"])
def addmm(step: Step, self: Any, mat1: Value, mat2: Tensor, **scales: Any) -> None:
    if isinstance(mat2, Value) or not isinstance(mat1, Value):
        raise UnsupportedOpError(f"CNN-Fixations traces products with fixed weights only, not {step.node.name!r}")
    activation = step.tensor("mat1")
    fully_connected(step, mat1, activation, mat2.t(), _every(step, mat1, len(activation)))


def _expand(value: Any, rank: int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * rank if len(given) == 1 else given


@rule("conv1d", "conv2d", "conv3d", saves=["input"])
def conv(
    step: Step,
    input: Value,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    if not isinstance(input, Value) or isinstance(weight, Value):
        raise UnsupportedOpError(f"CNN-Fixations traces convolutions with fixed weights only, not {step.node.name!r}")
    activation = step.tensor("input")
    rank = weight.dim() - 2
    stride, dilation = _expand(stride, rank), _expand(dilation, rank)
    kernel = weight.shape[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    padding = _expand(padding, rank)
    spatial = activation.shape[2:]
    if groups == 1 and kernel == spatial and not any(padding):
        # The kernel covers the whole map: a fully connected layer written as a convolution.
        every = step.options.first_fc == "all" or math.prod(spatial) == 1
        fully_connected(step, input, activation.flatten(1), weight.detach().flatten(1), every)
        return
    index = ops.conv_trace(
        activation,
        weight,
        step.points.index,
        step.points.negative,
        step.shape[2:],
        stride,
        padding,
        dilation,
        groups,
        step.options.location,
    )
    step.send(input, evidence_on(step, activation, replace(step.points, index=index, distinct=False)))


@rule("convolution", saves=["input"])
def convolution(
    step: Step,
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
        raise UnsupportedOpError(
            f"CNN-Fixations has no evidence rule for transposed convolutions (aten::convolution), which ran in "
            f"{step.node.path or 'the model'!r} (operation {step.node.name!r}); start before it (start=), stop "
            f"behind it (at=), or register a rule with pyfast_xai.rules.evidence.rule"
        )
    conv(step, input, weight, bias, stride, padding, dilation, groups)


def _scaled(step: Step, input: Value, weight: Tensor | None, channel: Tensor) -> None:
    """Identity; below a negative scale the evidence for a high output is a low input."""
    points = step.points
    step.send(input, points if weight is None else points.flip(weight.flatten()[channel] < 0))


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "group_norm")
def channel_norm(step: Step, input: Value, second: Any, third: Any = None, fourth: Any = None, *rest: Any, **_: Any):
    # `group_norm` takes the number of groups before its weight.
    weight = third if isinstance(second, int) else second
    _scaled(step, input, weight, unravel(step.points.index, step.shape)[1])


@rule("layer_norm", "rms_norm")
def layer_norm(step: Step, input: Value, normalized_shape: Any, weight: Tensor | None = None, *rest: Any, **_: Any):
    _scaled(step, input, weight, step.points.index % math.prod(normalized_shape))
