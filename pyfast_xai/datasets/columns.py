"""Explanations as the columns of a part, and rows as explanations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import localize, ops
from pyfast_xai.datasets.batching import BatchResult, out_of_memory
from pyfast_xai.datasets.decode import Decoded
from pyfast_xai.datasets.schema import ERROR, OK, POINT, PartInfo, columns, with_info
from pyfast_xai.datasets.sources import Item
from pyfast_xai.datasets.sources.item import valid
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.clear import ClassExplanation
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess
from pyfast_xai.localize import BoxRule

Maps = Literal["native", "heatmap", "none"]
DTYPES = ("float16", "float32", "uint8")

# Functions that compute a heat map from the map of a layer.
_KINDS = {
    "rectified-first": lambda layer_map, size: _resized(layer_map.clamp_min(0), size),
    "rectified-last": lambda layer_map, size: _resized(layer_map, size).clamp_min(0),
}


@dataclass(frozen=True)
class StoredColumns:
    """The columns stored of each explanation.

    Attributes:
        maps: "native" stores the method's map at the resolution of its layer where the heat map follows from it (and
            nothing where it follows from the points), "heatmap" the one at the resolution of the input, "none" neither.
        dtype: of the numbers: "float16" (scaled to each map's largest), "float32" or "uint8" (256 steps between its
            least and its largest).
        pictures: the heat map as a grey PNG, too.
        color_swap: what the model answers with swapped colours, too; see `color_swap`.
        box_rule: how boxes are made; None for the method's default.
        sigma: share of the diagonal with which the method spreads its points; None where it does not.
        labels: names of the classes.
    """

    maps: Maps = "native"
    dtype: str = "float16"
    pictures: bool = False
    color_swap: bool = False
    box_rule: BoxRule | str | None = None
    sigma: float | None = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        if self.maps not in ("native", "heatmap", "none"):
            raise InputError(f"maps must be 'native', 'heatmap' or 'none', got {self.maps!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"map_dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def schema(self) -> pa.Schema:
        """Returns the columns of all parts."""
        return columns(self.pictures, self.color_swap)


class Part:
    """The rows of a shard, or of some of its items, filled in any order.

    Args:
        indices: of the items, ascending.
        stored: what is stored of each.
        preprocess: of the network, to place boxes in the picture.

    Attributes:
        errors: rows without an explanation.
    """

    def __init__(self, indices: Sequence[int], stored: StoredColumns, preprocess: Preprocess) -> None:
        self.indices = indices
        self._stored, self._preprocess = stored, preprocess
        # A range knows the position of an index.
        positions = {index: n for n, index in enumerate(indices)}
        self._position = indices.index if isinstance(indices, range) else positions.__getitem__
        self._rows: list[dict[str, Any] | None] = [None] * len(indices)
        self._points: list[np.ndarray | None] = [None] * len(indices)
        self.errors = 0

    def fail(self, decoded: Decoded, error: Exception, seconds: float | None = None) -> None:
        """Adds the row of an image that has no explanation."""
        self._append(
            decoded.item,
            status=ERROR,
            error_type=valid(type(error).__name__),
            error_message=_message(error),
            decode_ms=decoded.seconds * 1000,
            explain_ms=None if seconds is None else seconds * 1000,
            **_of_picture(decoded),
        )
        self.errors += 1

    def add(self, images: list[Decoded], result: BatchResult, seconds: float) -> None:
        """Adds the rows of a batch; where they cannot be made, they are error rows.

        Args:
            images: of the whole batch.
            result: for some of them.
            seconds: that each image took.
        """
        chosen = [images[row] for row in result.rows]
        if result.explanation is None:
            for decoded in chosen:
                self.fail(decoded, result.error or RuntimeError("the method returned nothing"), seconds)
            return
        try:
            self._add(chosen, result.explanation, result, seconds)
        except Exception as error:  # explainers of others return what they like
            if out_of_memory(error):
                raise
            for decoded in chosen:
                if self._rows[self._position(decoded.item.index)] is None:
                    self.fail(decoded, error, seconds)

    def _add(self, images: list[Decoded], explanation: Explanation, result: BatchResult, seconds: float) -> None:
        boxes = explanation.boxes(self._stored.box_rule).cpu()
        faults = _faults(explanation, result)
        kind, maps = _stored_maps(explanation, self._stored)
        maps = None if maps is None else maps.detach().cpu()
        dominant = None
        if isinstance(explanation, ClassExplanation) and explanation.dominant_class is not None:
            dominant = explanation.dominant_class.cpu()
        targets = None if explanation.target is None else explanation.target.cpu().tolist()
        scores = None if explanation.score is None else explanation.score.float().cpu().tolist()
        top = None if result.top is None else tuple(column.cpu().tolist() for column in result.top)
        swapped = None if result.swapped is None else tuple(column.cpu().tolist() for column in result.swapped)
        height, width = explanation.heatmap.shape[-2:]
        names = self._stored.labels
        for n, decoded in enumerate(images):
            if faults[n] is not None:
                self.fail(decoded, ArithmeticError(faults[n]), seconds)
                continue
            box, size = boxes[n], decoded.size
            has_box = not bool(box.isnan().any())
            target = None if targets is None else targets[n]
            if explanation.points is not None:
                points = explanation.points[n].cpu().numpy().astype(np.int32)
                self._points[self._position(decoded.item.index)] = points
            self._append(
                decoded.item,
                status=OK,
                target=target,
                class_name=None if target is None else self._name(target),
                score=None if scores is None else scores[n],
                topk_index=None if top is None else top[0][n],
                topk_name=None if top is None or not names else [self._name(index) for index in top[0][n]],
                topk_score=None if top is None else top[1][n],
                swapped_index=None if swapped is None else swapped[0][n],
                swapped_score=None if swapped is None else swapped[1][n],
                box=box.tolist() if has_box else None,
                box_in_picture=self._preprocess.boxes_in(box[None], size)[0].tolist() if has_box and size else None,
                input_height=height,
                input_width=width,
                map_kind=kind,
                picture={"bytes": _png(explanation.heatmap[n]), "path": None} if self._stored.pictures else None,
                decode_ms=decoded.seconds * 1000,
                explain_ms=seconds * 1000,
                **({} if maps is None else _packed(maps[n], self._stored.dtype)),
                **({} if dominant is None else _classes(dominant[n])),
                **_of_picture(decoded),
            )

    def table(self, info: PartInfo) -> pa.Table:
        """Returns the finished part.

        Raises:
            RuntimeError: a row is missing.
        """
        missing = [self.indices[n] for n, row in enumerate(self._rows) if row is None]
        if missing:
            raise RuntimeError(f"part must have every row, got none for items {missing[:5]}")
        schema = with_info(self._stored.schema, info)
        arrays = []
        for field in schema:
            if field.name == "points":
                arrays.append(_points(self._points))
            else:
                arrays.append(pa.array([(row or {}).get(field.name) for row in self._rows], field.type))
        return pa.Table.from_arrays(arrays, schema=schema)

    def _append(self, item: Item, **row: Any) -> None:
        position = self._position(item.index)
        if self._rows[position] is not None:
            raise RuntimeError(f"part must have each row at most one time, got {item.id!r} two times")
        self._rows[position] = {"id": valid(item.id), "index": item.index, "source": valid(item.place), **row}

    def _name(self, index: int) -> str | None:
        names = self._stored.labels
        return names[index] if names and 0 <= index < len(names) else None


def _message(error: Exception) -> str:
    try:
        message = valid(" ".join(str(error).split())[:2000])
    except Exception:  # the `str` of a foreign exception may raise
        message = ""
    return message or valid(type(error).__name__)


def _faults(explanation: Explanation, result: BatchResult) -> list[str | None]:
    """Returns why each image of a batch has no row of an explanation; None where it has one."""
    faults: list[str | None] = [None] * len(explanation)
    checks = [("the method's heatmap must be finite, got NaN or infinity", explanation.heatmap.flatten(1))]
    if explanation.score is not None and explanation.score.is_floating_point():
        checks.append(("the model's output is not finite: the score is NaN or infinity", explanation.score[:, None]))
    for message, values in checks:
        for n in torch.nonzero(~torch.isfinite(values.reshape(len(faults), -1)).all(1)).flatten().tolist():
            faults[n] = message
    if result.finite is not None:
        for n in torch.nonzero(~result.finite).flatten().tolist():
            faults[n] = "the model's output is not finite: some classes have NaN or infinity"
    return faults


def _of_picture(decoded: Decoded) -> dict[str, Any]:
    label = {"label": decoded.label, "label_error": None if decoded.label_error is None else valid(decoded.label_error)}
    return label if decoded.size is None else {**label, "width": decoded.size[0], "height": decoded.size[1]}


def _points(rows: list[np.ndarray | None]) -> pa.Array:
    lengths = [0 if points is None else len(points) for points in rows]
    flat = np.concatenate([points for points in rows if points is not None] or [np.empty((0, 2), np.int32)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(flat[:, 0])), pa.array(np.ascontiguousarray(flat[:, 1]))], fields=list(POINT)
    )
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array([points is None for points in rows]))


def _stored_maps(explanation: Explanation, stored: StoredColumns) -> tuple[str | None, Tensor | None]:
    """Returns the kind of the stored map, and the map `[N, h, w]`."""
    if stored.maps == "none":
        return None, None
    if stored.maps == "native":
        if explanation.points is not None and stored.sigma is not None:
            return "points", None
        layer_map = explanation.signed_map
        if layer_map is not None and layer_map.dim() == 3 and len(layer_map) == len(explanation):
            heat = explanation.heatmap.float()
            scale = heat.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            for kind, heatmap_of in _KINDS.items():
                with torch.no_grad():
                    deviation = (heatmap_of(layer_map.float(), tuple(heat.shape[-2:])) - heat).abs() / scale
                if bool(((deviation < 1e-4) | ~torch.isfinite(heat)).all()):
                    return kind, layer_map
    return "heatmap", explanation.heatmap


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _packed(layer_map: Tensor, dtype: str) -> dict[str, Any]:
    """Returns a map as bytes; its numbers are `stored * map_scale + map_offset`."""
    values = layer_map.float().numpy()
    scale, offset = 1.0, 0.0
    if dtype == "float32":
        stored = values.astype("<f4")
    elif dtype == "float16":
        # Scaled, so that neither large nor tiny numbers leave its range.
        scale = float(np.abs(values).max(initial=0.0)) or 1.0
        stored = (values / np.float32(scale)).astype("<f2")
    else:
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        scale, offset = ((high - low) / 255) or 1.0, low
        stored = np.clip(np.rint((values - low) / scale), 0, 255).astype("u1")
    return {
        "map": stored.tobytes(),
        "map_dtype": dtype,
        "map_shape": list(values.shape),
        "map_scale": scale,
        "map_offset": offset,
    }


def _classes(dominant: Tensor) -> dict[str, Any]:
    dtype = "int16" if int(dominant.min()) >= -32768 and int(dominant.max()) < 32768 else "int32"
    stored = dominant.numpy().astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"dominant_class": stored, "dominant_class_dtype": dtype}


def _png(heatmap: Tensor) -> bytes:
    import io

    from PIL import Image

    from pyfast_xai import render

    grey = (render.normalize(heatmap[None])[0] * 255).round().byte().cpu().numpy()
    sink = io.BytesIO()
    Image.fromarray(grey).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def unpacked(row: dict[str, Any]) -> np.ndarray | None:
    """Returns the stored map of a row, float32; None where there is none.

    Raises:
        InputError: its bytes do not fit its shape.
    """
    if row["map"] is None:
        return None
    if row["map_dtype"] not in DTYPES:
        raise InputError(f"map_dtype of {row['id']!r} must be one of {', '.join(DTYPES)}, got {row['map_dtype']!r}")
    dtype = np.dtype(row["map_dtype"]).newbyteorder("<")
    shape = tuple(row["map_shape"] or ())
    if len(row["map"]) != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise InputError(f"map of {row['id']!r} must have shape {list(shape)}, got {len(row['map'])} bytes")
    stored = np.frombuffer(row["map"], dtype).reshape(shape).astype(np.float32)
    return stored * np.float32(row["map_scale"]) + np.float32(row["map_offset"])


def explanation_of(
    row: dict[str, Any], method: str, box_rule: BoxRule | str, sigma: float | None, labels: list[str] | None
) -> Explanation:
    """Returns a row as an explanation of one image, without the image.

    Args:
        row: of a part.
        method: name of the explainer that made it.
        box_rule: how its boxes are made, or the text of that.
        sigma: share of the diagonal with which points are spread.
        labels: names of the classes.

    Raises:
        InputError: the row is an error row, or has nothing that a heat map follows from.
    """
    if row["status"] != OK:
        raise InputError(f"row {row['id']!r} must have an explanation, got {row['error_type']}: {row['error_message']}")
    size = (row["input_height"], row["input_width"])
    points = None
    if row["points"] is not None:
        points = torch.tensor([[p["y"], p["x"]] for p in row["points"]], dtype=torch.int64).reshape(-1, 2)
    stored = unpacked(row)
    layer_map = None if stored is None else torch.from_numpy(stored)[None]
    kind = row["map_kind"]
    if kind == "points" and points is not None and sigma is not None:
        flat = points[:, 0] * size[1] + points[:, 1]
        heat = ops.point_density(flat, 1, *size, max(sigma * math.hypot(*size), 1e-3))
    elif layer_map is None or kind not in ("heatmap", *_KINDS):
        raise InputError(f"row {row['id']!r} must have a map to be shown, got none")
    else:
        heat = layer_map if kind == "heatmap" else _KINDS[kind](layer_map, size)
    fields: dict[str, Any] = {
        "method": method,
        "heatmap": heat,
        "target": None if row["target"] is None else torch.tensor([row["target"]]),
        "score": None if row["score"] is None else torch.tensor([row["score"]]),
        "points": None if points is None else [points],
        "signed_map": layer_map if kind in _KINDS else None,
        "box_rule": localize.box_rule(box_rule),
        "labels": labels,
    }
    if row["dominant_class"] is None or row["dominant_class_dtype"] not in ("int16", "int32"):
        return Explanation(**fields)
    classes = np.frombuffer(row["dominant_class"], np.dtype(row["dominant_class_dtype"]).newbyteorder("<"))
    return ClassExplanation(**fields, dominant_class=torch.from_numpy(classes.astype(np.int64)).reshape(1, *size))
