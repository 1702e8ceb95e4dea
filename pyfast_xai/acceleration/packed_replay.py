"""Outputs of a model on other inputs of the same shape, by a recording with folded and packed weights.

It serves a number of forwards that is known beforehand, within one call of an explainer. `ReplayedModel` keeps replays
from call to call, watches the model for changes, and holds contests of kernels, which takes ten forwards and more.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.acceleration.batch_norm_folding import fold_batch_norm
from pyfast_xai.acceleration.packed_convolutions import Allowance, pack
from pyfast_xai.acceleration.weight_cache import WeightCache
from pyfast_xai.errors import PyFastXaiError
from pyfast_xai.tape import aliasing
from pyfast_xai.tape.graph import Tape, Value, substitute
from pyfast_xai.tape.record import tensors_in

_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}


class NotReplayedError(PyFastXaiError):
    """A model cannot be replayed in this way, or that does not pay."""


class PackedReplay:
    """Computes what a model returns for images of the shape of those that it was recorded on.

    Results are those of the model up to rounding: batch norm is folded into convolutions, whose weights are packed and
    which apply the activations behind them.

    Args:
        tape: a recording of the model on the images, with its result.
        images: `[N, C, H, W]`, the only input of the tape, in any memory format.

    Raises:
        NotReplayedError: the tape cannot be replayed in this way, or gives other results.
    """

    def __init__(self, tape: Tape, images: Tensor) -> None:
        self._fold_and_pack(tape, images)
        self._compare(0, {self._input: images.clone()})

    def __call__(self, images: Tensor) -> Any:
        """Returns what the model returns for images `[N, C, H, W]`."""
        return self._finish(0, {self._input: images.clone()})

    def _fold_and_pack(self, tape: Tape, images: Tensor) -> None:
        """Copies a tape, and folds and packs its weights.

        Raises:
            NotReplayedError: the tape cannot be repeated, or takes something else than images.
        """
        if tape.not_replayable is not None or tape.writes or tape.reached is not None:
            raise NotReplayedError("the forward cannot be repeated")
        if len(tape.inputs) != 1 or images.dim() != 4 or images.dtype not in _TOLERANCES or images.device.type != "cpu":
            raise NotReplayedError("the model must take a batch of images on the CPU")
        if any(node.op in (aliasing.scatter_view, aliasing.regenerate_view) for node in tape):
            raise NotReplayedError("the model writes to parts of tensors")
        self._recorded, self._tape = tape.result, tape.copy()
        self._input = self._tape.inputs[0]
        allowance, cache = Allowance(), WeightCache()
        allowance.seconds = 0.0  # contests of kernels take longer than they save within one call
        allowance.next_call(0)
        fold_batch_norm(self._tape, None, cache)
        pack(self._tape, cache, observed=False, contests=allowance)
        self._last = {value: node.index for node in self._tape.nodes for value in node.inputs}
        self._last |= {value: len(self._tape.nodes) for value in self._tape.end_values(None)}

    def _compare(self, first: int, environment: dict[Value, Tensor]) -> None:
        """Compares the outputs for the recorded images with the recorded ones.

        Raises:
            NotReplayedError: they differ, or the replay fails, as where views need the memory format of the model.
        """
        try:
            result = self._finish(first, environment)
        except RuntimeError as error:
            raise NotReplayedError(str(error)) from error
        if not close(result, self._recorded):
            raise NotReplayedError("the replay gives other results")

    def _finish(self, first: int, environment: dict[Value, Tensor]) -> Any:
        """Returns the outputs by running the operations from the first on, which may write to the tensors."""
        for node in self._tape.nodes[first:]:
            args, kwargs = substitute(Value, environment.__getitem__, node.args, node.kwargs)
            result = node(*args, **kwargs)
            results = result if isinstance(result, (list, tuple)) else [result]
            environment.update(
                (output, part) for output, part in zip(node.outputs, results, strict=True) if output is not None
            )
            for value in (*node.inputs, *node.outputs):
                if value is not None and self._last.get(value, -1) <= node.index:
                    environment.pop(value, None)
        return pytree.tree_map_only(Value, environment.__getitem__, self._tape.outputs)


def close(actual: Any, expected: Any) -> bool:
    """Returns whether two results are the same up to rounding."""
    pairs = tensors_in(actual), tensors_in(expected)
    if len(pairs[0]) != len(pairs[1]):
        return False
    for one, other in zip(*pairs, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        allowed = _TOLERANCES.get(other.dtype, 0.0) * float(other.abs().max()) if other.numel() else 0.0
        if not bool(((one - other).abs() <= allowed).all() if other.is_floating_point() else torch.equal(one, other)):
            return False
    return True
