"""Parquet files without rows that carry other data, so that a folder of parts opens as one table in any reader.

Readers of a folder take every file in it for a part of the table, some of them hidden files, too. What a run notes
beside its parts therefore lies in Parquet files of the same columns that have no row group. Their data stands between
the first magic number and the footer, where the format lets a file hold bytes that no column refers to.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"PAR1"


def attached(data: bytes | memoryview, columns: pa.Schema) -> bytes:
    """Returns a Parquet file without rows that carries data.

    Args:
        data: of any kind.
        columns: of the parts beside it.
    """
    sink = io.BytesIO()
    pq.ParquetWriter(sink, columns).close()
    empty = sink.getvalue()
    return b"".join((_MAGIC, data, empty[len(_MAGIC) :]))


def detached(file: pa.Buffer) -> pa.Buffer:
    """Returns the data that a Parquet file without rows carries.

    Raises:
        ValueError: the file is no such file.
    """
    size = len(file)
    view = memoryview(file)
    if size < 12 or view[:4] != _MAGIC or view[-4:] != _MAGIC:
        raise ValueError("it is no Parquet file")
    footer = int.from_bytes(view[size - 8 : size - 4], "little")
    if footer > size - 12:
        raise ValueError("its footer is damaged")
    return file.slice(4, size - 12 - footer)
