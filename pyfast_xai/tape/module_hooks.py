"""The modules of a model: their wrappers, their paths, and which of them are running.

The user's modules get no hooks. PyTorch's process-wide module hooks are installed while any thread follows the modules
of a model, and act on those threads alone.
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

OnCall = Callable[[nn.Module, Any], Any]
OnReturn = Callable[[nn.Module, Any], Any]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel` wrappers."""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner: Any = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


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

    def __init__(self, modules: dict[nn.Module, str], on_return: Callable[[str, Any], None]) -> None:
        self._names = modules
        self._on_return = on_return
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
                self._on_return(name, output)
                return


def _enter(module: nn.Module, args: Any) -> Any:
    followers = getattr(_thread, "followers", ())
    if not followers:
        return None
    replacement = None
    with torch._C.DisableTorchFunction():  # the operations of followers are not the model's
        for on_call, _ in followers:
            answer = on_call(module, args if replacement is None else replacement)
            replacement = replacement if answer is None else answer
    return replacement


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    followers = getattr(_thread, "followers", ())
    if not followers:
        return None
    replacement = None
    with torch._C.DisableTorchFunction():
        for _, on_return in followers:
            answer = on_return(module, output if replacement is None else replacement)
            replacement = replacement if answer is None else answer
    return replacement


@contextlib.contextmanager
def following(on_call: OnCall, on_return: OnReturn) -> Iterator[None]:
    """Follows the modules that run on this thread.

    Args:
        on_call: receives each module and its positional arguments, just before it runs; a tuple that it returns takes
            their place.
        on_return: receives each module and its result; what it returns, other than None, takes its place.
    """
    global _following
    outer = getattr(_thread, "followers", ())
    with _lock:
        _following += 1
        if _following == 1:
            _handles.extend([register_module_forward_pre_hook(_enter), register_module_forward_hook(_leave)])
    _thread.followers = (*outer, (on_call, on_return))
    try:
        yield
    finally:
        _thread.followers = outer
        with _lock:
            _following -= 1
            _remove_unused()


def _remove_unused() -> None:
    while _handles and not _following:
        _handles.pop().remove()


def _after_fork_in_child() -> None:
    """Removes the state of threads that do not exist in a forked child."""
    global _following
    _following = len(getattr(_thread, "followers", ()))
    _remove_unused()
    _lock.release()


if hasattr(os, "register_at_fork"):
    # A fork waits until no other thread is changing the hooks.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)


def any_forward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Returns whether the modules or the process have forward hooks other than those of a recording."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return True
    process_hooks = (process_wide._global_forward_hooks, process_wide._global_forward_pre_hooks)
    return any(not is_recording_hook(hook) for hooks in process_hooks for hook in hooks.values())


def is_recording_hook(hook: Any) -> bool:
    """Returns whether a process-wide hook was installed by a recording."""
    return hook is _enter or hook is _leave
