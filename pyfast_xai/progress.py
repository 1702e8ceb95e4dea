"""The progress of slow work, with which its callback is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """The progress of slow work.

    Attributes:
        done: steps, images or rows that are done.
        total: how many there are.
        details: further figures by name, as the mean "score" of FGVis.
    """

    done: int
    total: int
    details: Mapping[str, float] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]
