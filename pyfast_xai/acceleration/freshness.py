"""Detection of changes to a model, in everything that its outputs depend on besides its inputs.

Python does not log writes to objects, so the objects that a model can reach are visited once: its modules with all
their attributes and hooks, the lists, dictionaries and plain objects among those, the functions of its classes with
their closures and the globals that they name, but not the internals of installed packages. They are then compared by
identity, which takes some tenths of a millisecond for hundreds of modules, and by value where an object was replaced.
"""

import collections
import enum
import functools
import itertools
import operator
import pathlib
import re
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as process_wide

from pyfast_xai.acceleration.weight_samples import WeightSamples
from pyfast_xai.tape import module_hooks

# Immutable types: objects of one type are equal if their `repr` is equal, which also tells 0.0 from -0.0.
_IMMUTABLE_TYPES = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, types.CodeType),
    }
)
_IMMUTABLE_BASES = (np.generic, np.dtype, pathlib.PurePath, re.Pattern)
# Types compared by identity alone, because their behaviour cannot be changed.
_FIXED_TYPES = (
    *(types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, enum.Enum),
    *(types.MemberDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.Generator),
)
# Modules whose objects affect how a program runs or reports, not what it computes.
_IGNORED_MODULES = frozenset(
    {
        *("logging", "threading", "_thread", "weakref", "_weakref", "typing", "abc", "_abc", "inspect", "warnings"),
        *("contextlib", "importlib", "_collections", "_frozen_importlib", "_frozen_importlib_external", "dataclasses"),
    }
)
_CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict, list, tuple, set, frozenset, collections.deque)
_LIBRARIES = frozenset({"torch", "numpy", "pyfast_xai", *sys.stdlib_module_names} - {"__main__"})
_INSTALLED = ("site-packages", "dist-packages")

_MAX_BYTES = 1 << 18  # of a NumPy array; arrays are compared as a whole
_MAX_OBJECTS = 200_000

_MISSING = object()
# Hooks of a module that run only when its weights are saved or loaded.
_SAVING = (
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"),
)


class Snapshot:
    """The state of a model at one time.

    Attributes:
        model: the model.
        unproven: the reason, as a clause, why a change of the model could go unnoticed; None if it cannot.
        modules: all modules that the model can reach, registered or not.

    Args:
        model: any module.
        weights: also watch the numbers in its tensors; False watches their shapes only.
    """

    def __init__(self, model: nn.Module, *, weights: bool = True) -> None:
        self.model = model
        self._tables: list[dict[Any, Any]] = []
        self._classes: list[type] = []
        self._sequences: list[Any] = []
        self._sets: list[Any] = []
        self._slots: list[tuple[Any, str]] = []
        self._globals: list[tuple[dict[str, Any], str]] = []
        self._arrays: list[tuple[np.ndarray, bytes]] = []
        self._visited: dict[int, Any] = {}
        self._watches_tensors = weights
        self._tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.unproven: str | None = None
        self._visit_all([(model, "the model"), (vars(nn.functional), "torch.nn.functional")])
        for name in _HOOKS:
            self._visit_all((hook, "a global hook") for hook in _hooks(name))
        self._empty = [table for table in self._tables if type(table) in _CONTAINERS and not table]
        self._tables = [table for table in self._tables if type(table) not in _CONTAINERS or table]
        self._keys, self._values = self._read()
        self._frozen = [set(members) for members in self._sets]
        try:
            self._weights = WeightSamples(self._tensors if weights else [])
        except (TypeError, RuntimeError, NotImplementedError) as error:
            self._weights = WeightSamples([])
            self.unproven = self.unproven or f"it has a tensor that cannot be watched ({error})"

    def storages(self) -> set[int]:
        """Returns the addresses of the storages of the model's tensors."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._tensors}

    def is_current(self) -> bool:
        """Returns whether nothing has changed; for the numbers of large tensors, as far as `WeightSamples` can tell."""
        if any(self._empty):
            return False
        keys, values = self._read()
        if keys != self._keys or len(values) != len(self._values):
            return False
        if not all(map(operator.is_, values, self._values)):
            pairs = zip(values, self._values, strict=True)
            if not all(current is previous or self._is_equivalent(current, previous) for current, previous in pairs):
                return False
            self._values = values
        if any(map(operator.ne, self._sets, self._frozen)):
            return False
        return all(array.tobytes() == numbers for array, numbers in self._arrays) and self._weights.unchanged()

    def _is_equivalent(self, current: Any, previous: Any) -> bool:
        if not self._watches_tensors and isinstance(current, Tensor) and isinstance(previous, Tensor):
            return type(current) is type(previous) and current.shape == previous.shape
        return _equivalent(current, previous)

    def refreshed(self, *, values: bool = True) -> "Snapshot":
        """Returns this snapshot if the model is as it was, otherwise a new one.

        Args:
            values: False accepts changed tensors, numbers and strings, and updates this snapshot to them.
        """
        valid = self.is_current() if values else self._update_values()
        return self if valid else Snapshot(self.model, weights=self._watches_tensors)

    def _update_values(self) -> bool:
        """Updates the snapshot, and returns True, if nothing but tensors, numbers and strings has changed."""
        keys, values = self._read()
        if any(self._empty) or keys != self._keys or len(values) != len(self._values):
            return False
        if any(map(operator.ne, self._sets, self._frozen)):
            return False
        if not all(map(operator.is_, values, self._values)):
            pairs = zip(values, self._values, strict=True)
            changed = [current for current, previous in pairs if current is not previous]
            if not all(isinstance(current, Tensor) or is_immutable(current) for current in changed):
                return False
        self._values = values
        self._arrays = [(array, array.tobytes()) for array, _ in self._arrays]
        return True

    def _read(self) -> tuple[list[Any], list[Any]]:
        keys = [*itertools.chain.from_iterable(map(dict.keys, self._tables))]
        keys += map(dict.__len__, self._tables)
        keys += map(len, self._sequences)
        values = [*itertools.chain.from_iterable(map(dict.values, self._tables))]
        values += itertools.chain.from_iterable(self._sequences)
        for kind in self._classes:
            members = vars(kind)
            keys += members
            values += members.values()
        values += [getattr(owner, name, _MISSING) for owner, name in self._slots]
        values += [names.get(name, _MISSING) for names, name in self._globals]
        for name in _HOOKS:
            values += _hooks(name)
        return keys, values

    # Traversal of the objects that the model can reach

    def _visit_all(self, roots: Any) -> None:
        pending = list(roots)
        while pending:
            obj, path = pending.pop()
            if is_immutable(obj) or id(obj) in self._visited:
                continue
            self._visited[id(obj)] = obj
            if len(self._visited) > _MAX_OBJECTS:
                self.unproven = self.unproven or f"it reaches more than {_MAX_OBJECTS:,} objects"
                return
            pending.extend(self._members(obj, path))

    def _members(self, obj: Any, path: str) -> Iterator[tuple[Any, str]]:
        """Watches one object, and yields the objects that it refers to, with their paths."""
        if isinstance(obj, _FIXED_TYPES) or type(obj).__module__ in _IGNORED_MODULES:
            return
        if isinstance(obj, type):
            yield from self._class_members(obj, path)
        elif isinstance(obj, types.FunctionType):
            yield from self._function_members(obj, path)
        elif isinstance(obj, types.MethodType):
            yield from ((obj.__self__, path), (obj.__func__, path))
        elif isinstance(obj, types.CellType):
            self._slots.append((obj, "cell_contents"))
            yield getattr(obj, "cell_contents", None), path
        elif isinstance(obj, (staticmethod, classmethod)):
            yield obj.__func__, path
        elif isinstance(obj, (property, functools.cached_property)):
            names = ("fget",) if isinstance(obj, property) else ("func",)
            yield from ((getattr(obj, name), path) for name in names)
        elif isinstance(obj, functools._lru_cache_wrapper):
            yield obj.__wrapped__, path
        elif isinstance(obj, functools.partial):
            yield from ((obj.func, path), (obj.args, path), (obj.keywords, path))
        elif isinstance(obj, np.ndarray):
            if obj.dtype.hasobject or obj.nbytes > _MAX_BYTES:
                self._mark_unproven(path, "a NumPy array that is too large or of objects")
            else:
                self._arrays.append((obj, obj.tobytes()))
        else:
            yield from self._object_members(obj, path)

    def _object_members(self, obj: Any, path: str) -> Iterator[tuple[Any, str]]:
        kind = type(obj)
        if isinstance(obj, Tensor):
            self._tensors.append(obj)
            if kind in (Tensor, nn.Parameter, nn.Buffer):
                return
        elif isinstance(obj, dict):
            self._tables.append(obj)
            yield from ((value, f"{path}[{key!r}]") for key, value in dict.items(obj))
        elif isinstance(obj, (list, tuple, collections.deque)):
            if not isinstance(obj, tuple):
                self._sequences.append(obj)
            yield from ((value, f"{path}[{index}]") for index, value in enumerate(obj))
        elif isinstance(obj, (set, frozenset)):
            self._sets.append(obj)
            yield from ((value, path) for value in obj)
        elif isinstance(obj, torch.jit.ScriptModule):
            self._mark_unproven(path, "a TorchScript module")
            return
        if kind in _CONTAINERS:
            return
        if isinstance(obj, nn.Module):
            self.modules.append(obj)
        yield kind, path
        self._slots.append((obj, "__class__"))
        slots = [name for base in kind.__mro__ for name in _slot_names(base)]
        self._slots += ((obj, name) for name in slots)
        yield from ((getattr(obj, name, None), f"{path}.{name}") for name in slots)
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict):
            self._tables.append(attributes)
            self._visited[id(attributes)] = attributes
            ignored = _SAVING if isinstance(obj, nn.Module) else ()
            yield from ((value, f"{path}.{name}") for name, value in attributes.items() if name not in ignored)
        if not (_is_transparent(kind) or isinstance(obj, Tensor) or (callable(obj) and is_from_library(obj))):
            self._mark_unproven(path, f"a {kind.__module__}.{kind.__qualname__}")

    def _class_members(self, kind: type, path: str) -> Iterator[tuple[Any, str]]:
        if not kind.__flags__ & _HEAP_TYPE:  # a compiled class, which cannot be changed
            return
        self._classes.append(kind)
        yield from ((base, path) for base in kind.__bases__)
        if not is_from_library(kind):
            members = dict(vars(kind))
            for name in ("__dict__", "__weakref__", "__doc__", "_abc_impl", "__abstractmethods__"):
                members.pop(name, None)
            yield from ((value, f"{kind.__qualname__}.{name}") for name, value in members.items())

    def _function_members(self, function: types.FunctionType, path: str) -> Iterator[tuple[Any, str]]:
        if is_from_library(function):
            return
        for name in ("__code__", "__defaults__", "__kwdefaults__", "__closure__"):
            self._slots.append((function, name))
        yield from ((obj, path) for obj in (function.__defaults__, function.__kwdefaults__, function.__dict__))
        yield from ((cell, path) for cell in function.__closure__ or ())
        for name in _names(function.__code__):
            value = function.__globals__.get(name, _MISSING)
            if value is _MISSING:
                continue
            self._globals.append((function.__globals__, name))
            yield value, f"the global {name}"
            if isinstance(value, types.ModuleType):
                for inner in _names(function.__code__):
                    if inner in vars(value):
                        self._globals.append((vars(value), inner))
                        yield vars(value)[inner], f"{name}.{inner}"

    def _mark_unproven(self, path: str, description: str) -> None:
        self.unproven = self.unproven or f"a change of {path}, {description}, could not be seen"


_HEAP_TYPE = 1 << 9
_POINTER = struct.calcsize("P")
_TRANSPARENT = frozenset({object, *_CONTAINERS, types.SimpleNamespace})


def _is_transparent(kind: type) -> bool:
    """Returns whether objects of a class have no state besides attributes and elements."""
    return all(
        base in _TRANSPARENT or (base.__flags__ & _HEAP_TYPE and not _has_hidden_memory(base)) for base in kind.__mro__
    )


def _has_hidden_memory(kind: type) -> bool:
    """Returns whether a class adds memory besides its slots, its dictionary and its weak references."""
    if kind.__base__ is None:
        return False
    added = kind.__basicsize__ - kind.__base__.__basicsize__
    return added > _POINTER * (len(_slot_names(kind)) + 2)


def _slot_names(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else names
    mangled = f"_{kind.__name__.lstrip('_')}"
    hidden = [f"{mangled}{name}" if name.startswith("__") and not name.endswith("__") else name for name in names]
    return [name for name in hidden if name not in ("__dict__", "__weakref__")]


def is_immutable(obj: Any) -> bool:
    """Returns whether an object is immutable, with a `repr` that shows all of its value."""
    return type(obj) in _IMMUTABLE_TYPES or isinstance(obj, _IMMUTABLE_BASES)


def is_from_library(obj: Any) -> bool:
    """Returns whether a function or class belongs to an installed package, and can change only by being replaced."""
    return _is_library(str(getattr(obj, "__module__", None)))


@functools.cache
def _is_library(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name.partition(".")[0] in _LIBRARIES or any(folder in pathlib.Path(file).parts for folder in _INSTALLED)


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Returns the global and attribute names that a function and its nested functions use."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _hooks(name: str) -> list[Any]:
    """Returns the process-wide module hooks of one kind, except those of a recording."""
    return [hook for hook in getattr(process_wide, name).values() if not module_hooks.is_recording_hook(hook)]


def _equivalent(current: Any, previous: Any) -> bool:
    """Returns whether replacing one object by the other makes no difference."""
    if type(current) is type(previous) is tuple and len(current) == len(previous):
        return all(left is right or _equivalent(left, right) for left, right in zip(current, previous, strict=True))
    return type(current) is type(previous) and is_immutable(current) and repr(current) == repr(previous)
