"""The key of a replayed function: everything a replay depends on besides the numbers in its tensors."""

import dataclasses
import enum
import hashlib
import types
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from pyfast_xai.acceleration.freshness import is_from_library, is_immutable


def cache_key(args: Any, kwargs: Any) -> Hashable | None:
    """Returns a key of the arguments: calls with equal keys differ in nothing but the numbers in tensors.

    Tensors are compared by shape, strides, dtype and device; numbers and strings by value, NumPy arrays by content,
    functions and classes by identity. Settings of PyTorch that change what operations do are part of the key.

    Args:
        args: positional arguments, nested in tuples, lists and dictionaries.
        kwargs: keyword arguments, nested in the same way.

    Returns:
        The key; None if calls cannot be told apart, because an argument is an object that may change, or functions of
        PyTorch are overridden.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    descriptions = [_describe(leaf) for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    settings = _settings({tensor.device.type for tensor in tensors})
    if None in descriptions or settings is None:
        return None
    return tuple(descriptions), structure, _sharing(tensors), settings


def _describe(leaf: Any) -> Hashable | None:
    if isinstance(leaf, Tensor):
        if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout != torch.strided:
            return None
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.is_conj(), leaf.is_neg()
    if is_immutable(leaf):
        return type(leaf), repr(leaf)
    if type(leaf) is np.ndarray:
        if leaf.dtype.hasobject:
            return None
        return leaf.shape, leaf.dtype.str, hashlib.blake2b(leaf.tobytes()).digest()
    if isinstance(leaf, enum.Enum):
        return leaf
    if isinstance(leaf, (type, types.FunctionType)) and is_from_library(leaf):
        return leaf
    if type(leaf).__module__.partition(".")[0] == "pyfast_xai":  # an explainer's settings
        return _Identity(leaf)
    # Any other function or class may read names outside itself, which may change.
    closed = isinstance(leaf, types.FunctionType) and _is_closed(leaf)
    return leaf if closed or isinstance(leaf, types.BuiltinFunctionType) else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Identity:
    """Compares an object by identity, and keeps it alive so that no other object gets its address."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_closed(function: types.FunctionType) -> bool:
    code = function.__code__
    return not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or code.co_names)


def _sharing(tensors: list[Tensor]) -> tuple[int, ...]:
    """Returns, for each tensor, the index of the first tensor that shares its memory."""
    if len(tensors) < 2:
        return ()
    memory = [tensor.untyped_storage()._cdata for tensor in tensors]
    return tuple(map(memory.index, memory))


def _settings(devices: set[str]) -> Hashable | None:
    modes = [torch._C._get_function_stack_at(level) for level in range(torch._C._len_torch_function_stack())]
    if not all(isinstance(mode, DeviceContext) for mode in modes):
        return None
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(devices) if torch.is_autocast_enabled(kind)]
    return (
        *(torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        *(torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled),
        *autocast,
        *(mode.device for mode in modes),
    )
