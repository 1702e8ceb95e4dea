"""Parquet files: a column of pictures, as Hugging Face writes it or as plain bytes, or a column of paths."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pyfast_xai.datasets.sources.entries import entries
from pyfast_xai.datasets.sources.files import PATHS, ListOfFiles
from pyfast_xai.datasets.sources.filesystems import FileSystem, LocalFiles, check_stamp
from pyfast_xai.datasets.sources.item import Item, StreamedSource, named, runs_of, text, valid
from pyfast_xai.datasets.sources.labels import label_columns
from pyfast_xai.errors import InputError
from pyfast_xai.images import ImageError

_SLICE = 16  # pictures that are read together
_ENTRIES = 4096  # ids and labels that are read together
_BUFFER = 1 << 20  # bytes of a column that are read ahead; without it a whole row group is


class ParquetImages(StreamedSource):
    """Pictures in a column of Parquet files: `struct<bytes, path>` or binary; with `id` and `label` where they are.

    A picture without bytes may name a file below the folder of its Parquet file, and no other. A row group of any size
    is read in slices of some pictures, and one time where its pictures are read in order.

    Args:
        paths: of the files, all with the same columns.
        column: of the pictures; None for the first that can be one.
        system: where they lie; None for this machine.

    Raises:
        InputError: a file that is no Parquet, or without such a column.

    Example:
        >>> import io
        >>> import pyarrow as pa
        >>> import pyarrow.parquet
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (96, 96)).save(stream, "PNG")
        >>> pyarrow.parquet.write_table(pa.table({"image": [stream.getvalue()]}), "images.parquet")
        >>> [item.id for item in datasets.ParquetImages(["images.parquet"]).items(0, 1)]
        ['images.parquet:0']
    """

    kind = "parquet"

    def __init__(
        self, paths: Sequence[str | Path], column: str | None = None, system: FileSystem | None = None
    ) -> None:
        self._system = system or LocalFiles()
        self._paths = [os.fspath(path) for path in paths]
        self._groups: list[_Group] = []
        self._cursor: _Cursor | None = None
        columns: list[str] | None = None
        for number, path in enumerate(self._paths):
            with opened(self._system, path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                if columns is None:
                    columns = schema.names
                    self._column = _picture_column(path, schema, column)
                elif schema.names != columns:
                    raise InputError(
                        f"source {text(path)!r} must have the columns of {text(self._paths[0])!r}, got others"
                    )
                for group in range(file.num_row_groups):
                    first = self._groups[-1].last if self._groups else 0
                    self._groups.append(_Group(number, group, first, first + metadata.row_group(group).num_rows))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cursor": None}

    def entries(self) -> Iterator[pa.RecordBatch]:
        for number, path in enumerate(self._paths):
            stamp = self._system.stamp(path)
            with opened(self._system, path) as file:
                present = [name for name in ("id", "label") if name in file.schema_arrow.names]
                row = 0
                for block in _blocks(path, file, present):
                    rows = range(row, row + block["rows"])
                    row = rows.stop
                    names = [f"{text(os.path.basename(path))}:{n}" for n in rows]
                    if "id" in block:
                        names = named(block["id"].to_pylist(), names)
                    labels, reasons = label_columns(block["label"]) if "label" in block else (None, None)
                    files, stamps = [number] * len(names), [stamp] * len(names)
                    yield entries(names, label=labels, label_error=reasons, file=files, stamp=stamps)

    def items_at(self, indices: Sequence[int], listed: pa.Table) -> Iterator[Item]:
        rows = listed.select(["id", "label", "label_error", "stamp"]).to_pylist()
        for position, (start, stop) in runs_of(indices):
            for group in self._groups:
                if group.first >= stop or group.last <= start:
                    continue
                path = self._paths[group.file]
                for index in range(max(start, group.first), min(stop, group.last)):
                    entry = rows[position + index - start]
                    shown_path = f"{text(self._system.place(path))}#{index - group.first}"
                    read = self._read(group, index, entry["stamp"])
                    yield Item(entry["id"], index, shown_path, read, entry["label"], entry["label_error"])

    def _read(self, group: "_Group", index: int, stamp: str | None) -> Callable[[], Any]:
        """Returns what reads the picture of an index; its file must have a stamp, where one is given."""
        try:
            picture = self._cursor_at(group, index, stamp).picture(index)
        except Exception as error:  # the reader may raise anything on damaged bytes
            name = text(os.path.basename(self._paths[group.file]))
            reason = " ".join(str(error).split()) or type(error).__name__
            fault = ImageError(f"images of row group {group.number} of {name!r} must be readable, got {reason}")
            return partial(_raise, fault)
        return partial(_bytes_of, picture, self._system, self._paths[group.file])

    def _cursor_at(self, group: "_Group", index: int, stamp: str | None) -> "_Cursor":
        """Returns the open cursor where it is at or before a picture, else a new one.

        Raises:
            InputError: the file is gone.
        """
        cursor = self._cursor
        if cursor is None or (cursor.group, cursor.stamp) != (group, stamp) or cursor.next > index:
            if cursor is not None:
                cursor.close()
            self._cursor = None
            cursor = self._cursor = _Cursor(self._system, self._paths[group.file], self._column, group, stamp)
        return cursor

    def stamps(self) -> Iterator[str]:
        return map(self._system.stamp, self._paths)

    def anchor(self) -> Any:
        return [[self._system.place(path) for path in self._paths], list(self.stamps()), self._column]


@dataclass(frozen=True)
class _Group:
    """A row group: its file, its number in it, and the indices of its pictures."""

    file: int
    number: int
    first: int
    last: int


class _Cursor:
    """Reads the pictures of a row group from its first to its last, in slices.

    Attributes:
        group: that is read.
        stamp: that the file must have while it is read; None for any.
        next: index of the next picture; earlier ones are gone but for those of the slice at hand.
    """

    def __init__(self, system: FileSystem, path: str, column: str, group: _Group, stamp: str | None) -> None:
        self.group, self.stamp, self._start = group, stamp, group.first
        self._system, self._path = system, path
        self._slice: Any = None
        self._fault: Exception | None = None
        self._open = contextlib.ExitStack()
        file = self._open.enter_context(opened(system, path))
        self._slices = file.iter_batches(_SLICE, [group.number], [column], use_threads=False)

    @property
    def next(self) -> int:
        return self._start

    def picture(self, index: int) -> Any:
        """Returns a picture as an Arrow scalar.

        Raises:
            Exception: the row group is damaged there or before, or the file has changed.
        """
        if self._fault is not None:
            raise self._fault
        try:
            while self._slice is None or index >= self._start + len(self._slice):
                self._start += 0 if self._slice is None else len(self._slice)
                self._slice = next(self._slices).column(0)
                if self.stamp is not None:
                    check_stamp(self._path, self.stamp, self._system.stamp(self._path))
        except StopIteration:
            self._fault = EOFError(f"row {index - self.group.first} is missing")
            raise self._fault from None
        except Exception as error:
            self._fault = error.with_traceback(None)
            raise
        return self._slice[index - self._start]

    def close(self) -> None:
        self._open.close()


def parquet(paths: Sequence[str], system: FileSystem) -> ParquetImages | ListOfFiles:
    """Returns the pictures where a column holds them, else the files of one list."""
    with opened(system, paths[0]) as file:
        schema = file.schema_arrow
    if any(_holds_pictures(field.type) for field in schema):
        return ParquetImages(paths, system=system)
    path = next((name for name in PATHS if name in schema.names), None)
    if len(paths) == 1 and path is not None:
        kind = schema.field(path).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"column {path!r} of {text(paths[0])!r} must hold paths as text, got {kind}")

        def rows(columns: list[str]) -> Iterator[dict[str, Any]]:
            with opened(system, paths[0]) as file:
                yield from _blocks(paths[0], file, columns)

        return ListOfFiles(paths[0], schema.names, rows, system)
    raise InputError(
        f"source {text(paths[0])!r} must have a column of pictures, or be one list with a column {' or '.join(PATHS)}, "
        f"got {', '.join(schema.names)}"
    )


@contextlib.contextmanager
def opened(system: FileSystem, path: str) -> Iterator[Any]:
    """Opens a Parquet file.

    Raises:
        InputError: it is none.
    """
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(system.open(path))
            file = stack.enter_context(pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"source {text(path)!r} must be a Parquet file, got {reason}") from error
        yield file


def _blocks(path: str, file: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yields some columns of a file in blocks, each with its number of `rows`.

    Raises:
        InputError: the columns are damaged.
    """
    if not columns:
        for start in range(0, file.metadata.num_rows, _ENTRIES):
            yield {"rows": min(_ENTRIES, file.metadata.num_rows - start)}
        return
    batches = file.iter_batches(_ENTRIES, columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # the reader may raise anything on damaged bytes
            reason = " ".join(str(error).split())
            raise InputError(f"{' and '.join(columns)} of {text(path)!r} must be readable, got {reason}") from error
        if batch is None:
            return
        yield {"rows": batch.num_rows, **dict(zip(batch.schema.names, batch.columns, strict=True))}


def _holds_pictures(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):  # of equal pictures one is stored
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(n).name for n in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _picture_column(path: str, schema: Any, column: str | None) -> str:
    able = [field.name for field in schema if _holds_pictures(field.type)]
    if not able or (column is not None and column not in able):
        raise InputError(f"column must be one of pictures in {text(path)!r}, {able}, got {column!r}")
    # A struct says that it is a picture, bytes may be anything.
    structs = [name for name in able if pa.types.is_struct(schema.field(name).type)]
    return column or (structs or able)[0]


def _raise(error: Exception) -> Any:
    raise error


def _bytes_of(scalar: Any, system: FileSystem, path: str) -> bytes:
    value = scalar.as_py()
    if isinstance(value, dict):
        relative_path, value = value.get("path"), value.get("bytes")
        if value is None and relative_path:
            return _below(system, path, relative_path)
    if not value:
        raise ImageError(f"image of {text(os.path.basename(path))!r} must have bytes, got none")
    if not isinstance(value, bytes):
        raise ImageError(f"image of {text(os.path.basename(path))!r} must be bytes, got a {type(value).__name__}")
    return value


def _below(system: FileSystem, path: str, relative_path: Any) -> bytes:
    """Returns the bytes of a file that a row names."""
    error = ImageError(
        f"image {valid(relative_path)!r} must lie below the folder of its Parquet file, got another place"
    )
    if not isinstance(relative_path, str):
        raise error
    if not isinstance(system, LocalFiles):
        if ".." in relative_path.split("/") or relative_path.startswith("/") or "://" in relative_path:
            raise error
        return system.read(system.join(system.parent(path), relative_path))
    root = os.path.realpath(system.place(system.parent(path)))
    full_path = os.path.realpath(os.path.join(root, relative_path))
    if os.path.commonpath([root, full_path]) != root:
        raise error
    return system.read(full_path)
