"""Judges every explainer on one small model of every family that people use, with random weights.

    python bench/zoo.py                 # what bench/data/zoo.csv has no verdict on; may be stopped and started again
    python bench/zoo.py --only timm/res # libraries and families by their beginning, anew
    python bench/zoo.py --table         # writes the table of docs/models.md
    python bench/zoo.py --count         # finds the smallest model of every family of timm, for a new release of it

Each model runs in a process of its own, for --seconds at most. Libraries that are not installed are left out.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "bench" / "data" / "zoo.csv"
PAGE = ROOT / "docs" / "models.md"
COLUMNS = ("library", "family", "model", "explainer", "verdict", "reason")
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


def read() -> list[dict[str, str]]:
    """Returns the verdicts on file."""
    if not ROWS.is_file():
        return []
    with ROWS.open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, str]]) -> None:
    """Writes the verdicts, in an order that does not depend on when they were found."""
    with ROWS.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(sorted(rows, key=lambda row: tuple(row[name] for name in COLUMNS[:4])))


def one_model(place: str, explainers: list[str], seconds: float) -> None:
    """Judges one model in this process, and prints a line for each verdict."""
    import warnings

    import conftest  # noqa: F401 lets torchvision import beside a CPU build of torch

    warnings.simplefilter("ignore")
    import torch
    from zoo_judge import judge
    from zoo_models import entries

    torch.set_num_threads(1)
    until = time.monotonic() + seconds
    (entry,) = [entry for entry in entries() if f"{entry.library}/{entry.family}/{entry.model}" == place]
    for verdict in judge(entry.build(), tuple(explainers), until):
        print("VERDICT", json.dumps(vars(verdict)), flush=True)


def run(only: str | None, seconds: float) -> None:
    """Judges what has no verdict, or all that `only` names."""
    from zoo_judge import EXPLAINERS
    from zoo_models import entries

    import conftest  # noqa: F401 as above

    known = read()
    todo = [entry for entry in entries() if only is None or f"{entry.library}/{entry.family}".startswith(only)]
    for number, entry in enumerate(todo):
        same = {"library": entry.library, "family": entry.family, "model": entry.model}
        actual = [row for row in known if all(row[name] == value for name, value in same.items())]
        known = [row for row in known if row not in actual]
        done = set() if only else {row["explainer"] for row in actual}
        missing = [name for name in EXPLAINERS if name not in done]
        if missing:
            print(f"{number + 1}/{len(todo)} {entry.library}/{entry.family}", end=" ", flush=True)
            result = _in_a_process(f"{entry.library}/{entry.family}/{entry.model}", missing, seconds)
            actual = [row for row in actual if row["explainer"] in done] + [{**same, **row} for row in result]
            print(dict(Counter(row["verdict"] for row in actual)), flush=True)
        known += actual
        write(known)


def _in_a_process(place: str, explainers: list[str], seconds: float) -> list[dict[str, str]]:
    command = [sys.executable, __file__, "--model", place, "--seconds", str(seconds), "--explainers", *explainers]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYFAST_XAI_TUNING": "off"}
    # A single explainer may take longer than is left; then the process is ended, and what it said stays.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=seconds * 1.5 + 60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
    result = [json.loads(line.removeprefix("VERDICT ")) for line in out.splitlines() if line.startswith("VERDICT ")]
    if process.returncode not in (0, -9):
        reason = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        left = next(name for name in explainers if name not in {row["explainer"] for row in result})
        place = left if result else "the model itself"
        result.append({"explainer": place, "verdict": "failed", "reason": reason[:200]})
    return result


def table() -> None:
    """Puts the table of what is served into docs/models.md."""
    rows = read()
    reasons: dict[str, int] = {}
    by_model: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_model[row["library"], row["family"], row["model"]].append(row)
    lines = ["| library | family | model | served | not applicable | refused or failed |", "|---|---|---|---|---|---|"]
    for (library, family, model), item in sorted(by_model.items()):
        sorts = defaultdict(list)
        for row in item:
            sorts[row["verdict"]].append(row["explainer"])
        trouble = defaultdict(list)
        for row in item:
            if row["verdict"] not in ("served", "not applicable"):
                text = f"{row['verdict']}: {row['reason']}".replace("|", "\\|").replace("<", "&lt;")
                trouble[reasons.setdefault(text, len(reasons) + 1)].append(row["explainer"])
        shown = "; ".join(f"{', '.join(names)} ({number})" for number, names in trouble.items())
        cells = (
            library,
            family,
            model,
            len(sorts["served"]),
            ", ".join(sorts["not applicable"]) or "none",
            shown or "none",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"{number}. {text}" for text, number in reasons.items())]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="beginning of library/family")
    parser.add_argument("--seconds", type=float, default=600, help="for a model")
    parser.add_argument("--table", action="store_true", help="write the table of docs/models.md")
    parser.add_argument("--count", action="store_true", help="count the parameters of timm's models")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--explainers", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    if given.model:
        one_model(given.model, given.explainers, given.seconds)
    elif given.table:
        table()
    elif given.count:
        from zoo_models import count_timm

        count_timm()
    else:
        run(given.only, given.seconds)
