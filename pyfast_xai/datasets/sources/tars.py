"""WebDataset tars: raw bytes of picture members, read where they lie; nothing is unpacked, unpickled or run."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pyfast_xai.datasets.sources.entries import entries
from pyfast_xai.datasets.sources.filesystems import MAX_BYTES, FileSystem, LocalFiles
from pyfast_xai.datasets.sources.item import Item, StreamedSource, text
from pyfast_xai.datasets.sources.labels import read_label
from pyfast_xai.errors import InputError
from pyfast_xai.images import SUFFIXES, ImageError

_LABEL_BYTES = 4096  # of a `.cls` member; a longer one is no number


class Tars(StreamedSource):
    """Pictures in uncompressed tars, with the class in a `.cls` member of the same key.

    A member is an id and a range of bytes; its name is never a path. A tar that breaks off gives one more row, named
    after the tar, that says so.

    Args:
        paths: of the tars.
        system: where they lie; None for this machine.

    Raises:
        InputError: not an uncompressed tar.

    Example:
        >>> import tarfile
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> with tarfile.open("shard.tar", "w") as archive:
        ...     archive.add("black.png")
        >>> [item.id for item in datasets.Tars(["shard.tar"]).items(0, 1)]
        ['shard.tar/black.png']
    """

    kind = "tars"

    def __init__(self, paths: Sequence[str | Path], system: FileSystem | None = None) -> None:
        self._system = system or LocalFiles()
        self._paths = [os.fspath(path) for path in paths]
        for path in self._paths:
            with self._open(path) as file:
                _check_first(path, file)

    def _open(self, path: str) -> BinaryIO:
        try:
            return self._system.open(path)
        except OSError as error:
            raise InputError(f"source {text(path)!r} must be readable, got {error.strerror or error}") from error

    def entries(self) -> Iterator[pa.RecordBatch]:
        for number, path in enumerate(self._paths):
            stamp = self._system.stamp(path)
            with self._open(path) as file:
                yield _members(number, path, file, stamp)

    def items_at(self, indices: Sequence[int], listed: pa.Table) -> Iterator[Item]:
        for index, entry in zip(indices, listed.to_pylist(), strict=True):
            path = self._paths[entry["file"]]
            name = entry["name"].decode()
            shown_path = f"{text(self._system.place(path))}#{name}"
            range_ = (entry["offset"], entry["size"], entry["stamp"])
            read = partial(_read, self._system, path, name, range_, entry["fault"])
            yield Item(entry["id"], index, shown_path, read, entry["label"], entry["label_error"])

    def stamps(self) -> Iterator[str]:
        return map(self._system.stamp, self._paths)

    def anchor(self) -> Any:
        return [[self._system.place(path) for path in self._paths], list(self.stamps())]


def _check_first(path: str, file: BinaryIO) -> None:
    """Refuses a file that does not begin as a tar does."""
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
            tar.next()
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"source {text(path)!r} must be an uncompressed tar, got {error}") from error


def _members(number: int, path: str, file: BinaryIO, stamp: str) -> pa.RecordBatch:
    """Returns the entries of the pictures of a tar."""
    names: list[str] = []
    members: list[tuple[int, int, str | None]] = []  # offset, size, fault
    labels: dict[str, tuple[int | None, str | None]] = {}
    broken: str | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # it would keep them all
                name = member.name.encode("utf-8", "backslashreplace").decode()
                key, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    names.append(name)
                    members.append((member.offset_data, member.size, _fault(member)))
                elif suffix == ".cls" and member.isreg():
                    labels[key] = _label(file, member)
            # A header that is no header ends the listing as the end of the archive does.
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                broken = "a member that is none"
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        broken = str(error)
    tar_name = text(os.path.basename(path))
    ids = [f"{tar_name}/{name}" for name in names]
    if broken is not None:
        ids.append(tar_name)
        members.append((0, 0, f"one that breaks off after {len(names)} pictures ({broken})"))
        names.append("")
    pairs = [labels.get(os.path.splitext(name)[0], (None, None)) for name in names]
    offsets, sizes, faults = zip(*members, strict=True) if members else ((), (), ())
    return entries(
        ids,
        label=[label for label, _ in pairs],
        label_error=[reason for _, reason in pairs],
        fault=faults,
        file=[number] * len(ids),
        name=[name.encode() for name in names],
        offset=offsets,
        size=sizes,
        stamp=[stamp] * len(ids),
    )


def _fault(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return f"a {'sparse file' if member.isreg() else 'link or a device'}"
    return None if 0 < member.size <= MAX_BYTES else f"{member.size:,} bytes"


def _label(file: BinaryIO, member: tarfile.TarInfo) -> tuple[int | None, str | None]:
    if member.size > _LABEL_BYTES:
        return None, f"label must be a whole number, got {member.size:,} bytes"
    position = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(position)
    return read_label(data)


def _read(system: FileSystem, path: str, name: str, range_: tuple[int, int, str | None], fault: str | None) -> bytes:
    if fault is not None:
        raise ImageError(f"image {name or text(os.path.basename(path))!r} must be a whole file in its tar, got {fault}")
    offset, size, stamp = range_
    data = system.read_range(path, offset, size, stamp)
    if len(data) < size:
        raise ImageError(f"image {name!r} must have {size} bytes in its tar, got {len(data)}")
    return data
