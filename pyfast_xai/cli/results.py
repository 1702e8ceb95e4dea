"""The files that `explain` and `demo` write."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Writes JSON with a line for each key, and for each entry of a list, to be read and compared by line."""
    lines = []
    for key, value in table.items():
        entries = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        lines.append(f" {json.dumps(key)}: " + (f"[\n  {entries}\n ]" if entries else json.dumps(value)))
    _write(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write_png(path: Path, picture: Any) -> None:
    from pyfast_xai import render

    _write(path, render.png_bytes(picture))


def _write(path: Path, content: bytes) -> None:
    # Writing through a link would change what it leads to, which may be one of the user's pictures.
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def zoomed(boxes: "Tensor", zoom: int) -> "Tensor":
    """Returns the inclusive boxes on a picture `zoom` times as large."""
    return boxes * zoom + boxes.new_tensor([0, 0, zoom - 1, zoom - 1])
