"""Folders of runs: on this machine, or under a prefix of an object store."""

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from pyfast_xai.datasets.atomic_files import folder_lock, remove_unfinished, sync_folder, write_all
from pyfast_xai.datasets.sources.filesystems import absolute, is_remote, store_of
from pyfast_xai.errors import InputError
from pyfast_xai.local_path import is_url


class Folder(Protocol):
    """The operations that a run needs of the place of its files."""

    @property
    def path(self) -> Path | str:
        """Returns the folder, or its URL."""

    def exists(self) -> bool:
        """Returns whether the folder exists."""

    def make(self) -> None:
        """Makes the folder where it is not there."""

    def names(self) -> list[str]:
        """Returns the names of the files, sorted; none where there is no folder."""

    def place(self, name: str) -> Path | str:
        """Returns where a file lies."""

    def size(self, name: str) -> int:
        """Returns the bytes of a file."""

    def open(self, name: str) -> Any:
        """Returns a file to read from, as Arrow reads it.

        Raises:
            OSError: it is not there, or cannot be read.
        """

    def write(self, name: str, data: bytes) -> None:
        """Puts a file there, whole, in place of an older one.

        Raises:
            OSError: the disk is full, or gone.
        """

    def remove(self, name: str) -> None:
        """Removes a file."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs out, where the place allows it."""

    def remove_unfinished(self) -> int:
        """Removes what a process that was stopped was writing; returns how many files there were."""


def run_folder(path: str | Path, system: Any = os) -> Folder:
    """Returns the place of a run.

    Args:
        path: a folder, or a URL such as `s3://bucket/explained`.
        system: what calls the disk, see `atomic_files.write_all`.

    Raises:
        InputError: it is empty, or a URL of another kind, or a URL as a path, which has lost a slash.
    """
    if not os.fspath(path):
        raise InputError("folder must be one of a run, got an empty text; `.` is the working folder")
    if isinstance(path, str) and is_remote(path):
        return ObjectFolder(path)
    if is_url(path):
        raise InputError(f"folder must be on this machine or the text of a URL, got the path {str(path)!r}")
    return LocalFolder(path, system)


class LocalFolder:
    """A folder of a file system with atomic renames."""

    def __init__(self, path: str | Path, system: Any = os) -> None:
        self._path, self._system = absolute(path), system

    def __reduce__(self) -> Any:
        return LocalFolder, (self._path,)

    @property
    def path(self) -> Path:
        return self._path

    def exists(self) -> bool:
        return self.path.is_dir()

    def make(self) -> None:
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)

    def names(self) -> list[str]:
        try:
            return sorted(self._system.listdir(self.path))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise InputError(f"out must be a folder, got {str(self.path)!r}, which is or lies below a file") from None

    def place(self, name: str) -> Path:
        return self.path / name

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def open(self, name: str) -> Any:
        return pa.OSFile(os.fspath(self.path / name))

    def write(self, name: str, data: bytes) -> None:
        write_all(self.path / name, data, self._system)

    def remove(self, name: str) -> None:
        self._system.unlink(self.path / name)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return folder_lock(self.path)

    def remove_unfinished(self) -> int:
        return remove_unfinished(self.path, self._system)


class ObjectFolder:
    """A prefix of an object store: a file is put there whole by one request, which is atomic.

    Stores have no locks. Two runs that write there at a time make the same parts, and the last one of each stays.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._store: Any = None

    @property
    def path(self) -> str:
        return self._url

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_store": None}

    @property
    def store(self) -> Any:
        if self._store is None:
            self._store = store_of(self.path)
        return self._store

    def exists(self) -> bool:
        return bool(self.names())

    def make(self) -> None:
        """Creates nothing: a prefix exists with its first file."""

    def names(self) -> list[str]:
        try:
            listed = self.store.ls(self.path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in listed)

    def place(self, name: str) -> str:
        return f"{self.path}/{name}"

    def size(self, name: str) -> int:
        return self.store.size(self.place(name))

    def open(self, name: str) -> Any:
        return self.store.open(self.place(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        if hasattr(self.store, "makedirs") and self.store.protocol == "memory":
            self.store.makedirs(self.path, exist_ok=True)
        self.store.pipe_file(self.place(name), data)

    def remove(self, name: str) -> None:
        self.store.rm_file(self.place(name))

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def remove_unfinished(self) -> int:
        return 0
