"""Looking after a run: how far it is, whether it is sound, and another try for its error rows."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pyfast_xai.datasets.columns import unpacked
from pyfast_xai.datasets.durable import alone_in
from pyfast_xai.datasets.engine import Engine, Progress
from pyfast_xai.datasets.manifest import begin, read_manifest
from pyfast_xai.datasets.run import Job, Summary, too_many
from pyfast_xai.datasets.schema import COLUMNS, ERROR, OK, About, about
from pyfast_xai.datasets.sources import Item, Source
from pyfast_xai.datasets.store import Shards, Store, read, told_by
from pyfast_xai.errors import InputError


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        items: in the source.
        rows: in parts that are written.
        errors: among them.
        parts: that are written.
        shards: that there are to be.
        bytes: of the parts.
        kinds: how many error rows there are of each type.
    """

    items: int
    rows: int
    errors: int
    parts: int
    shards: int
    bytes: int
    kinds: dict[str, int]


def status(folder: str | Path) -> Status:
    """How far a run is; may be asked while it works.

    Raises:
        InputError: no run lies there.
    """
    shards = _shards(folder)
    store = Store(folder)
    found = store.finished()
    kinds: Counter[str] = Counter()
    for shard, told in found.items():
        if told.errors:
            kinds.update(read(store.path(shard), ["error_type"])["error_type"].drop_null().to_pylist())
    size = sum(store.path(shard).stat().st_size for shard in found)
    rows = sum(told.stop - told.start for told in found.values())
    errors = sum(told.errors for told in found.values())
    return Status(shards.items, rows, errors, len(found), len(shards), size, dict(kinds.most_common()))


def _shards(folder: str | Path) -> Shards:
    described = read_manifest(folder).described
    items, size = described["source"].get("items"), described.get("shard_size")
    if type(items) is not int or type(size) is not int or items < 1 or size < 1:
        raise InputError(f"run in {str(folder)!r} must have items and a shard size, got {items} and {size}")
    return Shards(items, size)


@dataclass(frozen=True)
class Verified:
    """Whether a run is sound.

    Attributes:
        rows: that were looked at.
        missing: items without a row, because their part is not there yet.
        faults: a sentence each; none where all is well.
    """

    rows: int
    missing: int
    faults: list[str]


def verify(
    folder: str | Path, source: Source | None = None, told: Callable[[int, int], None] | None = None
) -> Verified:
    """Read everything that is there, checksums among it, and count.

    Every part must be of this run, hold exactly its items in their order, each id once in the whole run, with a map
    of the size it says.

    Args:
        folder: of the run.
        source: to compare the ids with; None compares them with each other.
        told: called with parts done and parts there.

    Raises:
        InputError: no run lies there.
    """
    manifest, shards, store = read_manifest(folder), _shards(folder), Store(folder)
    if source is not None and source.listing().ids != manifest.described["source"]["ids"]:
        raise InputError("source must be the one of the run, got one with other items")
    paths = store.paths()
    faults: list[str] = []
    digests: list[np.ndarray] = []
    rows = 0
    for done, (shard, path) in enumerate(paths.items(), 1):
        if shard >= len(shards):
            faults.append(f"{path.name} must be one of {len(shards)} parts, got another")
            continue
        start, stop = shards.range(shard)
        table = None
        try:
            table = read(path)
            faults += [f"{path.name}: {fault}" for fault in _faults(table, shard, start, stop, manifest.fingerprint)]
        except Exception as error:  # damaged bytes raise whatever the reader comes across
            faults.append(f"{path.name} must be readable, got {type(error).__name__}: {str(error).splitlines()[0]}")
        if table is not None and "id" in table.column_names:
            ids = table["id"].to_pylist()
            rows += len(ids)
            digests.append(np.array([hash(name) for name in ids], dtype=np.int64))
            if source is not None and ids != list(source.ids[start:stop]):
                faults.append(f"{path.name}: ids must be those of the source, got others")
        if told is not None:
            told(done, len(paths))
    if digests:
        values, counts = np.unique(np.concatenate(digests), return_counts=True)
        twice = set(values[counts > 1].tolist())
        if twice:
            faults += _doubled(paths, twice)
    present = sum(end - begin for begin, end in (shards.range(shard) for shard in paths if shard < len(shards)))
    return Verified(rows, shards.items - present, faults)


def _faults(table: pa.Table, shard: int, start: int, stop: int, fingerprint: str) -> Iterator[str]:
    told: About | None = about(table.schema)
    if told is None or told.fingerprint != fingerprint:
        yield "must be of this run, got a part of another"
        return
    if (told.shard, told.start, told.stop) != (shard, start, stop):
        yield f"must hold items {start} to {stop}, got a part that says {told.start} to {told.stop}"
    missing = [name for name in COLUMNS.names if name not in table.column_names]
    if missing:
        yield f"must have the columns of this version, got none called {', '.join(missing)}"
        return
    if table["index"].to_pylist() != list(range(start, stop)):
        yield f"must have a row for each item from {start} to {stop}, got {table.num_rows} rows, not all in their place"
    counts = Counter(table["status"].to_pylist())
    if set(counts) - {OK, ERROR} or counts[ERROR] != told.errors:
        yield f"must have {told.errors} error rows, got {dict(counts)}"
    # The bytes of maps are looked at one by one, which costs no more than reading them.
    for row in table.select(["id", "map", "map_dtype", "map_shape", "map_scale", "map_offset"]).to_pylist():
        try:
            unpacked(row)
        except InputError as error:
            yield str(error)


def _doubled(paths: dict[int, Path], twice: set[int]) -> list[str]:
    """The ids that are really there more than once, among those whose hash is."""
    seen: Counter[str] = Counter()
    for path in paths.values():
        try:
            seen.update(name for name in read(path, ["id"])["id"].to_pylist() if hash(name) in twice)
        except Exception:  # told already
            continue
    return [f"id {name!r} must be there once, got {count} rows" for name, count in seen.items() if count > 1]


class _Some(Source):
    """Some items of a source, numbered anew."""

    kind = "some"

    def __init__(self, source: Source, places: list[int]) -> None:
        self._source, self._places = source, places
        self.ids = [source.ids[place] for place in places]

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for index in range(start, min(stop, len(self))):
            place = self._places[index]
            item = next(iter(self._source.items(place, place + 1)))
            yield replace(item, index=index)


class _Merging(Store):
    """Takes parts of error rows that were tried again, and puts them in the place of the old rows."""

    def __init__(self, store: Store, places: dict[int, list[int]]) -> None:
        super().__init__(store.folder, store._system)
        self._places = places  # shard to indices of its error rows
        self.shard = 0

    def write(self, shard: int, table: pa.Table) -> int:
        path = self.path(self.shard)
        old, told = read(path), told_by(path)
        assert told is not None
        places = self._places[self.shard]
        fresh = table.set_column(table.column_names.index("index"), "index", pa.array(places, pa.int64()))
        kept = old.filter(pc.invert(pc.is_in(old["index"], pa.array(places, pa.int64()))))
        schema = old.schema.remove_metadata()
        both = pa.concat_tables([own.select(schema.names).replace_schema_metadata() for own in (kept, fresh)])
        both = both.sort_by("index").combine_chunks()
        errors = sum(state == ERROR for state in both["status"].to_pylist())
        from pyfast_xai.datasets.schema import schema as schema_of

        changed = schema_of(replace(told, errors=errors), "picture" in schema.names, "swapped_index" in schema.names)
        return super().write(self.shard, both.cast(changed.remove_metadata()).replace_schema_metadata(changed.metadata))


def retry(job: Job, progress: Callable[[Progress], None] | None = None) -> Summary:
    """Explain the error rows of a run again, each part in place of the old one, whole.

    Pictures may have been repaired since; the source must list the same items.

    Args:
        job: the run, from `run.prepare`.
        progress: see `explain`.

    Returns:
        How the run stands.

    Raises:
        InputError: it is another run.
    """
    with alone_in(job.store.folder):
        read_manifest(job.store.folder)
        begin(job.store.folder, job.manifest, repaired=True)
        job.store.clean()
        done = Progress(batch=job.settings.batch)
        found = job.finished()
        for shard, told in found.items():
            if not told.errors:
                continue
            table = read(job.store.path(shard), ["index", "status"])
            places = table.filter(pc.equal(table["status"], ERROR))["index"].to_pylist()
            merging = _Merging(job.store, {shard: places})
            merging.shard = shard
            # One shard of its own: the rows that failed.
            engine = Engine(
                _Some(job.source, places), job.explainer, merging, Shards(len(places), len(places)),
                job.manifest.fingerprint, replace(job.settings, strict=False),
            )  # fmt: skip
            own = engine.run([0])
            done = replace(
                done, rows=done.rows + own.rows, errors=done.errors + own.errors, images=done.images + own.images,
                seconds=done.seconds + own.seconds, shard=shard,
            )  # fmt: skip
            if progress is not None:
                progress(done)
        now: dict[int, Any] = job.finished()
    rows, errors = (sum(own.stop - own.start for own in now.values()), sum(own.errors for own in now.values()))
    return Summary(job.store.folder, job.shards.items, rows, errors, rows, done, too_many(errors, rows, None))
