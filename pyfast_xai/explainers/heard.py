"""What the model answered while it was explained, for those who want both from one forward pass."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

_thread = threading.local()


@dataclass
class Heard:
    """Some images, and what the model returned for them.

    Attributes:
        images: `[N, C, H, W]`.
        logits: outputs of the first whole forward pass of these very images; None while there was none.
    """

    images: Tensor
    logits: Tensor | None = None


@contextlib.contextmanager
def hearing(images: Tensor) -> Iterator[Heard]:
    """Hear what explainers that are called on this thread find the model to return for images."""
    before, _thread.heard = getattr(_thread, "heard", None), Heard(images)
    try:
        yield _thread.heard
    finally:
        _thread.heard = before


def waiting(images: Tensor) -> Heard | None:
    """Who waits to hear about these very images; None where nobody does."""
    heard: Heard | None = getattr(_thread, "heard", None)
    if heard is None or heard.logits is not None:
        return None
    same = images.shape == heard.images.shape and images.data_ptr() == heard.images.data_ptr()
    return heard if same else None
