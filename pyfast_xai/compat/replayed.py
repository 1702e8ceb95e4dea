"""Replays of a model within one call of a method of many forwards, whose number is known beforehand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.acceleration.local_replay import Box, LocalReplay
from pyfast_xai.acceleration.packed_replay import NotReplayedError, PackedReplay, close
from pyfast_xai.acceleration.row_independence import rows_are_independent
from pyfast_xai.compat import acceleration
from pyfast_xai.explainers.common.memory_format import in_channels_last
from pyfast_xai.tape import Tape, module_hooks

_LEAST = 8  # forwards: a replay costs two, and one spares a third of a forward


class Replayed:
    """The outputs of a model for changed copies of its input, by a replay.

    The first copy also goes through the model itself. Where the results differ the model runs as it is from then on.

    Args:
        model: the model.
        replay: what it returns for as many rows as the input has; of which the box alone may have changed.
        images: the input.
        independent: whether no row depends on another; otherwise several copies at once go through the model.
    """

    def __init__(
        self, model: nn.Module, replay: Callable[[Tensor, Box | None], Any], images: Tensor, independent: bool
    ) -> None:
        self._model, self._replay, self._images, self._independent = model, replay, images, independent
        self._agrees: bool | None = None

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        tape: Tape | None,
        images: Tensor,
        boxes: Sequence[Box | None],
        least: int = _LEAST,
    ) -> "Replayed | None":
        """Returns None where a model cannot be replayed, or that does not pay.

        Args:
            model: a module or a function.
            tape: its recording on the images, None where it cannot be repeated.
            images: its only argument, `[N, ...]`.
            boxes: a box for each copy that will come, None where more may have changed.
            least: so many copies must come where more may have changed.
        """
        if tape is None or not isinstance(model, nn.Module) or not may_replay(model):
            return None
        if not isinstance(tape.result, Tensor) or tape.result.shape[:1] != images.shape[:1]:
            return None
        independent = rows_are_independent(tape)
        known, laid_out = [box for box in boxes if box is not None], in_channels_last(model, images)
        if known and len(known) == len(boxes):
            try:
                local = LocalReplay(tape, laid_out, known)
            except NotReplayedError:
                pass
            else:
                return cls(model, lambda changed, box: local(_present(box), changed), images, independent)
        if len(boxes) < least:
            return None
        try:
            whole = PackedReplay(tape, laid_out)
        except NotReplayedError:
            return None
        return cls(model, lambda changed, box: whole(in_channels_last(model, changed)), images, independent)

    def __call__(self, changed: Tensor, boxes: Sequence[Box | None]) -> Any:
        """Returns what the model returns for `[copies * N, ...]`.

        Args:
            changed: the input once for each of some copies.
            boxes: their boxes.
        """
        if self._agrees is False or changed.dtype != self._images.dtype or (len(boxes) > 1 and not self._independent):
            return self._model(changed)
        results = []
        for images, box in zip(changed.split(len(self._images)), boxes, strict=True):
            result = self._replay(images, box)
            if self._agrees is None:
                self._agrees = close(result, self._model(images))
                if not self._agrees:
                    return self._model(changed)
            results.append(result)
        return results[0] if len(results) == 1 else torch.cat(results)


def _present(box: Box | None) -> Box:
    assert box is not None
    return box


def may_replay(model: nn.Module) -> bool:
    """Returns whether a model may be replayed."""
    if acceleration.mode() is False or torch.are_deterministic_algorithms_enabled():
        return False
    return not module_hooks.any_forward_hooks(module_hooks.modules_of(module_hooks.unwrap(model)))
