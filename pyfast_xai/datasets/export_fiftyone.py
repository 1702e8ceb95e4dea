"""A run as a folder that FiftyOne opens: pictures with heat maps, boxes around the evidence, and classes."""

import json
import math
from pathlib import Path
from typing import Any

from pyfast_xai.datasets.exported_rows import cell, file_name, grey, heatmap_of, picture_file, table_of, with_items
from pyfast_xai.datasets.reader import Results, Row
from pyfast_xai.images import MAX_PIXELS, Preprocess
from pyfast_xai.progress import Progress, ProgressCallback

# FiftyOne finds the files of a field below a folder of that name.
_HEATMAPS = "fields/heatmap"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}  # of formats whose files go by other names
_PLAIN = ("id", "index", "source", "status", "error_type", "error_message", "label_error", "score")


def write_fiftyone(results: Results, out: Path, report: ProgressCallback) -> None:
    """Writes `metadata.json`, `samples.json`, `data/`, `fields/heatmap/` and a card.

    This is the layout `fiftyone.types.FiftyOneDataset`, in the form that states no version of FiftyOne, which every
    release reads.

    Args:
        results: of the run.
        out: the folder.
        report: called with a `Progress` of the rows.
    """
    (out / "data").mkdir(parents=True)
    (out / _HEATMAPS).mkdir(parents=True)
    names = results.manifest.made.get("labels")
    with open(out / "samples.json", "x", encoding="utf-8") as file:
        file.write('{"samples": [')
        for done, (row, item) in enumerate(with_items(results), 1):
            name = file_name(row)
            sample = _labels(row, names)
            picture, heatmap = picture_file(item), heatmap_of(row)
            # A row without a picture is a sample all the same, whose file is not there.
            suffix = "PNG" if picture is None else _SUFFIXES.get(picture[1], picture[1])
            sample["filepath"] = f"data/{name}.{suffix.lower()}"
            sample["tags"] = [row["status"], *(["no picture"] if picture is None else [])]
            if picture is not None:
                (out / sample["filepath"]).write_bytes(picture[0])
            if heatmap is not None:
                path = f"{_HEATMAPS}/{name}.png"
                _in_picture(grey(heatmap), results.preprocess, _size(row)).save(out / path, compress_level=1)
                sample["heatmap"] = {"_cls": "Heatmap", "tags": [], "map_path": path}
            file.write(f"{',' if done > 1 else ''}\n{json.dumps(sample)}")
            report(Progress(done, len(results)))
        file.write("\n]}\n")
    identity = results.manifest.described
    method, model = identity["method"], identity["model"]
    facts = {
        "method": method["name"],
        "settings": json.dumps(method.get("settings")),
        "model": model.get("name"),
        "SHA-256 of the weights": model.get("weights"),
        "rows": len(results),
        "versions": json.dumps(identity.get("versions")),
    }
    metadata = {"media_type": "image", "info": facts}
    (out / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", "utf-8")
    (out / "README.md").write_text(_card(facts), "utf-8")


def _labels(row: Row, names: list[str] | None) -> dict[str, Any]:
    """Returns a row as fields of a sample, without those of files; what is not known is left out."""
    sample = {f"row_{name}" if name == "id" else name: row[name] for name in _PLAIN if row[name] is not None}
    if row["label"] is not None:
        sample["ground_truth"] = _class(row["label"], names)
    if row["topk_index"]:
        sample["prediction"] = _class(row["topk_index"][0], names, confidence=row["topk_score"][0])
    if row["target"] is not None:
        sample["target"] = _class(row["target"], names)
    size, box = row["width"] and (row["width"], row["height"]), row["box_in_picture"]
    if not size:
        size, box = (row["input_width"], row["input_height"]), row["box"]
    if box is not None:
        # FiftyOne's boxes are shares of the picture: left, top, width, height.
        left, top, right, bottom = box
        relative_box = [left / size[0], top / size[1], (right + 1 - left) / size[0], (bottom + 1 - top) / size[1]]
        explained = "evidence" if row["target"] is None else _name(row["target"], names)
        detection = {
            "_cls": "Detection",
            "tags": [],
            "attributes": {},
            "label": explained,
            "bounding_box": relative_box,
        }
        sample["evidence"] = {"_cls": "Detections", "detections": [detection]}
    return sample


def _class(index: int, names: list[str] | None, **more: Any) -> dict[str, Any]:
    return {"_cls": "Classification", "tags": [], "label": _name(index, names), "index": index, **more}


def _name(index: int, names: list[str] | None) -> str:
    return names[index] if names and 0 <= index < len(names) else str(index)


def _size(row: Row) -> tuple[int, int] | None:
    return (row["width"], row["height"]) if row["width"] else None


def _in_picture(heatmap: Any, preprocess: Preprocess, size: tuple[int, int] | None) -> Any:
    """Returns a heat map where it lies in the whole picture, which FiftyOne stretches it over; black around it.

    Args:
        heatmap: a grey PIL image, of the input of the network.
        preprocess: which made the input.
        size: (W, H) of the picture; None for a tensor, which is its own picture.
    """
    from PIL import Image

    if size is None:
        return heatmap
    original = preprocess.scaled(size)
    if math.prod(original) > MAX_PIXELS:  # a picture of a few pixels by thousands
        original = size
    x_scale, y_scale = original[0] / size[0], original[1] / size[1]
    left, top, right, bottom = preprocess.window(size)
    shape = max(1, round((right - left) * x_scale)), max(1, round((bottom - top) * y_scale))
    canvas = Image.new("L", original)
    canvas.paste(
        heatmap if heatmap.size == shape else heatmap.resize(shape), (round(left * x_scale), round(top * y_scale))
    )
    return canvas


def _card(facts: dict[str, Any]) -> str:
    return f"""# Explanations by {cell(facts["method"])}

```python
import fiftyone as fo

dataset = fo.Dataset.from_dir(dataset_dir=".", dataset_type=fo.types.FiftyOneDataset)
fo.launch_app(dataset)
```

Each sample is one picture as it was explained. `heatmap` lies over the whole picture, black where the network did not
look; `evidence` is the box around what counted, `target` the class that was explained, `prediction` the largest answer
with its probability, `ground_truth` the class that the source names. The tag `error` marks what could not be explained,
and `error_message` says why; the tag `no picture` what has no file in `data`.

{table_of(facts)}

Whoever publishes this folder states the licence of the pictures.
"""
