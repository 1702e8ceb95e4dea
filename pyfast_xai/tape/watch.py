"""What else must be arranged while a forward is recorded: module paths, fused fast paths, compiled wrappers.

Nothing is put on the user's modules. PyTorch's process-wide module hooks are installed for the length of the
recording only and act on the recording thread alone.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_lock = threading.Lock()
_thread = threading.local()
_recording = 0
_undo: list[Callable[[], None]] = []

Returned = Callable[[str, Any], None]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


class Paths:
    """The stack of modules that are running, by their paths in `model`."""

    def __init__(self, model: nn.Module, returned: Returned) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._returned = returned
        self._stack: list[tuple[int, str]] = []

    @property
    def current(self) -> str:
        return self._stack[-1][1] if self._stack else ""

    def enter(self, module: nn.Module) -> None:
        name = self._names.get(id(module))
        if name is None:  # not registered as part of the model
            name = ".".join(filter(None, [self.current, f"<{type(module).__name__}>"]))
        self._stack.append((id(module), name))

    def leave(self, module: nn.Module, output: Any) -> None:
        # A module that raised, and whose exception the model caught, is still on the stack.
        while self._stack:
            identity, name = self._stack.pop()
            if identity == id(module):
                self._returned(name, output)
                return


def _enter(module: nn.Module, args: Any) -> None:
    paths = getattr(_thread, "paths", None)
    if paths is not None:
        paths.enter(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    paths = getattr(_thread, "paths", None)
    if paths is not None:
        paths.leave(module, output)


def _install() -> None:
    hooks = [register_module_forward_pre_hook(_enter), register_module_forward_hook(_leave)]
    _undo.extend(hook.remove for hook in hooks)
    # The fused encoder kernels have no derivative and hide the attention that a reading traces.
    if torch.backends.mha.get_fastpath_enabled():
        torch.backends.mha.set_fastpath_enabled(False)
        _undo.append(lambda: torch.backends.mha.set_fastpath_enabled(True))


@contextlib.contextmanager
def watching(model: nn.Module, returned: Returned) -> Iterator[Paths]:
    """Follow the modules of `model` on this thread; `returned(path, output)` is called as each one returns."""
    global _recording
    with _lock:
        _recording += 1
        if _recording == 1:
            _install()
    before, _thread.paths = getattr(_thread, "paths", None), Paths(model, returned)
    try:
        with _eager(model):
            yield _thread.paths
    finally:
        _thread.paths = before
        with _lock:
            _recording -= 1
            if _recording == 0:
                while _undo:
                    _undo.pop()()


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Parts that were compiled run as they were written; importing the compiler is avoided where nothing was."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
