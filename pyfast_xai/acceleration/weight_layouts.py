"""Weights of convolutions in oneDNN's order, kept between the recorded calls of a model.

oneDNN reorders a weight before it convolves. On small maps that takes longer than the convolution, and PyTorch repeats
it in every call, forward and backward. The reordered weights give bit-identical results, and are used only if a digest
of all bits of the weight shows that they were computed from the same numbers.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyfast_xai import onednn
from pyfast_xai.acceleration.weight_cache import nbytes
from pyfast_xai.forks import ForkSafeLock
from pyfast_xai.rules.dimensions import per_dimension
from pyfast_xai.tape.graph import Node, key

LIMIT = 1 << 28  # bytes of all layouts of a process
# A layout is worth its digest up to this number of positions in all maps together, from this number of weights on.
_MAX_POSITIONS = 1024
_MIN_NUMBERS = 1 << 16
_RECENT_CALLS = 8  # layouts used within this number of calls are not evicted


@dataclass
class _Layout:
    """A weight in one order.

    Attributes:
        digest: of the weight it belongs to.
        packed: the weight in that order; None until the weight is used a second time with the same numbers.
        call: the last recording that used it.
    """

    digest: bytes
    packed: Tensor | None
    call: int


class WeightLayouts:
    """Caches weights in oneDNN's order, from the second recording with the same numbers until the model is deleted.

    Args:
        limit: bytes of all layouts. Beyond it, layouts that were not used recently are evicted; if all were, PyTorch
            reorders the weight in every call.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = ForkSafeLock()
        self._recordings = itertools.count(1)
        self._weights = WeakTensorKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all layouts."""
        with self._lock:
            return sum(nbytes(layout.packed) for layout in self._layouts() if layout.packed is not None)

    def begin(self) -> Callable[[Node, tuple[Any, ...], dict[str, Any]], None] | None:
        """Returns the argument `prepare` of `tape.record` for one recording; None if oneDNN is not used."""
        backend: Any = torch.backends.mkldnn  # its stub has no convolutions
        if not onednn.available() or backend.conv.fp32_precision not in ("none", "ieee"):
            return None
        recording = next(self._recordings)

        def prepare(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if key(node.op) == "aten::conv2d":
                convolution = _convolution(self, recording, *args, **kwargs)
                if convolution is not None:
                    node.kernel, node.adjoint = convolution.forward, convolution.adjoint

        return prepare

    def get(
        self, weight: nn.Parameter, digest: bytes, recording: int, reorder: Callable[..., Tensor], *geometry: Any
    ) -> Tensor | None:
        """Returns `reorder(weight, *geometry)` from the cache; None if it is not there.

        Args:
            weight: weight of a convolution.
            digest: digest of its numbers.
            recording: number of the recording.
            reorder: oneDNN's operation.
            *geometry: its other arguments.
        """
        with self._lock:
            layouts = self._weights.setdefault(weight, {})
            layout = layouts.get((reorder, geometry))
            if layout is None or layout.digest != digest:
                layouts[reorder, geometry] = _Layout(digest, None, recording)
                return None
            layout.call = recording
            if layout.packed is None and self._evict(weight.nbytes, recording):
                layout.packed = reorder(weight.detach(), *geometry)
            return layout.packed

    def _layouts(self) -> list[_Layout]:
        return [layout for layouts in list(self._weights.values()) for layout in layouts.values()]

    def _evict(self, size: int, recording: int) -> bool:
        size += self.nbytes
        for layout in sorted(self._layouts(), key=lambda layout: layout.call):
            if size <= self._limit or layout.call > recording - _RECENT_CALLS:
                break
            if layout.packed is not None:
                size -= nbytes(layout.packed)
                layout.packed = None
        return size <= self._limit


@dataclass(frozen=True)
class _Convolution:
    """A 2-D convolution in one recording, on maps that are small beside its weight."""

    layouts: WeightLayouts
    recording: int
    weight: nn.Parameter
    version: int
    digest: bytes
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the convolution as PyTorch does."""
        geometry = (self.padding, self.stride, self.dilation, 1)
        packed = None
        if onednn.serves(input, weight, bias, *geometry):
            packed = self._packed(torch.ops.mkldnn._reorder_convolution_weight.default, *geometry, input)
        if packed is None:
            return torch.nn.functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation)
        return onednn.convolution(input, packed, bias, *geometry)

    def adjoint(self, grad: Tensor, output_padding: Sequence[int]) -> Tensor | None:
        """Returns the gradient of the input from that of the result; None to leave it to PyTorch."""
        geometry = (self.padding, tuple(output_padding), self.stride, self.dilation, 1)
        if self.weight._version != self.version or not _is_small(grad):
            return None
        if not onednn.serves_transposed(grad, self.weight, *geometry):
            return None
        packed = self._packed(torch.ops.mkldnn._reorder_convolution_transpose_weight.default, *geometry, grad)
        return None if packed is None else onednn.transposed_convolution(grad, packed, *geometry)

    def _packed(self, reorder: Callable[..., Tensor], *geometry: Any) -> Tensor | None:
        *settings, maps = geometry
        shape = onednn.shape_to_pack_for(maps)
        return self.layouts.get(self.weight, self.digest, self.recording, reorder, *settings, shape)


def _convolution(
    layouts: WeightLayouts,
    recording: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Convolution | None:
    """Returns the convolution with these arguments of `conv2d`; None if a cached layout would not pay."""
    if groups != 1 or weight.numel() < _MIN_NUMBERS or not isinstance(weight, nn.Parameter):
        return None
    if isinstance(padding, str) or input.dim() != 4 or not onednn.takes(input, weight):
        return None
    stride, padding, dilation = (tuple(per_dimension(value, 2)) for value in (stride, padding, dilation))
    if not _is_small(input, math.prod(stride)):
        return None
    digest = _digest(weight)
    if digest is None:
        return None
    return _Convolution(layouts, recording, weight, weight._version, digest, stride, padding, dilation)


def _is_small(maps: Tensor, stride: int = 1) -> bool:
    """Returns whether maps are small and in channels_last; for other formats oneDNN chooses other kernels."""
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return False
    return maps.shape[0] * maps.shape[2] * maps.shape[3] // stride <= _MAX_POSITIONS


def _digest(weight: Tensor) -> bytes | None:
    """Returns a digest of all numbers of a weight in memory order; None if the weight is not dense."""
    memory_format = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
    if not weight.is_contiguous(memory_format=memory_format):
        return None
    numbers: Any = weight.detach().as_strided((weight.numel(),), (1,)).numpy()
    return xxhash.xxh3_128_digest(numbers) + bytes([memory_format is torch.channels_last])


LAYOUTS = WeightLayouts()  # shared by all models that are recorded in this process
