"""Data sets of Hugging Face's `datasets`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from pyfast_xai.datasets.sources.files import read_file
from pyfast_xai.datasets.sources.item import Item, Source, unique
from pyfast_xai.errors import InputError
from pyfast_xai.images import ImageError


class HuggingFace(Source):
    """The images of a `datasets.Dataset`, taken as bytes and decoded here.

    Args:
        dataset: one split, not a streamed one.
        column: of the images; None for the first.
        label: column of the classes; None for `label` where there is one.
        ids: column of unique names; None for `id`, and numbers where there is none.

    Raises:
        InputError: no such column, or several splits.
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
        self._stamp = str(dataset._fingerprint)
        names = dataset.column_names
        ids = ids or ("id" if "id" in names else None)
        label = label or ("label" if "label" in names else None)
        self.ids = unique(map(str, dataset[ids] if ids else range(len(dataset))))
        self._labels = list(dataset[label]) if label else [None] * len(dataset)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        pictures = self._data.select_columns([self._column])
        for index in range(start, min(stop, len(self))):
            label = self._labels[index]
            read = partial(_read, pictures[index][self._column], self.ids[index])
            yield Item(self.ids[index], index, f"#{index}", read, label if isinstance(label, int) else None)

    def stamps(self) -> Iterator[str]:
        yield self._stamp


def load(spec: str) -> HuggingFace:
    """`NAME`, `NAME:SPLIT` or `NAME:SPLIT@REVISION` of the Hub, or a folder that `save_to_disk` wrote.

    Raises:
        InputError: `datasets` is not installed, or finds nothing.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("source 'hf:…' needs datasets: pip install datasets") from error
    name, _, revision = spec.partition("@")
    name, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except Exception as error:  # whatever the Hub and its loaders raise
        raise InputError(f"source 'hf:{spec}' must be a data set, got {type(error).__name__}: {error}") from error
    return HuggingFace(found)


def _read(value: Any, name: str) -> bytes:
    found = value or {}
    if found.get("bytes"):
        return found["bytes"]
    if found.get("path"):
        return read_file(found["path"])
    raise ImageError(f"image {name!r} must have bytes or a path, got neither")
