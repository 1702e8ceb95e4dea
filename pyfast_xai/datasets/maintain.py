"""Looking after a run: how far it is, whether it is sound, and another try for its error rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pyfast_xai.datasets.columns import unpacked
from pyfast_xai.datasets.folders import Folder
from pyfast_xai.datasets.job import Job
from pyfast_xai.datasets.manifest import read_manifest
from pyfast_xai.datasets.run import Summary, open_run, too_many
from pyfast_xai.datasets.run_worker import RunCallback, RunWorker
from pyfast_xai.datasets.schema import COLUMNS, ERROR, OK, part_info
from pyfast_xai.datasets.sources import Source
from pyfast_xai.datasets.store import PartStore, Shards, name_of
from pyfast_xai.errors import InputError
from pyfast_xai.progress import Progress, ProgressCallback


@dataclass(frozen=True)
class Status:
    """The progress of a run.

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
    """Returns how far a run is, also while it works.

    Args:
        folder: of the run, or its URL.

    Raises:
        InputError: no run lies there.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> datasets.status("run").rows
        1
    """
    store = PartStore(folder)
    shards = _shards(store.folder)
    infos = store.finished()
    kinds: Counter[str] = Counter()
    for shard, info in infos.items():
        if info.errors:
            kinds.update(store.read(shard, ["error_type"])["error_type"].drop_null().to_pylist())
    size = sum(map(store.size, infos))
    rows = sum(info.stop - info.start for info in infos.values())
    errors = sum(info.errors for info in infos.values())
    return Status(shards.items, rows, errors, len(infos), len(shards), size, dict(kinds.most_common()))


def _shards(folder: Folder) -> Shards:
    facts = read_manifest(folder).described
    items, size = facts["source"].get("items"), facts.get("shard_size")
    if type(items) is not int or type(size) is not int or items < 1 or size < 1:
        raise InputError(f"run in {str(folder.path)!r} must have items and a shard size, got {items} and {size}")
    return Shards(items, size)


@dataclass(frozen=True)
class Verified:
    """The soundness of a run.

    Attributes:
        rows: that were read.
        missing: items without a row, because their part is not there yet.
        faults: a sentence each; none where all is well.
    """

    rows: int
    missing: int
    faults: list[str]


def verify(folder: str | Path, source: Source | None = None, progress: ProgressCallback | None = None) -> Verified:
    """Reads everything that is there, checksums among it, and counts.

    Every part must be of this run, hold exactly its items in their order, each id once in the whole run, with a map
    of the size it says.

    Args:
        folder: of the run, or its URL.
        source: to compare the ids with; None compares them with each other.
        progress: called with a `Progress` of the parts.

    Raises:
        InputError: no run lies there.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> datasets.verify("run").faults
        []
    """
    store = PartStore(folder)
    manifest, shards = read_manifest(store.folder), _shards(store.folder)
    if source is not None and source.listing().ids != manifest.described["source"]["ids"]:
        raise InputError("source must be the one of the run, got one with other items")
    names = None if source is None else source.ids
    present = store.shards()
    faults: list[str] = []
    digests: list[np.ndarray] = []
    rows = 0
    for done, shard in enumerate(present, 1):
        part = name_of(shard)
        if shard >= len(shards):
            faults.append(f"{part} must be one of {len(shards)} parts, got another")
            continue
        start, stop = shards.range(shard)
        table = None
        try:
            table = store.read(shard)
            faults += [f"{part}: {fault}" for fault in _faults(table, shard, start, stop, manifest.fingerprint)]
        except Exception as error:  # the reader may raise anything on damaged bytes
            reason = str(error).splitlines()[0] if str(error) else "no reason"
            faults.append(f"{part} must be readable, got {type(error).__name__}: {reason}")
        if table is not None and "id" in table.column_names:
            ids = table["id"].to_pylist()
            rows += len(ids)
            digests.append(np.array([hash(name) for name in ids], dtype=np.int64))
            if names is not None and ids != list(names[start:stop]):
                faults.append(f"{part}: ids must be those of the source, got others")
        if progress is not None:
            progress(Progress(done, len(present)))
    if digests:
        values, counts = np.unique(np.concatenate(digests), return_counts=True)
        duplicates = set(values[counts > 1].tolist())
        if duplicates:
            faults += _doubled(store, present, duplicates)
    expected_rows = sum(end - start for start, end in (shards.range(shard) for shard in present if shard < len(shards)))
    return Verified(rows, shards.items - expected_rows, faults)


def _faults(table: pa.Table, shard: int, start: int, stop: int, fingerprint: str) -> Iterator[str]:
    info = part_info(table.schema)
    if info is None or info.fingerprint != fingerprint:
        yield "must be of this run, got a part of another"
        return
    if (info.shard, info.start, info.stop) != (shard, start, stop):
        yield f"must hold items {start} to {stop}, got a part that says {info.start} to {info.stop}"
    missing = [name for name in COLUMNS.names if name not in table.column_names]
    if missing:
        yield f"must have the columns of this version, got none called {', '.join(missing)}"
        return
    if table["index"].to_pylist() != list(range(start, stop)):
        yield f"must have a row for each item from {start} to {stop}, got {table.num_rows} rows, not all in their place"
    counts = Counter(table["status"].to_pylist())
    if set(counts) - {OK, ERROR} or counts[ERROR] != info.errors:
        yield f"must have {info.errors} error rows, got {dict(counts)}"
    # Unpacking every map costs no more than reading it.
    for row in table.select(["id", "map", "map_dtype", "map_shape", "map_scale", "map_offset"]).to_pylist():
        try:
            unpacked(row)
        except InputError as error:
            yield str(error)


def _doubled(store: PartStore, present: list[int], duplicates: set[int]) -> list[str]:
    """Returns a sentence for each id that is there more than once, among those whose hash is."""
    counts: Counter[str] = Counter()
    for shard in present:
        try:
            counts.update(name for name in store.read(shard, ["id"])["id"].to_pylist() if hash(name) in duplicates)
        except Exception:  # is among the faults
            continue
    return [f"id {name!r} must be there once, got {count} rows" for name, count in counts.items() if count > 1]


def retry(job: Job, progress: RunCallback | None = None) -> Summary:
    """Explains the error rows of a run anew, each part in place of the old one, whole.

    Pictures may have been repaired since; the source must list the same items.

    Args:
        job: the run, from `run.prepare`.
        progress: see `explain`.

    Returns:
        How the run stands.

    Raises:
        InputError: it is another run.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> open("broken.png", "wb").close()
        >>> job = datasets.prepare("broken.png", demo.load(), preprocess=Preprocess(96), method="saliency", out="run")
        >>> datasets.run_job(job).errors
        1
        >>> Image.new("RGB", (96, 96)).save("broken.png")
        >>> datasets.retry(job).errors
        0
    """
    read_manifest(job.store.folder)
    with open_run(job, repaired=True) as opened:
        errors = {shard: _error_rows(job.store, shard) for shard, info in opened.finished.items() if info.errors}
        worker = RunWorker(opened.job.with_settings(strict=False))
        progress_ = worker.run({shard: indices for shard, indices in errors.items() if indices}, progress)
        infos = job.finished().values()
    rows, remaining_errors = sum(info.stop - info.start for info in infos), sum(info.errors for info in infos)
    return Summary(
        job.store.folder.path,
        job.shards.items,
        rows,
        remaining_errors,
        rows,
        progress_,
        too_many(remaining_errors, rows, None),
    )


def _error_rows(store: PartStore, shard: int) -> list[int]:
    """Returns the indices of the error rows of a part, ascending."""
    table = store.read(shard, ["index", "status"])
    return sorted(table.filter(pc.equal(table["status"], ERROR))["index"].to_pylist())
