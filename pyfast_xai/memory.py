"""The allocator: a process may keep freed memory for its next tensors."""

import contextlib
import ctypes

# Constants of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

_enabled = False


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of returning it to the system.

    Activations are freed and allocated by the hundred megabytes, and every page that comes back from the system is
    filled with zeros on first touch: a third of the time of an explanation on a CPU. The process stays as large as it
    once was. It holds for the whole process, so that no library should decide it: call it once, first thing, in a
    program of your own. `pyfast-xai`, the command, does.

    Returns:
        Whether it took effect: False without glibc.

    Example:
        >>> import pyfast_xai
        >>> pyfast_xai.keep_freed_memory()  # doctest: +SKIP
    """
    global _enabled
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**26)  # -1: never
    _enabled = min(mallopt(option, value) for option, value in settings) == 1
    return _enabled


def trim_freed_memory() -> None:
    """Have glibc give the system back what is freed between blocks in use, unless it is to keep it.

    After work that leaves small blocks among large ones, which glibc would hold on to.
    """
    with contextlib.suppress(OSError, AttributeError):
        if not _enabled:
            ctypes.CDLL(None).malloc_trim(0)


def is_kept() -> bool:
    """Returns whether `keep_freed_memory` was called in this process, and took effect."""
    return _enabled
