"""Convolution kernels of the CPU with weights that are packed once, instead of in every call.

On small maps, packing the weights costs more than the convolution. The kernels can also apply an activation to their
results. A contest on the first maps decides which kernel serves a convolution: PyTorch's own in either memory format,
oneDNN's with packed weights, or Winograd's. A second contest decides for its adjoint.
"""

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast_xai import onednn, ops, tuning
from pyfast_xai.acceleration.weight_cache import WeightCache
from pyfast_xai.ops import registry
from pyfast_xai.tape.graph import Node, Tape, Value, argument, key
from pyfast_xai.tuning import Candidate, Site

# Activations that a convolution kernel can apply to its results: the kernel's name, and its parameters.
_ACTIVATIONS: dict[str, Callable[[Node], tuple[str, list[float]]]] = {
    "aten::relu": lambda node: ("relu", []),
    "aten::relu6": lambda node: ("hardtanh", [0, 6]),
    "aten::hardtanh": lambda node: ("hardtanh", [argument(node, "min_val"), argument(node, "max_val")]),
    "aten::hardswish": lambda node: ("hardswish", []),
    "aten::silu": lambda node: ("swish", []),
}

# Output range of fused activations that take no parameters.
_LIMITS: dict[str, list[float]] = {"none": [-math.inf, math.inf], "relu": [0, math.inf]}


# The same activations in PyTorch, for kernels that cannot fuse them.
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "none": lambda maps: maps,
    "relu": torch.relu_,
    "hardtanh": F.hardtanh_,
    "hardswish": torch.ops.aten.hardswish_.default,
    "swish": torch.ops.aten.silu_.default,
}

# The largest error of a kernel, in parts of the largest number of PyTorch's own result: direct convolutions in float32
# have 1e-6 to 2e-6, Winograd's 1e-6 to 5e-6.
_TOLERANCE = 1e-5


class Allowance:
    """The seconds that contests may take in one call of a model; the remaining contests wait for the next call.

    Attributes:
        seconds: allowance of each call; unlimited until set.
        count: number of contests that were run or postponed.
    """

    def __init__(self) -> None:
        self.seconds = math.inf
        self.count = 0
        self.next_call()

    def next_call(self, share: float = 1) -> None:
        """Starts a call of the model, in which contests may take a share of the seconds; zero allows none."""
        self._remaining = share * self.seconds if share else 0.0

    def grants(self) -> bool:
        """Returns whether another contest may start."""
        self.count += 1
        return self._remaining > 0

    @property
    def rounds(self) -> float:
        """Returns the seconds after which a contest starts no further round."""
        return self.seconds / 100

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Subtracts the seconds that the block takes from the allowance."""
        elapsed = tuning.stopwatch("cpu", torch.get_num_threads())
        try:
            yield
        finally:
            self._remaining -= elapsed()


def pack(
    tape: Tape,
    cache: WeightCache,
    *,
    until: Value | None = None,
    observed: bool = True,
    contests: Allowance | None = None,
) -> None:
    """Sets kernels with packed weights on the 2-D CPU convolutions of a tape, and on their adjoints.

    The operations and their arguments on the tape stay as they are, for the rules that read them.

    Args:
        tape: changed in place.
        cache: holds the packed weights.
        until: the value the tape was stopped at, None for a whole forward.
        observed: whether a policy may read the result of a convolution. If False, convolutions also apply the
            activations that are their only readers.
        contests: time that contests may take; None for no limit.
    """
    contests = contests or Allowance()
    if not onednn.available():
        return
    for node in tape.nodes:
        if key(node.op) == "aten::linear" and isinstance(argument(node, "weight"), Tensor):
            node.kernel = onednn.linear
        if key(node.op) == "aten::conv2d":
            packed = _packed_convolution(cache, contests, *node.args, **node.kwargs)
            if packed is not None:
                node.kernel, node.adjoint = packed, packed.adjoint
    if not observed:
        _fuse_activations(tape, until)


def unpadded(kernel: Callable[..., Any]) -> Callable[..., Tensor] | None:
    """Returns a kernel that `pack` has set on a convolution, for maps around which its padding lies already.

    Returns None for the kernel of another operation.
    """
    if not isinstance(kernel, _PackedConvolution):
        return None
    return dataclasses.replace(kernel, padding=(0, 0))


def _fuse_activations(tape: Tape, until: Value | None) -> None:
    uses = Counter(value for node in tape.nodes for value in node.inputs)
    uses.update(tape.end_values(until))
    for node in tape.nodes:
        activation = _ACTIVATIONS.get(key(node.op))
        if activation is None or len(node.inputs) != 1 or uses[node.inputs[0]] != 1:
            continue
        convolution = tape.producer(node.inputs[0])
        if convolution is not None and isinstance(convolution.kernel, _PackedConvolution):
            convolution.kernel, node.kernel = (
                dataclasses.replace(convolution.kernel, activation=activation(node)),
                _identity,
            )


def _identity(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


@dataclasses.dataclass(frozen=True)
class _PackedConvolution:
    cache: WeightCache
    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    activation: tuple[str, list[float]] = ("none", [])
    contests: Allowance = dataclasses.field(default_factory=Allowance)
    # Keyed by the operation and its maps: the kernel that won its contest, and the strides of the first result, which
    # views on the tape may depend on.
    _winners: dict[Any, "_Kernel"] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    _strides: dict[Any, tuple[int, ...]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._fastest("conv2d", input, ())

    def adjoint(self, grad: Tensor, output_padding: list[int]) -> Tensor:
        return self._fastest("conv_transpose2d", grad, tuple(output_padding))

    def _fastest(self, op: str, maps: Tensor, output_padding: tuple[int, ...]) -> Tensor:
        """Runs the kernel that won the contest for such maps; where contests are off, the last of the kernels.

        While there is no time for its contest oneDNN's serves.
        """
        job = (op, output_padding, maps.shape, maps.stride(), torch.get_num_threads(), registry.current_backend())
        kernel = self._winners.get(job)
        if kernel is None:
            kernels = self._forward_kernels(maps) if op == "conv2d" else self._adjoint_kernels(maps, output_padding)
            if tuning.enabled() and not self.contests.grants():
                kernel = kernels["onednn"]
            else:
                with self.contests.spending():
                    kernel = self._winners[job] = kernels[self._winner(op, kernels, maps, output_padding)]
        result = kernel(self, maps, cache=self.cache)
        # In the memory format that the first of their kind had.
        stride = self._strides.setdefault(job, result.stride())
        if result.stride() == stride:
            return result
        return torch.empty_strided(result.shape, stride, dtype=result.dtype, device=result.device).copy_(result)

    def _forward_kernels(self, input: Tensor) -> dict[str, "_Kernel"]:
        kind = _PackedConvolution
        kernels: dict[str, _Kernel] = {
            "pytorch": kind._pytorch,
            "pytorch, other format": functools.partial(_in_other_format, kind._pytorch),
            "onednn": kind._onednn,
        }
        if self._limits is not None and self._winograd_pays(input, self.padding):
            kernels["winograd"] = kind._winograd
        return kernels

    def _adjoint_kernels(self, grad: Tensor, output_padding: tuple[int, ...]) -> dict[str, "_Kernel"]:
        kind = _PackedConvolution
        pytorch = functools.partial(kind._pytorch_adjoint, output_padding=output_padding)
        kernels: dict[str, _Kernel] = {
            "pytorch": pytorch,
            "pytorch, other format": functools.partial(_in_other_format, pytorch),
            "onednn": functools.partial(kind._onednn_adjoint, output_padding=output_padding),
        }
        if self._winograd_pays(grad, self._around):
            kernels["winograd"] = kind._winograd_adjoint
        return kernels

    def _winner(self, op: str, kernels: dict[str, "_Kernel"], maps: Tensor, output_padding: tuple[int, ...]) -> str:
        # Each with a cache of its own: what the losers made of the weight is thrown away.
        caches = {name: WeightCache(parent=self.cache) for name in kernels}
        field = [
            Candidate(
                name,
                functools.partial(run, self, cache=caches[name]),
                depends_on_data=name == "winograd",
                prepares=name in ("onednn", "winograd"),
            )
            for name, run in kernels.items()
        ]
        name, numbers = self.activation
        geometry = (self.stride, self.padding, self.dilation, self.groups, output_padding)
        site = Site.of(op, maps, tuple(self.weight.shape), *geometry, self.bias is not None, name, *numbers)
        rounds, last = self.contests.rounds, field[-1].name
        winner = tuning.choose(site, field, (maps,), tolerance=_TOLERANCE, untuned=last, seconds=rounds)
        self.cache.merge(caches[winner.name])
        return winner.name

    def _pytorch(self, input: Tensor, cache: WeightCache) -> Tensor:
        maps = F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        name, numbers = self.activation
        return _IN_PLACE[name](maps, *numbers)

    def _onednn(self, input: Tensor, cache: WeightCache) -> Tensor:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_weight.default
        weight = self._reordered_weight(cache, reorder, *geometry, onednn.shape_to_pack_for(input))
        return onednn.convolution(input, weight, self.bias, *geometry, self.activation)

    def _winograd(self, input: Tensor, cache: WeightCache) -> Tensor:
        weight = cache(ops.winograd_weight, self.weight, size=_winograd_bytes(self.weight))
        if weight is None:
            return self._onednn(input, cache)
        return ops.winograd_conv2d(input, weight, self.bias, self.padding, *(self._limits or ()))

    def _pytorch_adjoint(self, grad: Tensor, cache: WeightCache, output_padding: tuple[int, ...]) -> Tensor:
        geometry = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(grad, self.weight, None, *geometry)

    def _onednn_adjoint(self, grad: Tensor, cache: WeightCache, output_padding: tuple[int, ...]) -> Tensor:
        geometry = (self.padding, output_padding, self.stride, self.dilation, self.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight.default
        weight = self._reordered_weight(cache, reorder, *geometry, onednn.shape_to_pack_for(grad))
        return onednn.transposed_convolution(grad, weight, *geometry)

    def _winograd_adjoint(self, grad: Tensor, cache: WeightCache) -> Tensor:
        # The adjoint of a convolution without a stride is one, too, with its kernels turned round.
        weight = cache(_winograd_adjoint_weight, self.weight, size=_winograd_bytes(self.weight))
        if weight is None:
            return self._onednn_adjoint(grad, cache, (0, 0))
        return ops.winograd_conv2d(grad, weight, None, self._around)

    def _reordered_weight(self, cache: WeightCache, reorder: Callable[..., Tensor], *geometry: Any) -> Tensor:
        """Returns the weight as a kernel wants it; sizes of maps for which it wants the same share the memory."""
        packed = cache(reorder, self.weight, *geometry, layout=_layout)
        return self.weight if packed is None else packed

    @property
    def _limits(self) -> list[float] | None:
        """Returns the limits of the results, or None if the node ends otherwise."""
        name, numbers = self.activation
        return numbers if name == "hardtanh" else _LIMITS.get(name)

    @property
    def _around(self) -> tuple[int, ...]:
        return tuple(2 - extent for extent in self.padding)

    def _winograd_pays(self, maps: Tensor, padding: tuple[int, ...]) -> bool:
        unit = (*self.stride, *self.dilation, self.groups) == (1, 1, 1, 1, 1)
        return unit and min(padding) >= 0 and ops.winograd_pays(maps, self.weight, padding)


# A kernel takes the convolution, maps, and a cache for its packed weight.
_Kernel = Callable[..., Tensor]


def _in_other_format(kernel: _Kernel, convolution: _PackedConvolution, maps: Tensor, cache: WeightCache) -> Tensor:
    """Runs a kernel on the maps in the other memory format, and returns the result in that of the maps."""
    formats = [torch.contiguous_format, torch.channels_last]
    if maps.is_contiguous(memory_format=torch.channels_last):
        formats.reverse()
    current, other = formats
    return kernel(convolution, maps.contiguous(memory_format=other), cache).contiguous(memory_format=current)


def _winograd_adjoint_weight(weight: Tensor) -> Tensor:
    return ops.winograd_weight(weight.transpose(0, 1).flip(2, 3))


def _winograd_bytes(weight: Tensor) -> int:
    """Returns the bytes of a Winograd weight: 36 numbers for every 9."""
    return 4 * weight.nbytes


def _layout(packed: Tensor) -> bytes:
    """Returns the memory layout that oneDNN chose for a packed tensor."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md.default(packed).tolist())


def _packed_convolution(
    cache: WeightCache,
    contests: Allowance,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> _PackedConvolution | None:
    if not (isinstance(input, Value) and len(input.shape) == 4 and input.device.type == "cpu"):
        return None
    floats = isinstance(weight, Tensor) and input.dtype == weight.dtype == torch.float32
    if not floats or isinstance(padding, str) or isinstance(bias, Value):
        return None
    padding, stride, dilation = (tuple(value) * (3 - len(value)) for value in (padding, stride, dilation))
    bias = None if bias is None else bias.detach()
    return _PackedConvolution(cache, weight, bias, padding, stride, dilation, groups, contests=contests)
