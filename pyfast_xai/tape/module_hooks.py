"""The modules of a model: inside which wrappers they lie, under which paths, and which of them are running.

Nothing is put on the user's modules. PyTorch's process-wide module hooks are installed while any thread follows the
modules of a model, and act on those threads alone.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as process_wide
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_lock = threading.RLock()
_thread = threading.local()
_following = 0  # on all threads
_handles: list[Any] = []

Called = Callable[[nn.Module, Any], None]
Returned = Callable[[nn.Module, Any], None]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel` wrappers."""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inside: Any = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Returns every module of a model with its path: `named_modules` without its nested generators."""
    paths: dict[nn.Module, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        if module not in paths:
            paths[module] = path
            for name, child in module._modules.items():
                if child is not None:
                    visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return paths


def exported_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules that `torch.export` made: their mode is fixed, and their flags have no effect."""
    programs = [part for part in modules_of(model) if isinstance(part, torch.fx.GraphModule) and "eval" in vars(part)]
    return {module for program in programs for module in program.modules()}


class Paths:
    """The stack of modules that are running, by their paths in the model."""

    def __init__(self, modules: dict[nn.Module, str], returned: Callable[[str, Any], None]) -> None:
        self._names = modules
        self._returned = returned
        self._stack: list[tuple[nn.Module, str]] = []

    @property
    def current(self) -> str:
        """Returns the path of the innermost module that runs, "" outside all of them."""
        return self._stack[-1][1] if self._stack else ""

    @property
    def running(self) -> nn.Module | None:
        """Returns the innermost module that runs."""
        return self._stack[-1][0] if self._stack else None

    def enter(self, module: nn.Module, args: Any) -> None:
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
    with torch._C.DisableTorchFunction():  # what followers do with tensors is none of the model's
        for called, _ in getattr(_thread, "followers", ()):
            called(module, args)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    with torch._C.DisableTorchFunction():
        for _, returned in getattr(_thread, "followers", ()):
            returned(module, output)


@contextlib.contextmanager
def following(called: Called, returned: Returned) -> Iterator[None]:
    """Follows the modules that run on this thread.

    Args:
        called: receives each module and its positional arguments, just before it runs.
        returned: receives each module and its result.
    """
    global _following
    before = getattr(_thread, "followers", ())
    with _lock:
        _following += 1
        if _following == 1:
            _handles.extend([register_module_forward_pre_hook(_enter), register_module_forward_hook(_leave)])
    _thread.followers = (*before, (called, returned))
    try:
        yield
    finally:
        _thread.followers = before
        with _lock:
            _following -= 1
            _remove_unused()


def _remove_unused() -> None:
    while _handles and not _following:
        _handles.pop().remove()


def _in_child() -> None:
    """Forget the threads that a fork leaves behind."""
    global _following
    _following = len(getattr(_thread, "followers", ()))
    _remove_unused()
    _lock.release()


if hasattr(os, "register_at_fork"):
    # A fork waits until no other thread is amidst a change.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)


def any_forward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Returns whether some modules, or all modules of the process, have forward hooks that are not of a recording."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return True
    of_all = (process_wide._global_forward_hooks, process_wide._global_forward_pre_hooks)
    return any(not is_of_a_recording(hook) for hooks in of_all for hook in hooks.values())


def is_of_a_recording(hook: Any) -> bool:
    """Returns whether a process-wide hook is one that a recording has installed while it runs."""
    return hook is _enter or hook is _leave
