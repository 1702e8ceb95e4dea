"""Rows of a run in formats that others read: CSV, WebDataset tars, Zarr."""

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyfast_xai import render
from pyfast_xai.datasets.reader import Results, Row
from pyfast_xai.errors import InputError

FORMATS = ("csv", "webdataset", "zarr")
_BYTES = ("map", "winner", "picture")


def export(folder: str | Path, form: str, out: str | Path, told: Callable[[int, int], None] | None = None) -> int:
    """Write the rows of a run anew.

    Args:
        folder: of the run.
        form: "csv", one file, all columns but the maps; "webdataset", a folder with a tar a part, in it a JSON and a
            grey PNG of the heat map for each row; "zarr", a group with the heat maps float16 `[rows, H, W]`, NaN where
            there is none, and ids and classes beside them.
        out: what is written; must not be there.
        told: called with rows done and rows there.

    Returns:
        How many rows there were.

    Raises:
        InputError: another format, an `out` that is there, or maps of several sizes for Zarr.
    """
    if form not in FORMATS:
        raise InputError(f"to must be one of {', '.join(FORMATS)}, got {form!r}")
    if Path(out).exists():
        raise InputError(f"out must not be there yet, got {str(out)!r}")
    results = Results(folder)
    tell = told or (lambda _done, _all: None)
    {"csv": _csv, "webdataset": _tars, "zarr": _zarr}[form](results, Path(out), tell)
    return len(results)


def _csv(results: Results, out: Path, tell: Callable[[int, int], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x", newline="", encoding="utf-8") as file:
        writer = None
        for done, row in enumerate(results, 1):
            told = _told(row)
            if writer is None:
                writer = csv.DictWriter(file, told)
                writer.writeheader()
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else _cell(v) for k, v in told.items()})
            tell(done, len(results))


def _cell(value: Any) -> Any:
    # A spreadsheet would run what begins like a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _told(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _BYTES}


def _heat(row: Row) -> Any:
    """The heat map of a row `[H, W]`; None where there is none."""
    if row["status"] != "ok" or row["map_kind"] is None:
        return None
    from pyfast_xai.datasets.columns import explanation_of

    method = row.results.manifest.described["method"]
    return explanation_of(dict(row), method["name"], method["threshold"], method["sigma"], None).heatmap[0]


def _tars(results: Results, out: Path, tell: Callable[[int, int], None]) -> None:
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
            # A key has no dot or slash of the id's, so that no name leads anywhere.
            key = f"{row['index']:010d}-{re.sub(r'[^A-Za-z0-9_-]', '_', row['id'])[-80:]}"
            _member(tar, f"{key}.json", json.dumps(_told(row)).encode())
            heat = _heat(row)
            if heat is not None:
                picture = render.to_pil(render.normalize(heat[None]).expand(3, -1, -1)).convert("L")
                _member(tar, f"{key}.heatmap.png", render.png_bytes(picture))
            tell(done, len(results))
    finally:
        if tar is not None:
            tar.close()


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    told = tarfile.TarInfo(name)
    told.size = len(data)
    tar.addfile(told, io.BytesIO(data))


def _zarr(results: Results, out: Path, tell: Callable[[int, int], None]) -> None:
    try:
        import zarr
    except ImportError as error:
        raise InputError("export to zarr needs it: pip install zarr") from error
    import numpy as np

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
        found = _heat(row)
        block[(done - 1) % 16] = np.nan if found is None else render.normalize(found[None])[0].numpy()
        if done % 16 == 0 or done == len(results):
            first = (done - 1) // 16 * 16
            heat[first:done] = block[: done - first]
        tell(done, len(results))
