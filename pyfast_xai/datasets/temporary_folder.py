"""Folders that go with the process; those of processes that were killed go with the next one."""

import contextlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from pyfast_xai.datasets.folders import LocalFolder

PREFIX = "pyfast-xai-listing-"
_LOCK = "lock"


class TemporaryFolder(LocalFolder):
    """A new folder among the system's temporary files: nothing that is written there need reach the disk.

    It is removed with this object or at the end of the process. What a process that was killed left behind is removed
    here, too: the system has opened the lock of such a folder.
    """

    def __init__(self) -> None:
        remove_abandoned()
        super().__init__(tempfile.mkdtemp(prefix=PREFIX))
        weakref.finalize(self, _remove, self.path, _locked(self.path), os.getpid())

    def write(self, name: str, data: bytes) -> None:
        try:
            self.place(name).write_bytes(data)
        except OSError as error:
            if error.filename is None:  # a full disk does not say which
                error.filename = str(self.place(name))
            raise


def remove_abandoned() -> None:
    """Removes temporary folders of this user whose process has ended; elsewhere than on POSIX systems none."""
    try:
        import fcntl
    except ImportError:
        return
    with os.scandir(tempfile.gettempdir()) as entries:
        present = [entry for entry in entries if entry.name.startswith(PREFIX)]
    for entry in present:
        # One without a lock is being made; one that is gone was removed by another process.
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            handle = os.open(os.path.join(entry.path, _LOCK), os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(handle)


def _locked(folder: Path) -> int | None:
    """Returns the lock of a folder, held before other processes can see it."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder / f".{_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.rename(folder / f".{_LOCK}", folder / _LOCK)
    return handle


def _remove(path: Path, lock: int | None, process: int) -> None:
    # A fork has the folder of its parent.
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)
