"""The report: folders of runs become one file that opens anywhere."""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pyfast_xai import datasets, render
from pyfast_xai.datasets.run import cores
from pyfast_xai.errors import InputError
from pyfast_xai.local_path import local_path
from pyfast_xai.progress import Progress, ProgressCallback
from pyfast_xai.report import views
from pyfast_xai.report.pictures import Drawer
from pyfast_xai.report.rows import Run, chosen, named_apart

BLOCK = 128  # items whose pictures lie in one piece of the page, taken apart when one of them is looked at


@dataclass(frozen=True)
class Written:
    """The content of a report.

    Attributes:
        path: of the file.
        items: that are shown.
        of: how many there are in the source.
        errors: error rows of all runs among those that are shown.
        pictures: items with a picture; sources of the others were not at hand, or cannot be read.
        bytes: of the file.
    """

    path: Path
    items: int
    total: int
    errors: int
    pictures: int
    bytes: int


def write(
    folders: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    source: Any = None,
    limit: int | None = 10_000,
    side: int = 112,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Writes one or several runs over the same source as one HTML file that needs nothing else.

    Args:
        folders: of the runs, see `datasets.explain`; one or several.
        out: the file; replaced if it is there.
        source: where the pictures are; None for where they were when the runs started. Without them the heat maps
            are shown alone.
        limit: items that are shown, spread evenly over the source; None for all. Scores and confusions are counted
            over all rows, mean maps and dominant classes over those that are shown.
        side: longer side of a picture, in pixels; at most that of the network's input.
        workers: threads that decode and encode pictures; None for one a core, at most 8. The file is the same.
        progress: called with a `Progress` of the items.

    Returns:
        What the file holds.

    Raises:
        InputError: a folder of no run, runs over different sources, a source that is not theirs, or an `out` that is
            a URL.
        OSError: the file cannot be written.
    """
    names = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    if not names:
        raise InputError("folders must name at least one run, got none")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    if not 16 <= side <= 1024:
        raise InputError(f"side must lie in 16 to 1024 pixels, got {side}")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    path = local_path("out", out)
    if path.is_dir():
        raise InputError(f"out must be a file, got the folder {str(out)!r}")
    runs = _opened(names, source)
    indices = chosen(runs, limit)
    for run in runs:
        run.load(indices)
    drawer = Drawer(runs, side)
    head, tail = _page(runs)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="ascii", newline="\n") as file:
            file.write(head)
            for block in _blocks(drawer, indices, min(8, cores()) if workers is None else workers, progress):
                file.write(f'<script type="text/plain" class="pictures">{block}</script>\n')
            # The counts are complete after everything is drawn.
            file.write(f'<script type="application/json" id="data">{_json(_data(runs, indices, drawer))}</script>\n')
            file.write(tail)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    errors = sum(row is not None and row["status"] != "ok" for run in runs for row in run.rows_shown)
    return Written(path, len(indices), runs[0].items, errors, drawer.pictures, path.stat().st_size)


def _opened(names: Sequence[str | Path], source: Any) -> list[Run]:
    opened = None if source is None else datasets.open_source(source, without=names[0])
    runs = [Run(datasets.open(name, opened)) for name in names]
    for run in runs[1:]:
        if run.ids != runs[0].ids:
            first, second = (str(run_.results.folder) for run_ in (runs[0], run))
            raise InputError(f"folders must be of runs over the same source, got {first!r} and {second!r}")
    if opened is not None and opened.listing().ids != runs[0].ids:
        raise InputError("source must be the one of the runs, got one with other items")
    named_apart(runs)
    return runs


def _blocks(drawer: Drawer, indices: Sequence[int], workers: int, progress: ProgressCallback | None) -> Iterator[str]:
    """Yields pictures as text: a line an item, fields separated by commas, which base64 does not have."""
    lines: list[str] = []
    for done, fields in enumerate(drawer.draw(indices, workers), 1):
        lines.append(",".join(fields))
        if progress is not None:
            progress(Progress(done, len(indices)))
        if len(lines) == BLOCK or done == len(indices):
            yield "\n".join(lines)
            lines = []


def _data(runs: Sequence[Run], indices: Sequence[int], drawer: Drawer) -> dict[str, Any]:
    """Returns all that the page says, with every name one time."""
    indices_of_texts: dict[str, int] = {}

    def intern(text: str | None) -> int | None:
        return None if text is None else indices_of_texts.setdefault(text, len(indices_of_texts))

    rows: list[Any] = [
        next(row for row in rows_of_item if row) for rows_of_item in zip(*(run.rows_shown for run in runs), strict=True)
    ]
    labels: list[int] = sorted({row["label"] for row in rows if row["label"] is not None})
    data = []
    for n, run in enumerate(runs):
        columns = run.data(intern)
        columns["input"] = drawer.size(run)
        columns["picture"] = drawer.map_positions[n]
        columns["map"] = len(set(drawer.map_positions)) + n
        columns["views"] = views.data(run, drawer.means[n], drawer.dominant[n], intern)
        legends = [
            None if legend is None else [[intern(run.class_name(index)), color] for index, color in legend]
            for legend in drawer.legends[n]
        ]
        columns["columns"]["legend"] = legends if any(legends) else None
        data.append(columns)
    return {
        "block": BLOCK,
        "colors": _colors(),
        "of": runs[0].items,
        "items": {
            "id": [row["id"] for row in rows],
            "index": list(indices),
            "source": [row["source"] if row["source"] != row["id"] else None for row in rows],
            "width": [row["width"] for row in rows],
            "height": [row["height"] for row in rows],
            "label": [row["label"] for row in rows],
        },
        "labels": [[label, intern(runs[0].class_name(label))] for label in labels],
        "runs": data,
        "words": list(indices_of_texts),
    }


def _colors() -> str:
    """Returns 256 colours from cold to hot, three bytes each."""
    table = render.colorize(torch.arange(256).view(1, 1, 256) / 255)[0, :, 0].T
    return base64.b64encode((table * 255).round().to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _page(runs: Sequence[Run]) -> tuple[str, str]:
    """Returns the text of the page before the data, and after it."""
    script = _text("page.js")
    # The page may run this script and show what it holds, and reach nothing else.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = html.escape(", ".join(run.name for run in runs)).encode("ascii", "xmlcharrefreplace").decode()
    head, tail = _text("page.html").split("{{data}}")
    for name, text in (("style", _text("page.css")), ("policy", policy), ("title", title)):
        head = head.replace(f"{{{{{name}}}}}", text)
    return head, tail.replace("{{script}}", script)


def _text(name: str) -> str:
    return (files("pyfast_xai.report") / name).read_text("ascii")


def _json(data: Any) -> str:
    """Returns JSON in ASCII, without a character that HTML takes for markup."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
