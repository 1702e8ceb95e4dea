"""Runs the notebooks in this process, and keeps what they show for the site: `python docs/notebooks/run.py`.

A notebook is stored without outputs. What the last expression of a cell gives is shown, as a kernel does.
"""

import ast
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent


@dataclass
class Output:
    """What a cell shows: its number among all cells, what it printed, and a picture, PNG."""

    cell: int
    text: str
    picture: bytes | None


def outputs(path: Path) -> Iterator[Output]:
    """Runs a notebook and yields what its code cells show."""
    names: dict[str, Any] = {"__name__": path.stem}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        source, place = "".join(cell["source"]), f"{path.name}:{number}"
        body = ast.parse(source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
        printed, picture = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), place, "exec"), names)
            value = eval(compile(ast.Expression(last.value), place, "eval"), names) if last else None
        if hasattr(value, "_repr_png_"):
            picture = value._repr_png_()
        elif value is not None:
            print(repr(value), file=printed)
        yield Output(number, printed.getvalue(), picture)


def keep(path: Path) -> None:
    """Writes what a notebook shows beside it: one JSON file of texts by cell, and a JPEG for each picture."""
    for old in HERE.glob(f"{path.stem}-*.jpg"):
        old.unlink()
    texts = {}
    for output in outputs(path):
        if output.text:
            texts[output.cell] = output.text
        if output.picture:
            shown = Image.open(io.BytesIO(output.picture)).convert("RGB")
            shown.save(HERE / f"{path.stem}-{output.cell}.jpg", quality=88)
    path.with_suffix(".json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for notebook in sorted(HERE.glob("*.ipynb")):
        keep(notebook)
