"""Samples of weights, which reveal changed tensors at a small part of the cost of reading them all."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Tensors of up to this many elements are read as a whole; of larger ones, this many samples are.
_MAX_WHOLE = 1 << 13
_SAMPLES = 251

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class WeightSamples:
    """The numbers of some tensors at one time: all of small tensors, and evenly spaced samples of large ones.

    Versions, addresses, shapes and strides of the tensors are compared exactly. Writes that leave those unchanged
    (`tensor.data.mul_`, NumPy arrays and other tensors on the same memory) are seen in the samples, bit by bit: always
    in a tensor of up to 8,192 elements, and in a larger one if a contiguous 251st or more of it changes.

    Args:
        tensors: dense tensors on any devices.

    Raises:
        TypeError: a tensor has no memory that can be read.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # the others have no version
        self._state = self._read_state()
        views: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        with _disable_current_modes(), torch.inference_mode():
            for tensor in self._tensors:
                view = _readable(tensor)
                if view is not None:
                    views.setdefault((view.device, view.dtype, view.is_contiguous()), []).append(view)
            self._views = list(views.values())
            self._samples = [torch.cat(group) for group in self._views]
            self._current = [torch.empty_like(sample) for sample in self._samples]

    def unchanged(self) -> bool:
        """Returns whether the tensors are unchanged, as far as the samples tell; waits for their devices."""
        # The addresses come first, so that a view is not read after its memory was freed.
        if self._read_state() != self._state:
            return False
        with _disable_current_modes(), torch.inference_mode():
            for group, sample, current in zip(self._views, self._samples, self._current, strict=True):
                torch.cat(group, out=current)
                if not _equal(current, sample):
                    return False
        return True

    def _read_state(self) -> list[Any]:
        state: list[Any] = [tensor.data_ptr() for tensor in self._tensors]
        state += [tensor.shape for tensor in self._tensors]
        state += [tensor.stride() for tensor in self._tensors]
        state += [tensor._version for tensor in self._counted]
        return state


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.device.type == "cpu":  # NumPy takes a quarter of the time
        return np.array_equal(left.numpy(), right.numpy())
    return torch.equal(left, right)


def _readable(tensor: Tensor) -> Tensor | None:
    """Returns the elements to read, as integers `[count]` on the memory of the tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype} on {tensor.device}")
    if not tensor.numel():
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.detach().as_strided((span,), (1,), tensor.storage_offset())
    memory = memory.view(_INTEGERS.get(tensor.element_size(), torch.int64))
    if len(memory) <= _MAX_WHOLE:
        return memory
    # An odd step meets every column of a matrix whose width is a power of two.
    return memory[:: (len(memory) // _SAMPLES - 1) | 1]
