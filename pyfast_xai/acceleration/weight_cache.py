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

_ENTRY_BYTES = 512  # what Python takes to know one


@dataclass(slots=True)
class _Entry:
    arguments: tuple[Any, ...]  # so that the id of none is used again
    result: Any
    pinned: bool
    call: int


class WeightCache:
    """Calls functions of tensors, each once for the same ones, for however many tapes of a model.

    Where results come to more than `limit` bytes, those that were used longest ago are let go, but for what the same
    call of the model has used. A result that there is no room for is not made.

    Args:
        limit: bytes of all results together.
        parent: another cache, whose results serve here too.

    Attributes:
        nbytes: of all results together.
        made: how often a function was called.
    """

    def __init__(self, limit: float = float("inf"), parent: "WeightCache | None" = None) -> None:
        self._limit = limit
        self._parent = parent
        self._lock = ForkSafeLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._uses: Counter[int] = Counter()  # entries with this tensor, by its id
        self._call = 0
        self._lays_out = True
        self.nbytes = self.made = 0

    def next_call(self, limit: float, *, lay_out: bool = True) -> None:
        """Says that the model is called.

        Args:
            limit: bytes that there may be now.
            lay_out: make results that have a `layout`, too.
        """
        with self._lock:
            self._call += 1
            self._lays_out = lay_out
            self._limit = limit
            self._make_room(0)

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
            function: to be called.
            *arguments: tensors, known by identity, and hashable objects; the first is a tensor.
            size: bytes of the result; None for those of the first argument.
            pinned: the result is used beyond this call, and stays.
            layout: tells how a result lies in memory. Of those that it says the same of, for the same first argument,
                one is kept.

        Returns:
            None where there is no room for the result, or where it is not to be made in this call.
        """
        known = _key(function, arguments)
        if self._parent is not None and known in self._parent._entries:
            return self._parent(function, *arguments, size=size, pinned=pinned, layout=layout)
        with self._lock:
            entry = self._used(known)
            if entry is not None:
                return entry.result
            if layout is not None and not self._lays_out:
                return None
            if not self._make_room(nbytes(arguments[0]) if size is None else size):
                return None
        result = function(*arguments)
        with self._lock:
            self.made += 1
            if layout is not None:
                weight = arguments[:1]
                described = (*_key(function, weight), layout(result))
                result = self._keep(described, _Entry(weight, result, pinned, self._call))
            return self._keep(known, _Entry(arguments, result, pinned, self._call))

    def take_over(self, other: "WeightCache") -> None:
        """Keeps what another cache holds, as far as there is room."""
        with self._lock:
            for known, entry in other._entries.items():
                self._keep(known, replace(entry, call=self._call))

    def keeps(self, tensor: Tensor) -> bool:
        """Returns whether a tensor is one of the results."""
        return id(tensor) in self._uses

    def _used(self, known: Hashable) -> _Entry | None:
        entry = self._entries.get(known)
        if entry is not None:
            entry.call = self._call
            self._entries.move_to_end(known)
        return entry

    def _keep(self, known: Hashable, new: _Entry) -> Any:
        """Returns the result that is there, or else the new one, which is kept if there is room."""
        entry = self._used(known)
        if entry is not None:
            return entry.result
        tensors = _tensors(new.result)
        size = _ENTRY_BYTES + sum(nbytes(tensor) for tensor in tensors if id(tensor) not in self._uses)
        if self._make_room(size):
            self._entries[known] = new
            self._uses.update(map(id, tensors))
            self.nbytes += size
        return new.result

    def _make_room(self, size: int) -> bool:
        for known, entry in list(self._entries.items()):
            if self.nbytes + size <= self._limit:
                break
            if not entry.pinned and entry.call < self._call:
                self._drop(known)
        return self.nbytes + size <= self._limit

    def _drop(self, known: Hashable) -> None:
        self.nbytes -= _ENTRY_BYTES
        for tensor in _tensors(self._entries.pop(known).result):
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
    return (function, *(id(given) if isinstance(given, Tensor) else given for given in arguments))


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
