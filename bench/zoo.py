"""Judges every explainer on one small model of every family that people use, with random weights.

    python bench/zoo.py                 # what bench/data/zoo.csv has no verdict on; may be stopped and started again
    python bench/zoo.py --only timm/res # libraries and families by their beginning
    python bench/zoo.py --again --only timm/res --explainers lrp # anew what has a verdict
    python bench/zoo.py --table         # writes the table of docs/models.md
    python bench/zoo.py --count         # finds the smallest model of every family of timm, for a new release of it

Each model runs in a process of its own, and each explainer for --seconds of CPU time at most. Libraries that are not
installed are left out.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

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


def run(only: tuple[str, ...], explainers: list[str], seconds: float, again: bool) -> None:
    """Judges what has no verdict yet, or all of it again."""
    import torch
    from zoo_models import entries

    import conftest  # noqa: F401 lets torchvision import beside a CPU build of torch

    torch.set_num_threads(1)
    todo = [entry for entry in entries() if f"{entry.library}/{entry.family}".startswith(only)]
    for number, entry in enumerate(todo):
        same = {"library": entry.library, "family": entry.family, "model": entry.model}
        known = [row for row in read() if all(row[name] == value for name, value in same.items())]
        known = [row for row in known if row["explainer"] not in explainers] if again else known
        done = {row["explainer"] for row in known}
        missing = [name for name in explainers if name not in done]
        if not missing:
            continue
        print(f"{number + 1}/{len(todo)} {entry.library}/{entry.family}", end=" ", flush=True)
        begin = time.monotonic()
        result = [{**same, **row} for row in _in_a_process(entry, missing, seconds)]
        print(dict(Counter(row["verdict"] for row in result)), f"{time.monotonic() - begin:.0f} s", flush=True)
        others = [row for row in read() if any(row[name] != value for name, value in same.items())]
        write([*others, *known, *result])


def _in_a_process(entry: Any, explainers: list[str], seconds: float) -> list[dict[str, str]]:
    """Returns the verdicts on a model that is judged in a process of its own, which a crash or a hang ends alone."""
    fork = multiprocessing.get_context("fork")
    results, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_judged, args=(entry, tuple(explainers), seconds, sender))
    process.start()
    sender.close()
    rows: list[dict[str, str]] = []
    with contextlib.suppress(EOFError):
        while results.poll(20 * seconds + 300):
            rows.append(results.recv())
    process.kill()
    process.join()
    if len(rows) < len(explainers) and not any(row["explainer"] == "the model itself" for row in rows):
        place = explainers[len(rows)]
        rows.append({"explainer": place, "verdict": "failed", "reason": f"the process ended with {process.exitcode}"})
    return rows


def _judged(entry: Any, explainers: tuple[str, ...], seconds: float, sender: Any) -> None:
    """Sends the verdicts on a model."""
    import warnings

    from zoo_judge import MODEL, judge

    warnings.simplefilter("ignore")
    with sender:
        try:
            specimen = entry.build()
        except Exception as error:  # the verdict is what is looked for
            sender.send({"explainer": MODEL, "verdict": "failed", "reason": f"{type(error).__name__}: {error}"[:200]})
            return
        for verdict in judge(specimen, explainers, seconds):
            sender.send(vars(verdict))


def table() -> None:
    """Puts the table of what is served into docs/models.md: families with the same verdicts share a line."""
    by_model: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in read():
        by_model[row["library"], row["family"]][row["explainer"]] = row
    explainers = {name for rows in by_model.values() for name in rows}
    reasons: dict[str, int] = {}
    alike: dict[tuple[str, str, str], list[tuple[str, int, int]]] = defaultdict(list)
    for (library, family), rows in sorted(by_model.items()):
        sorts: dict[str, list[str]] = defaultdict(list)
        trouble: dict[int, list[str]] = defaultdict(list)
        for name, row in sorted(rows.items()):
            sorts[row["verdict"]].append(name)
            if row["verdict"] in ("refused", "wrong", "failed"):
                text = f"{row['verdict']}: {row['reason']}".replace("|", "\\|").replace("<", "&lt;")
                trouble[reasons.setdefault(text, len(reasons) + 1)].append(name)
        foreign = ", ".join(sorts["not applicable"]) or "none"
        shown = "; ".join(f"{', '.join(names)} ({number})" for number, names in trouble.items()) or "none"
        served = len(sorts["served"])
        untried = len(explainers) - len(rows) + len(sorts["not tried"])
        alike[library, foreign, shown].append((family, served, untried))
    counted = Counter(row["verdict"] for rows in by_model.values() for row in rows.values())
    lines = [
        f"{len(by_model)} families: {', '.join(f'{count} cells {name}' for name, count in counted.most_common())}.",
        "",
        "| library | families | served | not tried | not applicable | refused, wrong or failed |",
        "|---|---|---|---|---|---|",
    ]
    for (library, foreign, shown), families in sorted(alike.items(), key=lambda item: (item[0][0], item[1][0])):
        names, served, untried = zip(*families, strict=True)
        lines.append(f"| {library} | {', '.join(names)} | {_span(served)} | {_span(untried)} | {foreign} | {shown} |")
    lines += ["", *(f"{number}. {text}" for text, number in reasons.items())]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


def _span(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of library/family")
    parser.add_argument("--again", action="store_true", help="judge anew what has a verdict")
    parser.add_argument("--explainers", nargs="*", help="these alone")
    parser.add_argument("--seconds", type=float, default=20, help="of CPU time for an explainer and a model")
    parser.add_argument("--table", action="store_true", help="write the table of docs/models.md")
    parser.add_argument("--count", action="store_true", help="count the parameters of timm's models")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    os.environ.update(OMP_NUM_THREADS="1", PYFAST_XAI_TUNING="off")
    if given.table:
        table()
    elif given.count:
        from zoo_models import count_timm

        count_timm()
    else:
        from zoo_judge import EXPLAINERS

        run(tuple(given.only), given.explainers or list(EXPLAINERS), given.seconds, given.again)
