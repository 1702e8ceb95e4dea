"""Outputs of a model for many inputs of one row: equal ones run once, and some run together, by a replay."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.acceleration.row_independence import rows_are_independent
from pyfast_xai.compat.replayed import Replayed, may_replay
from pyfast_xai.tape import Tape, record

# Convolutions of some rows take less than those of one row each; larger maps leave the caches, and gain no more.
_FEWEST_ROWS, _MOST_ROWS, _LARGEST_MAP = 4, 32, 1 << 22
_LEAST = 5  # replays of several rows: each spares as much as two rows or more
_MOST_BYTES = 1 << 28


class SampleOutputs:
    """The outputs of a model whose rows do not depend on each other.

    Args:
        model: the model.
        example: `[1, ...]`, of the shape of the inputs that will come.
        rows: how many go through a replay at once.
        forwards: how many will come at most.
        at_once: how many go through the model itself at once.
    """

    def __init__(self, model: nn.Module, example: Tensor, rows: int, forwards: int, at_once: int) -> None:
        self._model, self._rows, self._forwards, self._at_once = model, rows, forwards, at_once
        self._kind = (example.shape, example.dtype)
        self._answers: dict[bytes, Tensor] = {}
        self._pending: dict[bytes, Tensor] = {}
        self._recorded = False
        self._replayed: Replayed | None = None

    @classmethod
    def of(
        cls, model: Callable[..., Any], tape: Tape | None, images: Tensor, forwards: int, at_once: int
    ) -> "SampleOutputs | None":
        """Returns None where a model cannot be replayed, or that does not pay.

        Args:
            model: a module or a function.
            tape: its recording, None where it cannot be repeated.
            images: what it was recorded on, its only argument, `[N, ...]`.
            forwards: how many inputs of one row will come at most.
            at_once: how many of them go through the model itself at once.
        """
        if tape is None or tape.writes or not isinstance(model, nn.Module) or not may_replay(model):
            return None
        if images.device.type != "cpu":
            return None
        result, count = tape.result, len(images)
        if not isinstance(result, Tensor) or result.shape[:1] != (count,) or not rows_are_independent(tape):
            return None
        largest = max((value.numel for node in tape for value in node.outputs if value is not None), default=0) // count
        rows = max(_FEWEST_ROWS, min(_MOST_ROWS, _LARGEST_MAP // max(largest, 1), forwards // _LEAST))
        if forwards < rows * _LEAST or result.nbytes // count * forwards > _MOST_BYTES:
            return None
        outputs = cls(model, images[:1], rows, forwards, at_once)
        for image, answer in zip(images.split(1), result.split(1), strict=True):
            outputs._answers[_key(image)] = answer
        return outputs

    def add(self, image: Tensor) -> bytes:
        """Takes an input `[1, ...]` and returns the key of its output."""
        key = _key(image)
        if key not in self._answers and key not in self._pending:
            if (image.shape, image.dtype) != self._kind:
                self._answers[key] = self._model(image)
            else:
                self._pending[key] = image
                if len(self._pending) == self._rows:
                    self._run()
        return key

    def __getitem__(self, key: bytes) -> Tensor:
        """Returns the output of an input, `[1, ...]`."""
        if key in self._pending:
            self._run()
        return self._answers[key]

    def _run(self) -> None:
        outputs = self._outputs(torch.cat(list(self._pending.values())))
        self._answers.update(zip(self._pending, outputs.split(1), strict=True))
        self._forwards -= len(self._pending)
        self._pending = {}

    def _outputs(self, images: Tensor) -> Tensor:
        missing = self._rows - len(images)
        if not self._recorded and not missing:
            self._recorded = True
            tape = record(self._model, images)
            if tape.not_replayable is None and rows_are_independent(tape):
                copies = [None] * (self._forwards // self._rows - 1)
                self._replayed = Replayed.of(self._model, tape, images, copies, least=_LEAST - 1)
                return tape.result
        if self._replayed is None:
            return torch.cat([self._model(part) for part in images.split(self._at_once)])
        filled = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])])
        return self._replayed(filled, [None])[: len(images)]


def _key(image: Tensor) -> bytes:
    """Returns the digest of the numbers of a tensor, with their shape and dtype."""
    digest = hashlib.blake2b(f"{image.dtype}{list(image.shape)}".encode(), digest_size=16)
    digest.update(image.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
