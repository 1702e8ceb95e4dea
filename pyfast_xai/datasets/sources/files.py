"""Picture files: folders, patterns, and lists of paths in a CSV or Parquet file."""

import csv
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyfast_xai.datasets.sources.item import Item, Source, stamp, text, unique
from pyfast_xai.errors import InputError
from pyfast_xai.images import ImageError, find_images

MAX_BYTES = 1 << 30  # no picture file is larger

PATHS = ("path", "file", "filename", "file_name", "image")  # columns that may hold them, the first there is taken


class Files(Source):
    """Files on this machine.

    Args:
        paths: of the files; one that is not there becomes a row that says so.
        ids: of each; None for the paths.
        labels: class of each; None where there are none.
    """

    kind = "files"

    def __init__(
        self, paths: Sequence[Path], ids: Iterable[str] | None = None, labels: Sequence[int | None] | None = None
    ) -> None:
        self._paths = paths
        self.ids = unique(map(text, paths) if ids is None else ids)
        self._labels = labels

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for index in range(start, min(stop, len(self))):
            path, label = self._paths[index], None if self._labels is None else self._labels[index]
            yield Item(self.ids[index], index, text(os.path.abspath(path)), partial(read_file, path), label)

    def stamps(self) -> Iterator[str]:
        return map(stamp, self._paths)


def files(given: Sequence[str], without: str | Path | None = None) -> Files:
    """Files, folders and patterns, see `images.find_images`.

    Args:
        given: what they are called. Of a single folder the ids are paths within it.
        without: a folder that is passed over.
    """
    paths = find_images(given, without)
    root = given[0] if len(given) == 1 and os.path.isdir(given[0]) else None
    return Files(paths, None if root is None else [text(Path(os.path.relpath(p, root)).as_posix()) for p in paths])


def csv_list(path: str | Path) -> Files:
    """A CSV file with a column of paths (`path`, `file`, `filename`, `file_name` or `image`), and `id` and `label`.

    Args:
        path: of the list; relative paths in it start from its folder.

    Raises:
        InputError: no such file, no such column, or a label that is no number.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"list {str(path)!r} must be a CSV file, got {type(error).__name__}: {error}") from error
    return listed(path, columns, rows)


def listed(path: str | Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Files:
    """The files that the rows of a list name."""
    column = next((name for name in PATHS if name in columns), None)
    if column is None:
        raise InputError(f"list {str(path)!r} must have a column {' or '.join(PATHS)}, got {', '.join(columns)}")
    root = Path(path).parent
    named = [row[column] or "" for row in rows]
    labels = [_label(path, n, row["label"]) for n, row in enumerate(rows)] if "label" in columns else None
    return Files(
        [root / name for name in named],
        [str(row["id"]) for row in rows] if "id" in columns else [name.replace("\0", "\\0") for name in named],
        labels,
    )


def _label(path: str | Path, row: int, given: Any) -> int | None:
    if given in (None, ""):
        return None
    try:
        return int(given)
    except ValueError:
        raise InputError(f"label of row {row + 1} of {str(path)!r} must be a whole number, got {given!r}") from None


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which might never end, is refused.

    Raises:
        ImageError: none of the sort is there.
    """
    name = repr(text(path))
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ImageError(f"image {name} must be a file, got {'a folder' if os.path.isdir(path) else 'a device'}")
        if not 0 < found.st_size <= MAX_BYTES:
            raise ImageError(f"image {name} must have 1 to {MAX_BYTES:,} bytes, got {found.st_size:,}")
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    except PermissionError as error:
        raise ImageError(f"image {name} must be readable, got {error.strerror}") from None
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"image {name} must be a file, got no such file") from None
