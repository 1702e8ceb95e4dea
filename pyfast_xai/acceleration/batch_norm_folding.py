"""Fewer operations for the same function: batch norm is folded into convolutions, unused results are dropped."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_xai.acceleration.weight_cache import WeightCache
from pyfast_xai.tape.graph import Node, Tape, Value, argument, key

_CONVOLUTIONS = {"aten::conv1d", "aten::conv2d", "aten::conv3d"}


class Folded(NamedTuple):
    """The weight and bias of a convolution with the batch norm behind it folded in."""

    weight: Tensor
    bias: Tensor


def fold_batch_norm(tape: Tape, until: Value | None, cache: WeightCache) -> None:
    """Folds batch norm into the convolutions before it, and drops the nodes whose results are not used.

    A convolution is left unfolded if anything but its batch norm reads it, or if the cache has no room. A folded one
    takes the name and the path of its batch norm. Names that no longer have their own result are in `tape.folded`.

    Args:
        tape: changed in place.
        until: the value the tape was stopped at, None for a whole forward.
        cache: holds the folded weights.
    """
    end_values = tape.end_values(until)
    uses = Counter(value for node in tape.nodes for value in node.inputs)
    uses.update(end_values)
    replaced: set[Value] = set()
    for norm in tape.nodes:
        convolution = _foldable(tape, norm, uses)
        if convolution is None:
            continue
        sources = [argument(convolution, name) for name in ("weight", "bias")]
        sources += [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")]
        folded = cache(_folded, *sources, pinned=True)
        if folded is None:
            continue
        convolution.args = (convolution.args[0], *folded, *convolution.args[3:])
        convolution.kwargs = {k: v for k, v in convolution.kwargs.items() if k not in ("weight", "bias")}
        replaced.update(value for value in convolution.outputs if value is not None)
        convolution.outputs, norm.outputs = norm.outputs, []
        tape.folded.add(convolution.name)
        # It now computes the output of the batch norm, and must be found under that name.
        convolution.name, convolution.path = norm.name, norm.path
    _drop(tape, end_values, replaced)


def _foldable(tape: Tape, norm: Node, uses: Counter[Value]) -> Node | None:
    """Returns the convolution that `norm` can be folded into; None if it is no batch norm or there is none."""
    if key(norm.op) != "aten::batch_norm" or len(norm.inputs) != 1:
        return None
    if argument(norm, "training") or argument(norm, "running_mean") is None:
        return None
    value = norm.args[0]
    convolution = tape.producer(value)
    if convolution is None or key(convolution.op) not in _CONVOLUTIONS or uses[value] != 1:
        return None
    weight = argument(convolution, "weight")
    unbatched = not isinstance(weight, Tensor) or weight.dim() != len(value.shape)
    return None if unbatched or len(convolution.inputs) != 1 else convolution


@torch.no_grad()
def _folded(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Folded:
    factor = torch.rsqrt(variance.double() + eps)
    if scale is not None:
        factor = factor * scale.double()
    offset = -mean.double() if bias is None else bias.double() - mean.double()
    offset = offset * factor
    if shift is not None:
        offset = offset + shift.double()
    # A product in float32 is exact to the last digit; below float32 the factor must not be rounded first.
    factor = factor.view(-1, *[1] * (weight.dim() - 1)).to(torch.promote_types(weight.dtype, torch.float32))
    return Folded((weight * factor).to(weight.dtype), offset.to(weight.dtype))


def _drop(tape: Tape, end_values: set[Value], replaced: set[Value]) -> None:
    """Drops the nodes that no end value depends on."""
    needed = set(end_values)
    used = []
    for node in reversed(tape.nodes):
        if any(value in needed for value in node.outputs):
            needed.update(node.inputs)
            used.append(node)
        else:
            replaced.update(value for value in node.outputs if value is not None)
    tape.nodes = used[::-1]
    for index, node in enumerate(tape.nodes):
        node.index = index
        for value in node.outputs:
            if value is not None:
                value.producer = index
    for path, calls in list(tape.modules.items()):
        remaining = [values for values in calls if not replaced.intersection(values)]
        if remaining:
            tape.modules[path] = remaining
        else:
            del tape.modules[path]
            tape.folded.add(path)
