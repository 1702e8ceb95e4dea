"""State that a forward pass changes and that existed before it: tensors it writes to, random number generators.

It is put back when the forward ends. Forwards that change such things run one at a time, for each would otherwise see,
and put back, what another has in hand.
"""

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Held by a thread from its first change until all is put back, and while a process forks, so that a child finds things
# as they were.
_one_at_a_time = threading.RLock()
_writers: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_one_at_a_time.acquire, after_in_parent=_one_at_a_time.release, after_in_child=_one_at_a_time.release
    )


def address(tensor: Tensor) -> int:
    """Returns the address that identifies the memory of a tensor while it lives."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse tensors have none
        return id(tensor)


class SharedState:
    """Keeps what a forward is about to change, and puts it back.

    Args:
        modules: the modules of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._attributes = {module: (dict(vars(module)), dict(module._buffers)) for module in modules}
        self._regions: set[Any] = set()
        self._tensors: list[tuple[Tensor, Tensor, Tensor, int | None]] = []
        self._writing: set[nn.Module] = set()
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._locked = 0
        # Even what such a model reads before it writes must be as it was.
        if _writers and any(module in _writers for module in self._attributes):
            self._lock()

    def before_write(self, tensor: Tensor, running: nn.Module | None) -> None:
        """Keep a tensor that an operation is about to write to, unless it is kept already.

        Args:
            tensor: any part of a memory that was there before the forward.
            running: the module that writes.
        """
        if running is not None and running not in self._writing:
            self._writing.add(running)
            _writers.add(running)
        strided = tensor.layout == torch.strided
        place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride()) if strided else ()
        region = (address(tensor), tensor.dtype, place)
        if region in self._regions:
            return
        self._lock()
        self._regions.add(region)
        version = None if tensor.is_inference() else tensor._version
        # The model may change what its tensor is of, `detach` what holds the versions.
        self._tensors.append((tensor, tensor.detach(), tensor.clone(), version))

    def before_draw(self, tensors: Iterable[Tensor]) -> None:
        """Keep the states of the generators that an operation on these tensors draws from."""
        if not self._generators:
            self._lock()
            self._generators.append((torch.default_generator, torch.default_generator.get_state()))
        if torch.cuda.is_available():
            for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                generator = torch.cuda.default_generators[device.index]
                if all(generator is not other for other, _ in self._generators):
                    self._generators.append((generator, generator.get_state()))

    @property
    def written(self) -> set[int]:
        """Returns the addresses of all memory that was written to."""
        return {region[0] for region in self._regions}

    def restore(self) -> None:
        """Put everything back, in the reverse order: parts of a memory may overlap."""
        try:
            for tensor, alias, copy, version in reversed(self._tensors):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    alias.copy_(copy)
                if version is not None:  # with the same numbers a graph that the user has built still holds
                    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
            for generator, state in self._generators:
                generator.set_state(state)
            # A module that says of itself what it has written must not say so any longer.
            for module in self._writing:
                if module in self._attributes:
                    attributes, buffers = self._attributes[module]
                    _put_back(vars(module), attributes)
                    _put_back(module._buffers, buffers)
        finally:
            self._tensors.clear()
            self._attributes.clear()
            self._generators.clear()
            while self._locked:
                self._locked -= 1
                _one_at_a_time.release()

    def _lock(self) -> None:
        if not self._locked:
            _one_at_a_time.acquire()
            self._locked = 1


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Make one dict as another, and nothing that is in both ever missing."""
    for name in now.keys() - before.keys():
        del now[name]
    now.update(before)
