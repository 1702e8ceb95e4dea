"""A bar on stderr for people who wait for a slow explainer, or calls of their own function."""

import sys
from typing import Any

from pyfast_xai.progress import Progress, ProgressCallback

ShowProgress = bool | ProgressCallback | None


class ProgressBar:
    """A bar on stderr, or calls of the user's function; rich is imported only where a bar is drawn.

    Args:
        show: True shows a bar, None shows one on a terminal; or a function that is called with a `Progress`.
        title: written in front of the bar.
        total: the number of steps.
        note: written behind the bar, a format of the details.
    """

    def __init__(self, show: ShowProgress, title: str, total: int, note: str = "") -> None:
        self._callback = show if callable(show) else None
        self._done, self._total, self._note = 0, total, note
        visible = sys.stderr.isatty() if show is None else bool(show) and self._callback is None
        self._bar = self._make() if visible else None
        self._task: Any = None if self._bar is None else self._bar.add_task(title, total=total, note="")

    def _make(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        title, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        return Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, steps: int = 1, **details: float) -> None:
        """Counts further steps as done, and shows the details."""
        self._done += steps
        if self._callback is not None:
            self._callback(Progress(self._done, self._total, details))
        elif self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note.format(**details))

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
