"""Helpers of all export formats: heat maps, pictures and names for the files of rows."""

import io
import re
from collections.abc import Iterator
from typing import Any

from pyfast_xai import render
from pyfast_xai.datasets.columns import explanation_of
from pyfast_xai.datasets.reader import Results, Row
from pyfast_xai.datasets.sources import Item, Labelled

_BLOCK = 256  # rows whose items are looked up together


def with_items(results: Results) -> Iterator[tuple[Row, Item | None]]:
    """Yields each row with its item; None where the source is not at hand."""
    for first in range(0, len(results), _BLOCK):
        rows = list(results.rows(range(first, min(first + _BLOCK, len(results)))))
        yield from zip(rows, results.items([row["index"] for row in rows]), strict=True)


def heatmap_of(row: Row) -> Any:
    """Returns the heat map of a row `[H, W]`; None where there is none."""
    if row["status"] != "ok" or row["map_kind"] is None:
        return None
    method = row.results.manifest.described["method"]
    return explanation_of(dict(row), method["name"], method["box_rule"], method["sigma"], None).heatmap[0]


def grey(heatmap: Any) -> Any:
    """Returns a heat map as a grey PIL image, stretched to 0..255."""
    return render.to_pil(render.normalize(heatmap[None]).expand(3, -1, -1)).convert("L")


def picture_file(item: Item | None) -> tuple[bytes, str] | None:
    """Returns the picture of an item as a file, as it is, and its format as Pillow calls it.

    Args:
        item: of the source; None where that is not at hand.

    Returns:
        None where the item is no picture or cannot be read.
    """
    from PIL import Image

    if item is None:
        return None
    try:
        picture = item.read()
        picture = picture.picture if isinstance(picture, Labelled) else picture
        if isinstance(picture, Image.Image):
            sink = io.BytesIO()
            picture.save(sink, "PNG")
            picture = sink.getvalue()
        if not isinstance(picture, bytes):
            return None
        with Image.open(io.BytesIO(picture)) as opened:  # so that no row breaks whoever opens the data set
            opened.verify()
            return picture, str(opened.format)
    except Exception:  # sources and decoders may raise anything on broken data
        return None


def file_name(row: Row) -> str:
    """Returns a name for the files of a row; without a dot or slash of its id, so that no name leads anywhere."""
    return f"{row['index']:010d}-{re.sub(r'[^A-Za-z0-9_-]', '_', row['id'])[-80:]}"


def table_of(facts: dict[str, Any]) -> str:
    """Returns facts as a table of Markdown, for the card of a data set."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in facts.items())])


def cell(value: Any) -> str:
    """Returns a value as text that stays in its cell of a table of Markdown."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
