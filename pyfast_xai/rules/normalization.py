"""Layer, group, instance and RMS norms, which normalise parts of each row, in one description."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast_xai.tape import Node, key
from pyfast_xai.tape.graph import argument

_BY_CHANNEL = ("group_norm", "native_group_norm", "instance_norm")


@dataclass(frozen=True)
class Normalization:
    """A layer, group, instance or RMS norm: `weight (x - mean) / sqrt(mean((x - mean) ** 2) + epsilon) + bias`.

    Attributes:
        shape: shape of the input, split so that what is normalised together fills whole dimensions.
        axes: these dimensions.
        centers: whether the mean is subtracted.
        epsilon: added to the mean square; None for that of the dtype.
        weight: that broadcasts to the input, or None.
        bias: that broadcasts to the input, or None.
    """

    shape: list[int]
    axes: tuple[int, ...]
    centers: bool
    epsilon: float | None
    weight: Tensor | None
    bias: Tensor | None

    def centered(self, x: Tensor) -> Tensor:
        """Returns the numerator, in `shape`: the input, less its mean if `centers` is set."""
        x = x.reshape(self.shape)
        return x - x.mean(self.axes, keepdim=True) if self.centers else x

    def variance(self, centered: Tensor) -> Tensor:
        """Returns the mean square and epsilon."""
        epsilon = torch.finfo(centered.dtype).eps if self.epsilon is None else self.epsilon
        return centered.square().mean(self.axes, keepdim=True) + epsilon


def normalization(node: Node) -> Normalization:
    """Returns the description of a normalisation."""
    name = key(node.op).removeprefix("aten::")
    shape = list(node.inputs[0].shape)
    centers = name != "rms_norm"
    if name in ("group_norm", "native_group_norm"):
        groups = argument(node, "num_groups" if name == "group_norm" else "group")
        split = [shape[0], groups, shape[1] // groups, *shape[2:]]
    else:
        split = shape
    last = 2 if name in _BY_CHANNEL else len(shape) - len(argument(node, "normalized_shape"))
    each = [-1] + [1] * (len(shape) - 2) if name in _BY_CHANNEL else shape[last:]
    weight = _viewed(argument(node, "weight"), each)
    bias = _viewed(argument(node, "bias"), each) if centers else None
    return Normalization(split, tuple(range(last, len(split))), centers, argument(node, "eps"), weight, bias)


def _viewed(tensor: Tensor | None, shape: list[int]) -> Tensor | None:
    return None if tensor is None else tensor.detach().view(shape)
