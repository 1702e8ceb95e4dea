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
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inside: Any = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Every module of a model with its path: `named_modules` without its nested generators."""
    found: dict[nn.Module, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        if module not in found:
            found[module] = path
            for name, child in module._modules.items():
                if child is not None:
                    visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


class Paths:
    """The stack of modules that are running, by their paths in the model."""

    def __init__(self, modules: dict[nn.Module, str], returned: Returned) -> None:
        self._names = modules
        self._returned = returned
        self._stack: list[tuple[nn.Module, str]] = []

    @property
    def current(self) -> str:
        return self._stack[-1][1] if self._stack else ""

    def enter(self, module: nn.Module) -> None:
        name = self._names.get(module)
        if name is None:  # not registered as part of the model
            name = ".".join(filter(None, [self.current, f"<{type(module).__name__}>"]))
        self._stack.append((module, name))

    def leave(self, module: nn.Module, output: Any) -> None:
        # A module that raised, and whose exception the model caught, is still on the stack.
        while self._stack:
            running, name = self._stack.pop()
            if running is module:
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
def watching(modules: dict[nn.Module, str], returned: Returned) -> Iterator[Paths]:
    """Follow the modules of a model on this thread; `returned(path, output)` is called as each one returns."""
    global _recording
    with _lock:
        _recording += 1
        if _recording == 1:
            _install()
    before, _thread.paths = getattr(_thread, "paths", None), Paths(modules, returned)
    try:
        with _eager():
            yield _thread.paths
    finally:
        _thread.paths = before
        with _lock:
            _recording -= 1
            if _recording == 0:
                while _undo:
                    _undo.pop()()


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Parts that were compiled run as they were written; importing the compiler is avoided where nothing was."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
