"""What all sources share: a listing that is the same every time, and items that are read when their turn comes."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """One input of a run.

    Attributes:
        id: unique in its source.
        index: its place in the listing.
        place: where a person finds it, such as a path.
        read: gives the bytes of a picture file, a PIL image, a tensor, or one of these as `Labelled`; may raise
            anything, which makes a row that says so. Called on a thread of its own.
        label: the class that the source says it has.
    """

    id: str
    index: int
    place: str
    read: Callable[[], Any]
    label: int | None = None


@dataclass(frozen=True)
class Labelled:
    """What an item is read as where its label comes with it."""

    picture: Any
    label: int | None


@dataclass(frozen=True)
class Listing:
    """What a source holds, in a few words: a run that goes on compares it.

    Attributes:
        kind: of the source.
        items: how many there are.
        ids: SHA-256 of the ids, in order.
        content: SHA-256 of sizes and times of change, or what else changes with the content.
    """

    kind: str
    items: int
    ids: str
    content: str


class Source:
    """A sequence of items that is the same every time it is opened.

    Attributes:
        ids: of the items, in order.
        kind: what a person calls it.
        spec: what `open_source` makes it from again; None for an object of the user's.
    """

    kind: str
    ids: Sequence[str]
    spec: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """The items of a range, in order; called by one thread at a time."""
        raise NotImplementedError

    def stamps(self) -> Iterable[str]:
        """What changes when the content of the source does."""
        raise NotImplementedError

    def listing(self) -> Listing:
        return Listing(self.kind, len(self), _digest(self.ids), _digest(self.stamps()))


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def text(path: str | Path) -> str:
    """A path as text that every file format can hold; bytes that are no text are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def stamp(path: str | Path) -> str:
    """Size and time of change of a file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


def unique(names: Iterable[str]) -> list[str]:
    """The same names, each once: the second of a kind gets #2."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    result = []
    for name in names:
        free = name
        while free in taken:
            counts[name] = counts.get(name, 1) + 1
            free = f"{name}#{counts[name]}"
        taken.add(free)
        result.append(free)
    return result
