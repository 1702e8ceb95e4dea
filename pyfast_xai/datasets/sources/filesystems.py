"""File systems of sources: this machine, or an object store that `fsspec` reaches."""

import functools
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pyfast_xai.errors import InputError
from pyfast_xai.images import FolderState, ImageError, PictureFolders, is_picture, matching_files

MAX_BYTES = 1 << 30  # no picture file is larger
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
ABSENT = "absent"

# Keys under which stores tell that a file has changed.
_CHANGES = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")

Walk = Callable[[str], Iterator[tuple[str, str | None]]]


class FileSystem(Protocol):
    """The operations that sources need of a file system; paths are texts."""

    def read(self, path: str, stamp: str | None = None) -> bytes:
        """Returns the bytes of a regular file.

        Args:
            path: of the file.
            stamp: that it must have; None for any.

        Raises:
            ImageError: there is no such file, or it has changed.
        """

    def read_range(self, path: str, offset: int, size: int, stamp: str | None = None) -> bytes:
        """Returns a range of bytes; fewer where the file ends in it.

        Args:
            path: of the file.
            offset: of the first byte.
            size: number of bytes.
            stamp: that the file must have; None for any.

        Raises:
            ImageError: the file has changed.
        """

    def open(self, path: str) -> BinaryIO:
        """Returns a file to read from.

        Raises:
            OSError: it cannot be read.
        """

    def stamp(self, path: str) -> str:
        """Returns a text that changes when a file does, `ABSENT` where there is none."""

    def stamps(self, folder: str, names: Sequence[str]) -> list[str]:
        """Returns the stamps of files below a folder; "" leaves the names as they are."""

    def is_folder(self, path: str) -> bool:
        """Returns whether a path is one of a folder."""

    def matching(self, name: str) -> list[str]:
        """Returns the files that match a pattern, sorted; the name where it is no pattern."""

    def place(self, path: str) -> str:
        """Returns a path as a person looks for it."""

    def join(self, folder: str, name: str) -> str:
        """Returns the path of a name in a folder; a path that is absolute stays as it is."""

    def parent(self, path: str) -> str:
        """Returns the folder of a path."""

    def walker(self, roots: Sequence[str], without: str | None, on_folder: Callable[[FolderState], None]) -> Walk:
        """Returns a function that walks one of several folders, see `images.PictureFolders`.

        Args:
            roots: the folders.
            without: a folder that is passed over, absolute.
            on_folder: called with each folder whose changes can be noticed.
        """


def is_remote(name: str) -> bool:
    """Returns whether a name is the URL of an object store.

    Raises:
        InputError: it is a URL of another kind, or a command.
    """
    protocol, mark, _ = name.partition("://")
    if not mark and not name.startswith("pipe:"):
        return False
    if protocol not in PROTOCOLS:
        raise InputError(
            f"source must lie on this machine, or be 'hf:NAME' or a URL that begins with {', '.join(PROTOCOLS[:-1])} "
            f"or {PROTOCOLS[-1]}, got {name!r}"
        )
    return True


def file_system(name: str, folder: str | None = None) -> FileSystem:
    """Returns where the file of a name lies.

    Args:
        name: of the file.
        folder: where relative names begin; None for the working folder.
    """
    return RemoteFiles(name) if is_remote(name) else LocalFiles(folder)


def absolute(path: str | Path) -> Path:
    """Returns a path that stays right when the working folder changes.

    `..` stays as it is: behind a link it leads elsewhere than text shows.
    """
    try:
        return Path(path).absolute()
    except FileNotFoundError:  # the working folder is gone, and a relative path leads nowhere
        return Path(path)


def store_of(url: str) -> Any:
    """Returns the `fsspec` file system of a URL.

    Raises:
        InputError: the package for this kind of store is not installed, or refuses the URL.
    """
    import fsspec

    # Listings that are remembered would hide what has changed since.
    options = {} if url.startswith("memory:") else {"use_listings_cache": False}
    try:
        return fsspec.core.url_to_fs(url, **options)[0]
    except ImportError as error:
        raise InputError(f"{url!r} needs a package that is not installed: {error}") from error
    except Exception as error:  # each store raises errors of its own
        raise InputError(f"{url!r} must be the URL of an object store, got {type(error).__name__}: {error}") from error


class LocalFiles:
    """Files on this machine.

    Args:
        folder: where relative paths begin; None for the working folder, which may change later.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = str(absolute(folder or ""))

    def read(self, path: str, stamp: str | None = None) -> bytes:
        # A pipe or a device might never end.
        name = repr(shown(path))
        full_path = self.join(self.folder, path)
        try:
            status = os.stat(full_path)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device"
                raise ImageError(f"image {name} must be a file, got {kind}")
            _check_size(name, status.st_size)
            check_stamp(path, stamp, _stamp_of(status))
            with open(full_path, "rb") as file:
                return file.read(MAX_BYTES)
        except PermissionError as error:
            raise ImageError(f"image {name} must be readable, got {error.strerror}") from None
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"image {name} must be a file, got no such file") from None

    def read_range(self, path: str, offset: int, size: int, stamp: str | None = None) -> bytes:
        with self.open(path) as file:
            file.seek(offset)
            data = file.read(size)
            check_stamp(path, stamp, _stamp_of(os.fstat(file.fileno())))
            return data

    def open(self, path: str) -> BinaryIO:
        return open(self.join(self.folder, path), "rb")

    def stamp(self, path: str) -> str:
        return self.stamps("", [path])[0]

    def stamps(self, folder: str, names: Sequence[str]) -> list[str]:
        # Millions of files go through here: a system call each, and little else.
        prefix = self.join(self.join(self.folder, folder), "")
        stamps, stat_of = [], os.stat
        for name in names:
            try:
                status = stat_of(name if name.startswith(os.sep) else prefix + name)
                # A folder changes with what is written into it, results among it, and is no picture anyhow.
                is_file = stat.S_ISREG(status.st_mode)
                stamps.append(f"{status.st_size} {status.st_mtime_ns}" if is_file else ABSENT)
            except (OSError, ValueError):
                stamps.append(ABSENT)
        return stamps

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(self.join(self.folder, path))

    def matching(self, name: str) -> list[str]:
        # A file may have brackets in its name.
        if os.path.lexists(self.join(self.folder, name)) or not glob.has_magic(name):
            return [name]
        return list(map(str, matching_files(name, self.folder)))

    def place(self, path: str) -> str:
        return str(Path(self.folder, path))

    def join(self, folder: str, name: str) -> str:
        return os.path.join(folder, name)

    def parent(self, path: str) -> str:
        return os.path.dirname(path)

    def walker(self, roots: Sequence[str], without: str | None, on_folder: Callable[[FolderState], None]) -> Walk:
        folders = PictureFolders([self.place(root) for root in roots], without)
        return lambda root: folders.walk(self.place(root), on_folder)


class RemoteFiles:
    """Files in an object store.

    Args:
        url: of any of them.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_store": None}

    @property
    def store(self) -> Any:
        if self._store is None:
            self._store = store_of(self._url)
        return self._store

    def read(self, path: str, stamp: str | None = None) -> bytes:
        name = repr(shown(path))
        try:
            status = self.store.info(path)
        except FileNotFoundError:
            raise ImageError(f"image {name} must be a file, got no such file") from None
        if status["type"] != "file":
            raise ImageError(f"image {name} must be a file, got a folder")
        _check_size(name, status["size"] or 0)
        check_stamp(path, stamp, _remote_stamp(status))
        return self.store.cat_file(path)

    def read_range(self, path: str, offset: int, size: int, stamp: str | None = None) -> bytes:
        if stamp is not None:
            check_stamp(path, stamp, self.stamp(path))
        return self.store.cat_file(path, start=offset, end=offset + size)

    def open(self, path: str) -> BinaryIO:
        return self.store.open(path, "rb")

    def stamp(self, path: str) -> str:
        try:
            return _remote_stamp(self.store.info(path))
        except FileNotFoundError:
            return ABSENT

    def stamps(self, folder: str, names: Sequence[str]) -> list[str]:
        return [self.stamp(self.join(folder, name) if folder else name) for name in names]

    def is_folder(self, path: str) -> bool:
        return self.store.isdir(path)

    def matching(self, name: str) -> list[str]:
        if not glob.has_magic(name) or self.store.exists(name):
            return [name]
        return sorted(map(self.store.unstrip_protocol, self.store.glob(name)))

    def place(self, path: str) -> str:
        return path

    def join(self, folder: str, name: str) -> str:
        return name if "://" in name else f"{folder.rstrip('/')}/{name}"

    def parent(self, path: str) -> str:
        return path.rpartition("/")[0]

    def walker(self, roots: Sequence[str], without: str | None, on_folder: Callable[[FolderState], None]) -> Walk:
        # Stores tell nothing of a folder that shows whether its files have changed.
        passed_over = None if without is None else self.store._strip_protocol(without).rstrip("/")
        return functools.partial(self._walk, without=passed_over)

    def _walk(self, root: str, without: str | None) -> Iterator[tuple[str, str | None]]:
        top = self.store._strip_protocol(root).rstrip("/")
        stack = [iter([("", top, True)])]
        while stack:
            for path, full, is_folder in stack[-1]:
                if not is_folder:
                    yield path, None
                    continue
                if full == without and path:
                    continue
                listed = self.store.ls(full, detail=True)
                names = sorted((entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in listed)
                prefix = f"{path}/" if path else ""
                children = [
                    (prefix + name, f"{full}/{name}", kind == "directory")
                    for name, kind in names
                    if name and not name.startswith(".") and (kind == "directory" or is_picture(name))
                ]
                stack.append(iter(children))
                break
            else:
                stack.pop()


def shown(path: str) -> str:
    """Returns a path as text that every file format holds; bytes that are no text are spelled out."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _check_size(name: str, size: int) -> None:
    if not 0 < size <= MAX_BYTES:
        raise ImageError(f"image {name} must have 1 to {MAX_BYTES:,} bytes, got {size:,}")


def check_stamp(path: str, expected: str | None, stamp: str) -> None:
    """Refuses a file that has changed since it was listed.

    Args:
        path: of the file.
        expected: its stamp of then; None and `ABSENT` for any.
        stamp: its stamp now.

    Raises:
        ImageError: they differ.
    """
    if expected not in (None, ABSENT, stamp):
        raise ImageError(
            f"file {shown(path)!r} must be as it was when the run began, got another size or time of change; `retry` "
            "takes it as it is"
        )


def _stamp_of(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _remote_stamp(status: dict[str, Any]) -> str:
    change = next((status[key] for key in _CHANGES if status.get(key) is not None), "")
    return f"{status.get('size')} {change}"
