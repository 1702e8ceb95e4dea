"""The listing of a run as it lies on the disk: written once, in a stream, and read shard by shard."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pyfast_xai.datasets.attachments import attached, detached
from pyfast_xai.datasets.folders import Folder
from pyfast_xai.datasets.sources import Item, Listing, Source
from pyfast_xai.datasets.sources.entries import CHUNK, ENTRIES, Digests, Names, Renamed, rechunked, without_stamps
from pyfast_xai.datasets.temporary_folder import TemporaryFolder
from pyfast_xai.errors import InputError

PREFIX = "_listing-"
_FILE = 32 * CHUNK  # entries of a file
_SAMPLE = (8, 512)  # batches of a long listing that are sampled, and the entries of each


class StoredListing:
    """A listing in a folder: Arrow files, each carried by a Parquet file without rows.

    Args:
        folder: where it lies.
        name: tells this listing from an older one in the same folder.
        items: how many entries it has.
        is_temporary: whether the folder goes with the process.
    """

    def __init__(self, folder: Folder, name: str, items: int, is_temporary: bool = False) -> None:
        self._folder, self.name, self._items, self.is_temporary = folder, name, items, is_temporary
        self._recent: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_recent": None}

    def __len__(self) -> int:
        return self._items

    def files(self) -> list[str]:
        """Returns the names of its files."""
        return [*map(self._entries, range(-(-self._items // _FILE))), self._folders]

    def _entries(self, number: int) -> str:
        return f"{PREFIX}{self.name}-{number:05d}.parquet"

    @property
    def _folders(self) -> str:
        return f"{PREFIX}{self.name}-folders.parquet"

    def entries(self, start: int, stop: int) -> pa.Table:
        """Returns a range of entries.

        Raises:
            InputError: the listing is damaged.
        """
        stop = min(stop, self._items)
        batches = []
        while start < stop:
            number, offset = divmod(start, _FILE)
            batch = self._file(number).get_batch(offset // CHUNK)
            part = batch.slice(offset % CHUNK, stop - start)
            batches.append(part)
            start += part.num_rows
        return pa.Table.from_batches(batches, ENTRIES)

    def take(self, indices: Sequence[int]) -> pa.Table:
        """Returns some entries.

        Args:
            indices: of the entries, ascending.
        """
        batches = []
        start = 0
        while start < len(indices):
            first = indices[start] // CHUNK * CHUNK
            end = start
            while end < len(indices) and indices[end] < first + CHUNK:
                end += 1
            chosen = pa.array([index - first for index in indices[start:end]], pa.int64())
            batches.append(self.entries(first, first + CHUNK).take(chosen))
            start = end
        return pa.concat_tables(batches) if batches else ENTRIES.empty_table()

    def items(self, source: Source, indices: Sequence[int], check: bool) -> Iterator[Item]:
        """Yields some items of the source that is listed here.

        Args:
            source: where they are read.
            indices: of the items, ascending.
            check: whether files must be as they were listed; reading one that has changed then fails.
        """
        is_range = isinstance(indices, range) and indices.step == 1
        listed = self.entries(indices[0], indices[-1] + 1) if is_range and indices else self.take(indices)
        if not check:
            listed = without_stamps(listed)
        return source.items_at(indices, listed)

    def sample(self) -> pa.Table:
        """Returns all entries of a short listing, and some spread over a long one."""
        count, size = _SAMPLE
        if self._items <= count * size:
            return self.entries(0, self._items)
        starts = [n * (self._items - size) // (count - 1) for n in range(count)]
        return pa.concat_tables([self.entries(start, start + size) for start in starts])

    def folders(self) -> pa.Table | None:
        """Returns the folders that the listing went through; None where there are none."""
        table = pa.ipc.open_file(self._data(self._folders)).read_all()
        return table if table.num_columns else None

    def append(self, batches: list[pa.RecordBatch]) -> None:
        """Writes one more file of entries.

        Args:
            batches: of `CHUNK` entries each, the very last perhaps of fewer.
        """
        count = sum(batch.num_rows for batch in batches)
        if count:
            self._items += count
            self._folder.write(self.files()[-2], attached(_encoded(batches), ENTRIES))

    def copy_to(self, folder: Folder, name: str, columns: pa.Schema) -> "StoredListing":
        """Writes the listing into the folder of a run.

        Args:
            folder: of the run.
            name: of the listing there.
            columns: of the parts beside it.
        """
        copied = StoredListing(folder, name, self._items)
        for source, target in zip(self.files(), copied.files(), strict=True):
            folder.write(target, attached(memoryview(self._data(source)), columns))
        return copied

    def remove_others(self) -> None:
        """Removes other listings from the folder."""
        names = set(self.files())
        for name in self._folder.names():
            if name.startswith(PREFIX) and name not in names:
                self._folder.remove(name)

    def _file(self, number: int) -> Any:
        if self._recent is None or self._recent[0] != number:
            self._recent = number, pa.ipc.open_file(self._data(self._entries(number)))
        return self._recent[1]

    def _data(self, name: str) -> pa.Buffer:
        try:
            with self._folder.open(name) as file:
                buffer = file.read_buffer() if isinstance(file, pa.NativeFile) else pa.py_buffer(file.read())
            return detached(buffer)
        except (OSError, ValueError) as error:
            raise InputError(
                f"listing {str(self._folder.place(name))!r} must be whole, got {error}; remove it and run again"
            ) from error


def take_listing(source: Source, progress: Callable[[int], None] | None = None) -> tuple[StoredListing, Listing]:
    """Lists a source in a stream, into a temporary folder that goes with the listing.

    Args:
        source: of the items.
        progress: called with the number of items now and then.

    Returns:
        The listing, in which every id comes once, and its digests.
    """
    folder = TemporaryFolder()
    names = Names()
    listing, summary = _written(source, _counted(source.entries(), names, progress), folder, "first")
    duplicates = names.duplicates()
    if len(duplicates):
        raw = (listing.entries(start, start + CHUNK).to_batches()[0] for start in range(0, len(listing), CHUNK))
        listing, summary = _written(source, map(Renamed(duplicates), raw), folder, "distinct")
        listing.remove_others()
    return listing, summary


def _counted(
    batches: Iterator[pa.RecordBatch], names: Names, progress: Callable[[int], None] | None
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        names.add(batch)
        if progress is not None:
            progress(names.count)
        yield batch


def _written(
    source: Source, batches: Iterator[pa.RecordBatch], folder: TemporaryFolder, name: str
) -> tuple[StoredListing, Listing]:
    digests = Digests()
    pending: list[pa.RecordBatch] = []
    listing = StoredListing(folder, name, 0, is_temporary=True)
    for batch in rechunked(batches):
        digests.add(batch)
        pending.append(batch)
        if len(pending) == _FILE // CHUNK:
            listing.append(pending)
            pending = []
    listing.append(pending)
    folders = source.folders()
    folder.write(listing.files()[-1], attached(_encoded([] if folders is None else folders.to_batches()), ENTRIES))
    return listing, digests.listing(source.kind, source.stamps())


def _encoded(batches: list[pa.RecordBatch]) -> bytes:
    """Returns tables of one schema as an Arrow file."""
    sink = io.BytesIO()
    schema = batches[0].schema if batches else pa.schema([])
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()
