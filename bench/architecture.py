"""Draws the picture of docs/architecture.md from the imports of the package.

An arrow leads from a package to one that it imports. An import that a chain of others implies is left out.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from package_imports import imported  # noqa: E402

PACKAGE = ROOT / "pyfast_xai"
WIDTH, HEIGHT = 132, 40  # of a box, in pixels
GAP, STEP = 18, 84  # between boxes of a row, and from row to row


def parts() -> dict[str, list[Path]]:
    """Returns the files of each package or module of `pyfast_xai`."""
    result: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.glob("**/*.py")) + sorted((PACKAGE / "kernels").resolve().glob("**/*.py")):
        inside = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path("kernels", path.name)
        name = inside.parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__"):
            result.setdefault(name, []).append(path)
    return result


def imports(paths: list[Path]) -> set[str]:
    """Returns the packages and modules of `pyfast_xai` that some files import."""
    return {name for path in paths for name in imported(path)}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns a graph without the arrows that a longer way implies."""

    def reach(name: str) -> set[str]:
        below = graph[name]
        return below.union(*(reach(other) for other in below))

    return {name: {b for b in below if not any(b in reach(c) for c in below - {b})} for name, below in graph.items()}


def heights(graph: dict[str, set[str]]) -> dict[str, int]:
    """Returns how many packages lie below each, on the longest way down."""
    known: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in known:
            known[name] = max((height(below) + 1 for below in graph[name]), default=0)
        return known[name]

    for name in graph:
        height(name)
    return known


def chains(graph: dict[str, set[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the rows of the picture from the bottom up, and each arrow as a chain of places from row to row.

    Where an arrow passes a row it has a place of its own there, so that it runs beside boxes and not behind them.
    """
    levels = heights(graph)
    drawn: list[list[str]] = [[] for _ in range(max(levels.values()) + 1)]
    for name, level in levels.items():
        drawn[level].append(name)
    arrows = []
    for name, below in sorted(graph.items()):
        for other in sorted(below):
            passed = [f"{name}>{other}>{level}" for level in range(levels[name] - 1, levels[other], -1)]
            for place in passed:
                drawn[int(place.rsplit(">", 1)[1])].append(place)
            arrows.append([name, *passed, other])
    # Each row in the order of the middles of its neighbours, up and down until it settles.
    neighbours: dict[str, set[str]] = {place: set() for row in drawn for place in row}
    for arrow in arrows:
        for upper, lower in pairwise(arrow):
            neighbours[upper].add(lower)
            neighbours[lower].add(upper)
    for _ in range(24):
        for row in (*drawn, *reversed(drawn)):
            place = {name: (i + 0.5) / len(other) for other in drawn for i, name in enumerate(other)}
            row.sort(key=lambda name: (sum(place[n] for n in neighbours[name]) / max(1, len(neighbours[name])), name))
    return drawn, arrows


def svg(graph: dict[str, set[str]], sizes: dict[str, int], foundations: list[str]) -> str:
    """Returns the picture; under each name stands how many lines of code the package has."""
    drawn, arrows = chains(graph)
    span = {place: WIDTH if place in sizes else 8 for row in drawn for place in row}
    width = max(sum(span[place] + GAP for place in row) for row in drawn) + GAP
    height = (len(drawn) + 1) * STEP
    center = {}
    for level, row in enumerate(drawn):
        left = (width - sum(span[place] + GAP for place in row) + GAP) / 2
        for place in row:
            center[place] = left + span[place] / 2, height - (level + 1) * STEP - STEP / 2
            left += span[place] + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        "<title>Packages of pyfast_xai and what they import</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#7a869a"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for arrow in arrows:
        x, y = center[arrow[0]]
        path = f"M{x:.0f} {y + HEIGHT / 2:.0f}"
        y += HEIGHT / 2
        for place in arrow[1:]:
            x2, y2 = center[place]
            y2 -= HEIGHT / 2
            path += f"C{x:.0f} {y + 26:.0f} {x2:.0f} {y2 - 26:.0f} {x2:.0f} {y2:.0f}"
            if place != arrow[-1]:
                path += f"V{y2 + HEIGHT:.0f}"
                y2 += HEIGHT
            x, y = x2, y2
        lines.append(f'<path d="{path}" fill="none" stroke="#7a869a" stroke-width="1.2" marker-end="url(#tip)"/>')
    for name in sizes:
        if name in center:
            x, y = center[name]
            lines.append(
                f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
                'fill="#e8eef7" stroke="#34558b"/>'
                f'<text x="{x:.0f}" y="{y - 2:.0f}" text-anchor="middle" font-size="14" fill="#14213d">{name}</text>'
                f'<text x="{x:.0f}" y="{y + 14:.0f}" text-anchor="middle" font-size="10" fill="#54607a">'
                f"{sizes[name]:,} lines</text>"
            )
    top = height - STEP + 10
    lines += [
        f'<rect x="{GAP}" y="{top}" width="{width - 2 * GAP}" height="{HEIGHT + 14}" rx="5" fill="#f3efe6" '
        'stroke="#8a7a55"/>',
        f'<text x="{width / 2:.0f}" y="{top + 32}" text-anchor="middle" font-size="14" fill="#14213d">'
        f"below all of them: {', '.join(foundations)}</text>",
    ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architecture.svg")
    out = parser.parse_args().out
    files = parts()
    graph = {name: (imports(paths) - {name}) & set(files) for name, paths in files.items()}
    foundations = sorted(name for name, below in graph.items() if not below and files[name][0].parent == PACKAGE)
    graph = {name: below - {*foundations} for name, below in graph.items() if name not in foundations}
    sizes = {name: sum(len(path.read_text().splitlines()) for path in paths) for name, paths in files.items()}
    out.write_text(svg(reduced(graph), sizes, foundations))


if __name__ == "__main__":
    main()
