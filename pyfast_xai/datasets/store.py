"""The parts of a run: one Parquet file a shard, whole or not there; what is finished is what lies there."""

import io
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pyfast_xai.datasets.folders import Folder, LocalFolder, run_folder
from pyfast_xai.datasets.schema import ERROR, PartInfo, part_info, with_info

logger = logging.getLogger("pyfast_xai")

ROWS = 256  # of a row group: a hundred random rows come back in milliseconds


@dataclass(frozen=True)
class Shards:
    """The division of a listing into shards.

    Attributes:
        items: in all.
        size: of each shard but the last.
    """

    items: int
    size: int

    def __len__(self) -> int:
        return -(-self.items // self.size)

    def range(self, shard: int) -> tuple[int, int]:
        """Returns the index of the first item, and that after the last."""
        return shard * self.size, min(self.items, (shard + 1) * self.size)


class PartStore:
    """The parts of a run.

    Args:
        path: of the folder, or its URL.
        system: what calls the disk, see `atomic_files.write_all`.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, path: str | Path, system: Any = os) -> None:
        self.folder: Folder = run_folder(path, system)

    def path(self, shard: int) -> Any:
        """Returns where a part lies: a path, or a URL."""
        return self.folder.place(name_of(shard))

    def shards(self) -> list[int]:
        """Returns the numbers of the stored parts, ascending."""
        matches = (re.fullmatch(r"part-(\d{8,})\.parquet", name) for name in self.folder.names())
        return sorted(int(match[1]) for match in matches if match)

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns a part, with every checksum compared.

        Raises:
            OSError: it is damaged, or not there.
        """
        with (
            self.folder.open(name_of(shard)) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            return file.read(columns=None if columns is None else list(columns))

    def dataset(self, shards: Sequence[int]) -> Any:
        """Returns parts as one Arrow data set, read when and as far as its rows are needed.

        Files are named one by one: no name of a folder is taken for a pattern or for a column.
        """
        from pyarrow import dataset

        system = None if isinstance(self.folder, LocalFolder) else self.folder.store  # type: ignore[attr-defined]
        paths = [os.fspath(self.path(shard)) for shard in shards]
        with self.folder.open(name_of(shards[0])) as source:
            schema = pq.read_schema(source).remove_metadata()
        return dataset.dataset(paths, schema, format="parquet", filesystem=system, partitioning=None)

    def write(self, shard: int, table: pa.Table) -> int:
        """Puts a part there, whole, in place of an older one; returns its bytes."""
        data = encoded(table)
        self.folder.write(name_of(shard), data)
        return len(data)

    def replace_rows(self, shard: int, table: pa.Table) -> int:
        """Puts rows in the place of those of the same indices, in a part that is there; returns its bytes.

        Args:
            shard: number of the part.
            table: the new rows, with the columns of the part.

        Raises:
            OSError: the part is damaged, or not there.
        """
        present = self.read(shard)
        info = part_info(present.schema)
        if info is None:
            raise OSError(f"part {str(self.path(shard))!r} must say what it is, got nothing")
        other_rows = present.filter(pc.invert(pc.is_in(present["index"], table["index"])))
        schema = present.schema.remove_metadata()
        rows = pa.concat_tables(
            [part.select(schema.names).replace_schema_metadata().cast(schema) for part in (other_rows, table)]
        )
        rows = rows.sort_by("index").combine_chunks()
        errors = sum(status == ERROR for status in rows["status"].to_pylist())
        return self.write(shard, rows.cast(with_info(present.schema, replace(info, errors=errors))))

    def size(self, shard: int) -> int:
        """Returns the bytes of a part."""
        return self.folder.size(name_of(shard))

    def info(self, shard: int) -> PartInfo | None:
        """Returns what a part says of itself; None where it says nothing or cannot be read."""
        try:
            with self.folder.open(name_of(shard)) as source:
                return part_info(pq.read_schema(source))
        except (pa.ArrowException, OSError):
            return None

    def finished(self) -> dict[int, PartInfo]:
        """Returns what each part says of itself; one that cannot be read counts as not there, with a warning."""
        infos = {}
        for shard in self.shards():
            info = self.info(shard)
            if info is None:
                logger.warning("part %s cannot be read and is made anew", self.path(shard))
            else:
                infos[shard] = info
        return infos


def name_of(shard: int) -> str:
    """Returns the name of the file of a part."""
    return f"part-{shard:08d}.parquet"


def encoded(table: pa.Table) -> bytes:
    """Returns a table as a Parquet file. Its pages carry checksums, so that a flipped bit shows."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=ROWS, write_page_checksum=True)
    return sink.getvalue()
