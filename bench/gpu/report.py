"""What was found, as JSON for programs, CSV for `bench/data/gpu.csv`, and a page for people."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from gpu.goals import Goal
from gpu.steps import Outcome

COLUMNS = (
    *("date", "commit", "device", "torch", "triton", "kind", "name", "network", "batch", "shape", "dtype", "backend"),
    *("median_ms", "low_ms", "high_ms", "rounds", "forward_ms", "forwards", "low", "high", "bytes", "operations"),
    *("share", "of", "ratio", "right", "value", "unit", "note", "error"),
)


Row = dict[str, Any]


def write(out: Path, facts: Row, outcomes: list[Outcome], rows: list[Row], goals: list[Goal]) -> None:
    """Write `gpu.json` and `gpu.csv`; a crash leaves those of the step before.

    Args:
        out: folder.
        facts: device, versions, commit, date.
        outcomes: of the steps so far.
        rows: measured so far.
        goals: by these rows.
    """
    steps = [outcome.as_dict() for outcome in outcomes]
    contents = {**facts, "steps": steps, "goals": [goal.as_dict() for goal in goals], "rows": rows}
    partial = out / "gpu.json.partial"
    partial.write_text(json.dumps(contents, indent=1))
    os.replace(partial, out / "gpu.json")
    versions = facts.get("versions", {})
    common = {"date": facts["date"], "commit": facts["commit"], "device": facts.get("device", {}).get("name", "")}
    common |= {"torch": versions.get("torch", ""), "triton": versions.get("triton", "")}
    partial = out / "gpu.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    os.replace(partial, out / "gpu.csv")


def _cell(value: Any, width: int) -> str:
    """A cell of a table: numbers to the right, with three digits."""
    if value is None or isinstance(value, float):
        return ("" if value is None else f"{value:.3g}").rjust(width)
    return str(value).ljust(width)


OP = {"name": 18, "shape": 36, "dtype": 9, "backend": 17, "median_ms": 9, "share": 7, "ratio": 7, "right": 5}
EXPLAINER = {"name": 16, "network": 12, "dtype": 9, "backend": 17, "forwards": 9, "median_ms": 9, "forward_ms": 10}


def _table(kind: str, columns: dict[str, int], rows: list[Row]) -> list[str]:
    lines = ["", " ".join(_cell(name, width) for name, width in columns.items())]
    for row in rows:
        if row["kind"] == kind:
            cells = " ".join(_cell(row.get(name), width) for name, width in columns.items())
            lines.append(f"{cells} {row.get('error', '')[:80]}".rstrip())
    return lines


def summary(facts: Row, outcomes: list[Outcome], rows: list[Row], goals: list[Goal]) -> str:
    """The page for people, the most important last."""
    lines = [f"{facts.get('device', {}).get('name', 'no device')}, commit {facts['commit']}, {facts['date']}"]
    lines.append(", ".join(f"{name} {item}" for name, item in facts.get("versions", {}).items()))
    lines += [f"{row['name']}: {row['value']:.3g} {row['unit']}" for row in rows if row["kind"] == "ceiling"]
    lines += _table("op", OP, rows) + _table("explainer", EXPLAINER, rows) + ["", "steps"]
    for outcome in outcomes:
        last = outcome.detail.strip().splitlines()[-1:] if outcome.detail else []
        lines.append(f"  {outcome.state:11} {outcome.seconds:6.1f} s  {outcome.name}{': ' + last[0] if last else ''}")
    lines += ["", "goals"]
    words = {True: "reached", False: "MISSED", None: "not measured"}
    lines += [f"  {words[goal.reached]:12} {_cell(goal.value, 8)}  {goal.name} ({goal.wanted})" for goal in goals]
    return "\n".join(lines)
