"""The rows of a run, from one to a billion: as dictionaries, tables, explanations, pictures and answers to SQL."""

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pyfast_xai.datasets.columns import explanation_of, unpacked
from pyfast_xai.datasets.decode import pixels_seen, rgb_of
from pyfast_xai.datasets.manifest import Manifest, read_manifest
from pyfast_xai.datasets.sources import Item, Labelled, Source, open_source
from pyfast_xai.datasets.store import Store, read
from pyfast_xai.errors import InputError
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess

_PARTS_HELD = 2  # in memory, for rows asked for one by one
_NEAR = 8  # items that are passed over rather than asked for anew, which may read much


class Row(Mapping[str, Any]):
    """One input: a mapping of the columns, see docs/datasets.md."""

    def __init__(self, results: "Results", columns: dict[str, Any]) -> None:
        self.results, self._columns = results, columns

    def __getitem__(self, column: str) -> Any:
        return self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        told = "error_message" if self["status"] == "error" else "class_name"
        return f"Row({self['id']!r}, {self['status']}, {self[told]!r})"

    @property
    def map(self) -> Any:
        """The stored map as a float32 array `[h, w]`; None where there is none."""
        return unpacked(self._columns)

    def explanation(self) -> Explanation:
        """The row as an explanation of one image, with that image where its source is at hand.

        Raises:
            InputError: the row is an error, or has no map.
        """
        results = self.results
        method = results.manifest.described["method"]
        found = explanation_of(
            self._columns, method["name"], method["threshold"], method["sigma"], results.manifest.made.get("classes")
        )
        picture = results.picture(self["index"])
        if picture is not None:
            found.images = picture[None]
        return found


class Results:
    """The rows of a run, in the order of its source; parts that are not there yet are left out.

    Args:
        folder: of the run.
        source: where its pictures are; None for that of the command line which began it, where there was one.

    Raises:
        InputError: no run lies there.
    """

    def __init__(self, folder: str | Path, source: Any = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder)
        self._given = source
        self._source: Source | None = None
        self._looked = False
        self._parts = []  # first row, index of the first item, path
        self._count = 0
        for path, about in ((Store(folder).path(shard), about) for shard, about in Store(folder).finished().items()):
            self._parts.append((self._count, about.start, path))
            self._count += about.stop - about.start
        self._held: dict[Path, pa.Table] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Row:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must lie in [{-len(self)}, {len(self)}), got {row}")
        row %= len(self)
        first, _, path = self._parts[bisect.bisect([part[0] for part in self._parts], row) - 1]
        return Row(self, self._part(path).slice(row - first, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for _, _, path in self._parts:
            for batch in read(path).to_batches(64):
                for columns in batch.to_pylist():
                    yield Row(self, columns)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Some rows, each part read once.

        Args:
            numbers: of the rows, ascending.
        """
        ends = [first for first, _, _ in self._parts[1:]] + [self._count]
        begin = 0
        for (first, _, path), last in zip(self._parts, ends, strict=True):
            end = bisect.bisect_left(numbers, last, begin)
            if begin == end:
                continue
            chosen = pa.array([number - first for number in numbers[begin:end]], pa.int64())
            for batch in read(path).take(chosen).to_batches(64):
                for columns in batch.to_pylist():
                    yield Row(self, columns)
            begin = end

    def items(self, indices: Sequence[int]) -> Iterator[Item | None]:
        """What the source has; None for each where it is not at hand. Their pictures are read by whoever wants them.

        Args:
            indices: of the items, ascending.
        """
        source = self._opened()
        begin = 0
        while begin < len(indices):
            end = begin + 1
            while end < len(indices) and indices[end] - indices[end - 1] <= _NEAR:
                end += 1
            wanted = indices[begin:end]
            begin = end
            if source is None:
                yield from [None] * len(wanted)
                continue
            chosen = set(wanted)
            for item in source.items(wanted[0], wanted[-1] + 1):
                if item.index in chosen:
                    yield item

    @property
    def paths(self) -> list[Path]:
        """The parts, in order."""
        return [path for _, _, path in self._parts]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows as one Arrow table.

        Args:
            columns: which; None for all, maps included.
        """
        chosen = None if columns is None else list(columns)
        # What each part says of itself differs.
        tables = [read(path, chosen).replace_schema_metadata() for path in self.paths]
        return pa.concat_tables(tables) if tables else pa.table({})

    def query(self, sql: str) -> Any:
        """The answer to a question in SQL, of the table `results`, as a DuckDB relation.

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
        connection.read_parquet([str(path) for path in self.paths]).create_view("results")
        return connection.sql(sql)

    def picture(self, index: int) -> torch.Tensor | None:
        """What the network saw of an item, `[3, H, W]` in 0..1; None where its source is not at hand.

        Args:
            index: of the item.
        """
        source = self._opened()
        if source is None:
            return None
        item = next(iter(source.items(index, index + 1)))
        found = item.read()
        found = found.picture if isinstance(found, Labelled) else found
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            return found
        image = rgb_of(found, item.id, self.manifest.described["rows"]["max_pixels"])
        return pixels_seen(self.preprocess, image).float() / 255

    @property
    def preprocess(self) -> Preprocess:
        """How pictures became inputs."""
        told = dict(self.manifest.described["preprocess"])
        size = told.pop("size")
        return Preprocess(size if isinstance(size, int) else (size[0], size[1]), **told)

    def _opened(self) -> Source | None:
        if self._source is None and self._given is not None:
            self._source = self._same(open_source(self._given, without=self.folder))
        elif self._source is None and not self._looked:
            self._looked = True
            noted = self._noted()
            # Pictures may have gone elsewhere since; rows can be read without them.
            with contextlib.suppress(InputError):
                self._source = None if noted is None else self._same(open_source(noted, without=self.folder))
        return self._source

    def _same(self, source: Source) -> Source:
        if source.listing().ids != self.manifest.described["source"]["ids"]:
            raise InputError("source must be the one of the run, got one with other items")
        return source

    def _noted(self) -> list[str] | None:
        noted = self.manifest.made.get("source")
        # A file that somebody sent names no data set to be fetched.
        names = isinstance(noted, list) and all(isinstance(name, str) and not name.startswith("hf:") for name in noted)
        return noted if names else None

    def _part(self, path: Path) -> pa.Table:
        if path not in self._held:
            while len(self._held) >= _PARTS_HELD:
                del self._held[next(iter(self._held))]
            self._held[path] = read(path)
        return self._held[path]


def open_results(folder: str | Path, source: Any = None) -> Results:
    """The rows of a run; see `Results`."""
    return Results(folder, source)
