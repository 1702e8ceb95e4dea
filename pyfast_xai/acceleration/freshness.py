"""Detection of changes to a model: all that its outputs depend on besides its inputs.

Python has no log of what was written to an object, so the objects that a model can reach are walked once: its modules
with all their attributes and hooks, the lists, dictionaries and plain objects among those, the functions of its classes
with their closures and the globals that they name, but not what installed packages have inside. What is found is then
compared by identity, which takes some tenths of a millisecond for hundreds of modules, and by value where an object was
replaced.
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

# Immutable types: two objects of a type that print alike are alike, and zeros of two signs are not.
_PLAIN_TYPES = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, types.CodeType),
    }
)
_PLAIN_KINDS = (np.generic, np.dtype, pathlib.PurePath, re.Pattern)
# Types compared by identity alone, because their behaviour cannot be changed.
_FIXED = (
    *(types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, enum.Enum),
    *(types.MemberDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.Generator),
)
# Objects of these say how a program runs or reports, not what it computes.
_ASIDE = frozenset(
    {
        *("logging", "threading", "_thread", "weakref", "_weakref", "typing", "abc", "_abc", "inspect", "warnings"),
        *("contextlib", "importlib", "_collections", "_frozen_importlib", "_frozen_importlib_external", "dataclasses"),
    }
)
_CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict, list, tuple, set, frozenset, collections.deque)
_LIBRARIES = frozenset({"torch", "numpy", "pyfast_xai", *sys.stdlib_module_names} - {"__main__"})
_INSTALLED = ("site-packages", "dist-packages")

_MOST_BYTES = 1 << 18  # of an array, which is compared whole
_MOST_OBJECTS = 200_000

_MISSING = object()
# Of a module; they run as its weights are saved and loaded.
_SAVING = (
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"),
)


class Snapshot:
    """A model at one time.

    Attributes:
        unproven: what the model can reach of which a change could not be seen, as a clause; None where there is none.
        modules: all that the model can reach, registered or not.

    Args:
        model: any module.
        weights: also watch its tensors; without, only their shapes.
    """

    def __init__(self, model: nn.Module, *, weights: bool = True) -> None:
        self._tables: list[dict[Any, Any]] = []
        self._classes: list[type] = []
        self._sequences: list[Any] = []
        self._sets: list[Any] = []
        self._slots: list[tuple[Any, str]] = []
        self._globals: list[tuple[dict[str, Any], str]] = []
        self._arrays: list[tuple[np.ndarray, bytes]] = []
        self._known: dict[int, Any] = {}
        self._watches_tensors = weights
        self._tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.unproven: str | None = None
        self._visit_all([(model, "the model"), (vars(nn.functional), "torch.nn.functional")])
        for name in _HOOKS:
            self._visit_all((hook, "a global hook") for hook in _hooks(name))
        self._empty = [table for table in self._tables if type(table) in _CONTAINERS and not table]
        self._tables = [table for table in self._tables if type(table) not in _CONTAINERS or table]
        self._keys, self._values = self._look()
        self._frozen = [set(found) for found in self._sets]
        try:
            self._weights = WeightSamples(self._tensors if weights else [])
        except (TypeError, RuntimeError, NotImplementedError) as error:
            self._weights = WeightSamples([])
            self.unproven = self.unproven or f"it has a tensor that cannot be watched ({error})"

    def storages(self) -> set[int]:
        """Returns the addresses of the memory that the model's tensors lie in."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._tensors}

    def holds(self) -> bool:
        """Returns whether nothing has changed, as far as `WeightSamples` can tell for the numbers of large tensors."""
        if any(self._empty):
            return False
        keys, values = self._look()
        if keys != self._keys or len(values) != len(self._values):
            return False
        if not all(map(operator.is_, values, self._values)):
            pairs = zip(values, self._values, strict=True)
            if not all(now is before or self._is_alike(now, before) for now, before in pairs):
                return False
            self._values = values
        if any(map(operator.ne, self._sets, self._frozen)):
            return False
        return all(array.tobytes() == numbers for array, numbers in self._arrays) and self._weights.hold()

    def _is_alike(self, now: Any, before: Any) -> bool:
        if not self._watches_tensors and isinstance(now, Tensor) and isinstance(before, Tensor):
            return type(now) is type(before) and now.shape == before.shape
        return _alike(now, before)

    def renew(self) -> bool:
        """Returns the takes the model as it is now, if nothing changed but tensors, numbers and strings that it keeps.

        Returns:
            False where more changed, and another snapshot is to be made.
        """
        keys, values = self._look()
        if any(self._empty) or keys != self._keys or len(values) != len(self._values):
            return False
        changed = [now for now, before in zip(values, self._values, strict=True) if now is not before]
        if any(map(operator.ne, self._sets, self._frozen)) or not all(
            isinstance(now, Tensor) or is_plain(now) for now in changed
        ):
            return False
        self._values = values
        self._arrays = [(array, array.tobytes()) for array, _ in self._arrays]
        return True

    def _look(self) -> tuple[list[Any], list[Any]]:
        keys = [*itertools.chain.from_iterable(map(dict.keys, self._tables))]
        keys += map(dict.__len__, self._tables)
        keys += map(len, self._sequences)
        values = [*itertools.chain.from_iterable(map(dict.values, self._tables))]
        values += itertools.chain.from_iterable(self._sequences)
        for kind in self._classes:
            members = vars(kind)
            keys += members
            values += members.values()
        values += [getattr(found, name, _MISSING) for found, name in self._slots]
        values += [names.get(name, _MISSING) for names, name in self._globals]
        for name in _HOOKS:
            values += _hooks(name)
        return keys, values

    # The walk

    def _visit_all(self, found: Any) -> None:
        waiting = list(found)
        while waiting:
            thing, where = waiting.pop()
            if is_plain(thing) or id(thing) in self._known:
                continue
            self._known[id(thing)] = thing
            if len(self._known) > _MOST_OBJECTS:
                self.unproven = self.unproven or f"it reaches more than {_MOST_OBJECTS:,} objects"
                return
            waiting.extend(self._inside(thing, where))

    def _inside(self, thing: Any, where: str) -> Iterator[tuple[Any, str]]:
        """Put one object among those to be watched, and return what it leads to."""
        if isinstance(thing, _FIXED) or type(thing).__module__ in _ASIDE:
            return
        if isinstance(thing, type):
            yield from self._inside_class(thing, where)
        elif isinstance(thing, types.FunctionType):
            yield from self._inside_function(thing, where)
        elif isinstance(thing, types.MethodType):
            yield from ((thing.__self__, where), (thing.__func__, where))
        elif isinstance(thing, types.CellType):
            self._slots.append((thing, "cell_contents"))
            yield getattr(thing, "cell_contents", None), where
        elif isinstance(thing, (staticmethod, classmethod)):
            yield thing.__func__, where
        elif isinstance(thing, (property, functools.cached_property)):
            names = ("fget",) if isinstance(thing, property) else ("func",)
            yield from ((getattr(thing, name), where) for name in names)
        elif isinstance(thing, functools._lru_cache_wrapper):
            yield thing.__wrapped__, where
        elif isinstance(thing, functools.partial):
            yield from ((thing.func, where), (thing.args, where), (thing.keywords, where))
        elif isinstance(thing, np.ndarray):
            if thing.dtype.hasobject or thing.nbytes > _MOST_BYTES:
                self._doubt(where, "a NumPy array that is too large or of objects")
            else:
                self._arrays.append((thing, thing.tobytes()))
        else:
            yield from self._inside_object(thing, where)

    def _inside_object(self, thing: Any, where: str) -> Iterator[tuple[Any, str]]:
        kind = type(thing)
        if isinstance(thing, Tensor):
            self._tensors.append(thing)
            if kind in (Tensor, nn.Parameter, nn.Buffer):
                return
        elif isinstance(thing, dict):
            self._tables.append(thing)
            yield from ((value, f"{where}[{key!r}]") for key, value in dict.items(thing))
        elif isinstance(thing, (list, tuple, collections.deque)):
            if not isinstance(thing, tuple):
                self._sequences.append(thing)
            yield from ((value, f"{where}[{index}]") for index, value in enumerate(thing))
        elif isinstance(thing, (set, frozenset)):
            self._sets.append(thing)
            yield from ((value, where) for value in thing)
        elif isinstance(thing, torch.jit.ScriptModule):
            self._doubt(where, "a TorchScript module")
            return
        if kind in _CONTAINERS:
            return
        if isinstance(thing, nn.Module):
            self.modules.append(thing)
        yield kind, where
        self._slots.append((thing, "__class__"))
        slots = [name for base in kind.__mro__ for name in _slots_of(base)]
        self._slots += ((thing, name) for name in slots)
        yield from ((getattr(thing, name, None), f"{where}.{name}") for name in slots)
        attributes = getattr(thing, "__dict__", None)
        if isinstance(attributes, dict):
            self._tables.append(attributes)
            self._known[id(attributes)] = attributes
            aside = _SAVING if isinstance(thing, nn.Module) else ()
            yield from ((value, f"{where}.{name}") for name, value in attributes.items() if name not in aside)
        if not (_is_open(kind) or isinstance(thing, Tensor) or (callable(thing) and is_from_library(thing))):
            self._doubt(where, f"a {kind.__module__}.{kind.__qualname__}")

    def _inside_class(self, kind: type, where: str) -> Iterator[tuple[Any, str]]:
        if not kind.__flags__ & _HEAP_TYPE:  # compiled, and closed
            return
        self._classes.append(kind)
        yield from ((base, where) for base in kind.__bases__)
        if not is_from_library(kind):
            members = dict(vars(kind))
            for name in ("__dict__", "__weakref__", "__doc__", "_abc_impl", "__abstractmethods__"):
                members.pop(name, None)
            yield from ((value, f"{kind.__qualname__}.{name}") for name, value in members.items())

    def _inside_function(self, function: types.FunctionType, where: str) -> Iterator[tuple[Any, str]]:
        if is_from_library(function):
            return
        for name in ("__code__", "__defaults__", "__kwdefaults__", "__closure__"):
            self._slots.append((function, name))
        yield from ((thing, where) for thing in (function.__defaults__, function.__kwdefaults__, function.__dict__))
        yield from ((cell, where) for cell in function.__closure__ or ())
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

    def _doubt(self, where: str, what: str) -> None:
        self.unproven = self.unproven or f"a change of {where}, {what}, could not be seen"


_HEAP_TYPE = 1 << 9
_POINTER = struct.calcsize("P")
_OPEN = frozenset({object, *_CONTAINERS, types.SimpleNamespace})


def _is_open(kind: type) -> bool:
    """Returns whether objects of a class hold nothing but attributes and elements."""
    return all(base in _OPEN or (base.__flags__ & _HEAP_TYPE and not _hides(base)) for base in kind.__mro__)


def _hides(kind: type) -> bool:
    """Returns whether a class adds memory besides its slots, its dictionary and its weak references."""
    if kind.__base__ is None:
        return False
    added = kind.__basicsize__ - kind.__base__.__basicsize__
    return added > _POINTER * (len(_slots_of(kind)) + 2)


def _slots_of(kind: type) -> list[str]:
    named = vars(kind).get("__slots__", ())
    named = [named] if isinstance(named, str) else named
    mangled = f"_{kind.__name__.lstrip('_')}"
    hidden = [f"{mangled}{name}" if name.startswith("__") and not name.endswith("__") else name for name in named]
    return [name for name in hidden if name not in ("__dict__", "__weakref__")]


def is_plain(thing: Any) -> bool:
    """Returns whether an object cannot change, and shows all that it is when it is printed."""
    return type(thing) in _PLAIN_TYPES or isinstance(thing, _PLAIN_KINDS)


def is_from_library(thing: Any) -> bool:
    """Returns whether a function or class is of an installed package, which changes only if it is replaced."""
    return _is_library(str(getattr(thing, "__module__", None)))


@functools.cache
def _is_library(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name.partition(".")[0] in _LIBRARIES or any(folder in pathlib.Path(file).parts for folder in _INSTALLED)


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Returns the names that a function and those written inside it take from outside, or from an attribute."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _hooks(name: str) -> list[Any]:
    """Returns the hooks of all modules of the process, but those of a recording."""
    return [hook for hook in getattr(process_wide, name).values() if not module_hooks.is_of_a_recording(hook)]


def _alike(now: Any, before: Any) -> bool:
    """Returns whether one object in place of another makes no difference."""
    if type(now) is type(before) is tuple and len(now) == len(before):
        return all(one is other or _alike(one, other) for one, other in zip(now, before, strict=True))
    return type(now) is type(before) and is_plain(now) and repr(now) == repr(before)
