"""A cache of facts about a model, valid for as long as the model does not change."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from pyfast_xai.acceleration.cache_key import cache_key
from pyfast_xai.acceleration.freshness import Snapshot

if TYPE_CHECKING:
    from pyfast_xai.explainers.common.explainer import Explainer

Entry = TypeVar("Entry")

_MOST_ENTRIES = 256


class ModelCache(Generic[Entry]):
    """Keeps an entry for each kind of input of a model: shape of the images, further arguments, settings of PyTorch.

    All entries go when a module, an attribute, a hook or a function of the model is not what it was. Where that cannot
    be seen, nothing is kept. Numbers of weights are not looked at: entries say where layers are.

    Args:
        explainer: whose model it is.
        make: makes the entry of inputs that were not there before.
    """

    def __init__(self, explainer: "Explainer", make: Callable[[], Entry]) -> None:
        self._explainer, self._make = explainer, make
        self._entries: dict[Hashable, Entry] = {}
        self._snapshot: Snapshot | None = None

    @contextmanager
    def entry(self, images: Tensor, args: Any, kwargs: Any, settings: Hashable = None) -> Iterator[Entry]:
        """Yields the entry of some inputs, which may be filled in place, for calls of the model.

        What the model itself changes in these calls is no change.

        Args:
            images: `[N, C, H, W]`.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.
            settings: settings of the explainer, on which the entry depends, too.
        """
        entries = self._fresh_entries()
        key = None if entries is None else cache_key((one_of_batch(images, args, kwargs), *args), kwargs)
        if entries is None or key is None:
            yield self._make()
            return
        if len(entries) >= _MOST_ENTRIES:
            entries.clear()
        try:
            yield entries.setdefault((key, settings), self._make())
        finally:
            assert self._snapshot is not None
            self._snapshot = self._snapshot.refreshed(values=False)

    def _fresh_entries(self) -> dict[Hashable, Entry] | None:
        """Returns the entries of the current model; None if its changes cannot be seen."""
        model, snapshot = self._explainer.model, self._snapshot
        if snapshot is None or snapshot.model is not model or not (snapshot.unproven or snapshot.is_current()):
            snapshot = Snapshot(model, weights=False)
            self._snapshot, self._entries = snapshot, {}
        return self._entries if snapshot.unproven is None else None

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to another model, and addresses mean nothing in another process.
        return {**vars(self), "_entries": {}, "_snapshot": None}


def one_of_batch(images: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Returns the first image, for a forward that only looks at the model; all where arguments may go with them."""
    return images if args or kwargs else images[:1]
