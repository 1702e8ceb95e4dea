"""Layers with weights: their adjoints need the weight and the geometry, and no activation."""

from typing import Any

import torch
from torch import Tensor

from pyfast_xai import onednn
from pyfast_xai.rules.dimensions import per_dimension
from pyfast_xai.rules.gradient import subpixel
from pyfast_xai.rules.gradient.context import BackwardContext
from pyfast_xai.rules.gradient.strides import canonical
from pyfast_xai.rules.gradient.table import rule
from pyfast_xai.tape import Node, Value
from pyfast_xai.tape.graph import parameters

aten = torch.ops.aten

# By name, the arguments of a product that are its factors.
PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "matmul": ("self", "other"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}


def _not_only_input(node: Node) -> bool:
    """Returns whether something besides the first argument depends on the inputs of the model."""
    return not isinstance(node.args[0], Value) or len(node.inputs) != 1


def _differs_from_adjoint(node: Node) -> bool:
    """Returns whether the transposed convolution does not take the arguments: maps without a batch, complex numbers."""
    if _not_only_input(node) or isinstance(_padding(node), str):
        return True
    return len(node.args[0].shape) != node.args[1].dim() or node.args[0].dtype.is_complex


def _padding(node: Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)


@rule("conv1d", "conv2d", "conv3d", unless=_differs_from_adjoint)
def _conv(
    ctx: BackwardContext,
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
        ctx, input, weight, bias, stride, padding, dilation, transposed=False, output_padding=[0] * rank, groups=groups
    )


@rule("convolution", "_convolution", unless=_differs_from_adjoint)
def _convolution(
    ctx: BackwardContext,
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
    stride, padding, dilation = (per_dimension(value, rank) for value in (stride, padding, dilation))
    grad = canonical(ctx.grad.flatten(0, 1))
    size, kernel = input.shape[2:], tuple(weight.shape)[2:]
    # Rows that the last window did not reach.
    rest = [0] * rank
    if not transposed:
        for d, extent in enumerate(tuple(grad.shape)[2:]):
            rest[d] = size[d] - ((extent - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + 1)
    weight = weight.detach()
    if not transposed and size == kernel == (1, 1) and groups == 1 and not any(padding):
        # Squeezed to one pixel, as gates of channels are: a product of matrices, for which no weight is laid out anew.
        product = onednn.linear(grad.flatten(1), weight.flatten(1).mH)
        ctx.propagate(input, product.view(len(ctx.grad), *input.shape))
        return
    # The adjoint of a convolution is the transposed convolution, and the other way round.
    if not transposed and subpixel.takes(grad, weight, stride, dilation, groups):
        result: Tensor | None = subpixel.adjoint(grad, weight, stride, padding, size)
    else:
        result = None if ctx.node.adjoint is None else ctx.node.adjoint(grad, rest)
    if result is None and not transposed and onednn.is_passed_over(grad, weight, stride):
        result = onednn.transposed_convolution(grad, weight, padding, rest, stride, dilation, groups)
    if result is None:
        result = aten.convolution.default(grad, weight, None, stride, padding, dilation, not transposed, rest, groups)
    ctx.propagate(input, result.view(len(ctx.grad), *input.shape))


@rule("linear", unless=_not_only_input)
def _linear(ctx: BackwardContext, input: Value, weight: Tensor, bias: Tensor | None = None) -> None:
    ctx.propagate(input, onednn.linear(ctx.grad, weight.detach().mH))


def _is_not_matrix(node: Node) -> bool:
    return _not_only_input(node) or len(node.args[1].shape) != 2


@rule("mm", unless=_is_not_matrix)
def _mm(ctx: BackwardContext, input: Value, weight: Tensor) -> None:
    ctx.propagate(input, onednn.linear(ctx.grad, weight.detach().conj()))


def _weighs(node: Node) -> bool:
    """Returns whether the second factor of an `addmm` depends on the inputs."""
    return not isinstance(node.args[1], Value) or isinstance(node.args[2], Value)


@rule("addmm", unless=_weighs)
def _addmm(ctx: BackwardContext, bias: Any, input: Value, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    ctx.propagate(bias, ctx.grad if beta == 1 else ctx.grad * conjugate(beta))
    grad = onednn.linear(ctx.grad, weight.detach().conj())
    ctx.propagate(input, grad if alpha == 1 else grad * conjugate(alpha))


def _factors(node: Node) -> list[str]:
    """Returns the factors to save: the gradient of one factor needs the other."""
    names = list(parameters(node.op))
    return [names[1 - i] for i in range(2) if isinstance(node.args[i], Value) and isinstance(node.args[1 - i], Value)]


def factor(ctx: BackwardContext, argument: Any, name: str) -> Any:
    """Returns the numbers of a factor: the constant on the tape, otherwise the saved tensor."""
    if isinstance(argument, Value):
        return ctx.tensor(name)
    return argument.detach() if isinstance(argument, Tensor) else argument


def conjugate(number: Any) -> Any:
    """Returns the conjugate of a tensor or number, by which a gradient passes a product; of a real one, itself."""
    return number.conj() if isinstance(number, Tensor) else number.conjugate()


def _is_not_batched(node: Node) -> bool:
    """Returns whether a factor is a vector, or several are complex matrices, which autograd sums in another order."""
    if any(len(argument.shape) < 2 for argument in node.args[:2]):
        return True
    return node.inputs[0].dtype.is_complex and _is_not_matrix(node)


@rule("matmul", saves=_factors, unless=_is_not_batched)
def _matmul(ctx: BackwardContext, self: Any, other: Any) -> None:
    if isinstance(self, Value) and isinstance(other, Tensor) and other.dim() == 2:
        _mm(ctx, self, other)
        return
    if ctx.wants(self):
        ctx.propagate(self, _product(ctx.grad, factor(ctx, other, "other").mH))
    if ctx.wants(other):
        ctx.propagate(other, _product(factor(ctx, self, "self").mH, ctx.grad))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns the product of a factor with gradients `[K, ...]`, either of which may be on the left.

    The gradient of one target by a matrix is one product of matrices, as in autograd: some processors add up a batch
    of one in another order.
    """
    grad = max(left, right, key=Tensor.dim)
    if grad.dim() == 3 and left.dim() != right.dim() and len(grad) == 1:
        return torch.mm(left.view(left.shape[-2:]), right.view(right.shape[-2:]))[None]
    return left @ right


@rule("bmm", saves=_factors)
def _bmm(ctx: BackwardContext, self: Any, mat2: Any) -> None:
    if ctx.wants(self):
        ctx.propagate(self, ctx.grad @ factor(ctx, mat2, "mat2").mH)
    if ctx.wants(mat2):
        ctx.propagate(mat2, factor(ctx, self, "self").mH @ ctx.grad)


def _in_training(node: Node) -> bool:
    statistics = node.args[5] if len(node.args) > 5 else True
    return bool(statistics) or len(node.inputs) != 1


@rule("batch_norm", unless=_in_training)
def _batch_norm(
    ctx: BackwardContext,
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
    channels = (-1, *(1,) * (len(input.shape) - 2))
    scale = torch.rsqrt(var + eps)
    if weight is None or input.dtype == torch.float64:  # there, one multiplication rounds otherwise than autograd's two
        grad = ctx.scaled(scale.to(ctx.grad.dtype).view(channels))
        if weight is not None:
            grad.mul_(weight.to(grad.dtype).view(channels))
    else:
        grad = ctx.scaled((scale * weight).to(ctx.grad.dtype).view(channels))
    ctx.propagate(input, grad)
