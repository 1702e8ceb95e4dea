"""A cache of tensors computed from a model's weights, limited to a number of bytes."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.forks import ForkSafeLock

T = TypeVar("T")

_ENTRY_BYTES = 512  # Python objects of one entry


@dataclass(slots=True)
class _Entry:
    arguments: tuple[Any, ...]  # kept alive, because their ids are part of the key
    result: Any
    pinned: bool
    call: int


class WeightCache:
    """Caches results of functions of tensors, for any number of tapes of a model.

    Beyond `limit` bytes the least recently used results are evicted, except those that the current call of the model
    has used. A result that does not fit is not computed.

    Args:
        limit: bytes of all results together.
        parent: another cache, whose results are used, too.

    Attributes:
        nbytes: bytes of all results together.
        computed: number of results that were computed.
    """

    def __init__(self, limit: float = float("inf"), parent: "WeightCache | None" = None) -> None:
        self._limit = limit
        self._parent = parent
        self._lock = ForkSafeLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._uses: Counter[int] = Counter()  # number of entries that hold a tensor, by its id
        self._call = 0
        self._lays_out = True
        self.nbytes = self.computed = 0

    def next_call(self, limit: float, *, lay_out: bool = True) -> None:
        """Starts a call of the model.

        Args:
            limit: bytes of all results from now on.
            lay_out: also compute results that have a `layout`.
        """
        with self._lock:
            self._call += 1
            self._lays_out = lay_out
            self._limit = limit
            self._evict(0)

    def __call__(
        self,
        function: Callable[..., T],
        *arguments: Any,
        size: int | None = None,
        pinned: bool = False,
        layout: Callable[[T], Hashable] | None = None,
    ) -> T | None:
        """Returns `function(*arguments)`, from the cache if it is there.

        Args:
            function: a pure function.
            *arguments: tensors, compared by identity, and hashable objects; the first is a tensor.
            size: bytes of the result; None for the bytes of the first argument.
            pinned: the result is used beyond this call, and is not evicted.
            layout: returns a description of the memory layout of a result. Results with the same description and the
                same first argument are stored once.

        Returns:
            The result; None if there is no room for it, or if it must not be computed in this call.
        """
        entry_key = _key(function, arguments)
        if self._parent is not None and entry_key in self._parent._entries:
            return self._parent(function, *arguments, size=size, pinned=pinned, layout=layout)
        with self._lock:
            entry = self._get(entry_key)
            if entry is not None:
                return entry.result
            if layout is not None and not self._lays_out:
                return None
            if not self._evict(nbytes(arguments[0]) if size is None else size):
                return None
        result = function(*arguments)
        with self._lock:
            self.computed += 1
            if layout is not None:
                weight = arguments[:1]
                layout_key = (*_key(function, weight), layout(result))
                result = self._insert(layout_key, _Entry(weight, result, pinned, self._call))
            return self._insert(entry_key, _Entry(arguments, result, pinned, self._call))

    def merge(self, other: "WeightCache") -> None:
        """Inserts the entries of another cache, as far as there is room."""
        with self._lock:
            for entry_key, entry in other._entries.items():
                self._insert(entry_key, replace(entry, call=self._call))

    def contains(self, tensor: Tensor) -> bool:
        """Returns whether a tensor is one of the results."""
        return id(tensor) in self._uses

    def _get(self, entry_key: Hashable) -> _Entry | None:
        entry = self._entries.get(entry_key)
        if entry is not None:
            entry.call = self._call
            self._entries.move_to_end(entry_key)
        return entry

    def _insert(self, entry_key: Hashable, new: _Entry) -> Any:
        """Returns the cached result if there is one, otherwise the new one, which is cached if there is room."""
        entry = self._get(entry_key)
        if entry is not None:
            return entry.result
        tensors = _tensors(new.result)
        size = _ENTRY_BYTES + sum(nbytes(tensor) for tensor in tensors if id(tensor) not in self._uses)
        if self._evict(size):
            self._entries[entry_key] = new
            self._uses.update(map(id, tensors))
            self.nbytes += size
        return new.result

    def _evict(self, size: int) -> bool:
        for entry_key, entry in list(self._entries.items()):
            if self.nbytes + size <= self._limit:
                break
            if not entry.pinned and entry.call < self._call:
                self._drop(entry_key)
        return self.nbytes + size <= self._limit

    def _drop(self, entry_key: Hashable) -> None:
        self.nbytes -= _ENTRY_BYTES
        for tensor in _tensors(self._entries.pop(entry_key).result):
            self._uses[id(tensor)] -= 1
            if not self._uses[id(tensor)]:
                del self._uses[id(tensor)]
                self.nbytes -= nbytes(tensor)


def nbytes(tensor: Tensor) -> int:
    """Returns the memory of a tensor, in bytes."""
    if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
        return int(torch.ops.mkldnn._nbytes.default(tensor))
    return tensor.untyped_storage().nbytes()


def _key(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (function, *(id(argument) if isinstance(argument, Tensor) else argument for argument in arguments))


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
