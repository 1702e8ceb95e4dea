"""Progress of a long run: a line that changes on a terminal, a line now and then elsewhere, and a log for machines."""

import contextlib
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.progress import TimeElapsedColumn

from pyfast_xai.cli.progress import Late

if TYPE_CHECKING:
    from pyfast_xai.datasets import RunProgress

EVERY = 30.0  # seconds between two lines if the output is no terminal


class Live:
    """Shows how far a run is while it works.

    Args:
        total: rows there are to be.
        before: rows that were there.
        errors: among them.
        log: a file that gets a line of JSON for each part, after what it holds; None for none.
        prometheus: a file that is rewritten after each part, in the text format of Prometheus; None for none.
    """

    def __init__(
        self,
        total: int,
        items_before: int = 0,
        errors: int = 0,
        log: Path | None = None,
        prometheus: Path | None = None,
    ) -> None:
        self._bar = Late(TimeElapsedColumn())
        self._console = self._bar.console
        self._task = self._bar.add_task("explaining", total=total, completed=items_before)
        self._total, self._items_before, self._errors = total, items_before, errors
        self._path, self._prometheus = log, prometheus
        self._log: TextIO | None = None
        self._shard: int | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> "Live":
        if self._path is not None:
            self._log = open(self._path, "a", encoding="utf-8")
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if self._log is not None:
            self._log.close()

    def __call__(self, progress: "RunProgress") -> None:
        line = self.line(progress)
        self._bar.update(self._task, completed=self._items_before + progress.images, description=line)
        if not self._console.is_terminal and time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
            self._console.print(f"{self._items_before + progress.images}/{self._total} {line}", soft_wrap=True)
        if progress.shard != self._shard:
            self._shard = progress.shard
            # A log on a full disk does not end the run.
            with contextlib.suppress(OSError):
                if self._log is not None:
                    self._log.write(json.dumps(self._record(progress)) + "\n")
                    self._log.flush()
                if self._prometheus is not None:
                    # Whole or not there, for whoever collects it at this moment.
                    temporary = self._prometheus.with_name(f".{self._prometheus.name}.tmp")
                    temporary.write_text(self.metrics(progress))
                    temporary.replace(self._prometheus)

    def line(self, progress: "RunProgress") -> str:
        """Returns the progress in a line for people."""
        speed = progress.images / progress.seconds if progress.seconds else 0.0
        waiting_share = progress.waiting / progress.seconds if progress.seconds else 0.0
        remaining = (self._total - self._items_before - progress.images) / speed if speed else 0.0
        return (
            f"{speed:.1f} images/s, {waiting_share:.0%} waiting for decoding, {self._errors + progress.errors} errors, "
            f"batch size {progress.batch_size}, {_duration(remaining)} left"
        )

    def metrics(self, progress: "RunProgress") -> str:
        """Returns the progress as text for Prometheus (the text file collector of its node exporter takes it)."""
        figures = {
            "items": ("gauge", "Inputs of the source.", self._total),
            "rows": ("gauge", "Rows in finished parts.", self._items_before + progress.rows),
            "error_rows": ("gauge", "Error rows among them.", self._errors + progress.errors),
            "images_total": ("counter", "Images that went through this process.", progress.images),
            "seconds_total": ("counter", "Seconds since this process began.", progress.seconds),
            "decode_wait_seconds_total": ("counter", "Seconds the model waited for decoding.", progress.waiting),
            "explain_seconds_total": ("counter", "Seconds in model and method.", progress.explaining),
            "write_wait_seconds_total": ("counter", "Seconds waiting for the part writer.", progress.writing),
            "batch_size": ("gauge", "Images at a time.", progress.batch_size),
        }
        lines = []
        for name, (kind, help_, value) in figures.items():
            lines += [
                f"# HELP pyfast_xai_{name} {help_}",
                f"# TYPE pyfast_xai_{name} {kind}",
                f"pyfast_xai_{name} {value}",
            ]
        return "\n".join(lines) + "\n"

    def _record(self, progress: "RunProgress") -> dict[str, Any]:
        speed = progress.images / progress.seconds if progress.seconds else 0.0
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "part": progress.shard,
            "rows": self._items_before + progress.rows,
            "errors": self._errors + progress.errors,
            "items": self._total,
            "images_per_second": round(speed, 3),
            "waiting_for_decoding": round(progress.waiting, 3),
            "explaining": round(progress.explaining, 3),
            "waiting_for_writing": round(progress.writing, 3),
            "seconds": round(progress.seconds, 3),
            "batch_size": progress.batch_size,
        }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
