"""Layers with weights: their adjoints need the weight and the geometry, and no activation."""

import math
from typing import Any

import torch
from torch import Tensor

from pyfast_xai import onednn
from pyfast_xai.rules.response import subpixel
from pyfast_xai.rules.response.step import Step
from pyfast_xai.rules.response.table import rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.nodes import find

aten = torch.ops.aten


def _not_only_input(node: Node) -> bool:
    """Whether something besides the first argument depends on the inputs of the model."""
    return not isinstance(node.args[0], Value) or len(node.inputs) != 1


def _listed(value: int | list[int] | tuple[int, ...], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _unbatched(node: Node) -> bool:
    return _not_only_input(node) or len(node.args[0].shape) != node.args[1].dim() or isinstance(_padding(node), str)


def _padding(node: Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)


@rule("conv1d", "conv2d", "conv3d", unless=_unbatched)
def _conv(
    step: Step,
    input: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    rank = weight.dim() - 2
    _convolution(
        step, input, weight, bias, stride, padding, dilation, transposed=False, output_padding=[0] * rank, groups=groups
    )


@rule("convolution", "_convolution", unless=_unbatched)
def _convolution(
    step: Step,
    input: Value,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *flags: bool,
) -> None:
    rank = weight.dim() - 2
    stride, padding, dilation = (_listed(value, rank) for value in (stride, padding, dilation))
    grad = step.grad.flatten(0, 1)
    # Rows that the last window did not reach.
    rest = [0] * rank
    if not transposed:
        for d in range(rank):
            reached = (grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1
            rest[d] = input.shape[2 + d] - reached
    weight = weight.detach()
    # The adjoint of a convolution is the transposed convolution, and the other way round.
    if not transposed and subpixel.takes(grad, weight, stride, dilation, groups):
        grad = subpixel.adjoint(grad, weight, stride, padding, input.shape[2:])
    elif step.node.adjoint is not None:
        grad = step.node.adjoint(grad, rest)
    elif not transposed and onednn.is_passed_over(grad, weight, stride):
        grad = onednn.transposed_convolution(grad, weight, padding, rest, stride, dilation, groups)
    else:
        grad = aten.convolution(grad, weight, None, stride, padding, dilation, not transposed, rest, groups)
    step.send(input, grad.unflatten(0, (-1, input.shape[0])))


@rule("linear", unless=_not_only_input)
def _linear(step: Step, input: Value, weight: Tensor, bias: Tensor | None = None) -> None:
    step.send(input, onednn.linear(step.grad, weight.detach().mT))


@rule("mm", "matmul", unless=lambda node: _not_only_input(node) or node.args[1].dim() != 2)
def _mm(step: Step, input: Value, weight: Tensor) -> None:
    step.send(input, onednn.linear(step.grad, weight.detach()))


def _weighs(node: Node) -> bool:
    """Whether the second factor of an `addmm` depends on the inputs."""
    return not isinstance(node.args[1], Value) or isinstance(node.args[2], Value)


@rule("addmm", unless=_weighs)
def _addmm(step: Step, bias: Any, input: Value, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    step.send(bias, step.grad if beta == 1 else step.grad * beta)
    grad = onednn.linear(step.grad, weight.detach())
    step.send(input, grad if alpha == 1 else grad * alpha)


def _factors(node: Node) -> list[str]:
    """Of a product of two, each is needed for the gradient of the other."""
    names = [argument.name for argument in node.op._schema.arguments]
    return [names[1 - i] for i in range(2) if isinstance(node.args[i], Value) and isinstance(node.args[1 - i], Value)]


def factor(step: Step, argument: Any, name: str) -> Any:
    """The numbers of a factor: of a constant as it is on the tape, else what was saved."""
    if isinstance(argument, Value):
        return step.tensor(name)
    return argument.detach() if isinstance(argument, Tensor) else argument


@rule("bmm", saves=_factors)
def _bmm(step: Step, self: Any, mat2: Any) -> None:
    if step.wants(self):
        step.send(self, step.grad @ factor(step, mat2, "mat2").mT)
    if step.wants(mat2):
        step.send(mat2, factor(step, self, "self").mT @ step.grad)


def _in_training(node: Node) -> bool:
    statistics = node.args[5] if len(node.args) > 5 else True
    return bool(statistics) or len(find(Value, node.args, node.kwargs)) != 1


@rule("batch_norm", unless=_in_training)
def _batch_norm(
    step: Step,
    input: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *flags: bool,
) -> None:
    scales = [torch.rsqrt(var + eps)]
    if weight is not None:
        scales.append(weight)
    if input.dtype != torch.float64:  # there, one multiplication rounds otherwise than the two of autograd
        scales = [math.prod(scales[1:], start=scales[0])]
    grad, ours = step.grad, step.exclusive
    for scale in scales:
        scale = scale.to(grad.dtype).view(-1, *[1] * (len(input.shape) - 2))
        grad, ours = (grad.mul_(scale) if ours else grad * scale), True
    step.send(input, grad)
