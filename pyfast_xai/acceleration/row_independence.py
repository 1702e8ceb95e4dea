"""Says whether each row of a batch goes through a recorded forward on its path alone."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyfast_xai.tape import aliasing
from pyfast_xai.tape.graph import Node, Tape, Value, argument, key

# Operations of one tensor whose results at a place depend on that place alone.
POINTWISE = {
    *("aten::relu", "aten::relu6", "aten::hardtanh", "aten::leaky_relu", "aten::elu", "aten::selu", "aten::celu"),
    *("aten::gelu", "aten::silu", "aten::mish", "aten::hardswish", "aten::hardsigmoid", "aten::sigmoid", "aten::tanh"),
    *("aten::softplus", "aten::clamp", "aten::clamp_min", "aten::abs", "aten::neg", "aten::exp", "aten::square"),
}
# Each element of the result depends on the elements of the operands at the same place.
_ELEMENTWISE = POINTWISE | {
    *("aten::sqrt", "aten::rsqrt", "aten::log", "aten::pow", "aten::contiguous", "aten::clone", "aten::alias"),
    *("aten::add", "aten::sub", "aten::mul", "aten::div", "aten::maximum", "aten::minimum"),
}
# Images `[N, C, *sizes]` with so many sizes.
_OF_MAPS = {
    f"aten::{name}{sizes}d": sizes + 2
    for name in ("conv", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for sizes in (1, 2, 3)
}
# The argument with the dimensions along which these work.
_ALONG = {
    **dict.fromkeys(("aten::mean", "aten::sum", "aten::amax", "aten::softmax", "aten::log_softmax"), "dim"),
    **dict.fromkeys(("aten::select", "aten::slice", "aten::chunk", "aten::split", "aten::cat"), "dim"),
    **dict.fromkeys(("aten::squeeze", "aten::unsqueeze", "aten::unflatten"), "dim"),
    "aten::roll": "dims",
    "aten::flatten": "start_dim",
}


def rows_are_independent(tape: Tape) -> bool:
    """Returns whether each row of the results depends on the same row of the inputs alone, and alike in all rows.

    False where an operation is not known.

    Args:
        tape: a recording on inputs `[N, ...]`.
    """
    rows = {value.shape[:1] for value in tape.inputs}
    if len(rows) != 1 or () in rows:
        return False
    (count,) = next(iter(rows))
    return all(_keeps_rows(node, count) for node in tape)


def _keeps_rows(node: Node, count: int) -> bool:
    made = [value for value in node.outputs if value is not None]
    if node.op in (aliasing.scatter_view, aliasing.regenerate_view):
        return False
    if any(value.shape[:1] != (count,) for value in (*made, *node.inputs)):
        return False
    check = _CHECKS.get(key(node.op))
    return check is not None and all(check(node, value) for value in made)


def _elementwise(node: Node, made: Value) -> bool:
    return all(_is_broadcast(part, made) for part in (*node.args, *node.kwargs.values()))


def _is_broadcast(part: Any, made: Value) -> bool:
    """Returns whether an operand has the rows of the result, or is the same for all of them."""
    if isinstance(part, Value):
        return len(part.shape) == len(made.shape)
    return not isinstance(part, Tensor) or part.dim() < len(made.shape) or len(part) == 1


def _of_maps(node: Node, made: Value) -> bool:
    return len(made.shape) == _OF_MAPS[key(node.op)] and len(node.inputs) == 1


def _along(node: Node, made: Value) -> bool:
    dims = argument(node, _ALONG[key(node.op)])
    rank = max(len(made.shape), *(len(value.shape) for value in node.inputs))
    numbers = [dims] if isinstance(dims, int) else list(dims or ())
    return bool(numbers) and all(dim % rank != 0 for dim in numbers) and not _constants(node)


def _constants(node: Node) -> bool:
    """Returns whether an operand does not depend on the inputs."""
    parts = [part for arg in node.args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return any(isinstance(part, Tensor) for part in parts)


def _reshaped(node: Node, made: Value) -> bool:
    return True  # rows come first before and after


def _permuted(node: Node, made: Value) -> bool:
    return argument(node, "dims")[0] == 0


def _transposed(node: Node, made: Value) -> bool:
    return all(argument(node, name) % len(made.shape) != 0 for name in ("dim0", "dim1"))


def _linear(node: Node, made: Value) -> bool:
    return len(made.shape) > 1 and len(node.inputs) == 1 and isinstance(node.args[0], Value)


def _batch_norm(node: Node, made: Value) -> bool:
    return not argument(node, "training") and len(node.inputs) == 1


def _layer_norm(node: Node, made: Value) -> bool:
    return len(argument(node, "normalized_shape")) < len(made.shape) and len(node.inputs) == 1


def _dropout(node: Node, made: Value) -> bool:
    return not argument(node, "train")


_CHECKS: dict[str, Callable[[Node, Value], bool]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_OF_MAPS, _of_maps),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("aten::view", "aten::reshape", "aten::_unsafe_view"), _reshaped),
    "aten::permute": _permuted,
    "aten::transpose": _transposed,
    "aten::linear": _linear,
    "aten::batch_norm": _batch_norm,
    "aten::layer_norm": _layer_norm,
    "aten::dropout": _dropout,
}
