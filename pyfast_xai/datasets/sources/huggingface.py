"""Data sets of Hugging Face's `datasets`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from pyfast_xai.datasets.sources.entries import entries
from pyfast_xai.datasets.sources.filesystems import LocalFiles
from pyfast_xai.datasets.sources.item import Item, StreamedSource, named, valid
from pyfast_xai.datasets.sources.labels import label_columns
from pyfast_xai.errors import InputError
from pyfast_xai.images import ImageError

_BLOCK = 1000  # entries that are read together, and pictures


class HuggingFace(StreamedSource):
    """The images of a `datasets.Dataset`, taken as bytes and decoded here.

    Args:
        dataset: one split, not a streamed one.
        column: of the images; None for the first.
        label: column of the classes; None for `label` where there is one.
        ids: column of unique names; None for `id`, and numbers where there is none.

    Raises:
        InputError: no such column, or several splits.

    Example:
        >>> from pyfast_xai.datasets import HuggingFace
        >>> import datasets  # doctest: +SKIP
        >>> pictures = datasets.load_dataset("beans", split="test")  # doctest: +SKIP
        >>> source = HuggingFace(pictures, column="image", label="labels")  # doctest: +SKIP
    """

    kind = "huggingface"

    def __init__(
        self, dataset: Any, column: str | None = None, label: str | None = None, ids: str | None = None
    ) -> None:
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            raise InputError(f"source must be one split, a datasets.Dataset, got {type(dataset).__name__}")
        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not images or (column is not None and column not in images):
            raise InputError(f"column must be one of images, {images}, got {column!r}")
        self._column = column or images[0]
        self._data = dataset.cast_column(self._column, datasets.Image(decode=False))
        self._fingerprint = str(dataset._fingerprint)
        self._files = LocalFiles()
        names = dataset.column_names
        self._ids = ids or ("id" if "id" in names else None)
        self._label = label or ("label" if "label" in names else None)
        for name in filter(None, (self._ids, self._label)):
            if name not in names:
                raise InputError(f"column must be one of {', '.join(names)}, got {name!r}")

    def __len__(self) -> int:
        return len(self._data)

    def entries(self) -> Iterator[pa.RecordBatch]:
        columns = [name for name in (self._ids, self._label) if name is not None]
        tables = self._data.select_columns(columns).with_format("arrow") if columns else None
        for start in range(0, len(self), _BLOCK):
            rows = range(start, min(start + _BLOCK, len(self)))
            table = None if tables is None else tables[rows.start : rows.stop]
            names = list(map(valid, rows))
            if self._ids is not None and table is not None:
                names = named(table[self._ids].to_pylist(), names)
            labels, reasons = (None, None)
            if self._label is not None and table is not None:
                labels, reasons = label_columns(table[self._label])
            yield entries(names, label=labels, label_error=reasons)

    def items_at(self, indices: Sequence[int], listed: pa.Table) -> Iterator[Item]:
        pictures = self._data.select_columns([self._column])
        rows = listed.select(["id", "label", "label_error"]).to_pylist()
        for index, entry in zip(indices, rows, strict=True):
            read = partial(_bytes_of, pictures[index][self._column], entry["id"], self._files)
            yield Item(entry["id"], index, f"#{index}", read, entry["label"], entry["label_error"])

    def stamps(self) -> Iterator[str]:
        yield self._fingerprint

    def anchor(self) -> Any:
        return [self._fingerprint, len(self), self._column, self._label, self._ids]


def load(spec: str) -> HuggingFace:
    """Returns `NAME`, `NAME:SPLIT` or `NAME:SPLIT@REVISION` of the Hub, or a folder that `save_to_disk` wrote.

    Raises:
        InputError: `datasets` is not installed, or has no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("source 'hf:…' needs datasets: pip install datasets") from error
    name, _, revision = spec.partition("@")
    name, _, split = name.partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except Exception as error:  # the Hub and its loaders may raise anything
        raise InputError(f"source 'hf:{spec}' must be a data set, got {type(error).__name__}: {error}") from error
    return HuggingFace(dataset)


def _bytes_of(value: Any, name: str, files: LocalFiles) -> bytes:
    value = value or {}
    if value.get("bytes"):
        return value["bytes"]
    if value.get("path"):
        return files.read(value["path"])
    raise ImageError(f"image {name!r} must have bytes or a path, got neither")
