"""One operation as a map that rules take apart: its inputs, its weights, and the adjoint of what it does with them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.rules.gradient.context import has_gradient
from pyfast_xai.rules.gradient.derivative import node_device
from pyfast_xai.rules.gradient.strides import canonical
from pyfast_xai.rules.kinds import PRODUCTS
from pyfast_xai.rules.normalization import normalization
from pyfast_xai.rules.precision import at_least_float32, outside_inference_mode
from pyfast_xai.rules.rerun import usable, with_numbers
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.graph import argument, find, substitute

# Changes a weight or a bias, for example to its positive part.
Modify = Callable[[Tensor], Tensor]
Adjoint = Callable[[Tensor], list[Tensor]]
Forward = Callable[[list[Tensor], Modify, Modify | None], Tensor]


def unchanged(weight: Tensor) -> Tensor:
    """Returns a weight as it is."""
    return weight


def positive_part(weight: Tensor) -> Tensor:
    """Returns `max(weight, 0)`."""
    return weight.clamp_min(0)


def negative_part(weight: Tensor) -> Tensor:
    """Returns `min(weight, 0)`."""
    return weight.clamp_max(0)


@dataclass
class OperationMap:
    """An operation of the tape, run again on its recorded inputs.

    Attributes:
        name: name of the operation, for messages.
        values: those of its arguments that relevance goes to.
        inputs: their numbers, in float32 or more.
        device: its type.
        forward: does what the operation does, of inputs, with weights that one function changes and a bias that another
            does; None for no bias.
    """

    name: str
    values: list[Value]
    inputs: list[Tensor]
    device: str
    forward: Forward

    def run(
        self, inputs: Sequence[Tensor], modify: Modify = unchanged, *, bias: bool | Modify = True
    ) -> tuple[Tensor, Adjoint]:
        """Returns the result on some inputs, and its adjoint: of `[K, *result]`, `[K, *input]` for each input.

        Args:
            inputs: tensors of the shapes of `inputs`.
            modify: applied to the weight and to the bias.
            bias: False to leave the bias out, or what is applied to it instead.
        """
        of_bias = (modify if bias else None) if isinstance(bias, bool) else bias
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device, enabled=False):
            leaves = [outside_inference_mode(tensor).detach().requires_grad_() for tensor in inputs]
            result = self.forward(leaves, modify, of_bias)

        def adjoint(share: Tensor) -> list[Tensor]:
            gradients = [torch.autograd.grad(result, leaves, canonical(seed), retain_graph=True) for seed in share]
            return [parts[0][None] if len(parts) == 1 else torch.stack(parts) for parts in zip(*gradients, strict=True)]

        return result.detach(), adjoint

    def signed(self, same: Modify, opposite: Modify, *, bias: bool = True) -> tuple[Tensor, Adjoint]:
        """Returns the sum of what contributes with one sign, and how shares of it become relevance of the inputs.

        Args:
            same: makes the weights and the bias that positive inputs meet.
            opposite: makes the weights that negative inputs meet.
            bias: False to leave the bias out.
        """
        if self.not_negative:
            total, back = self.run(self.inputs, same, bias=bias)
            return total, lambda share: times(self.inputs, back(share))
        above = [tensor.clamp_min(0) for tensor in self.inputs]
        total, back = self.run(above, same, bias=bias)
        below = [tensor.clamp_max(0) for tensor in self.inputs]
        rest, back_below = self.run(below, opposite, bias=False)
        return total + rest, lambda share: added(times(above, back(share)), times(below, back_below(share)))

    @functools.cached_property
    def not_negative(self) -> bool:
        """Returns whether all inputs are known to be zero or larger; on a CPU they are looked at."""
        return self.device == "cpu" and all(not tensor.numel() or bool(tensor.amin() >= 0) for tensor in self.inputs)


def times(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns the products of inputs and gradients `[K, *input]`."""
    return [input * gradient for input, gradient in zip(inputs, gradients, strict=True)]


def added(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sums of two lists of tensors."""
    return [one + other for one, other in zip(first, second, strict=True)]


def operation_map(node: Node, kind: str, norm: Node | None = None, output: int = 0) -> OperationMap:
    """Returns an operation as a map.

    Args:
        node: recorded by `RelevanceRules`.
        kind: kind of the operation.
        norm: the batch norm behind it, which becomes part of it.
        output: which of its results.
    """
    recorded: list[Value] = [value for value in find(Value, node.args, node.kwargs) if has_gradient(value)]
    inputs = [at_least_float32(node.saved[str(value.index)].tensor) for value in recorded]
    forward = _FORWARDS.get(kind, _itself)(node, norm, output)
    return OperationMap(node.name, recorded, inputs, node_device(node), forward)


def _fixed(node: Node, modify: Modify) -> None:
    if modify is not unchanged:
        raise InputError(
            f"composite must give {node.name!r} ({key(node.op)}) a rule that leaves weights as they are, such as "
            f"Epsilon, Norm, Pass or Gradient, got one that changes them"
        )


def _itself(node: Node, norm: Node | None, output: int) -> Forward:
    def forward(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        _fixed(node, modify)
        args, kwargs = with_numbers(node, leaves)
        result = node.op(*args, **kwargs)
        return result[output] if isinstance(result, (list, tuple)) else result

    return forward


def _pool(node: Node, norm: Node | None, output: int) -> Forward:
    """Returns a map whose weights are all of one size, for which one stands."""
    itself = _itself(node, norm, output)
    return lambda leaves, modify, of_bias: itself(leaves, unchanged, of_bias) * modify(leaves[0].new_ones(()))


def _sum(node: Node, norm: Node | None, output: int) -> Forward:
    first, second = node.args[0], node.args[1]
    alpha = argument(node, "alpha")
    name = key(node.op)
    weights = {"aten::add": (1, alpha), "aten::sub": (1, -alpha), "aten::rsub": (-alpha, 1)}[name]

    def forward(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        following = iter(leaves)
        total: Any = 0
        for term, weight in zip((first, second), weights, strict=True):
            if isinstance(term, Value):
                total = total + next(following) * modify(leaves[0].new_tensor(weight))
            elif of_bias is not None:
                constant = usable(term) if isinstance(term, Tensor) else leaves[0].new_tensor(term)
                total = total + of_bias((constant * weight).to(leaves[0]))
        return total

    return forward


def _batch_norm(node: Node, norm: Node | None, output: int) -> Forward:
    scale, shift = batch_norm_map(node)

    def forward(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        shape = [-1] + [1] * (leaves[0].dim() - 2)
        result = leaves[0] * modify(scale.to(leaves[0])).view(shape)
        return result if of_bias is None else result + of_bias(shift.to(leaves[0])).view(shape)

    return forward


def batch_norm_map(node: Node) -> tuple[Tensor, Tensor]:
    """Returns the scale and the shift of each channel by a batch norm in evaluation mode, in float64."""
    mean, variance = (argument(node, name).detach().double() for name in ("running_mean", "running_var"))
    weight, bias = argument(node, "weight"), argument(node, "bias")
    scale = torch.rsqrt(variance + argument(node, "eps"))
    scale = scale if weight is None else scale * weight.detach()
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.detach()


def _normalization(node: Node, norm: Node | None, output: int) -> Forward:
    """Returns the map with the spread of its input as a constant (AttnLRP, section 3.3.2; Ali et al., 2022)."""
    settings = normalization(node)

    def forward(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        _fixed(node, modify)
        centered = settings.centered(leaves[0])
        result = (centered / settings.variance(centered.detach()).sqrt()).reshape(leaves[0].shape)
        result = result if settings.weight is None else result * usable(settings.weight)
        return result if settings.bias is None or of_bias is None else result + of_bias(usable(settings.bias))

    return forward


def _layer(node: Node, norm: Node | None, output: int) -> Forward:
    weight, bias = (argument(node, name) for name in ("weight", "bias"))
    weight = usable(weight)
    shift = None if bias is None else usable(bias)
    if norm is not None:
        scale, offset = batch_norm_map(norm)
        shape = [1] * weight.dim()
        shape[_outputs(node)] = -1
        moved = offset if shift is None else shift.double() * scale + offset
        weight, shift = weight * scale.to(weight).view(shape), moved.to(weight)
    more, kwargs = substitute(Tensor, usable, node.args[3:], node.kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("weight", "bias")}

    def forward(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        changed = None if shift is None or of_bias is None else of_bias(shift)
        return node.op(leaves[0], modify(weight), changed, *more, **kwargs)

    return forward


def _outputs(node: Node) -> int:
    """Returns the dimension of a weight that belongs to the outputs."""
    return 1 if is_transposed(node) else 0


def is_transposed(node: Node) -> bool:
    """Returns whether an operation is a transposed convolution."""
    name = key(node.op)
    return "transpose" in name or (name in ("aten::convolution", "aten::_convolution") and node.args[6])


def _matrix(node: Node, norm: Node | None, output: int) -> Forward:
    if key(node.op) not in PRODUCTS:
        return _layer(node, norm, output)
    names = PRODUCTS[key(node.op)]
    left, right = (argument(node, name) for name in names)
    constant = usable(left if isinstance(left, Tensor) else right)
    has_bias = key(node.op) in ("aten::addmm", "aten::baddbmm")

    def forward(leaves: list[Tensor], modify: Modify, of_bias: Modify | None) -> Tensor:
        weight = modify(constant)
        result = weight @ leaves[0] if isinstance(left, Tensor) else leaves[0] @ weight
        if not has_bias:
            return result
        result = result * argument(node, "alpha")
        beta, shift = argument(node, "beta"), argument(node, "self")
        return result + of_bias(beta * usable(shift)) if of_bias is not None and beta else result

    return forward


_FORWARDS: dict[str, Callable[[Node, Node | None, int], Forward]] = {
    "convolution": _layer,
    "linear": _matrix,
    "batch_norm": _batch_norm,
    "normalization": _normalization,
    "sum": _sum,
    "pool": _pool,
}
