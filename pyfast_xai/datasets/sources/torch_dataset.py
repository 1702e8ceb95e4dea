"""A map-style `torch.utils.data.Dataset`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from pyfast_xai.datasets.sources.entries import digested, distinct, entries, rechunked
from pyfast_xai.datasets.sources.item import Item, Labelled, StreamedSource, valid
from pyfast_xai.errors import InputError
from pyfast_xai.forks import ForkSafeLock

_BLOCK = 4096


class TorchDataset(StreamedSource):
    """Anything with a length that gives an image, or a tuple of an image and its class, for an index.

    An image is a PIL image or a uint8 tensor `[3, H, W]`, which go through the preprocessing of the model, or a
    floating-point tensor `[C, H, W]`, which is the input of the model as it is.

    Args:
        dataset: the same at every opening, and in every order in which it is read.
        ids: of its entries; None numbers them.
        version: what tells one content of it from another; nothing else does.
        concurrent: several threads may read it at a time.

    Raises:
        InputError: no length, or another number of ids.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import datasets
        >>> pairs = [(Image.new("RGB", (96, 96)), 3)]
        >>> [item.id for item in datasets.TorchDataset(pairs).items(0, 1)]
        ['0']
    """

    kind = "torch"

    def __init__(
        self, dataset: Any, ids: Sequence[str] | None = None, version: str = "", concurrent: bool = False
    ) -> None:
        try:
            self._count = len(dataset)
        except TypeError as error:
            raise InputError(f"source must have a length, got a {type(dataset).__name__} without") from error
        if ids is not None and len(ids) != self._count:
            raise InputError(f"ids must be one for each of {self._count} entries, got {len(ids)}")
        self._dataset, self._names, self._version = dataset, ids, version
        self._lock = None if concurrent else ForkSafeLock()

    def __len__(self) -> int:
        return self._count

    def entries(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, self._count, _BLOCK):
            block = range(start, min(start + _BLOCK, self._count))
            names = block if self._names is None else self._names[start : block.stop]
            yield entries([valid(name) for name in names])

    def items_at(self, indices: Sequence[int], listed: pa.Table) -> Iterator[Item]:
        for index, name in zip(indices, listed["id"].to_pylist(), strict=True):
            yield Item(name, index, f"#{index}", partial(self._read, index))

    def stamps(self) -> Iterator[str]:
        yield self._version

    def anchor(self) -> Any:
        names = None
        if self._names is not None:
            names = digested(self.kind, rechunked(distinct(self.entries)), ()).ids
        return [self._count, self._version, names]

    def _read(self, index: int) -> Any:
        if self._lock is None:
            entry = self._dataset[index]
        else:
            with self._lock:
                entry = self._dataset[index]
        if not isinstance(entry, (tuple, list)):
            return entry
        return Labelled(entry[0], entry[1] if len(entry) > 1 else None)
