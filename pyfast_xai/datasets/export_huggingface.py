"""A run as a folder that Hugging Face's `datasets` and the Hub show: pictures and heat maps as images, and a card."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pyfast_xai import render
from pyfast_xai.datasets.exported_rows import cell, grey, heatmap_of, picture_file, table_of, with_items
from pyfast_xai.datasets.reader import Results
from pyfast_xai.datasets.schema import OK, PICTURE, columns
from pyfast_xai.progress import Progress, ProgressCallback

_ROWS = 256  # of a row group: the viewer of the Hub reads a few pictures at a time
_LEFT_OUT = (
    "map",
    "map_dtype",
    "map_shape",
    "map_scale",
    "map_offset",
    "map_kind",
    "dominant_class",
    "dominant_class_dtype",
)


def write_hugging_face(results: Results, out: Path, report: ProgressCallback) -> None:
    """Writes the folder: `README.md`, the card, and `data/train-*.parquet`, one file a part of the run.

    Args:
        results: of the run.
        out: the folder.
        report: called with a `Progress` of the rows.
    """
    folder = out / "data"
    folder.mkdir(parents=True)
    schema = _schema()
    size = results.manifest.described["shard_size"]
    files = len(results.paths)
    writer: Any = None
    number, shard = -1, -1
    pending: list[dict[str, Any]] = []

    def flush() -> None:
        if pending:
            arrays = [pa.array([row.get(field.name) for row in pending], field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            pending.clear()

    try:
        for done, (row, item) in enumerate(with_items(results), 1):
            if row["index"] // size != shard:
                flush()
                if writer is not None:
                    writer.close()
                shard, number = row["index"] // size, number + 1
                name = f"train-{number:05d}-of-{files:05d}.parquet"
                writer = pq.ParquetWriter(folder / name, schema, compression="zstd", compression_level=1)
            heatmap, picture = heatmap_of(row), picture_file(item)
            pending.append(
                {
                    **row,
                    "image": None if picture is None else _image(picture[0], row["id"].rpartition("/")[2]),
                    "heatmap": None
                    if heatmap is None
                    else _image(render.png_bytes(grey(heatmap)), f"{row['index']}.png"),
                }
            )
            if len(pending) == _ROWS:
                flush()
            report(Progress(done, len(results)))
        flush()
    finally:
        if writer is not None:
            writer.close()
    (out / "README.md").write_text(_card(results), "utf-8")


def _schema() -> pa.Schema:
    plain_fields = [field for field in columns() if field.name not in _LEFT_OUT]
    first = next(n for n, field in enumerate(plain_fields) if field.name == "status")
    images = [pa.field("image", PICTURE), pa.field("heatmap", PICTURE)]
    fields = [*plain_fields[:first], *images, *plain_fields[first:]]
    features = json.loads(columns(pictures=True).metadata[b"huggingface"])["info"]["features"]
    features = {field.name: features.get(field.name, {"_type": "Image"}) for field in fields}
    return pa.schema(fields, metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def _image(data: bytes, path: str) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _card(results: Results) -> str:
    identity, columns = results.manifest.described, results.table(["status", "class_name"])
    explained = columns["status"].to_pylist().count(OK)
    method, model, rows = identity["method"]["name"], identity["model"], len(results)
    facts = {
        "method": method,
        "settings": json.dumps(identity["method"].get("settings")),
        "model": model.get("name"),
        "SHA-256 of the weights": model.get("weights"),
        "rows": f"{rows}, {rows - explained} of them errors",
        "versions": json.dumps(identity.get("versions")),
    }
    header = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        "tags": ["explainability", "saliency", "pyfast-xai"],
        "size_categories": [_size_category(rows)],
    }
    # JSON is YAML, and needs no care with names of models.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    return f"""---
{front}
---

# Explanations by {cell(method)}

Each row is one picture: `image` as it was explained, `heatmap` as a grey image of the network's input, stretched to
0..255, the class that was explained (`target`, `class_name`, `score`), the largest answers (`topk_*`), and the box
around the evidence (`box` in pixels of the input, `box_in_picture` in those of the picture). A row with
`status = "error"` says in `error_message` why it has no explanation.

{table_of(facts)}

Whoever publishes this folder states the licence of the pictures.
"""


def _size_category(rows: int) -> str:
    names = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    names += [(10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B")]
    return next((name for limit, name in names if rows < limit), "n>1T" if rows >= 10**12 else "1B<n<10B")
