"""Explanations as the columns of a part, and a row as an explanation again."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import ops
from pyfast_xai.datasets.answering import Answered
from pyfast_xai.datasets.decode import Decoded
from pyfast_xai.datasets.schema import ERROR, OK, POINT, About, schema
from pyfast_xai.datasets.sources import Item
from pyfast_xai.errors import InputError
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess

Maps = Literal["native", "heatmap", "none"]
DTYPES = ("float16", "float32", "uint8")

# How a heat map comes from what is stored.
_KINDS = {
    "rectified-first": lambda own, size: _resized(own.clamp_min(0), size),
    "rectified-last": lambda own, size: _resized(own, size).clamp_min(0),
}


@dataclass(frozen=True)
class Kept:
    """What is kept of each explanation.

    Attributes:
        maps: "native" keeps the method's own map at the resolution of its layer where the heat map follows from it
            (and nothing where it follows from the points), "heatmap" that at the resolution of the input, "none"
            neither.
        dtype: of the numbers: "float16" (scaled to each map's largest), "float32" or "uint8" (256 steps between its
            least and its largest).
        pictures: the heat map as a grey PNG, too.
        color_swap: what the model answers once colours have traded places, too; see `swapping`.
        threshold: at which boxes are cut; None for the method's own.
        sigma: share of the diagonal with which the method spreads its points; None where it does not.
        classes: names of the classes.
    """

    maps: Maps = "native"
    dtype: str = "float16"
    pictures: bool = False
    color_swap: bool = False
    threshold: float | None = None
    sigma: float | None = None
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        if self.maps not in ("native", "heatmap", "none"):
            raise InputError(f"maps must be 'native', 'heatmap' or 'none', got {self.maps!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"map_dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


class Part:
    """The rows of a shard, filled in any order.

    Args:
        start: index of the first.
        stop: index after the last.
        kept: what is kept of each.
        preprocess: of the network, to place boxes in the picture.
    """

    def __init__(self, start: int, stop: int, kept: Kept, preprocess: Preprocess) -> None:
        self.start, self.stop = start, stop
        self._kept, self._preprocess = kept, preprocess
        self._rows: list[dict[str, Any] | None] = [None] * (stop - start)
        self._points: list[np.ndarray | None] = [None] * (stop - start)
        self.errors = 0

    def fail(self, decoded: Decoded, error: Exception, seconds: float | None = None) -> None:
        """A row of an image that has no explanation."""
        self._put(
            decoded.item,
            status=ERROR,
            error_type=type(error).__name__,
            error_message=_text(" ".join(str(error).split())[:2000]) or type(error).__name__,
            label=decoded.label,
            decode_ms=decoded.seconds * 1000,
            explain_ms=None if seconds is None else seconds * 1000,
            **_size(decoded),
        )
        self.errors += 1

    def add(self, images: list[Decoded], answered: Answered, seconds: float) -> None:
        """The rows of a batch.

        Args:
            images: of the whole batch.
            answered: some of them.
            seconds: that each image took.
        """
        mine = [images[row] for row in answered.rows]
        found = answered.explanation
        if found is None:
            for decoded in mine:
                self.fail(decoded, answered.error or RuntimeError("no answer"), seconds)
            return
        boxes = found.boxes(self._kept.threshold).cpu()
        finite = torch.isfinite(found.heatmap).flatten(1).all(1).cpu()
        kind, maps = _stored(found, self._kept)
        maps = None if maps is None else maps.detach().cpu()
        winner = None if found.winner is None else found.winner.cpu()
        targets = None if found.target is None else found.target.cpu().tolist()
        scores = None if found.score is None else found.score.float().cpu().tolist()
        top = None if answered.top is None else tuple(own.cpu().tolist() for own in answered.top)
        swapped = None if answered.swapped is None else tuple(own.cpu().tolist() for own in answered.swapped)
        height, width = found.heatmap.shape[-2:]
        for n, decoded in enumerate(mine):
            if not bool(finite[n]):
                self.fail(decoded, ArithmeticError("heatmap must be finite, got NaN or infinity"), seconds)
                continue
            box = boxes[n]
            there = not bool(box.isnan().any())
            size = decoded.size
            target = None if targets is None else targets[n]
            self._put(
                decoded.item,
                status=OK,
                label=decoded.label,
                target=target,
                class_name=None if target is None else self._name(target),
                score=None if scores is None else scores[n],
                topk_index=None if top is None else top[0][n],
                topk_name=None if top is None or not self._kept.classes else [self._name(c) for c in top[0][n]],
                topk_score=None if top is None else top[1][n],
                swapped_index=None if swapped is None else swapped[0][n],
                swapped_score=None if swapped is None else swapped[1][n],
                box=box.tolist() if there else None,
                box_in_picture=self._preprocess.boxes_in(box[None], size)[0].tolist() if there and size else None,
                input_height=height,
                input_width=width,
                map_kind=kind,
                picture={"bytes": _png(found.heatmap[n]), "path": None} if self._kept.pictures else None,
                decode_ms=decoded.seconds * 1000,
                explain_ms=seconds * 1000,
                **({} if maps is None else _packed(maps[n], self._kept.dtype)),
                **({} if winner is None else _classes(winner[n])),
                **_size(decoded),
            )
            if found.points is not None:
                self._points[decoded.item.index - self.start] = found.points[n].cpu().numpy().astype(np.int32)

    def table(self, about: About) -> pa.Table:
        """The finished part.

        Raises:
            RuntimeError: a row is missing.
        """
        missing = [self.start + n for n, row in enumerate(self._rows) if row is None]
        if missing:
            raise RuntimeError(f"part must have every row, got none for items {missing[:5]}")
        columns = schema(about, self._kept.pictures, self._kept.color_swap)
        arrays = []
        for field in columns:
            if field.name == "points":
                arrays.append(_points(self._points))
            else:
                arrays.append(pa.array([(row or {}).get(field.name) for row in self._rows], field.type))
        return pa.Table.from_arrays(arrays, schema=columns)

    def _put(self, item: Item, **row: Any) -> None:
        place = item.index - self.start
        if self._rows[place] is not None:
            raise RuntimeError(f"part must have each row once, got {item.id!r} twice")
        self._rows[place] = {"id": _text(item.id), "index": item.index, "source": _text(item.place), **row}

    def _name(self, index: int) -> str | None:
        names = self._kept.classes
        return names[index] if names and 0 <= index < len(names) else None


def _text(given: str) -> str:
    return given.encode("utf-8", "backslashreplace").decode()


def _size(decoded: Decoded) -> dict[str, Any]:
    return {} if decoded.size is None else {"width": decoded.size[0], "height": decoded.size[1]}


def _points(rows: list[np.ndarray | None]) -> pa.Array:
    lengths = [0 if own is None else len(own) for own in rows]
    flat = np.concatenate([own for own in rows if own is not None] or [np.empty((0, 2), np.int32)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(flat[:, 0])), pa.array(np.ascontiguousarray(flat[:, 1]))], fields=list(POINT)
    )
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array([own is None for own in rows]))


def _stored(found: Explanation, kept: Kept) -> tuple[str | None, Tensor | None]:
    """Of what kind the stored map is, and the map `[N, h, w]`."""
    if kept.maps == "none":
        return None, None
    if kept.maps == "native":
        if found.points is not None and kept.sigma is not None:
            return "points", None
        own = found.map
        if own is not None and own.dim() == 3 and len(own) == len(found):
            heat = found.heatmap.float()
            scale = heat.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            for kind, made in _KINDS.items():
                with torch.no_grad():
                    off = (made(own.float(), tuple(heat.shape[-2:])) - heat).abs() / scale
                if bool(((off < 1e-4) | ~torch.isfinite(heat)).all()):
                    return kind, own
    return "heatmap", found.heatmap


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _packed(own: Tensor, dtype: str) -> dict[str, Any]:
    """A map as bytes; its numbers are `stored * map_scale + map_offset`."""
    values = own.float().numpy()
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


def _classes(winner: Tensor) -> dict[str, Any]:
    dtype = "int16" if int(winner.min()) >= -32768 and int(winner.max()) < 32768 else "int32"
    return {"winner": winner.numpy().astype(np.dtype(dtype).newbyteorder("<")).tobytes(), "winner_dtype": dtype}


def _png(heatmap: Tensor) -> bytes:
    import io

    from PIL import Image

    from pyfast_xai import render

    grey = (render.normalize(heatmap[None])[0] * 255).round().byte().cpu().numpy()
    sink = io.BytesIO()
    Image.fromarray(grey).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def unpacked(row: dict[str, Any]) -> np.ndarray | None:
    """The stored map of a row, float32; None where there is none.

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
    row: dict[str, Any], method: str, threshold: float, sigma: float | None, labels: list[str] | None
) -> Explanation:
    """A row as an explanation of one image, without the image.

    Args:
        row: of a part.
        method: the explainer that made it.
        threshold: at which its boxes are cut.
        sigma: share of the diagonal with which points are spread.
        labels: names of the classes.

    Raises:
        InputError: the row says no more than why there is none, or nothing that a heat map follows from.
    """
    if row["status"] != OK:
        raise InputError(f"row {row['id']!r} must have an explanation, got {row['error_type']}: {row['error_message']}")
    size = (row["input_height"], row["input_width"])
    points = None
    if row["points"] is not None:
        points = torch.tensor([[p["y"], p["x"]] for p in row["points"]], dtype=torch.int64).reshape(-1, 2)
    stored = unpacked(row)
    own = None if stored is None else torch.from_numpy(stored)[None]
    kind = row["map_kind"]
    if kind == "points" and points is not None and sigma is not None:
        flat = points[:, 0] * size[1] + points[:, 1]
        heat = ops.point_density(flat, 1, *size, max(sigma * math.hypot(*size), 1e-3))
    elif own is None or kind not in ("heatmap", *_KINDS):
        raise InputError(f"row {row['id']!r} must have a map to be shown, got none")
    else:
        heat = own if kind == "heatmap" else _KINDS[kind](own, size)
    winner = None
    if row["winner"] is not None and row["winner_dtype"] in ("int16", "int32"):
        classes = np.frombuffer(row["winner"], np.dtype(row["winner_dtype"]).newbyteorder("<"))
        winner = torch.from_numpy(classes.astype(np.int64)).reshape(1, *size)
    return Explanation(
        method=method,
        heatmap=heat,
        target=None if row["target"] is None else torch.tensor([row["target"]]),
        score=None if row["score"] is None else torch.tensor([row["score"]]),
        points=None if points is None else [points],
        map=own if kind in _KINDS else None,
        winner=winner,
        threshold=threshold,
        labels=labels,
    )
