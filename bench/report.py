"""Draws what the benchmarks appended to bench/data, and writes its tables into docs/performance.md and README.md.

`make bench-report`. Of rows that measure the same the last counts. What stands between the two marks of a document is
written anew; the rest is by hand.
"""

import csv
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import measured
import quick
from matplotlib import colormaps
from matplotlib.figure import Figure
from measured import Row, table

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: by bench/report.py -->", "<!-- end -->"
OURS = ("cpp", "numba", "reference")
FASTER = ", accelerated"
PEERS = {
    "Saliency": "Captum: Saliency",
    "GuidedBackprop": "Captum: GuidedBackprop",
    "GradCAM": "pytorch-grad-cam: GradCAM",
    "EigenCAM": "pytorch-grad-cam: EigenCAM",
}
SHADES = {"forward": "tab:gray", "pyfast_xai": "tab:blue", "captum": "tab:orange"}


def costs(rows: list[Row], batch: str) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Networks, methods with their maker, and the row of each pair."""
    actual = [row for row in rows if row["batch"] == batch]
    cells = {(row["network"], _named(row)): row for row in actual}
    networks = list(dict.fromkeys(row["network"] for row in actual))
    named = {_named(row).removesuffix(FASTER) for row in actual}
    methods = sorted(named, key=lambda name: (name.split(" of ")[0], " of " in name))
    return networks, methods, cells


def _named(row: Row) -> str:
    return row["method"] if row["backend"] in OURS else f"{row['method']} of {row['backend']}"


def _where(rows: Iterable[Row]) -> str:
    result = set()
    for row in rows:
        threads = f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"
        result.add(
            f"{row['cpu']}, {row['instruction_set']}, {threads}, torch {row['torch']}{_freed(row)}, {row['date']}"
        )
    return "; ".join(sorted(result))


def _loads(rows: Iterable[Row]) -> str:
    """The load of the machine while they were measured."""
    loads = [float(row["load"]) for row in rows]
    return f"{min(loads):.0f} to {max(loads):.0f}"


def _freed(row: Row) -> str:
    return f", freed memory {row['freed']}" if row.get("freed") else ""


def cost_table(rows: list[Row], batch: str) -> str:
    """Cost in forwards, a row a method; after the slash that of replays."""
    networks, methods, cells = costs(rows, batch)

    def cell(network: str, method: str) -> str:
        result = [cells.get((network, name)) for name in (method, method + FASTER)]
        return " / ".join(f"{float(row['forwards']):.2f}" for row in result if row is not None)

    body = [[method, *(cell(network, method) for network in networks)] for method in methods]
    return table([["method", *networks], *body])


def goal_table(rows: list[Row], quotients: Collection[str] = (quick.FASTER, quick.OF_PEER)) -> str:
    """What was measured for the goals, a row an explainer or class: recorded / the faster of recorded and replayed."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    cells = {(row["network"], row["what"], row["quotient"]): row for row in rows}
    pairs = {
        quick.FASTER: (quick.RECORDED, "in forwards"),
        quick.OF_PEER: (quick.OF_PEER_RECORDED, "of the peer's time"),
    }
    body = []
    for faster in quotients:
        recorded, unit = pairs[faster]
        for what, goal in dict.fromkeys((row["what"], row["goal"]) for row in rows if row["quotient"] == faster):
            result = [[cells.get((network, what, name)) for name in (recorded, faster)] for network in networks]
            values = [" / ".join(f"{float(row['value']):.2f}" for row in pair if row is not None) for pair in result]
            body.append([what, unit, goal, *values])
    return table([["", "unit", "goal", *networks], *body])


def drop_ins(rows: list[Row]) -> Figure:
    """The time of drop-in classes as a share of that of the classes they replace: median and range over networks."""
    ways = {quick.OF_PEER_RECORDED: ("recorded", "tab:cyan", -0.2), quick.OF_PEER: ("the faster way", "tab:blue", 0.2)}
    rows = [row for row in rows if row["quotient"] in ways]
    panels = sorted({(row["instruction_set"], int(row["batch"])) for row in rows}, key=lambda panel: panel[::-1])
    figure = Figure(figsize=(2 + 2.8 * len(panels), 2.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        shares: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if (row["instruction_set"], int(row["batch"])) == panel:
                shares.setdefault((row["what"], row["quotient"]), []).append(float(row["value"]))
        names = list(dict.fromkeys(name for name, _ in shares))
        for quotient, (label, shade, offset) in ways.items():
            values = [shares[name, quotient] for name in names]
            places = [place + offset for place in range(len(names))]
            axes.barh(places, [statistics.median(item) for item in values], 0.36, color=shade, label=label)
            axes.hlines(places, [min(item) for item in values], [max(item) for item in values], color="black", lw=1)
        axes.axvline(1, color="tab:gray", linewidth=2, label="the class that it replaces")
        axes.set_yticks(range(len(names)), [PEERS[name] for name in names])
        axes.set_xlim(0, 1.3)
        axes.set_title(f"{panel[0]}, {panel[1]} image{'s' * (panel[1] > 1)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.supxlabel("share of its time; lower is better", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


def bars(rows: list[Row], batch: str) -> Figure:
    """Cost of ours beside that of peers, with the spread between a fifth and four fifths of the rounds."""
    networks, methods, cells = costs(rows, batch)
    figure = Figure(figsize=(1.6 + 1.9 * len(networks), 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(methods)
    shades = colormaps["tab20"]
    for i, method in enumerate(methods):
        places, heights, spread = [], [], [[], []]
        for j, network in enumerate(networks):
            row = cells.get((network, method))
            if row is not None:
                value = float(row["forwards"])
                places.append(j + (i - len(methods) / 2 + 0.5) * width)
                heights.append(value)
                spread[0].append(max(0.0, value - float(row["low"])))
                spread[1].append(max(0.0, float(row["high"]) - value))
            faster = cells.get((network, method + FASTER))
            if faster is not None:
                axes.hlines(float(faster["forwards"]), places[-1] - width / 2, places[-1] + width / 2, color="black")
        peer = " of " in method
        look = {"hatch": "//", "alpha": 0.6} if peer else {}
        axes.bar(places, heights, width, yerr=spread, label=method, color=shades(i % 20), **look)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("forward passes of the model")
    axes.set_title(f"cost of an explanation, batch {batch}; black strokes: accelerated; hatched: peers", fontsize=10)
    figure.legend(loc="outside lower center", fontsize=7, ncols=5)
    return figure


def speedups(rows: list[Row], batch: str) -> Figure | None:
    """How many times as much a peer's explanation costs, on the networks that both were measured on."""
    networks, methods, cells = costs(rows, batch)
    peers = [name for name in methods if " of " in name]
    pairs = {
        (network, peer): float(cells[network, peer]["forwards"]) / float(actual["forwards"])
        for network in networks
        for peer in peers
        if (network, peer) in cells and (actual := cells.get((network, peer.split(" of ")[0]))) is not None
    }
    if not pairs:
        return None
    figure = Figure(figsize=(1.6 + 1.3 * len(networks), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        places = {j + (i - len(peers) / 2 + 0.5) * width: (name, peer) for j, name in enumerate(networks)}
        places = {place: pair for place, pair in places.items() if pair in pairs}
        drawn = axes.bar(list(places), [pairs[pair] for pair in places.values()], width, label=peer)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("times the cost of ours")
    axes.set_title(f"what peers cost, batch {batch}", fontsize=10)
    axes.legend(fontsize=7)
    return figure


def memory(rows: list[Row]) -> Figure:
    """Peak over the loaded model."""
    networks = list(dict.fromkeys(f"{row['network']}, batch {row['batch']}" for row in rows))
    who = list(dict.fromkeys(row["who"] for row in rows))
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(who)
    for i, maker in enumerate(who):
        actual = {f"{row['network']}, batch {row['batch']}": row for row in rows if row["who"] == maker}
        places = [j + (i - len(who) / 2 + 0.5) * width for j, name in enumerate(networks) if name in actual]
        sizes = [float(actual[name]["increment_mib"]) for name in networks if name in actual]
        drawn = axes.bar(places, sizes, width, label=maker, color=SHADES.get(maker))
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("MiB over the loaded model")
    axes.set_title("peak memory: a plain forward, guided backprop here and of Captum", fontsize=9)
    axes.legend(fontsize=7)
    return figure


AXES = {
    "size": "side of the images, pixels",
    "batch": "images at a time",
    "depth": "depth of the ResNet",
    "classes": "classes",
    "points": "points an image",
}


def growth(rows: list[Row]) -> Figure:
    """Cost along each axis, a panel each."""
    axes = [name for name in AXES if any(row["axis"] == name for row in rows)]
    figure = Figure(figsize=(12, 3.4 * -(-len(axes) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(axes) // 3), 3, squeeze=False).flatten()
    colors: dict[str, str] = {}
    for panel, axis in zip(panels, axes, strict=False):
        actual = [row for row in rows if row["axis"] == axis]
        for name in dict.fromkeys(map(_named, actual)):
            color = colors.setdefault(name, f"C{len(colors)}")
            line = sorted((int(row["value"]), row) for row in actual if _named(row) == name)
            at = [value for value, _ in line]
            cost = [float(row["forwards"]) for _, row in line]
            panel.plot(at, cost, marker="o", markersize=4, label=name, color=color)
            low, high = ([float(row[end]) for _, row in line] for end in ("low", "high"))
            panel.fill_between(at, low, high, alpha=0.2, color=color)
        ticks = sorted({int(row["value"]) for row in actual})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        if axis in ("classes", "points"):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        else:
            panel.set_ylim(bottom=0)
        panel.minorticks_off()
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("forward passes")
        networks = sorted({row["network"] for row in actual})
        if axis != "depth":
            panel.set_title(
                f"{networks[0]}, batch {actual[0]['batch']}" if axis != "batch" else networks[0], fontsize=9
            )
        else:
            panel.set_title(f"batch {actual[0]['batch']}", fontsize=9)
        panel.legend(fontsize=7)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    return figure


def roofline(rows: list[Row]) -> Figure:
    """Operations a second over operations a byte, under the two rates of the machine."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    copy, product = (max(float(row[name]) for row in rows) for name in ("copy", "float32"))
    left, right = 5e-4, 300.0
    axes.plot([left, product / copy, right], [left * copy / 1e9, product / 1e9, product / 1e9], color="black")
    axes.text(0.002, 0.002 * copy / 1e9 * 1.5, f"copy, {copy / 1e9:.0f} GB/s", rotation=32, fontsize=8)
    axes.text(
        product / copy * 1.3, product / 1e9 * 1.15, f"product or convolution, {product / 1e9:.0f} Gop/s", fontsize=8
    )
    markers = "osD^v<>Pp*Xhd"
    names = list(dict.fromkeys(row["op"] for row in rows))
    for backend, filled in (("cpp", True), ("numba", False)):
        for i, name in enumerate(names):
            actual = [row for row in rows if row["op"] == name and row["backend"] == backend]
            at = [float(row["operations"]) / float(row["bytes"]) for row in actual]
            reached = [float(row["operations"]) / float(row["ms"]) / 1e6 for row in actual]
            color = f"C{i % 10}"
            face = color if filled else "none"
            label = name if filled else None
            axes.scatter(at, reached, marker=markers[i], facecolors=face, edgecolors=color, label=label, s=36)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("10⁹ operations a second")
    axes.set_title("every op at shapes of real networks; filled: C++, empty: Numba", fontsize=10)
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    return figure


def op_table(rows: list[Row]) -> str:
    """Time, what it is faster than, and the share of the machine."""
    calls: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        calls.setdefault((row["op"], row["shape"]), {})[row["backend"]] = row
    head = ["op", "shape", "C++ ms", "Numba ms", "C++ beside plain PyTorch", "Numba beside it", "share", "bound"]
    body: list[list[Any]] = []
    for (op, shape), result in calls.items():
        cpp, numba = result.get("cpp"), result.get("numba")
        best = cpp or numba or next(iter(result.values()))
        bound = {"copy": "bandwidth", "float32": "FMA"}[best["bound"]]
        body.append([op, shape, *(_ms(row) for row in (cpp, numba)), *(_times(row) for row in (cpp, numba))])
        body[-1] += [f"{100 * float(best['share']):.0f} %", bound]
    return table([head, *body])


def _ms(row: Row | None) -> str:
    return "" if row is None else f"{float(row['ms']):.3g}"


def _times(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{float(row['times']):.3g} ({float(row['low']):.3g} to {float(row['high']):.3g})"


def beside_table(rows: list[Row]) -> str:
    """What is measured beside another library."""
    head = ["op", "of", "ms", "beside", "its ms", "times as fast"]
    body = [
        [row["op"], row["shape"], _ms(row), row["beside"], f"{float(row['beside_ms']):.3g}", _times(row)]
        for row in rows
    ]
    return table([head, *body])


def traces(rows: list[Row]) -> str:
    """The trace of CNN-Fixations beside the loop, by points."""
    actual = [row for row in rows if row["axis"] == "points"]
    head = ["points an image", "network", "ms", "ms of the NumPy loop", "times as fast"]
    body = []
    for row in actual:
        if row["backend"] not in OURS:
            continue
        loop = next((o for o in actual if o["value"] == row["value"] and o["backend"] == "NumPy loop"), None)
        if loop is not None:
            ours, other = float(row["explain_ms"]), float(loop["explain_ms"])
            name = f"{row['network']}, batch {row['batch']}"
            body.append([row["value"], name, f"{ours:.3g}", f"{other:.3g}", f"{other / ours:.3g}"])
    return table([head, *body])


def cold_table(rows: list[Row]) -> str:
    """Imports and first calls."""
    head = ["", "backend", "first, ms", "again, ms"]
    body = []
    for row in rows:
        first = f"{float(row['first_ms']):.0f} ({float(row['low']):.0f} to {float(row['high']):.0f})"
        body.append([row["what"], row["backend"], first, f"{float(row['again_ms']):.1f}" if row["again_ms"] else ""])
    return table([head, *body])


def peers_table(rows: list[dict[str, str]]) -> str:
    """Processor seconds of drop-in classes beside those of the peers."""
    head = ["class", "of", "images", "instructions", "threads", "load", "seconds", "there", "share of the time"]
    body = [
        [
            *(
                row["name"],
                row["peer"],
                row["batch"],
                row["instructions"],
                row["threads"],
                row["load"] or "others at work",
            ),
            *(row["seconds"], row["peer_seconds"], row["ratio"]),
        ]
        for row in rows
    ]
    return table([head, *body])


class Page:
    """What goes between the marks, and the pictures beside the document."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def draw(self, name: str, what: str, figure: Figure | None) -> None:
        if figure is not None:
            figure.savefig(DOCUMENT.parent / f"{name}.png", dpi=120)
            self.parts.append(f"![{what}]({name}.png)")


def write(document: Path, parts: Iterable[str]) -> None:
    """Writes between the two marks of a document."""
    head, _, rest = document.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    document.write_text("\n\n".join([head + BEGIN, *parts, END]) + tail)


def main() -> None:
    page = Page()
    rows = measured.read("quick", "network", "batch", "what", "quotient")
    if any(row["quotient"] == quick.OF_PEER for row in rows):
        page.parts.append(
            "Drop-in classes beside those they replace, median and range over the networks of the tables below; the "
            "faster way is the faster of recorded and replayed:"
        )
        page.draw("performance-drop-ins", "time of drop-in classes as a share of the peer's", drop_ins(rows))
    for instructions, batch in sorted({(row["instruction_set"], int(row["batch"])) for row in rows}):
        actual = [row for row in rows if (row["instruction_set"], int(row["batch"])) == (instructions, batch)]
        where = f"{_where(actual)}; load {_loads(actual)}"
        if (instructions, batch) == ("AVX-512", 8):
            write(README, [f"Eight images ({where}):", goal_table(actual, [quick.FASTER])])
        page.parts += [
            f"Goals, batch {batch}: recorded / the faster of recorded and replayed ({where}):",
            goal_table(actual),
        ]
    rows = measured.read("cpu", "freed", "network", "batch", "method", "backend")
    rows = [row for row in rows if "loop" not in row["backend"]]
    saved = [row for row in rows if row["freed"] != "given back"]
    for batch in sorted({row["batch"] for row in saved}, key=int):
        actual = [row for row in saved if row["batch"] == batch]
        page.parts += [f"Batch {batch} ({_where(actual)}):", cost_table(actual, batch)]
        page.draw(f"performance-batch-{batch}", f"cost of explanations, batch {batch}", bars(actual, batch))
        page.draw(f"performance-peers-{batch}", f"cost of peers beside ours, batch {batch}", speedups(actual, batch))
    given_back = [row for row in rows if row["freed"] == "given back"]
    if given_back:
        # Rows of one commit, since they are compared with each other.
        batch, commit = given_back[-1]["batch"], given_back[-1]["commit"]
        actual = [row for row in given_back if (row["batch"], row["commit"]) == (batch, commit)]
        page.parts += [f"Batch {batch} as glibc has it ({_where(actual)}):", cost_table(actual, batch)]
    with (measured.DATA / "peers.csv").open() as file:
        beside_peers = list(csv.DictReader(file))
    page.parts += ["## Beside the peers", _PEERS, peers_table(beside_peers)]
    rows = measured.read("cpu_memory", "network", "batch", "who")
    if rows:
        page.parts += ["## Memory", f"{_where(rows)}:"]
        page.draw("performance-memory", "peak memory", memory(rows))
    rows = measured.read("cpu_growth", "axis", "value", "network", "batch", "method", "backend")
    if rows:
        page.parts += ["## Growth", f"Random weights; bands: a fifth to four fifths of the rounds ({_where(rows)})."]
        page.draw("performance-growth", "cost by image size, batch, depth, classes and points", growth(rows))
        page.parts += ["CNN-Fixations' trace alone, from points of the last feature map to pixels:", traces(rows)]
    rows = measured.read("cpu_ops", "op", "shape", "dtype", "backend", "beside")
    ops = [row for row in rows if row["beside"] == "reference"]
    if ops:
        page.parts += ["## Ops", f"{_where(ops)}. {_EXPLAINED}"]
        page.draw("performance-roofline", "roofline of the ops", roofline(ops))
        page.parts.append(op_table(ops))
    for what, op in _BESIDE_OTHERS.items():
        others = [row for row in rows if row["op"] == op and row["beside"] != "reference"]
        if others:
            page.parts += [f"{what}:", beside_table(others)]
    rows = measured.read("cpu_cold_start", "what", "backend")
    if rows:
        page.parts += [
            f"## Cold start\n\nEach in processes of its own, median and range ({_where(rows)}).",
            cold_table(rows),
        ]
    write(DOCUMENT, page.parts)


_BESIDE_OTHERS = {
    "The projection of Eigen-CAM alone, on real layers": "leading_singular",
    "Convolutions of accelerated replays beside direct ones, both with packed weights and a ReLU": "winograd_conv2d",
}

_PEERS = (
    "Drop-in classes beside the classes that they replace, on ResNet-50 at 224 x 224 unless a network is named: "
    "processor seconds of all threads, the least of one to three runs in turns in one process. Other programs used the "
    "machine meanwhile; the load is the average number of programs that wanted its two cores. By default a model is "
    "replayed where that pays; without these words `compat.accelerate(False)` was set. Of a grid each cell is a "
    "feature, or a window."
)

_EXPLAINED = (
    "All backends take turns in one process; brackets: a fifth to four fifths of the rounds. The bound is the longer "
    "of moving each byte once at the bandwidth of a large copy and doing each operation at the rate of a large matrix "
    "product or convolution, whichever is faster, on the same threads; the share is how near C++ comes. Above 100 % a "
    "call did not have to leave the caches."
)


if __name__ == "__main__":
    main()
