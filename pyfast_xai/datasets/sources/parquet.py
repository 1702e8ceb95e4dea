"""Parquet files: a column of pictures, as Hugging Face writes it or as plain bytes, or a column of paths."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pyfast_xai.datasets.sources.files import PATHS, Files, listed, read_file
from pyfast_xai.datasets.sources.item import Item, Source, stamp, text, unique
from pyfast_xai.errors import InputError
from pyfast_xai.images import ImageError


class ParquetImages(Source):
    """Pictures in a column of Parquet files: `struct<bytes, path>` or binary; with `id` and `label` where they are.

    A picture without bytes may name a file below the folder of its Parquet file, and no other. A row group is read at
    a time.

    Args:
        paths: of the files, all with the same columns.
        column: of the pictures; None for the first that can be one.

    Raises:
        InputError: a file that is no Parquet, or without such a column.
    """

    kind = "parquet"

    def __init__(self, paths: Sequence[Path], column: str | None = None) -> None:
        self._paths = paths
        self._groups: list[tuple[int, int, int, int]] = []  # file, row group, first and last index
        ids: list[str] = []
        labels: list[int | None] = []
        schema = _open(paths[0]).schema_arrow
        self._column = _column(paths[0], schema, column)
        for number, path in enumerate(paths):
            file = _open(path)
            if file.schema_arrow.names != schema.names:
                raise InputError(f"source {text(path)!r} must have the columns of {text(paths[0].name)!r}, got others")
            for group in range(file.num_row_groups):
                first = self._groups[-1][3] if self._groups else 0
                self._groups.append((number, group, first, first + file.metadata.row_group(group).num_rows))
            known = [name for name in ("id", "label") if name in schema.names]
            table = file.read(columns=known) if known else None
            rows = file.metadata.num_rows
            ids += (
                [str(value) for value in table["id"].to_pylist()]
                if table is not None and "id" in known
                else [f"{text(path.name)}:{row}" for row in range(rows)]
            )
            integer = table is not None and "label" in known and pa.types.is_integer(table["label"].type)
            labels += table["label"].to_pylist() if table is not None and integer else [None] * rows
        self.ids, self._labels = unique(ids), labels

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for number, group, first, last in self._groups:
            if first >= stop or last <= start:
                continue
            path = self._paths[number]
            pictures: Any = None
            try:
                # A broken group is as many rows that say so.
                pictures = _open(path).read_row_group(group, columns=[self._column])[self._column]
                fault = None
            except Exception as error:
                fault = ImageError(f"images of row group {group} of {text(path.name)!r} must be readable, got {error}")
            for index in range(max(start, first), min(stop, last)):
                place = f"{text(os.path.abspath(path))}#{index - first}"
                read = partial(_raise, fault) if fault else partial(_read, pictures[index - first], path)
                yield Item(self.ids[index], index, place, read, self._labels[index])

    def stamps(self) -> Iterator[str]:
        return map(stamp, self._paths)


def parquet(paths: Sequence[Path]) -> ParquetImages | Files:
    """Pictures where a column has them, else the files of one list."""
    schema = _open(paths[0]).schema_arrow
    if any(_holds_pictures(field.type) for field in schema):
        return ParquetImages(paths)
    if len(paths) == 1 and any(name in schema.names for name in PATHS):
        known = [name for name in (*PATHS, "id", "label") if name in schema.names]
        return listed(paths[0], known, _open(paths[0]).read(columns=known).to_pylist())
    raise InputError(
        f"source {text(paths[0])!r} must have a column of pictures, or be one list with a column {' or '.join(PATHS)}, "
        f"got {', '.join(schema.names)}"
    )


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"source {text(path)!r} must be a Parquet file, got {str(error).splitlines()[0]}") from error


def _holds_pictures(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(n).name for n in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _column(path: Path, schema: Any, column: str | None) -> str:
    able = [field.name for field in schema if _holds_pictures(field.type)]
    if not able or (column is not None and column not in able):
        raise InputError(f"column must be one of pictures in {text(path)!r}, {able}, got {column!r}")
    # A struct says that it is a picture, bytes may be anything.
    structs = [name for name in able if pa.types.is_struct(schema.field(name).type)]
    return column or (structs or able)[0]


def _raise(error: Exception) -> Any:
    raise error


def _read(value: Any, path: Path) -> bytes:
    found = value.as_py()
    if isinstance(found, dict):
        named, found = found.get("path"), found.get("bytes")
        if found is None and named:
            root = os.path.realpath(path.parent)
            inside = os.path.realpath(os.path.join(root, named))
            if os.path.commonpath([root, inside]) != root:
                raise ImageError(
                    f"image {text(named)!r} must lie below the folder of its Parquet file, got another place"
                )
            return read_file(inside)
    if not found:
        raise ImageError(f"image of {text(path.name)!r} must have bytes, got none")
    return found
