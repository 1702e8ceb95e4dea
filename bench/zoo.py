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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "bench" / "data" / "zoo.csv"
PAGE = ROOT / "docs" / "models.md"
COLUMNS = ("library", "family", "model", "explainer", "verdict", "reason")
WRITE_EACH = 10  # seconds, between two times that the verdicts on one model are written
TROUBLE = ("refused", "wrong", "failed")
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
        others = [row for row in read() if any(row[name] != value for name, value in same.items())]
        result: list[dict[str, str]] = []
        written = begin
        for row in _in_a_process(entry, missing, seconds):
            result.append({**same, **row})
            if time.monotonic() - written > WRITE_EACH:
                written = time.monotonic()
                write([*others, *known, *result])
        print(dict(Counter(row["verdict"] for row in result)), f"{time.monotonic() - begin:.0f} s", flush=True)
        write([*others, *known, *result])


def _in_a_process(entry: Any, explainers: list[str], seconds: float) -> Iterator[dict[str, str]]:
    """Yields the verdicts on a model that is judged in a process of its own, which a crash or a hang ends alone."""
    fork = multiprocessing.get_context("fork")
    results, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_judged, args=(entry, tuple(explainers), seconds, sender))
    process.start()
    sender.close()
    judged: list[str] = []
    with contextlib.suppress(EOFError):
        while results.poll(20 * seconds + 300):
            row = results.recv()
            judged.append(row["explainer"])
            yield row
    process.kill()
    process.join()
    if len(judged) < len(explainers) and "the model itself" not in judged:
        place = explainers[len(judged)]
        yield {"explainer": place, "verdict": "failed", "reason": f"the process ended with {process.exitcode}"}


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
    """Puts the tables of what is served into docs/models.md: families with the same verdicts share a line."""
    by_model: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    by_explainer: dict[str, Counter[str]] = defaultdict(Counter)
    for row in read():
        by_model[row["library"], row["family"]][row["explainer"]] = row
        by_explainer[row["explainer"]][row["verdict"]] += 1
    lines = [_summary(by_model, len(by_explainer)), "", *_families(by_model), "", *_explainers(by_explainer)]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


def _summary(by_model: dict[tuple[str, str], dict[str, dict[str, str]]], explainers: int) -> str:
    counted = Counter(row["verdict"] for rows in by_model.values() for row in rows.values())
    tried = sum(counted.values()) - counted["not tried"]
    kinds = ", ".join(f"{counted[name]} {name}" for name in (*TROUBLE, "not applicable") if counted[name])
    pairs = len(by_model) * explainers
    return (
        f"{len(by_model)} families with {explainers - 1} explainers and the model itself are {pairs} pairs. {tried} "
        f"of them were tried: {counted['served']} served, {kinds}."
    )


def _families(by_model: dict[tuple[str, str], dict[str, dict[str, str]]]) -> list[str]:
    """Returns the table of families; each cell of its last column is a refusal with its reason."""
    alike: dict[tuple[str, str, str], list[tuple[str, int, int]]] = defaultdict(list)
    for (library, family), rows in sorted(by_model.items()):
        verdicts = {name: row for name, row in sorted(rows.items()) if row["verdict"] != "not tried"}
        foreign = ", ".join(name for name, row in verdicts.items() if row["verdict"] == "not applicable") or "none"
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, row in verdicts.items():
            if row["verdict"] in TROUBLE:
                text = row["reason"].removeprefix(f"{name}: ").replace("|", "\\|").replace("<", "&lt;")
                reasons[f"{row['verdict']}: {text}"].append(name)
        shown = "<br>".join(f"{', '.join(names)} {text}" for text, names in reasons.items()) or "none"
        served = sum(row["verdict"] == "served" for row in verdicts.values())
        alike[library, foreign, shown].append((family, served, len(verdicts)))
    lines = [
        "| library | families | served | tried | not made for them | refused, wrong or failed |",
        "|---|---|---|---|---|---|",
    ]
    for (library, foreign, shown), families in sorted(alike.items(), key=lambda item: (item[0][0], item[1][0])):
        names, served, tried = zip(*families, strict=True)
        lines.append(f"| {library} | {', '.join(names)} | {_span(served)} | {_span(tried)} | {foreign} | {shown} |")
    return lines


def _explainers(by_explainer: dict[str, Counter[str]]) -> list[str]:
    """Returns the table of explainers; those with the same numbers share a line."""
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, counted in sorted(by_explainer.items()):
        trouble = sum(counted[verdict] for verdict in TROUBLE)
        alike[counted["served"], counted["not applicable"], trouble].append(name)
    lines = ["| explainers | families served | not made for | refused, wrong or failed |", "|---|---|---|---|"]
    for numbers, names in sorted(alike.items(), reverse=True):
        lines.append(f"| {', '.join(names)} | {' | '.join(map(str, numbers))} |")
    return lines


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
