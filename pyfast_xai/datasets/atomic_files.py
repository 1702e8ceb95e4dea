"""Files that are whole or not there, whenever the process or the machine stops."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyfast_xai.errors import InputError

SUFFIX = ".tmp"  # of unfinished files, which are hidden, too


def write_all(path: Path, data: bytes, system: Any = os) -> None:
    """Writes a file so that a crash or a power cut at any moment leaves the old one or the new one.

    The data goes to a hidden file beside it and to the disk, then the hidden file takes the name, then the name goes to
    the disk.

    Args:
        path: of the file, in a folder that exists.
        data: all of it.
        system: what calls the disk; `os`, or something that fails on purpose.

    Raises:
        OSError: the disk is full, or gone; it names the file, and no hidden file stays behind where that can be helped.
    """
    hidden = path.parent / f".{path.name}{SUFFIX}"
    try:
        handle = system.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[system.write(handle, remaining) :]
            system.fsync(handle)
        finally:
            system.close(handle)
        system.replace(hidden, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            system.unlink(hidden)
        if error.filename is None:  # a full disk does not say which
            error.filename = os.fspath(path)
        raise
    sync_folder(path.parent, system)


def sync_folder(folder: Path, system: Any = os) -> None:
    """Brings the names in a folder to the disk."""
    handle = system.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        system.fsync(handle)
    finally:
        system.close(handle)


def remove_unfinished(folder: Path, system: Any = os) -> int:
    """Removes the unfinished files of a stopped process; no other process may be writing there.

    Returns:
        How many files there were.
    """
    names = [name for name in system.listdir(folder) if name.startswith(".") and name.endswith(SUFFIX)]
    for name in names:
        system.unlink(folder / name)
    return len(names)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the system opens it when the process ends, however that happens.

    Raises:
        InputError: another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks there
        yield
        return
    # Without content, so that readers of the folder pass over it.
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"out must be a folder that no other run writes to, got {str(folder)!r}") from None
        yield
    finally:
        os.close(handle)
