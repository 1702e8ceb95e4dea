"""A progress bar for people who wait."""

import threading
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)


class Bar:
    """A bar on a terminal's stderr, shown once a second has passed.

    Args:
        total: how many images there are.
        doing: what happens to them, written in front.
    """

    def __init__(self, total: int, doing: str) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._doing = doing
        self._task = self._bar.add_task(doing, total=total)
        self._late = threading.Timer(1.0, self._bar.start)
        self._late.daemon = True

    def __enter__(self) -> "Bar":
        self._late.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._late.cancel()
        self._late.join()
        if self._bar.live.is_started:
            self._bar.stop()

    def advance(self, images: int) -> None:
        self._bar.update(self._task, advance=images, description=self._doing)

    def within(self, method: str) -> Callable[..., None]:
        """What a slow explainer calls with its iteration, their number and whatever else it knows."""

        def tell(iteration: int, iterations: int, *_: object) -> None:
            self._bar.update(self._task, description=f"{self._doing}, {method} {iteration}/{iterations}")

        return tell


class Counter:
    """What is being done and how many images of it are, on a terminal's stderr.

    Args:
        title: written in front.
    """

    def __init__(self, title: str) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:.0f}"))
        self._line = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._title, self._doing = title, ""
        self._task = self._line.add_task(title, total=None)

    def __enter__(self) -> "Counter":
        self._line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.stop()

    def tell(self, doing: str, images: int) -> None:
        """So many more are done; another thing to do counts from zero."""
        if doing != self._doing:
            self._doing = doing
            self._line.reset(self._task, description=f"{self._title}: {doing}")
        self._line.update(self._task, advance=images)
