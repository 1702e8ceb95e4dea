"""Picture files: folders, patterns, and lists of paths in a CSV or Parquet file."""

import contextlib
import csv
import glob
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pyfast_xai.datasets.sources.entries import entries
from pyfast_xai.datasets.sources.filesystems import FileSystem, LocalFiles, shown
from pyfast_xai.datasets.sources.item import Item, StreamedSource, named, text, valid
from pyfast_xai.datasets.sources.labels import label_columns, read_label
from pyfast_xai.errors import InputError
from pyfast_xai.images import FolderState, ImageError, folder_state, no_pictures

PATHS = ("path", "file", "filename", "file_name", "image")  # columns that may hold paths; the first one present is used

# The folders that a listing went through, with what shows that one has changed; see `images.FolderState`.
FOLDERS = pa.schema([("file", pa.int32()), ("path", pa.binary()), ("changed", pa.int64()), ("names", pa.binary())])

_BLOCK = 4096  # entries that are made together


class Files(StreamedSource):
    """Files, one an item.

    Args:
        paths: of the files; one that is not there becomes an error row.
        ids: of each; None for the paths.
        labels: class of each; None where there are none.
        system: where they lie; None for this machine.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> Image.new("RGB", (96, 64)).save("black.png")
        >>> [item.id for item in datasets.Files(["black.png"]).items(0, 1)]
        ['black.png']
    """

    kind = "files"

    def __init__(
        self,
        paths: Sequence[str | Path],
        ids: Iterable[str] | None = None,
        labels: Sequence[Any] | None = None,
        system: FileSystem | None = None,
    ) -> None:
        self._system = system or LocalFiles()
        self._without: str | None = None
        self._roots = [""]
        self._paths, self._names, self._labels = paths, None if ids is None else list(ids), labels

    def entries(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(self._paths), _BLOCK):
            block = slice(start, start + _BLOCK)
            paths = [os.fspath(path) for path in self._paths[block]]
            names = [shown(path) for path in paths] if self._names is None else map(valid, self._names[block])
            labels = None if self._labels is None else self._labels[block]
            yield self._block(0, paths, list(names), labels)

    def _block(
        self, root: int, paths: Sequence[str], ids: Sequence[str], labels: Sequence[Any] | None = None, **columns: Any
    ) -> pa.RecordBatch:
        """Returns the entries of files below one root."""
        stamps = self._system.stamps(self._roots[root], paths)
        if labels is not None:
            pairs = [read_label(label) for label in labels]
            columns.update(label=[label for label, _ in pairs], label_error=[reason for _, reason in pairs])
        names = [path.encode() if path.isascii() else os.fsencode(path) for path in paths]
        return entries(ids, file=[root] * len(paths), name=names, stamp=stamps, **columns)

    def items_at(self, indices: Sequence[int], listed: pa.Table) -> Iterator[Item]:
        system = self._system
        for index, entry in zip(indices, listed.to_pylist(), strict=True):
            top, name = self._roots[entry["file"]], os.fsdecode(entry["name"])
            path = system.join(top, name) if top else name
            shown_path = shown(system.place(path))
            read: Callable[[], Any] = partial(system.read, path, entry["stamp"])
            if entry["fault"] is not None:
                read = partial(_raise, ImageError(f"{shown_path!r}: {entry['fault']}"))
            yield Item(entry["id"], index, shown_path, read, entry["label"], entry["label_error"])

    def stamps(self) -> Iterable[str]:
        return ()

    def name_in(self, folder: str, listed: pa.Table) -> str | None:
        """Returns the name of a file that lies in a folder, itself or through a link; None where none does.

        Args:
            folder: a real path.
            listed: entries of the files.
        """
        if not isinstance(self._system, LocalFiles):
            return None
        # Of a million files in a few folders, one of each is looked up.
        folders: dict[str, str] = {}
        for root, name in zip(listed["file"].to_pylist(), listed["name"].to_pylist(), strict=True):
            path = self._system.place(self._system.join(self._roots[root], os.fsdecode(name)))
            folders.setdefault(os.path.dirname(path), path)
        for parent, path in folders.items():
            if folder in (os.path.realpath(parent), os.path.dirname(os.path.realpath(path))):
                return shown(os.path.basename(path))
        return None

    def is_listed_by(self, anchor: Any, folders: pa.Table | None, sample: Callable[[], pa.Table]) -> bool:
        return (
            super().is_listed_by(anchor, folders, sample)
            and all(self._is_unchanged(folder) for folder in ([] if folders is None else folders.to_pylist()))
            and self._has_stamps(sample())
        )

    def _is_unchanged(self, folder: dict[str, Any]) -> bool:
        root, path = self._system.place(self._roots[folder["file"]]), os.fsdecode(folder["path"])
        try:
            if folder["changed"] and os.stat(os.path.join(root, path)).st_mtime_ns == folder["changed"]:
                return True
            return folder_state(root, path, self._without).names == folder["names"]
        except OSError:
            return False

    def _has_stamps(self, listed: pa.Table) -> bool:
        for root, top in enumerate(self._roots):
            chosen = listed.filter(pc.equal(listed["file"], root))
            names = [os.fsdecode(name) for name in chosen["name"].to_pylist()]
            if self._system.stamps(top, names) != chosen["stamp"].to_pylist():
                return False
        return True


class FoldersOfFiles(Files):
    """Picture files, folders of them and patterns, in the order in which they are named, each file once.

    Args:
        names: what the user calls them. With a single folder the ids are paths within it.
        without: a folder that is passed over, absolute.
        system: where they lie.

    Raises:
        ImageError: at the listing, a folder or a pattern without any picture.
    """

    def __init__(self, names: Sequence[str], without: str | None, system: FileSystem) -> None:
        self._system, self._without = system, without
        self._arguments = [str(Path(name)) for name in names] if isinstance(system, LocalFiles) else list(names)
        self._roots = [name if system.is_folder(name) else "" for name in self._arguments]
        self._folders: list[tuple[int, bytes, int, bytes]] = []

    def entries(self) -> Iterator[pa.RecordBatch]:
        self._folders = []
        number = 0
        is_only = len(self._arguments) == 1

        def note(state: FolderState) -> None:
            self._folders.append((number, os.fsencode(state.path), state.changed, state.names))

        walk = self._system.walker([root for root in self._roots if root], self._without, note)
        single: set[str] = set()  # paths that are named one by one, or by a pattern
        for number, (name, root) in enumerate(zip(self._arguments, self._roots, strict=True)):
            listed = walk(root) if root else iter([(path, None) for path in self._system.matching(name)])
            empty = True
            while block := list(itertools.islice(listed, _BLOCK)):
                empty = False
                if not is_only:
                    block = [(path, fault) for path, fault in block if not self._is_listed(root, path, number, single)]
                    if not root:
                        single.update(path for path, _ in block)
                if block:
                    paths = [path for path, _ in block]
                    ids = [shown(path if is_only or not root else self._system.join(root, path)) for path in paths]
                    faults = [fault for _, fault in block]
                    yield self._block(number, paths, ids, fault=faults if any(faults) else None)
            if empty:
                raise no_pictures(name)

    def _is_listed(self, root: str, path: str, number: int, single: set[str]) -> bool:
        """Returns whether a path was listed under an earlier name."""
        if number == 0:
            return False
        full = self._system.join(root, path) if root else path
        if full in single:
            return True
        for earlier in filter(None, self._roots[:number]):
            relative = full.removeprefix(earlier.rstrip("/") + "/")
            if relative != full and not any(part.startswith(".") for part in relative.split("/")):
                return True
        return False

    def anchor(self) -> Any:
        # Patterns are matched anew; of folders in a store nothing but the names of all files shows what is new.
        is_local = isinstance(self._system, LocalFiles)
        names = zip(self._arguments, self._roots, strict=True)
        fixed = all(is_local if root else not glob.has_magic(name) for name, root in names)
        places = [self._system.place(name) for name in self._arguments]
        # The ids in a single folder are the same however it is called.
        called = [] if len(places) == 1 and self._roots[0] else self._arguments
        return [called, places] if fixed else None

    def folders(self) -> pa.Table:
        columns = list(zip(*self._folders, strict=True)) or [()] * len(FOLDERS)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, FOLDERS, strict=True)]
        return pa.table(arrays, schema=FOLDERS)


class ListOfFiles(Files):
    """The files that a list names, by a column of paths, with `id` and `label` where they are there.

    Args:
        path: of the list; relative paths in it start from its folder.
        columns: that the list has.
        rows: yields the rows in blocks, each column as a sequence or as an Arrow array.
        system: where list and files lie.

    Raises:
        InputError: no column of paths.
    """

    def __init__(
        self,
        path: str,
        columns: Sequence[str],
        rows: Callable[[list[str]], Iterator[dict[str, Any]]],
        system: FileSystem,
    ) -> None:
        column = next((name for name in PATHS if name in columns), None)
        if column is None:
            raise InputError(f"list {text(path)!r} must have a column {' or '.join(PATHS)}, got {', '.join(columns)}")
        self._path, self._column, self._rows, self._system = path, column, rows, system
        self._roots = [system.parent(path)]
        self._columns = [column, *(name for name in ("id", "label") if name in columns)]

    def entries(self) -> Iterator[pa.RecordBatch]:
        for block in self._rows(self._columns):
            paths = [_path_text(self._path, value) for value in block[self._column]]
            names = [valid(name.replace("\0", "\\0")) for name in paths]
            if "id" in block:
                ids = block["id"]
                names = named(ids if isinstance(ids, list) else ids.to_pylist(), names)
            columns: dict[str, Any] = {}
            if "label" in block:
                labels = block["label"]
                if isinstance(labels, (pa.Array, pa.ChunkedArray)):
                    columns["label"], columns["label_error"] = label_columns(labels)
                else:
                    columns["labels"] = labels
            yield self._block(0, paths, names, **columns)

    def anchor(self) -> Any:
        return [self._system.place(self._path), self._system.stamp(self._path)]


def _path_text(path: str, value: Any) -> str:
    value = value.as_py() if isinstance(value, pa.Scalar) else value
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"paths in list {text(path)!r} must be texts, got a {type(value).__name__}")
    return value


def csv_list(path: str, system: FileSystem) -> ListOfFiles:
    """Returns the source of a CSV file with a column of paths (`path`, `file`, `filename`, `file_name` or `image`).

    Args:
        path: of the list.
        system: where list and files lie.

    Raises:
        InputError: no such file, or no such column.
    """

    def rows(columns: list[str]) -> Iterator[dict[str, Any]]:
        with _csv_reader(system, path) as reader:
            while block := list(itertools.islice(reader, _BLOCK)):
                yield {name: [row[name] or "" for row in block] for name in columns}

    with _csv_reader(system, path) as reader:
        columns = list(reader.fieldnames or [])
    return ListOfFiles(path, columns, rows, system)


@contextlib.contextmanager
def _csv_reader(system: FileSystem, path: str) -> Iterator[Any]:
    try:
        with io.TextIOWrapper(system.open(path), "utf-8-sig", newline="") as file:
            yield csv.DictReader(file)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"list {text(path)!r} must be a CSV file, got {type(error).__name__}: {error}") from error


def _raise(error: Exception) -> Any:
    raise error
