"""Samples of weights, which show changed tensors at a small part of the cost of reading them all."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Up to so many elements a tensor is read whole; of a larger one so many are.
_WHOLE = 1 << 13
_SAMPLES = 251

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class WeightSamples:
    """Numbers of some tensors at one time: all of small tensors, and some, evenly spread, of large ones.

    Versions, addresses, shapes and strides of the tensors are compared exactly. What changes numbers without them
    (`tensor.data.mul_`, NumPy arrays and other tensors on the same memory) is seen in the samples, bit by bit: always
    in a tensor of up to 8,192 elements, and wherever a larger one changes by a 251st or more in one piece.

    Args:
        tensors: dense ones on any devices.

    Raises:
        TypeError: a tensor has no memory of its own that can be read.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # the others have no version
        self._places = self._look()
        views: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        with _disable_current_modes(), torch.inference_mode():
            for tensor in self._tensors:
                view = _readable(tensor)
                if view is not None:
                    views.setdefault((view.device, view.dtype, view.is_contiguous()), []).append(view)
            self._views = list(views.values())
            self._samples = [torch.cat(group) for group in self._views]
            self._now = [torch.empty_like(sample) for sample in self._samples]

    def hold(self) -> bool:
        """Returns whether the tensors are unchanged, as far as the samples tell; waits for their devices."""
        # The addresses come first: a view is not read after its memory was given back.
        if self._look() != self._places:
            return False
        with _disable_current_modes(), torch.inference_mode():
            for group, sample, now in zip(self._views, self._samples, self._now, strict=True):
                torch.cat(group, out=now)
                if not _equal(now, sample):
                    return False
        return True

    def _look(self) -> list[Any]:
        places: list[Any] = [tensor.data_ptr() for tensor in self._tensors]
        places += [tensor.shape for tensor in self._tensors]
        places += [tensor.stride() for tensor in self._tensors]
        places += [tensor._version for tensor in self._counted]
        return places


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.device.type == "cpu":  # NumPy takes a quarter of the time
        return np.array_equal(one.numpy(), other.numpy())
    return torch.equal(one, other)


def _readable(tensor: Tensor) -> Tensor | None:
    """Returns the elements to read, as integers `[count]` on the memory of the tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype} on {tensor.device}")
    if not tensor.numel():
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.detach().as_strided((span,), (1,), tensor.storage_offset())
    memory = memory.view(_INTEGERS.get(tensor.element_size(), torch.int64))
    if len(memory) <= _WHOLE:
        return memory
    # An odd step meets every column of a matrix whose width is a power of two.
    return memory[:: (len(memory) // _SAMPLES - 1) | 1]
