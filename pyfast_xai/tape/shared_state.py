"""State that a forward pass changes and that existed before it: tensors it writes to, random number generators.

It is restored when the forward ends. Forwards that change such state run one at a time, because each would otherwise
see, and restore, the changes of another.
"""

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Held by a thread from its first change until everything is restored, and while a process forks, so that a child starts
# with unchanged state.
_exclusive = threading.RLock()
_writers: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_exclusive.acquire, after_in_parent=_exclusive.release, after_in_child=_exclusive.release
    )


def address(tensor: Tensor) -> int:
    """Returns the address that identifies the storage of a tensor while it lives."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse tensors have none
        return id(tensor)


class SharedState:
    """Saves the state that a forward is about to change, and restores it.

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
        # Such a model must also read unchanged state before its first write.
        if _writers and any(module in _writers for module in self._attributes):
            self._lock()

    def before_write(self, tensor: Tensor, running: nn.Module | None) -> None:
        """Saves a tensor that an operation is about to write to, unless it is saved already.

        Args:
            tensor: any part of a storage that existed before the forward.
            running: the module that writes.
        """
        if running is not None and running not in self._writing:
            self._writing.add(running)
            _writers.add(running)
        strided = tensor.layout == torch.strided
        geometry = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride()) if strided else ()
        region = (address(tensor), tensor.dtype, geometry)
        if region in self._regions:
            return
        self._lock()
        self._regions.add(region)
        version = None if tensor.is_inference() else tensor._version
        # The model may point its tensor to another storage; `detach` keeps a reference to this one.
        self._tensors.append((tensor, tensor.detach(), tensor.clone(), version))

    def before_draw(self, tensors: Iterable[Tensor]) -> None:
        """Saves the states of the generators that an operation on these tensors draws from."""
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
        """Returns the addresses of all storages that were written to."""
        return {region[0] for region in self._regions}

    def restore(self) -> None:
        """Restores everything in reverse order, because saved parts of a storage may overlap."""
        try:
            for tensor, alias, copy, version in reversed(self._tensors):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    alias.copy_(copy)
                if version is not None:  # the numbers are the same, so autograd graphs that the user built stay valid
                    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
            for generator, state in self._generators:
                generator.set_state(state)
            # A module may have noted in its attributes that it wrote.
            for module in self._writing:
                if module in self._attributes:
                    attributes, buffers = self._attributes[module]
                    _restore_dict(vars(module), attributes)
                    _restore_dict(module._buffers, buffers)
        finally:
            self._tensors.clear()
            self._attributes.clear()
            self._generators.clear()
            while self._locked:
                self._locked -= 1
                _exclusive.release()

    def _lock(self) -> None:
        if not self._locked:
            _exclusive.acquire()
            self._locked = 1


def _restore_dict(current: dict[str, Any], saved: dict[str, Any]) -> None:
    """Makes one dict equal to another; keys that are in both are never missing in between."""
    for name in current.keys() - saved.keys():
        del current[name]
    current.update(saved)
