"""The kind of a model's outputs, which decides how they become scores.

The kind is decided here and nowhere else, for each row by itself: the score of an image never depends on its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.tensors import at_least_float32, outside_inference_mode
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument, find

OutputKind = Literal["logits", "independent logits", "probabilities", "values"]
Outputs = Literal["auto", "logits", "independent logits", "probabilities", "values"]
OUTPUTS: tuple[str, ...] = get_args(Outputs)

# Operations whose result lies in 0..1 for all inputs.
_SQUASHES = {f"aten::{name}" for name in ("sigmoid", "hardsigmoid", "softmax", "_softmax", "_safe_softmax")}
# Operations whose result lies in 0..1 where all their inputs do.
_KEEPS = {
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "as_strided"),
        *("clone", "alias", "contiguous", "_to_copy", "detach", "dropout", "feature_dropout", "permute", "transpose"),
        *("t", "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "expand", "mean"),
        *("amax", "amin", "max", "min", "maximum", "minimum", "mul", "sqrt", "pow", "max_pool2d"),
        *("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices"),
    )
}  # fmt: skip


@dataclass
class OutputKinds:
    """The kinds of some rows of outputs `[N, classes]`.

    Attributes:
        kind: "logits" of one choice among the classes, whose softmax is the probability; "independent logits" of
            labels that do not exclude each other, whose sigmoids are; "probabilities", taken as they are; or "values",
            which are no probabilities (a regression, or a single output of unknown kind).
        distributions: bool `[N]`, the rows that are probabilities already, in spite of `kind`; None for none.
    """

    kind: OutputKind
    distributions: Tensor | None = None

    @classmethod
    def named(cls, names: Sequence[str], device: torch.device) -> "OutputKinds":
        """Returns the kinds that `names` gave as a list, with tensors on a device."""
        kind: Any = next((name for name in names if name != "probabilities"), "probabilities")
        distributions = [name == "probabilities" for name in names]
        mixed = kind != "probabilities" and any(distributions)
        return cls(kind, torch.tensor(distributions, device=device) if mixed else None)

    def names(self, count: int) -> list[str]:
        """Returns the kind of each of `count` rows."""
        if self.distributions is None:
            return [self.kind] * count
        return ["probabilities" if row else self.kind for row in self.distributions.tolist()]

    def scores(self, outputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns probabilities (or values), at least float32; they can be differentiated.

        Args:
            outputs: `[M, classes]`.
            rows: the row that decides for each of the outputs, int64 `[M]`; None for one after the other.
        """
        outputs = at_least_float32(outputs)
        if self.kind == "logits":
            return self._unless_distribution(outputs.softmax(1), outputs, rows)
        return outputs.sigmoid() if self.kind == "independent logits" else outputs

    def log_scores(self, outputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns logarithms of the probabilities; values as they are. See `scores`."""
        outputs = at_least_float32(outputs)
        if self.kind == "values":
            return outputs
        if self.kind == "independent logits":
            return torch.nn.functional.logsigmoid(outputs)
        logarithm = outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
        if self.kind == "probabilities":
            return logarithm
        return self._unless_distribution(outputs.log_softmax(1), logarithm, rows)

    def _unless_distribution(self, scores: Tensor, probabilities: Tensor, rows: Tensor | None) -> Tensor:
        if self.distributions is None:
            return scores
        is_distribution = self.distributions if rows is None else self.distributions[rows]
        return torch.where(is_distribution[:, None], probabilities, scores)


def kinds_of(outputs: Tensor, made: bool | None = None, kind: Outputs = "auto") -> OutputKinds:
    """Returns the kinds of outputs.

    Args:
        outputs: outputs of the model for N images, `[N, classes]`.
        made: whether they are probabilities by construction, see `is_probability`.
        kind: the choice of the user. With "auto", outputs that end in a sigmoid or softmax are probabilities, and so is
            a row that is not negative and sums to one but for the rounding of its dtype. A single output is a value
            otherwise, and several are logits of one choice.
    """
    if kind != "auto":
        return OutputKinds(kind)
    if made:
        return OutputKinds("probabilities")
    if outputs.shape[1] == 1:
        return OutputKinds("values")
    tolerance = max(1e-3, torch.finfo(outputs.dtype).eps if outputs.is_floating_point() else 0)
    wide = at_least_float32(outputs)
    sums_to_one = (wide >= 0).all(1) & ((wide.sum(1) - 1).abs() <= tolerance)
    return OutputKinds("logits", outside_inference_mode(sums_to_one))


def is_probability(tape: Tape, value: Value) -> bool:
    """Returns whether a value lies in 0..1 by the operations that made it: sigmoids and softmax, however arranged."""
    visited, queue = {value}, [value]
    while queue:
        node = tape.producer(queue.pop())
        if node is None:
            return False
        if not _squashes(node):
            if not _keeps(node):
                return False
            queue += [value for value in node.inputs if value not in visited]
            visited.update(queue)
    return True


def _squashes(node: Node) -> bool:
    """Returns whether the result lies in 0..1 for all inputs."""
    if key(node.op) != "aten::clamp":
        return key(node.op) in _SQUASHES
    low, high = argument(node, "min"), argument(node, "max")
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 <= low <= high <= 1


def _keeps(node: Node) -> bool:
    """Returns whether the result lies in 0..1 where all inputs do."""
    name = key(node.op)
    if name not in _KEEPS or find(Tensor, node.args, node.kwargs):
        return False
    if name == "aten::mul":
        other = argument(node, "other")
        return isinstance(other, Value) or 0 <= other <= 1
    if name == "aten::pow":
        exponent = argument(node, "exponent")
        return isinstance(exponent, (int, float)) and exponent >= 0
    return True


def check_outputs(outputs: Any) -> Outputs:
    """Returns a setting `outputs`.

    Raises:
        InputError: the setting does not exist.
    """
    if outputs not in OUTPUTS:
        raise InputError(f"outputs must be one of {', '.join(map(repr, OUTPUTS))}, got {outputs!r}")
    return outputs
