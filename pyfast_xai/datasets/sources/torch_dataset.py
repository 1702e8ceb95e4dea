"""A map-style `torch.utils.data.Dataset`."""

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from pyfast_xai.datasets.sources.item import Item, Labelled, Source, unique
from pyfast_xai.errors import InputError


class TorchDataset(Source):
    """Anything with a length that gives an image, or a tuple of an image and its class, for an index.

    An image is a PIL image or a uint8 tensor `[3, H, W]`, which go through the preprocessing of the model, or a
    floating-point tensor `[C, H, W]`, which is the input of the model as it is.

    Args:
        dataset: the same at every opening, and in every order it is asked in.
        ids: of its entries; None numbers them.
        version: what tells one content of it from another; there is nothing else to tell by.
        concurrent: it may be asked by several threads at a time.

    Raises:
        InputError: no length, or another number of ids.
    """

    kind = "torch"

    def __init__(
        self, dataset: Any, ids: Sequence[str] | None = None, version: str = "", concurrent: bool = False
    ) -> None:
        try:
            count = len(dataset)
        except TypeError as error:
            raise InputError(f"source must have a length, got a {type(dataset).__name__} without") from error
        if ids is not None and len(ids) != count:
            raise InputError(f"ids must be one for each of {count} entries, got {len(ids)}")
        self._dataset, self._version = dataset, version
        self._lock = None if concurrent else threading.Lock()
        self.ids = unique(map(str, range(count) if ids is None else ids))

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for index in range(start, min(stop, len(self))):
            yield Item(self.ids[index], index, f"#{index}", partial(self._read, index))

    def stamps(self) -> Iterator[str]:
        yield self._version

    def _read(self, index: int) -> Any:
        if self._lock is None:
            entry = self._dataset[index]
        else:
            with self._lock:
                entry = self._dataset[index]
        if not isinstance(entry, (tuple, list)):
            return entry
        label = entry[1] if len(entry) > 1 else None
        try:
            return Labelled(entry[0], None if label is None else int(label))
        except (TypeError, ValueError, RuntimeError):  # boxes and the like
            return Labelled(entry[0], None)
