"""The progress of a slow explainer: a bar for people, or numbers for a program."""

import sys
from collections.abc import Callable
from typing import Any

Told = bool | Callable[[int, int], None] | None


class Progress:
    """A bar on stderr, or the caller's own function; rich is imported where a bar is drawn only.

    Args:
        told: True shows a bar, None does on a terminal; or a function called with (done, total, *more).
        doing: written in front of the bar.
        total: how much there is to do.
        note: written behind the bar, a format of what more there is to tell.
    """

    def __init__(self, told: bool | Callable[..., None] | None, doing: str, total: int, note: str = "") -> None:
        self._told = told if callable(told) else None
        self._done, self._total, self._note = 0, total, note
        wanted = sys.stderr.isatty() if told is None else bool(told) and self._told is None
        self._bar = self._make() if wanted else None
        self._task: Any = None if self._bar is None else self._bar.add_task(doing, total=total, note="")

    def _make(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        doing, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        columns = (doing, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        return Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, by: int = 1, *more: float) -> None:
        """Adds to the work done; `more` is passed on to the callback."""
        self._done += by
        if self._told is not None:
            self._told(self._done, self._total, *more)
        elif self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note.format(*more))

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
