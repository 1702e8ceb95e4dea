"""A progress bar for people who wait."""

import threading
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from pyfast_xai.progress import Progress, ProgressCallback


class Late(rich_progress.Progress):
    """A line with a bar on a terminal's stderr, shown once a second has passed; none elsewhere.

    Args:
        time: what the line ends with.
    """

    def __init__(self, time: ProgressColumn) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time)
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._late = threading.Timer(1.0, self.start)
        self._late.daemon = True

    def __enter__(self) -> "Late":
        self._late.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._late.cancel()
        self._late.join()
        if self.live.is_started:
            self.stop()


class Bar:
    """A bar on a terminal's stderr, shown once a second has passed.

    Args:
        total: how many images there are.
        doing: what happens to them, written in front.
    """

    def __init__(self, total: int, activity: str) -> None:
        self._bar = Late(TimeRemainingColumn())
        self._activity = activity
        self._task = self._bar.add_task(activity, total=total)

    def __enter__(self) -> "Bar":
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def advance(self, images: int) -> None:
        self._bar.update(self._task, advance=images, description=self._activity)

    def show(self, progress: Progress) -> None:
        """Show how far a function is, as its callback."""
        self._bar.update(self._task, completed=progress.done, total=progress.total, description=self._activity)

    def callback(self, method: str) -> ProgressCallback:
        """Returns what a slow explainer calls with its progress."""

        def show(progress: Progress) -> None:
            self._bar.update(self._task, description=f"{self._activity}, {method} {progress.done}/{progress.total}")

        return show


class Counter:
    """Shows the current task and the number of images done, on a terminal's stderr.

    Args:
        title: written in front.
    """

    def __init__(self, title: str) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:.0f}"))
        self._line = rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._title, self._activity = title, ""
        self._task = self._line.add_task(title, total=None)

    def __enter__(self) -> "Counter":
        self._line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.stop()

    def update(self, activity: str, images: int) -> None:
        """Adds images to those done; another task counts from zero."""
        if activity != self._activity:
            self._activity = activity
            self._line.reset(self._task, description=f"{self._title}: {activity}")
        self._line.update(self._task, advance=images)
