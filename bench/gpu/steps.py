"""A step is a command with a time limit: what crashes or hangs costs its own rows and no others'."""

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TAIL = 12  # lines of a failed step that are shown


@dataclass
class Outcome:
    """How a step ended.

    Attributes:
        name: of the step.
        state: "done", "failed", "timed out", "skipped" (no time was left), "unavailable" (what it needs is not there).
        seconds: it took.
        detail: why, where it is not done.
    """

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.state in ("failed", "timed out")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Rows:
    """Measurements of a step, each on disk as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # cut by a crash
                continue
        return rows


def run(name: str, command: list[str], limit: float, log: Path, environment: dict[str, str], cwd: Path) -> Outcome:
    """Run a command for at most `limit` seconds; what it prints goes to `log`.

    Args:
        name: of the step.
        command: program and arguments.
        limit: seconds, after which it is ended with all that it started.
        log: file for its output.
        environment: variables on top of this process's own.
        cwd: folder to run in.
    """
    if limit < 1:
        return Outcome(name, "skipped", detail="no time was left")
    start = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(name, "unavailable", detail=str(error))
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its children are killed too: a hanging compiler, a sanitizer.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(name, "timed out", seconds, f"after {limit:.0f} s; " + tail(log))
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(name, "failed", seconds, f"{how}; " + tail(log))
    return Outcome(name, "done", seconds)


def tail(log: Path, lines: int = TAIL) -> str:
    """The end of what a step printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
