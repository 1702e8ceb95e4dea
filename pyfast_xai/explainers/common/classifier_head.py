"""Networks whose scores are an average over positions: the average, and the linear layer behind it."""

import math
from dataclasses import dataclass

from torch import Tensor

from pyfast_xai.explainers.common.targets import logits_of
from pyfast_xai.tape import Node, Tape, Value, key


@dataclass
class PooledHead:
    """The end of a network whose scores are made of an average over positions.

    Attributes:
        pool: the operation that averages.
        weight: weight of the linear layer between the average and the scores, `[classes, C]`; None where maps of the
            classes themselves are averaged.
        bias: bias of that layer, `[classes]`.
        channels: dimension of the averaged map that is not a position, 1 or the last.
    """

    pool: Node
    weight: Tensor | None
    bias: Tensor | None
    channels: int

    @property
    def source(self) -> Value:
        """Returns the value that is averaged."""
        return self.pool.args[0]


# What may stand between the average and the scores without mixing classes.
_MOVES = {
    f"aten::{name}"
    for name in (
        *(
            "view",
            "_unsafe_view",
            "reshape",
            "_reshape_alias",
            "flatten",
            "squeeze",
            "unsqueeze",
            "as_strided",
            "clone",
            "alias",
        ),
        *("contiguous", "dropout", "feature_dropout", "_to_copy", "detach"),
    )
}
_SQUASHES = {f"aten::{name}" for name in ("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid")}
_POOLS = {"aten::avg_pool2d", "aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool1d"}
_REDUCTIONS = {"aten::mean", "aten::sum"}


def classifier_head(tape: Tape) -> PooledHead | None:
    """Returns the average and the linear layer that a network ends in; None where it ends otherwise.

    Args:
        tape: tape of a whole forward pass.
    """
    value, logits = logits_of(tape)
    weight = bias = None
    classes = value.numel // len(logits)
    node = tape.producer(value)
    while node is not None and isinstance(node.args[0], Value):
        name, source = key(node.op), node.args[0]
        if name in _POOLS or name in _REDUCTIONS:
            count = classes if weight is None else weight.shape[1]
            channels = _channels_averaged(node, count)
            pools = value.numel == len(logits) * count and source.numel > value.numel
            return PooledHead(node, weight, bias, channels) if pools and channels is not None else None
        if weight is None and on_vectors(node):
            weight, bias = node.args[1].flatten(1), node.args[2] if len(node.args) > 2 else None
        elif name not in _MOVES and (name not in _SQUASHES or weight is not None):
            return None
        value = source
        node = tape.producer(source)
    return None


def _channels_averaged(node: Node, count: int) -> int | None:
    """Returns the remaining dimension of an averaged map of `count` channels; None if it is not 1 or the last."""
    shape = node.args[0].shape
    rank = len(shape)
    reduced = {rank - 1} if key(node.op) == "aten::adaptive_avg_pool1d" else {rank - 2, rank - 1}
    if key(node.op) in _REDUCTIONS:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        reduced = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
    left = [d for d in range(1, rank) if d not in reduced]
    fits = len(left) == 1 and 0 not in reduced and left[0] in (1, rank - 1) and shape[left[0]] == count
    return left[0] if fits else None


def on_vectors(node: Node) -> bool:
    """Returns whether a node is a linear layer, as such or as a convolution of maps of one position."""
    name, rest = key(node.op), node.args[1:3]
    if name not in ("aten::linear", "aten::conv2d") or any(isinstance(part, Value) for part in rest):
        return False
    vectors, weight = node.args[0], rest[0]
    return vectors.numel == vectors.shape[0] * weight.shape[1] and weight.numel() == math.prod(weight.shape[:2])
