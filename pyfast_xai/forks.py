"""State that a fork must find in order while other threads explain: servers load first and fork then.

Locks of ours are free in the child, whoever held them in the parent. Modules that another thread is importing have been
imported: a first explanation imports parts of PyTorch, and Python's lock on one that was half imported would be held in
the child for ever.
"""

import contextlib
import importlib
import os
import sys
import threading
import weakref


class ForkSafeLock:
    """A re-entrant lock for a `with` block, which no thread that a fork left behind can hold.

    What it guards must be whole, or harmless in part, whenever a thread may be interrupted: the child sees it as it was
    at the fork.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["ForkSafeLock"], tuple[()]]:
        return ForkSafeLock, ()

    def free(self) -> None:
        """Replaces the lock in a child if another thread of the parent held it."""
        if not self._lock._is_owned():  # type: ignore[attr-defined]
            self._lock = threading.RLock()


_locks: "weakref.WeakSet[ForkSafeLock]" = weakref.WeakSet()


def _free_all() -> None:
    for lock in list(_locks):
        lock.free()


def _finish_imports() -> None:
    """Waits for other threads that import a part of PyTorch or of this package."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.", "pyfast_xai.")) and getattr(
            getattr(module, "__spec__", None), "_initializing", False
        ):
            with contextlib.suppress(Exception):  # which the thread that imports it will see
                importlib.import_module(name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_finish_imports, after_in_child=_free_all)
