"""Rows of a run in formats that others read: CSV, WebDataset tars, Zarr, Hugging Face's `datasets`, FiftyOne."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyfast_xai import render
from pyfast_xai.datasets.exported_rows import file_name, grey, heatmap_of
from pyfast_xai.datasets.reader import Results, Row
from pyfast_xai.errors import InputError
from pyfast_xai.local_path import local_path
from pyfast_xai.progress import Progress, ProgressCallback

_BYTES = ("map", "dominant_class", "picture")


def export(
    folder: str | Path, form: str, out: str | Path, progress: ProgressCallback | None = None, source: Any = None
) -> int:
    """Writes the rows of a run in another format.

    Args:
        folder: of the run.
        form: "csv", one file, all columns but the maps; "webdataset", a folder with a tar a part, in it a JSON and a
            grey PNG of the heat map for each row; "zarr", a group with the heat maps float16 `[rows, H, W]`, NaN where
            there is none, and ids and classes beside them; "huggingface", a folder that `datasets.load_dataset` opens
            and that can be put on the Hub as it is: Parquet with pictures and heat maps as images, and a card;
            "fiftyone", a folder that `fiftyone.Dataset.from_dir` opens: pictures with heat maps, boxes and classes.
        out: what is written; must not be there.
        progress: called with a `Progress` of the rows.
        source: where the pictures are; None for where they were.

    Returns:
        How many rows there were.

    Raises:
        InputError: another format, an `out` that is there or a URL, or maps of several sizes for Zarr.

    Example:
        >>> from PIL import Image
        >>> from pyfast_xai import Preprocess, datasets, demo
        >>> Image.new("RGB", (96, 96)).save("black.png")
        >>> options = {"preprocess": Preprocess(96), "method": "saliency", "out": "run"}
        >>> summary = datasets.explain("black.png", demo.load(), **options)
        >>> datasets.export("run", "csv", "rows.csv")
        1
    """
    if form not in FORMATS:
        raise InputError(f"to must be one of {', '.join(FORMATS)}, got {form!r}")
    path = local_path("out", out)
    if os.path.lexists(path):
        raise InputError(f"out must not be there yet, got {str(out)!r}")
    results = Results(folder, source)
    FORMATS[form](results, path, progress or (lambda _: None))
    return len(results)


def _csv(results: Results, out: Path, report: ProgressCallback) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x", newline="", encoding="utf-8") as file:
        writer = None
        for done, row in enumerate(results, 1):
            cells = _without_bytes(row)
            if writer is None:
                writer = csv.DictWriter(file, cells)
                writer.writeheader()
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else _cell(v) for k, v in cells.items()})
            report(Progress(done, len(results)))


def _cell(value: Any) -> Any:
    # A spreadsheet would run what begins like a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _without_bytes(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _BYTES}


def _tars(results: Results, out: Path, report: ProgressCallback) -> None:
    out.mkdir(parents=True)
    tar: tarfile.TarFile | None = None
    part = -1
    size = results.manifest.described["shard_size"]
    try:
        for done, row in enumerate(results, 1):
            if row["index"] // size != part:
                part = row["index"] // size
                if tar is not None:
                    tar.close()
                tar = tarfile.open(out / f"part-{part:08d}.tar", "w")  # noqa: SIM115 (closed below)
            assert tar is not None
            key = file_name(row)
            _member(tar, f"{key}.json", json.dumps(_without_bytes(row)).encode())
            heatmap = heatmap_of(row)
            if heatmap is not None:
                _member(tar, f"{key}.heatmap.png", render.png_bytes(grey(heatmap)))
            report(Progress(done, len(results)))
    finally:
        if tar is not None:
            tar.close()


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _zarr(results: Results, out: Path, report: ProgressCallback) -> None:
    try:
        import zarr
    except ImportError as error:
        raise InputError("export to zarr needs it: pip install zarr") from error

    sizes = {
        (row["input_height"], row["input_width"])
        for row in results.table(["input_height", "input_width"]).to_pylist()
        if row["input_height"] is not None
    }
    if len(sizes) != 1:
        raise InputError(f"maps must be of one size for zarr, got {sorted(sizes) or 'none'}")
    (size,) = sizes
    group = zarr.open_group(str(out), mode="w-")
    heat = group.create_array(
        "heatmap", shape=(len(results), *size), chunks=(16, *size), dtype="float16", fill_value=float("nan")
    )
    columns = results.table(["id", "index", "target", "score", "status"]).to_pydict()
    for name, kind in (("index", "int64"), ("target", "float64"), ("score", "float32")):
        values = [np.nan if value is None else value for value in columns[name]]
        group.create_array(name, data=np.array(values, kind))
    group.attrs.update({"ids": columns["id"], "method": results.manifest.described["method"]["name"]})
    block = np.full((16, *size), np.nan, np.float16)
    for done, row in enumerate(results, 1):
        heatmap = heatmap_of(row)
        block[(done - 1) % 16] = np.nan if heatmap is None else render.normalize(heatmap[None])[0].numpy()
        if done % 16 == 0 or done == len(results):
            first = (done - 1) // 16 * 16
            heat[first:done] = block[: done - first]
        report(Progress(done, len(results)))


def _hugging_face(results: Results, out: Path, report: ProgressCallback) -> None:
    from pyfast_xai.datasets.export_huggingface import write_hugging_face

    write_hugging_face(results, out, report)


def _fiftyone(results: Results, out: Path, report: ProgressCallback) -> None:
    from pyfast_xai.datasets.export_fiftyone import write_fiftyone

    write_fiftyone(results, out, report)


FORMATS: dict[str, Callable[[Results, Path, ProgressCallback], None]] = {
    "csv": _csv,
    "webdataset": _tars,
    "zarr": _zarr,
    "huggingface": _hugging_face,
    "fiftyone": _fiftyone,
}
