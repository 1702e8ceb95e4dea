"""The rows of a run, from one to a billion: as dictionaries, tables, explanations, pictures and tables for SQL."""

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pyfast_xai.datasets.columns import explanation_of, unpacked
from pyfast_xai.datasets.decode import input_pixels
from pyfast_xai.datasets.listing import StoredListing
from pyfast_xai.datasets.manifest import Manifest, read_manifest
from pyfast_xai.datasets.run import stored_listing
from pyfast_xai.datasets.sources import Item, Labelled, Source, open_source
from pyfast_xai.datasets.sources.entries import ENTRIES
from pyfast_xai.datasets.sources.item import runs_of
from pyfast_xai.datasets.store import PartStore
from pyfast_xai.errors import InputError
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess

_PARTS_HELD = 2  # in memory, for rows that are read one by one


class Row(Mapping[str, Any]):
    """One input: a mapping of the columns, see docs/datasets.md.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> row = datasets.open("run")[0]
        >>> row["status"], row.map.dtype
        ('ok', dtype('float32'))
    """

    def __init__(self, results: "Results", columns: dict[str, Any]) -> None:
        self.results, self._columns = results, columns

    def __getitem__(self, column: str) -> Any:
        return self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        column = "error_message" if self["status"] == "error" else "class_name"
        return f"Row({self['id']!r}, {self['status']}, {self[column]!r})"

    @property
    def map(self) -> Any:
        """Returns the stored map as a float32 array `[h, w]`; None where there is none."""
        return unpacked(self._columns)

    def explanation(self) -> Explanation:
        """Returns the row as an explanation of one image, with that image where its source is at hand.

        Raises:
            InputError: the row is an error, or has no map.
        """
        results = self.results
        method = results.manifest.described["method"]
        explanation = explanation_of(
            self._columns, method["name"], method["box_rule"], method["sigma"], results.manifest.made.get("labels")
        )
        picture = results.picture(self["index"])
        if picture is not None:
            explanation.images = picture[None]
        return explanation


class Results:
    """The rows of a run, in the order of its source; parts that are not there yet are left out.

    Args:
        folder: of the run, or its URL.
        source: where its pictures are; None for the source of the command line that made the run, where there was one.

    Raises:
        InputError: no run lies there.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> [row["id"] for row in datasets.Results("run")]
        ['black.png']
    """

    def __init__(self, folder: str | Path, source: Any = None) -> None:
        self.store = PartStore(folder)
        self.folder = self.store.folder.path
        self.manifest: Manifest = read_manifest(self.store.folder)
        self._other_source = source
        self._source: _Items | None = None
        self._is_opened = False
        self._parts: list[tuple[int, int]] = []  # first row, number of the part
        self._count = 0
        for shard, info in self.store.finished().items():
            self._parts.append((self._count, shard))
            self._count += info.stop - info.start
        self._cached: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Row:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must lie in [{-len(self)}, {len(self)}), got {row}")
        row %= len(self)
        first, shard = self._parts[bisect.bisect([part[0] for part in self._parts], row) - 1]
        return Row(self, self._part(shard).slice(row - first, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for _, shard in self._parts:
            for batch in self.store.read(shard).to_batches(64):
                for columns in batch.to_pylist():
                    yield Row(self, columns)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yields some rows; each part is read one time.

        Args:
            numbers: of the rows, ascending.
        """
        ends = [first for first, _ in self._parts[1:]] + [self._count]
        start = 0
        for (first, shard), last in zip(self._parts, ends, strict=True):
            end = bisect.bisect_left(numbers, last, start)
            if start == end:
                continue
            chosen = pa.array([number - first for number in numbers[start:end]], pa.int64())
            for batch in self.store.read(shard).take(chosen).to_batches(64):
                for columns in batch.to_pylist():
                    yield Row(self, columns)
            start = end

    def items(self, indices: Sequence[int]) -> Iterator[Item | None]:
        """Yields items of the source; None for each where the source is not at hand. Nothing is read yet.

        Args:
            indices: of the items, ascending.
        """
        source = self._opened()
        if source is None:
            return iter([None] * len(indices))
        return source.items(indices)

    @property
    def paths(self) -> list[Any]:
        """Returns the parts, in order: paths, or URLs."""
        return [self.store.path(shard) for _, shard in self._parts]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the rows as one Arrow table.

        Args:
            columns: which; None for all, maps included.
        """
        # The metadata of each part differs.
        tables = [self.store.read(shard, columns).replace_schema_metadata() for _, shard in self._parts]
        return pa.concat_tables(tables) if tables else pa.table({})

    def query(self, sql: str) -> Any:
        """Runs a statement of SQL on the table `results`, and returns a DuckDB relation.

            open("out").query("select class_name, avg(score) from results group by 1").df()

        Args:
            sql: one statement.

        Raises:
            InputError: DuckDB is not installed, or there is no part yet.
        """
        try:
            import duckdb
        except ImportError as error:
            raise InputError("query needs DuckDB: pip install duckdb") from error
        if not self._parts:
            raise InputError(f"folder must have at least one part to be queried, got none in {str(self.folder)!r}")
        connection = duckdb.connect()
        connection.register("results", self.store.dataset([shard for _, shard in self._parts]))
        return connection.sql(sql)

    def picture(self, index: int) -> torch.Tensor | None:
        """Returns what the network saw of an item, `[3, H, W]` in 0..1; None where its source is not at hand.

        Args:
            index: of the item.
        """
        item = next(iter(self.items([index])))
        if item is None:
            return None
        picture = item.read()
        picture = picture.picture if isinstance(picture, Labelled) else picture
        if isinstance(picture, torch.Tensor) and picture.is_floating_point():
            return picture
        rows = self.manifest.described["rows"]
        pixels, _ = input_pixels(picture, item.id, self.preprocess, rows["max_pixels"], rows.get("reduced_jpeg", False))
        return pixels.float() / 255

    @property
    def preprocess(self) -> Preprocess:
        """Returns the preprocessing that turned pictures into inputs."""
        settings = dict(self.manifest.described["preprocess"])
        size = settings.pop("size")
        return Preprocess(size if isinstance(size, int) else (size[0], size[1]), **settings)

    def source(self) -> Source:
        """Returns the source of the run, opened by the names that were used then, from the working folder of then.

        Raises:
            InputError: it is not there any more, or was an object without a name.
        """
        folder = self.manifest.made.get("folder")
        names = self.manifest.made.get("source")
        return open_source(names, without=self.folder, folder=folder if isinstance(folder, str) else None)

    def _opened(self) -> "_Items | None":
        if not self._is_opened:
            self._is_opened = True
            if self._other_source is not None:
                self._source = self._items_of(open_source(self._other_source, without=self.folder))
            elif _is_here(self.manifest.made.get("source")):
                # Pictures may have gone elsewhere since; rows can be read without them.
                with contextlib.suppress(InputError):
                    self._source = self._items_of(self.source())
        return self._source

    def _items_of(self, source: Source) -> "_Items":
        """Returns the items of a source.

        Raises:
            InputError: it is not the source of the run.
        """
        present = stored_listing(self.store.folder)
        if present is not None and source.kind == self.manifest.described["source"]["kind"]:
            listing = present[0]
            if source.is_listed_by(self.manifest.made.get("anchor"), listing.folders(), ENTRIES.empty_table):
                return _Items(source, listing)
        if source.listing().ids != self.manifest.described["source"]["ids"]:
            self._is_opened = False
            raise InputError("source must be the one of the run, got one with other items")
        return _Items(source, None)

    def _part(self, shard: int) -> pa.Table:
        if shard not in self._cached:
            while len(self._cached) >= _PARTS_HELD:
                del self._cached[next(iter(self._cached))]
            self._cached[shard] = self.store.read(shard)
        return self._cached[shard]


def _is_here(names: Any) -> bool:
    """Returns whether all names are of this machine: a file from an untrusted source must not trigger downloads."""
    return isinstance(names, list) and all(
        isinstance(name, str) and not name.startswith("hf:") and "://" not in name for name in names
    )


class _Items:
    """The items of a source, as they are now.

    Args:
        source: of the run.
        listing: of the source in the folder of the run; None lists the source into memory.
    """

    def __init__(self, source: Source, listing: StoredListing | None) -> None:
        self._source, self._listing = source, listing

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        if self._listing is not None:
            yield from self._listing.items(self._source, indices, check=False)
            return
        for _, (start, stop) in runs_of(indices):
            yield from self._source.items(start, stop)


def open_results(folder: str | Path, source: Any = None) -> Results:
    """Returns the rows of a run; see `Results`.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> results = datasets.open("run")
        >>> len(results), results.table(["id", "target"]).num_columns
        (1, 2)
    """
    return Results(folder, source)
