"""Multipliers of operations: `m` with `sum_i m_i (x_i - r_i) = f(x) - f(r)` between an image and a baseline.

x is the input of an operation for the image, and r its input for the baseline (Shrikumar et al., 2017). What
is linear needs neither and keeps the rule of the gradient.

=====================  ================================================================================================
operation              multiplier
=====================  ================================================================================================
of one tensor,         `(f(x) - f(r)) / (x - r)`, the rescale rule (Eq. 14); the derivative where both are equal
element by element
product                the gradient halfway between x and r, which is exact for products, of matrices too
quotient               a product with the reciprocal, which is elementwise
softmax, log-softmax   exponentials, the logarithm of their sum and an exponential, one after the other
normalisation          centring, squares, the root and a product, one after the other
attention              two products and a softmax
max-pool, maximum      the larger of both maxima is where the difference comes from
any other              the mean gradient on the straight line from r to x, by quadrature
=====================  ================================================================================================
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai.rules.dimensions import per_dimension, reduced
from pyfast_xai.rules.fused_attention import fused_attention
from pyfast_xai.rules.gradient.context import BackwardContext, has_gradient
from pyfast_xai.rules.gradient.derivative import node_device
from pyfast_xai.rules.normalization import normalization
from pyfast_xai.rules.precision import at_least_float32
from pyfast_xai.rules.rerun import usable, with_numbers
from pyfast_xai.tape import Node, Value, key
from pyfast_xai.tape.graph import argument

# Nodes of the quadrature for operations without a rule.
_STEPS = 16


class Both:
    """The numbers of a node's arguments for the image and for the baseline.

    Args:
        node: node of the image's recording.
        reference: the same operation of the baseline's.
    """

    def __init__(self, node: Node, reference: Node) -> None:
        self.node, self._reference = node, reference
        self._counterparts = {value.index: other for value, other in zip(node.inputs, reference.inputs, strict=True)}

    def __call__(self, value: Value) -> tuple[Tensor, Tensor]:
        """Returns the numbers of a value, of which those of one baseline may stand for all images."""
        other = self._counterparts[value.index]
        pair = self.node.saved[str(value.index)].tensor, self._reference.saved[str(other.index)].tensor
        return usable(pair[0]), usable(pair[1])

    def factor(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the numbers of an argument, which may be a constant."""
        recorded = argument(self.node, name)
        if isinstance(recorded, Value):
            return self(recorded)
        constants = (usable(argument(node, name)) for node in (self.node, self._reference))
        return tuple(constants)  # type: ignore[return-value]

    def run(self, numbers: Sequence[Tensor]) -> Any:
        """Runs the operation on other numbers for its floating-point arguments, one for each in order."""
        args, kwargs = with_numbers(self.node, numbers)
        with torch.autocast(node_device(self.node), enabled=False):
            return self.node.op(*args, **kwargs)


def quotient(change: Tensor, x: Tensor, r: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `change / (x - r)`; where the two are equal up to rounding, the derivative between them.

    Args:
        change: change of the result.
        x: numbers of the image.
        r: numbers of the baseline.
        slope: the derivative at a place.
    """
    way = x - r
    equal = way.abs() <= 16 * torch.finfo(way.dtype).eps * (1 + x.abs())
    # Of two that are -inf, as masked scores are, the difference is no number.
    ratio = torch.where(torch.isfinite(way), change / torch.where(equal, 1, way), 0)
    if way.device.type == "cpu" and not bool(equal.any()):
        return ratio
    return torch.where(equal, slope((x + r) / 2), ratio)


def elementwise(ctx: BackwardContext, both: Both) -> None:
    """Rescales by the change of the result over that of the input."""
    value = next(value for value in both.node.inputs if has_gradient(value))
    x, r = both(value)

    def function(tensor: Tensor) -> Tensor:
        result = both.run([tensor])
        return result[0] if isinstance(result, tuple) else result

    def slope(place: Tensor) -> Tensor:
        return derivative_at(function, place)

    ctx.propagate(value, ctx.grad * quotient(function(x) - function(r), x, r, slope))


def derivative_at(function: Callable[[Tensor], Tensor], place: Tensor) -> Tensor:
    """Returns the derivative of an elementwise function."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = place.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def path_gradients(ctx: BackwardContext, both: Both, places: Sequence[float], weights: Sequence[float]) -> None:
    """Takes the weighted sum of gradients at places between the baseline, 0, and the image, 1."""
    values = [value for value in both.node.inputs if has_gradient(value)]
    pairs = [both(value) for value in values]
    outputs = [(i, grad) for i, grad in enumerate(ctx.grads) if grad is not None]
    totals: list[list[Any]] = [[0.0] * len(values) for _ in range(len(ctx.grad))]
    for place, weight in zip(places, weights, strict=True):
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [(r + place * (x - r)).detach().requires_grad_() for x, r in pairs]
            result = both.run(leaves)
            results = result if isinstance(result, (list, tuple)) else (result,)
            for k, total in enumerate(totals):
                gradients = torch.autograd.grad(
                    [results[i] for i, _ in outputs],
                    leaves,
                    [grad[k].to(results[i]) for i, grad in outputs],
                    retain_graph=k + 1 < len(totals),
                    allow_unused=True,
                )
                for i, gradient in enumerate(gradients):
                    total[i] = total[i] + (0 if gradient is None else gradient * weight)
    for i, value in enumerate(values):
        if isinstance(totals[0][i], Tensor):
            ctx.propagate(value, torch.stack([total[i] for total in totals]))


def bilinear(ctx: BackwardContext, both: Both) -> None:
    """Takes the gradient halfway, which is exact for what is at most quadratic."""
    path_gradients(ctx, both, [0.5], [1.0])


def integrated(ctx: BackwardContext, both: Both) -> None:
    """Takes the mean gradient of an operation of any kind, by Gauss-Legendre quadrature."""
    places, weights = np.polynomial.legendre.leggauss(_STEPS)
    path_gradients(ctx, both, [float(item) for item in (places + 1) / 2], [float(item) for item in weights / 2])


def division(ctx: BackwardContext, both: Both) -> None:
    """Takes a quotient as a product with the reciprocal."""
    (a, a_r), (b, b_r) = both.factor("self"), both.factor("other")
    ctx.propagate(argument(both.node, "self"), ctx.grad * ((1 / b + 1 / b_r) / 2))
    ctx.propagate(argument(both.node, "other"), ctx.grad * (-(a + a_r) / 2 / (b * b_r)))


def softmax_multiplied(grad: Tensor, x: Tensor, r: Tensor, dim: int, *, log: bool = False) -> Tensor:
    """Returns the multipliers at the inputs of a softmax, from those at its results, `[K, *x]`.

    The logarithm of a softmax is `x - L` with `L = log(sum(exp(x)))`, of which the logarithm and the exponentials are
    rescaled; all in quotients by the larger of both sums, so that nothing overflows.

    Args:
        grad: `[K, *shape]`.
        x: numbers of the image.
        r: numbers of the baseline.
        dim: dimension of the sum, counted from the end.
        log: True for the logarithm of the softmax.
    """
    z, z_r = x.log_softmax(dim), r.log_softmax(dim)
    y, y_r = z.exp(), z_r.exp()
    if not log:
        grad = grad * quotient(y - y_r, z, z_r, torch.exp)
    change = x.logsumexp(dim, keepdim=True) - r.logsumexp(dim, keepdim=True)
    smaller = (-change.abs()).exp()
    # The change of a sum over that of its logarithm, in units of the larger sum.
    of_log = torch.where(change == 0, 1, change.abs() / -torch.expm1(-change.abs()))
    grows = change >= 0
    each = torch.where(grows, y - y_r * smaller, y * smaller - y_r)
    each = quotient(each, x, r, lambda place: torch.where(grows, y, y_r))
    return grad - grad.sum(dim, keepdim=True) * of_log * each


def softmax(ctx: BackwardContext, both: Both) -> None:
    """Takes a softmax apart, or its logarithm."""
    value = both.node.inputs[0]
    x, r = both(value)
    dim = both.node.args[1]
    from_the_end = dim - x.dim() if dim >= 0 else dim
    log = "log" in key(both.node.op)
    ctx.propagate(value, softmax_multiplied(ctx.grad, x, r, from_the_end, log=log))


def normalized(ctx: BackwardContext, both: Both) -> None:
    """Takes a normalisation apart: `y = c v ** -1/2` with `c = x - mean(x)` and `v = mean(c ** 2) + epsilon`."""
    value, norm = both.node.inputs[0], normalization(both.node)
    x, r = both(value)
    c, c_r = norm.centered(x), norm.centered(r.expand(x.shape))
    v, v_r = norm.variance(c), norm.variance(c_r)
    root, root_r = v.sqrt(), v_r.sqrt()
    grad = ctx.grads[0] if ctx.grads[0] is not None else torch.zeros_like(ctx.grad)
    grad = at_least_float32(grad if norm.weight is None else grad * norm.weight)
    grad = grad.reshape(len(grad), *norm.shape)
    axes = tuple(axis + 1 for axis in norm.axes)
    between = (c + c_r) / 2
    count = math.prod(norm.shape[axis] for axis in norm.axes)
    by_spread = (grad * between).sum(axes, keepdim=True) * (-1 / (root * root_r * (root + root_r)))
    at_centered = grad * ((1 / root + 1 / root_r) / 2) + by_spread * (2 * between / count)
    if norm.centers:
        at_centered = at_centered - at_centered.mean(axes, keepdim=True)
    ctx.propagate(value, at_centered.reshape(len(grad), *value.shape))


def attention(ctx: BackwardContext, both: Both) -> None:
    """Takes fused attention apart: two products and a softmax."""
    node = both.node
    (q, q_r), (k, k_r), (v, v_r) = (both.factor(name) for name in ("query", "key", "value"))
    fused = fused_attention(node, q, k)
    scores, scores_r = fused.scores(q, k), fused.scores(q_r, k_r)
    between = (fused.softmax(scores) + fused.softmax(scores_r)) / 2
    if fused.bias is not None:
        scores, scores_r = scores + fused.bias, scores_r + fused.bias
    grad = at_least_float32(ctx.grad)
    ctx.propagate(argument(node, "value"), _summed(between.mT @ grad, fused.groups))
    at_weights = grad @ fused.each_head((v + v_r) / 2).mT
    at_scores = softmax_multiplied(at_weights, scores, scores_r, -1) * fused.scale
    ctx.propagate(argument(node, "query"), at_scores @ fused.each_head((k + k_r) / 2))
    ctx.propagate(argument(node, "key"), _summed(at_scores.mT @ ((q + q_r) / 2), fused.groups))


def _summed(grad: Tensor, groups: int) -> Tensor:
    """Returns the sum over the heads that read the same keys and values."""
    return grad if groups == 1 else grad.unflatten(-3, (-1, groups)).sum(-3)


# Maxima


def larger(ctx: BackwardContext, both: Both) -> None:
    """Takes the larger of two tensors as `b + max(a - b, 0)`, and the smaller as `a - max(a - b, 0)`."""
    (a, a_r), (b, b_r) = both.factor("self"), both.factor("other")
    above = quotient(
        (a - b).clamp_min(0) - (a_r - b_r).clamp_min(0), a - b, a_r - b_r, lambda place: (place > 0).to(place.dtype)
    )
    first = above if "max" in key(both.node.op) else 1 - above
    ctx.propagate(argument(both.node, "self"), ctx.grad * first)
    ctx.propagate(argument(both.node, "other"), ctx.grad * (1 - first))


def max_pool(ctx: BackwardContext, both: Both) -> None:
    """Gives the change of a maximum to where the larger of both maxima lies."""
    value = both.node.inputs[0]
    x, r = both(value)
    r = r.expand(x.shape)
    (result, places), (result_r, places_r) = _pooled(both.node, x), _pooled(both.node, r)
    rank = _rank(both.node)
    flat = [tensor.flatten(-rank) for tensor in (ctx.grad, x, r, result, result_r, places, places_r)]
    ctx.propagate(value, _shared(*flat).view(len(ctx.grad), *x.shape))


def _rank(node: Node) -> int:
    """Returns the number of dimensions that a max-pool is over."""
    return int(key(node.op).split("pool")[1][0])


def _pooled(node: Node, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the maxima and their places in the flattened dimensions that are pooled."""
    name = key(node.op).removeprefix("aten::").removesuffix("_with_indices")
    function: Callable[..., Any] = getattr(functional, name)
    if name.startswith("adaptive"):
        return function(x, per_dimension(node.args[1], _rank(node)), return_indices=True)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    settings = {name: argument(node, name) for name in names}
    settings["stride"] = settings["stride"] or None
    return function(x, **settings, return_indices=True)


def _shared(
    grad: Tensor, x: Tensor, r: Tensor, result: Tensor, result_r: Tensor, places: Tensor, places_r: Tensor
) -> Tensor:
    """Returns the multipliers at the inputs, `[K, *x]`, of maxima over the last dimension, `[K, ..., M]`."""
    chosen = torch.where(result >= result_r, places, places_r)
    share = quotient(result - result_r, x.gather(-1, chosen), r.gather(-1, chosen), torch.ones_like)
    total = grad.new_zeros(len(grad), *x.shape)
    return total.scatter_add_(-1, chosen.expand(grad.shape), grad * share)


def extreme(ctx: BackwardContext, both: Both) -> None:
    """Gives the change of a maximum or minimum over dimensions to where the more extreme of both lies."""
    value, node = both.node.inputs[0], both.node
    x, r = both(value)
    sign = 1 if "max" in key(node.op) else -1
    dims = reduced(node.args[1] if len(node.args) > 1 else None, x.dim())
    order = [d for d in range(x.dim()) if d not in dims] + dims
    back = sorted(range(x.dim()), key=order.__getitem__)
    shape = x.permute(order).shape
    x, r = (sign * tensor.expand(x.shape).permute(order).flatten(-len(dims)) for tensor in (x, r))
    largest, largest_r = x.max(-1, keepdim=True), r.max(-1, keepdim=True)
    grad = ctx.grad.reshape(len(ctx.grad), *largest.values.shape)
    total = _shared(grad, x, r, largest.values, largest_r.values, largest.indices, largest_r.indices)
    ctx.propagate(value, total.view(len(grad), *shape).permute(0, *[d + 1 for d in back]))
