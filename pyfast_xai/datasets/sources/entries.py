"""The listing of a source as Arrow tables: one entry an item, produced and read in pieces."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

CHUNK = 8192  # entries of a piece; digests depend on it

# The columns of a listing: the id of an item, and where its source reads it. Every source fills those that it needs.
ENTRIES = pa.schema(
    [
        ("id", pa.string()),  # unique
        ("label", pa.int64()),
        ("label_error", pa.string()),  # why there is no label although the source names something
        ("fault", pa.string()),  # why the item cannot be read, where the listing shows it
        ("file", pa.int32()),  # number of the folder, tar or Parquet file
        ("name", pa.binary()),  # path below the folder, or name of the member
        ("offset", pa.int64()),  # of the member, in bytes
        ("size", pa.int64()),  # of the member, in bytes
        ("stamp", pa.string()),  # of a file of its own: size and time of change
    ]
)


@dataclass(frozen=True)
class Listing:
    """A summary of a source's items; a resumed run compares it.

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


def entries(ids: Sequence[str] | pa.Array, **columns: Any) -> pa.RecordBatch:
    """Returns some entries of a listing; columns that are left out are null.

    Args:
        ids: of the items, valid Unicode.
        **columns: further columns of `ENTRIES`, as sequences or Arrow arrays.
    """
    columns["id"] = ids
    count = len(ids)
    arrays = []
    for field in ENTRIES:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(count, field.type))
        else:
            arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=ENTRIES)


def rechunked(batches: Iterable[pa.RecordBatch], size: int = CHUNK) -> Iterator[pa.RecordBatch]:
    """Yields the same entries in pieces of `size`; the last is smaller, and there is at least one."""
    remaining_batches: list[pa.RecordBatch] = []
    count = 0
    produced = False
    for batch in batches:
        remaining_batches.append(batch)
        count += batch.num_rows
        while count >= size:
            table = pa.Table.from_batches(remaining_batches, ENTRIES)
            yield _one(table.slice(0, size))
            produced = True
            remaining_batches, count = table.slice(size).to_batches(), count - size
    if count or not produced:
        yield _one(pa.Table.from_batches(remaining_batches, ENTRIES))


def _one(table: pa.Table) -> pa.RecordBatch:
    arrays = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(
        [array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks) for array in arrays], schema=ENTRIES
    )


def without_stamps(listed: pa.Table) -> pa.Table:
    """Returns entries whose files may have any content."""
    column = ENTRIES.get_field_index("stamp")
    return listed.set_column(column, ENTRIES.field(column), pa.nulls(len(listed), pa.string()))


class Digests:
    """Digests of a listing that comes in pieces of `CHUNK`."""

    def __init__(self) -> None:
        self._ids, self._content, self._items = hashlib.sha256(), hashlib.sha256(), 0

    def add(self, batch: pa.RecordBatch) -> None:
        _update(self._ids, batch.column("id"))
        stamps = batch.column("stamp")
        if stamps.null_count < len(stamps):
            _update(self._content, stamps.fill_null("absent"))
        self._items += batch.num_rows

    def listing(self, kind: str, stamps: Iterable[str]) -> Listing:
        """Returns the digests of all pieces, and of the stamps of the source itself."""
        _update(self._content, pa.array(list(stamps), pa.string()))
        return Listing(kind, self._items, self._ids.hexdigest(), self._content.hexdigest())


def digested(kind: str, batches: Iterable[pa.RecordBatch], stamps: Iterable[str]) -> Listing:
    """Returns the digests of a listing.

    Args:
        kind: of the source.
        batches: of `CHUNK` entries each.
        stamps: of the source itself.
    """
    digests = Digests()
    for batch in batches:
        digests.add(batch)
    return digests.listing(kind, stamps)


def _update(digest: Any, column: pa.Array) -> None:
    """Adds the texts of a column without nulls, each with its length, to a digest."""
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    digest.update((offsets - offsets[:1]).astype("<i4").tobytes())
    if data is not None and len(offsets):
        digest.update(memoryview(data)[int(offsets[0]) : int(offsets[-1])])


def distinct(listed: Callable[[], Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Yields entries in which every id comes once: the second of a kind becomes `id#2`.

    Args:
        listed: yields the entries, the same every time; called twice for more than `CHUNK` of them, so that no more
            than 8 bytes an entry are held.
    """
    names = Names()
    kept_batches: list[pa.RecordBatch] = []
    for batch in listed():
        names.add(batch)
        if names.count <= CHUNK:
            kept_batches.append(batch)
    duplicates = names.duplicates()
    batches = iter(kept_batches) if names.count <= CHUNK else listed()
    if not len(duplicates):
        yield from batches
        return
    renamed = Renamed(duplicates)
    for batch in batches:
        yield renamed(batch)


class Names:
    """Hashes of ids, to find those that come more than once."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []
        self.count = 0

    def add(self, batch: pa.RecordBatch) -> None:
        names = batch.column("id").to_pylist()
        self._hashes.append(np.fromiter(map(hash, names), np.int64, len(names)))
        self.count += len(names)

    def duplicates(self) -> np.ndarray:
        """Returns the hashes that come more than once, sorted; the others are forgotten."""
        hashes = np.concatenate(self._hashes or [np.empty(0, np.int64)])
        self._hashes = []
        hashes.sort()
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


class Renamed:
    """Gives the ids of a listing, piece after piece, new names where they have come before.

    Args:
        twice: hashes of the ids that may come more than once.
    """

    def __init__(self, duplicates: np.ndarray) -> None:
        self._duplicates = set(duplicates.tolist())
        self._used: set[str] = set()
        self._counts: dict[str, int] = {}

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        names = [self._free(name) if self._may_clash(name) else name for name in batch.column("id").to_pylist()]
        return batch.set_column(0, ENTRIES.field("id"), pa.array(names, pa.string()))

    def _may_clash(self, name: str) -> bool:
        # A name such as a#2 may be what the second a becomes.
        while hash(name) not in self._duplicates:
            name, mark, _ = name.rpartition("#")
            if not mark:
                return False
        return True

    def _free(self, name: str) -> str:
        free = name
        while free in self._used:
            self._counts[name] = self._counts.get(name, 1) + 1
            free = f"{name}#{self._counts[name]}"
        self._used.add(free)
        return free
