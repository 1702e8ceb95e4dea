"""WebDataset tars: raw bytes of picture members, read where they lie; nothing is unpacked, unpickled or run."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyfast_xai.datasets.sources.files import MAX_BYTES
from pyfast_xai.datasets.sources.item import Item, Source, stamp, text, unique
from pyfast_xai.errors import InputError
from pyfast_xai.images import SUFFIXES, ImageError


@dataclass(frozen=True)
class _Member:
    tar: int
    name: str
    offset: int
    size: int
    fault: str | None = None  # why it cannot be read, known from the listing


class Tars(Source):
    """Pictures in uncompressed tars, with the class in a `.cls` member of the same key.

    A member is an id and a range of bytes; its name is never a path. A tar that breaks off gives one more row, named
    after the tar, that says so.

    Args:
        paths: of the tars.

    Raises:
        InputError: not an uncompressed tar.
    """

    kind = "tars"

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._members: list[_Member] = []
        self._labels: list[int | None] = []
        for number, path in enumerate(paths):
            members, classes = _members(number, path)
            self._members += members
            self._labels += [classes.get(os.path.splitext(member.name)[0]) for member in members]
        self.ids = unique(
            f"{text(paths[m.tar].name)}/{m.name}" if m.name else text(paths[m.tar].name) for m in self._members
        )

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for index in range(start, min(stop, len(self))):
            member = self._members[index]
            path = self._paths[member.tar]
            place = f"{text(os.path.abspath(path))}#{member.name}"
            yield Item(self.ids[index], index, place, partial(_read, path, member), self._labels[index])

    def stamps(self) -> Iterator[str]:
        return map(stamp, self._paths)


def _members(number: int, path: Path) -> tuple[list[_Member], dict[str, int]]:
    """The pictures of a tar, and classes by key."""
    members, classes = [], {}
    broken: str | None = None
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below, with whatever tarfile leaves of it)
    except OSError as error:
        raise InputError(f"source {text(path)!r} must be readable, got {error.strerror}") from error
    with file:
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
                while (member := tar.next()) is not None:
                    vars(tar)["members"] = []  # it would keep them all
                    name = member.name.encode("utf-8", "backslashreplace").decode()
                    key, suffix = os.path.splitext(name)
                    if suffix.lower() in SUFFIXES:
                        fault = None
                        if not member.isreg() or member.issparse():
                            fault = f"a {'sparse file' if member.isreg() else 'link or a device'}"
                        elif not 0 < member.size <= MAX_BYTES:
                            fault = f"{member.size:,} bytes"
                        members.append(_Member(number, name, member.offset_data, member.size, fault))
                    elif suffix == ".cls" and member.isreg() and member.size <= 20:
                        label = os.pread(file.fileno(), member.size, member.offset_data).strip()
                        if label.isdigit():
                            classes[key] = int(label)
                # A header that is no header ends the listing as the end of the archive does.
                file.seek(tar.offset)
                if file.read(512).strip(b"\0"):
                    broken = "a member that is none"
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            if not members:
                raise InputError(f"source {text(path)!r} must be an uncompressed tar, got {error}") from error
            broken = str(error)
    if broken is not None:
        members.append(_Member(number, "", 0, 0, f"one that breaks off after {len(members)} pictures ({broken})"))
    return members, classes


def _read(path: Path, member: _Member) -> bytes:
    if member.fault is not None:
        raise ImageError(
            f"image {member.name or text(path.name)!r} must be a whole file in its tar, got {member.fault}"
        )
    with open(path, "rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) < member.size:
        raise ImageError(f"image {member.name!r} must have {member.size} bytes in its tar, got {len(data)}")
    return data
