"""The folder of a run: one Parquet part a shard, whole or not there; what is finished is what lies there."""

import io
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pyfast_xai.datasets.durable import remove_unfinished, write_whole
from pyfast_xai.datasets.schema import About, about

logger = logging.getLogger("pyfast_xai")

ROWS = 256  # of a row group: a hundred random rows come back in milliseconds


@dataclass(frozen=True)
class Shards:
    """How a listing is cut.

    Attributes:
        items: in all.
        size: of each shard but the last.
    """

    items: int
    size: int

    def __len__(self) -> int:
        return -(-self.items // self.size)

    def range(self, shard: int) -> tuple[int, int]:
        """Index of the first item, and that after the last."""
        return shard * self.size, min(self.items, (shard + 1) * self.size)


class Store:
    """The parts of a run.

    Args:
        folder: of the run.
        system: what speaks to the disk, see `durable.write_whole`.
    """

    def __init__(self, folder: str | Path, system: Any = os) -> None:
        self.folder = Path(folder)
        self._system = system

    def path(self, shard: int) -> Path:
        return self.folder / f"part-{shard:08d}.parquet"

    def paths(self) -> dict[int, Path]:
        """The parts that are there, in order."""
        names = sorted(self._system.listdir(self.folder))
        matches = [(re.fullmatch(r"part-(\d{8})\.parquet", name), name) for name in names]
        return {int(match[1]): self.folder / name for match, name in matches if match}

    def write(self, shard: int, table: pa.Table) -> int:
        """Put a part there, whole, in place of an older one; returns its bytes."""
        data = encoded(table)
        write_whole(self.path(shard), data, self._system)
        return len(data)

    def clean(self) -> int:
        """Remove what an earlier run left unfinished."""
        return remove_unfinished(self.folder, self._system)

    def finished(self) -> dict[int, About]:
        """What each part says of itself; one that cannot be read is told, and counts as not there."""
        found = {}
        for shard, path in self.paths().items():
            told = told_by(path)
            if told is None:
                logger.warning("part %s cannot be read and is made again", path)
            else:
                found[shard] = told
        return found


def encoded(table: pa.Table) -> bytes:
    """A Parquet file. Its pages carry checksums, so that a flipped bit is found."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=ROWS, write_page_checksum=True)
    return sink.getvalue()


def told_by(path: Path) -> About | None:
    """What a part says of itself; None where it says nothing or cannot be read."""
    try:
        return about(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return None


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A part, with every checksum looked at.

    Raises:
        OSError: it is damaged.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=columns)
