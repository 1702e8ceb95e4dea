"""The answers of a network without one channel of a layer: by algebra where a linear layer follows, else by replays.

The rows of a tape stand for images, some times over: J copies of N images, one behind the other. One replay of what
depends on the layer takes J channels out of every image. Where only operations that keep channels apart lie between
the layer and a linear one, the result of that is known without it, `z_k = z - W_k A_k`, for all channels at the price
of one product with W. The replay then begins above it; where nothing is above it, nothing is replayed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.explainers.common.classifier_head import on_vectors
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import substitute
from pyfast_xai.tape.suffix import recorded_value, replay_suffix, suffix_nodes

# These keep channels apart, make zeros of zeros, and leave alone what is positive and the same everywhere.
_KEEPS_CHANNELS = {
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("permute", "transpose", "movedim", "contiguous", "clone", "alias", "detach", "dropout", "relu", "mean"),
        *("avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d"),
        *("max_pool2d", "adaptive_max_pool2d"),
    )
}
_NUMBERS_AT_ONCE = 1 << 24  # of answers that need no replay


def scores_without_channels(
    recorded: tuple[Tape, Value],
    record: Callable[[int], tuple[Tape, Value]],
    images: int,
    dim: int,
    batch_size: int,
    read: Callable[[Any, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns the scores of a model as it is, and without each channel of a layer.

    Args:
        recorded: a tape of the images, with `KeepSuffix` for the layer, and the layer.
        record: records so many copies of the images, one behind the other, likewise.
        images: N.
        dim: dimension of the layer's channels.
        batch_size: rows of a replay.
        read: gives the scores `[M, ...]` in what the model returned for rows of the images, int64 `[M]`.

    Returns:
        `[N, ...]` and `[C, N, ...]`.

    Raises:
        InputError: the model cannot be replayed, see `replay_suffix`.
        UnsupportedOpError: likewise.
    """
    tape, value = recorded
    front = linear_front(tape, value, dim)
    copies = batch_size // images
    if copies > 1 and suffix_nodes(tape, value if front is None else front.value):
        tape, value = record(copies)
        front = front and linear_front(tape, value, dim)
    activation = recorded_value(tape, value)
    rows = torch.arange(images, device=activation.device)
    before = read(first_rows(replay_suffix(tape, value, activation.clone()), len(activation), images), rows)
    after = [
        read(result, rows.repeat(len(part))).unflatten(0, (len(part), images))
        for part, result in without_channels(tape, value, dim, images, front)
    ]
    return before, torch.cat(after)


def share_lost(before: Tensor, after: Tensor) -> Tensor:
    """Returns `(y - y_k) / |y|` of scores with and without channels, the weights of Ablation-CAM; y = 0 counts as 1."""
    return (before - after) / torch.where(before == 0, 1, before.abs())


def without_channels(
    tape: Tape, value: Value, dim: int, images: int, front: "LinearFront | None"
) -> Iterator[tuple[Tensor, Any]]:
    """Yields what the model returns without each channel of a layer.

    Args:
        tape: tape of J copies of the images, recorded with `KeepSuffix` for the layer.
        value: the layer, with one row an image.
        dim: dimension of its channels.
        images: N.
        front: what `linear_front` found on the tape.

    Yields:
        Some channels, int64 `[M]`, and the outputs of the model for M * N rows: first without the first channel, image
        by image, then without the second. Every channel comes once.

    Raises:
        InputError: the model cannot be replayed, see `replay_suffix`.
        UnsupportedOpError: likewise.
    """
    activation = recorded_value(tape, value)
    if front is None:
        replaced, without = value, _zeroed(activation, dim, images)
    else:
        replaced, without = front.value, front.without(activation[:images])
    rows, above = len(activation), bool(suffix_nodes(tape, replaced))
    together = rows // images if above else max(1, _NUMBERS_AT_ONCE * rows // (images * replaced.numel))
    for part in torch.arange(activation.shape[dim], device=activation.device).split(together):
        # A replay has as many rows as the tape: the last one is filled up.
        filled = torch.cat([part, part[:1].expand(together - len(part))]) if above else part
        result = replay_suffix(tape, replaced, without(filled))
        yield part, first_rows(result, len(filled) * images, len(part) * images)


def _zeroed(activation: Tensor, dim: int, images: int) -> Callable[[Tensor], Tensor]:
    def without(channels: Tensor) -> Tensor:
        out = activation.clone()
        out.movedim(dim, 1)[torch.arange(len(out), device=out.device), channels.repeat_interleave(images)] = 0
        return out

    return without


def first_rows(result: Any, rows: int, count: int) -> Any:
    """Returns the first rows of each tensor that a model returned with so many rows."""

    def first(leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf

    return pytree.tree_map(first, result)


@dataclass(frozen=True)
class LinearFront:
    """A linear layer that reads a layer channel by channel.

    Attributes:
        node: the linear layer.
        chain: the operations between, which keep channels apart.
        source: the layer.
        columns: int64 `[C, P]`, the features that each channel of the layer becomes.
    """

    node: Node
    chain: list[Node]
    source: Value
    columns: Tensor

    @property
    def value(self) -> Value:
        """Returns the value that the linear layer makes."""
        value = self.node.outputs[0]
        assert value is not None
        return value

    def without(self, activation: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns a function that gives the results of the linear layer without some channels, `[M * N, O, ...]`."""
        rows = self.source.shape[0]
        repeated = activation.repeat(rows // len(activation), *[1] * (activation.dim() - 1))
        features = at_least_float32(_through(self.chain, self.source, repeated)[: len(activation)].flatten(1))
        weight = at_least_float32(self.node.args[1].detach().flatten(1))
        whole = features @ weight.mT
        if len(self.node.args) > 2 and self.node.args[2] is not None:
            whole = whole + self.node.args[2].detach()

        def without(channels: Tensor) -> Tensor:
            columns = self.columns[channels]
            parts = torch.einsum("nmp,omp->mno", features[:, columns], weight[:, columns])
            return (whole - parts).to(self.value.dtype).reshape(-1, *self.value.shape[1:])

        return without


def linear_front(tape: Tape, value: Value, dim: int) -> LinearFront | None:
    """Returns the linear layer that reads a layer channel by channel; None where something else reads it."""
    nodes = suffix_nodes(tape, value)
    chain: list[Node] = []
    reached = value
    for node in nodes:
        if node.inputs != [reached]:
            return None
        if on_vectors(node):
            break
        if key(node.op) not in _KEEPS_CHANNELS or len(node.outputs) != 1 or node.outputs[0] is None:
            return None
        chain.append(node)
        reached = node.outputs[0]
    else:
        return None
    between = {value, *(output for node in chain for output in node.outputs)} & tape.end_values(None)
    read = {source for other in nodes[len(chain) + 1 :] for source in other.inputs}
    if between or not read.isdisjoint([value, *(output for node in chain for output in node.outputs)]):
        return None
    # Which channel a feature is made of is seen on numbers that tell channels apart; the squares see whether they
    # arrive as they are.
    count = value.shape[dim]
    numbers = torch.arange(1.0, count + 1, dtype=torch.float64, device=value.device)
    numbers = numbers.view([-1 if i == dim else 1 for i in range(len(value.shape))]).expand(value.shape)
    one, squared = (_through(chain, value, values)[0].flatten() for values in (numbers, numbers**2))
    channels = one.round().long() - 1
    if not torch.allclose(one, channels.double() + 1) or not torch.allclose(one**2, squared):
        return None
    if len(set(channels.bincount(minlength=count).tolist())) != 1:
        return None
    return LinearFront(node, chain, value, channels.argsort(stable=True).view(count, -1))


def _through(chain: list[Node], value: Value, tensor: Tensor) -> Tensor:
    """Returns the results of a chain of operations for other numbers of a value."""
    placed = torch.empty_strided(value.shape, value.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    environment = {value: placed}
    for node in chain:
        args, kwargs = substitute(Value, environment.__getitem__, node.args, node.kwargs)
        placed = node.op(*args, **kwargs)
        assert node.outputs[0] is not None
        environment[node.outputs[0]] = placed
    return placed
