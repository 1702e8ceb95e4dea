"""Draws what `make bench` appended to bench/data/cpu.csv, and writes its tables into docs/performance.md.

`make bench-report`. Of rows that measure the same the last counts. What stands between the two marks of the document is
written anew; the rest is by hand.
"""

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DATA, DOCUMENT = ROOT / "bench/data/cpu.csv", ROOT / "docs/performance.md"
BEGIN, END = "<!-- measured: by bench/report.py -->", "<!-- end -->"
OURS = ("cpp", "numba", "reference")

Row = dict[str, Any]


def latest() -> list[Row]:
    """The last row of each network, batch, method, backend and number of threads."""
    kept: dict[tuple[str, ...], Row] = {}
    with DATA.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("network", "batch", "method", "backend", "threads"))
            kept.pop(key, None)
            kept[key] = row
    return list(kept.values())


def costs(rows: list[Row], batch: str) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Networks, methods with their maker, and the row of each pair."""
    own = [row for row in rows if row["batch"] == batch]
    cells = {(row["network"], _named(row)): row for row in own}
    networks = list(dict.fromkeys(row["network"] for row in own))
    methods = sorted({_named(row) for row in own}, key=lambda name: (name.split(" of ")[0], " of " in name))
    return networks, methods, cells


def _named(row: Row) -> str:
    return row["method"] if row["backend"] in OURS else f"{row['method']} of {row['backend']}"


def table(rows: list[Row], batch: str) -> str:
    """Cost in forwards, a row a method."""
    networks, methods, cells = costs(rows, batch)
    lines = [["method", *networks], ["---"] * (len(networks) + 1)]
    for method in methods:
        found = [cells.get((network, method)) for network in networks]
        lines.append([method, *("" if row is None else f"{float(row['forwards']):.2f}" for row in found)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bars(rows: list[Row], batch: str) -> Figure:
    """Cost of ours beside that of peers, with the spread between a fifth and four fifths of the rounds."""
    networks, methods, cells = costs(rows, batch)
    shown = [name for name in methods if "loop" not in name]
    figure = Figure(figsize=(1.6 + 1.9 * len(networks), 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(shown)
    for i, method in enumerate(shown):
        places, heights, spread = [], [], [[], []]
        for j, network in enumerate(networks):
            row = cells.get((network, method))
            if row is not None:
                value = float(row["forwards"])
                places.append(j + (i - len(shown) / 2 + 0.5) * width)
                heights.append(value)
                spread[0].append(max(0.0, value - float(row["low"])))
                spread[1].append(max(0.0, float(row["high"]) - value))
        peer = " of " in method
        axes.bar(
            places, heights, width, yerr=spread, label=method, hatch="//" if peer else None, alpha=0.6 if peer else 1
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("forward passes of the model")
    axes.set_title(f"cost of an explanation, batch {batch}; hatched: peers", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    return figure


def growth(rows: list[Row], network: str) -> Figure | None:
    """Cost by batch; None where one batch was measured only."""
    own = [row for row in rows if row["network"] == network and "loop" not in row["backend"]]
    if len({row["batch"] for row in own}) < 2:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(map(_named, own)):
        line = sorted((int(row["batch"]), float(row["forwards"])) for row in own if _named(row) == method)
        axes.plot(*zip(*line, strict=True), marker="o", label=method, linestyle="--" if " of " in method else "-")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images at a time")
    axes.set_ylabel("forward passes of the model")
    axes.set_title(network, fontsize=10)
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    rows = latest()
    parts = []
    for batch in sorted({row["batch"] for row in rows}, key=int):
        own = [row for row in rows if row["batch"] == batch and "loop" not in row["backend"]]
        if not own:
            continue
        where = {f"{row['cpu']}, {row['threads']} threads, torch {row['torch']}, {row['date']}" for row in own}
        parts += [f"Batch {batch} ({'; '.join(sorted(where))}):", table(own, batch)]
        name = f"performance-batch-{batch}.png"
        bars(own, batch).savefig(DOCUMENT.parent / name, dpi=120)
        parts.append(f"![cost of explanations, batch {batch}]({name})")
    figure = growth(rows, "resnet50")
    if figure is not None:
        figure.savefig(DOCUMENT.parent / "performance-growth.png", dpi=120)
        parts.append("![cost by batch](performance-growth.png)")
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCUMENT.write_text("\n\n".join([head + BEGIN, *parts, END]) + tail)


if __name__ == "__main__":
    main()
