"""The base of all sources: a listing that is the same every time, and items that are read when their turn comes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pyfast_xai.datasets.sources.entries import Listing, digested, distinct, entries, rechunked, without_stamps


@dataclass(frozen=True)
class Item:
    """One input of a run.

    Attributes:
        id: unique in its source.
        index: its position in the listing.
        place: where a person looks for it, such as a path.
        read: returns the bytes of a picture file, a PIL image, a tensor, or one of these as `Labelled`; may raise
            anything, which makes an error row. Threads call it.
        label: the class that the source names, of any kind, see `labels.read_label`.
        label_error: why `label` is None although the source names something.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> item = datasets.Item("black", 0, "memory", lambda: Image.new("RGB", (96, 64)))
        >>> item.read().size
        (96, 64)
    """

    id: str
    index: int
    place: str
    read: Callable[[], Any]
    label: Any = None
    label_error: str | None = None


@dataclass(frozen=True)
class Labelled:
    """The result of reading an item whose label comes with its picture; the label may be of any kind."""

    picture: Any
    label: Any


class Source:
    """A sequence of items that is the same every time it is opened.

    A subclass with its items in memory sets `ids` and defines `items` and `stamps`. A subclass whose items lie
    elsewhere derives from `StreamedSource`.

    Attributes:
        ids: of the items, in order.
        kind: what a person calls it.
        spec: what `open_source` makes it from; None for an object of the user's.
        folder: where relative names in `spec` begin.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> isinstance(datasets.open_source("black.png"), datasets.Source)
        True
    """

    kind: str
    ids: Sequence[str]
    spec: list[str] | None = None
    folder: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yields the items of a range, in order; one thread at a time calls it."""
        raise NotImplementedError

    def stamps(self) -> Iterable[str]:
        """Returns texts that change when the content of the source does, beside the stamps of its entries."""
        raise NotImplementedError

    def entries(self) -> Iterator[pa.RecordBatch]:
        """Yields the listing in a stream, see `entries.ENTRIES`."""
        for start in range(0, len(self), 4096):
            yield entries([valid(name) for name in self.ids[start : start + 4096]])

    def items_at(self, indices: Sequence[int], listed: pa.Table) -> Iterator[Item]:
        """Yields some items, in order; one thread at a time calls it.

        Args:
            indices: of the items, ascending.
            listed: their entries in the listing. A file of its own must have the stamp of its entry where that has one.
        """
        names = listed["id"].to_pylist()
        for position, (first, stop) in runs_of(indices):
            for item in self.items(first, stop):
                name = names[position + item.index - first]
                yield item if item.id == name else _renamed(item, name)

    def anchor(self) -> Any:
        """Returns what shows cheaply that the listing is still the same, JSON-ready; None where only listing does."""
        return None

    def folders(self) -> pa.Table | None:
        """Returns the folders that the last listing went through, see `files.FOLDERS`; None without folders."""
        return None

    def is_listed_by(self, anchor: Any, folders: pa.Table | None, sample: Callable[[], pa.Table]) -> bool:
        """Returns whether a stored listing is still the listing of this source, without listing it.

        Args:
            anchor: from the time of that listing.
            folders: from that time, too.
            sample: returns some of its entries.
        """
        current = self.anchor()
        return current is not None and current == anchor

    def listing(self) -> Listing:
        """Returns the digests of the listing."""
        return digested(self.kind, rechunked(distinct(self.entries)), self.stamps())


class StreamedSource(Source):
    """A source that is listed in a stream, so that a run holds no more of it than a shard.

    `len`, `ids` and `items` list it into memory when they are first used.

    Example:
        >>> from pyfast_xai import datasets
        >>> issubclass(datasets.StreamedSource, datasets.Source)
        True
    """

    @property
    def ids(self) -> Sequence[str]:  # type: ignore[override]
        return self._listed["id"].to_pylist()

    def __len__(self) -> int:
        return self._listed.num_rows

    def items(self, start: int, stop: int) -> Iterator[Item]:
        stop = min(stop, len(self))
        listed = without_stamps(self._listed.slice(start, max(0, stop - start)))
        yield from self.items_at(range(start, stop), listed)

    @cached_property
    def _listed(self) -> pa.Table:
        return pa.Table.from_batches(list(rechunked(distinct(self.entries))))


def _renamed(item: Item, name: str) -> Item:
    return Item(name, item.index, item.place, item.read, item.label, item.label_error)


def runs_of(indices: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields each run of consecutive indices as its position in `indices`, and its first index and that after it."""
    start = 0
    while start < len(indices):
        end = start + 1
        while end < len(indices) and indices[end] == indices[end - 1] + 1:
            end += 1
        yield start, (indices[start], indices[end - 1] + 1)
        start = end


def text(path: str | Path) -> str:
    """Returns a path as text that every file format holds; bytes that are no text are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def named(ids: Iterable[Any], others: Iterable[Any]) -> list[str]:
    """Returns ids as `valid` makes them, and in the place of each that is null or empty another name."""
    return [valid(other if name is None or name == "" else name) for name, other in zip(ids, others, strict=True)]


def valid(name: Any) -> str:
    """Returns a name as text that every file format holds."""
    name = name if isinstance(name, str) else str(name)
    return name.encode("utf-8", "backslashreplace").decode()
