"""Pictures and heat maps as text, small enough that ten thousand fit into a page.

A field of a page's block begins with a letter: `p` for a picture, `m` for a map in 256 levels at the resolution of its
layer, which the page enlarges and colours, `g` for a finer map as a grey picture, which the page colours, and `c` for
one in colours of its own.
"""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.datasets.columns import explanation_of
from pyfast_xai.errors import InputError
from pyfast_xai.explanation import Explanation
from pyfast_xai.report.rows import Run, subject
from pyfast_xai.report.views import Means, packed

_SMALL = 1024  # numbers of a map that is kept as it is; as many bytes as its picture has
_LEGEND = 4  # dominant classes that are named


class Drawer:
    """Draws items of several runs.

    Args:
        runs: over the same source.
        side: longer side of a picture, in pixels.

    Attributes:
        means: of the maps of each run that were drawn.
        dominant: for each run, the class of each row that was drawn and the class that dominates its picture.
        legends: for each run, the dominant classes of each row with their hues in degrees.
        pictures: items that have a picture.
    """

    def __init__(self, runs: Sequence[Run], side: int) -> None:
        self._runs, self._side = runs, side
        # Networks of the same input see the same.
        self.views = [json.dumps(_geometry(run), sort_keys=True) for run in runs]
        self._sets = list(dict.fromkeys(self.views))
        self.means = [Means() for _ in runs]
        self.dominant: list[list[tuple[int, int]]] = [[] for _ in runs]
        self.legends: list[list[list[tuple[int, int]] | None]] = [[] for _ in runs]
        self.pictures = 0

    @property
    def places(self) -> list[int]:
        """Of each run, the field of its picture; the fields of maps follow those of pictures."""
        return [self._sets.index(view) for view in self.views]

    def draw(self, index: int) -> list[str]:
        """The fields of an item: a picture for each kind of input, a map for each run; empty where there is none."""
        shown = [self._picture(index, view) for view in self._sets]
        self.pictures += any(shown)
        return [*shown, *(self._map(n, index) for n in range(len(self._runs)))]

    def size(self, run: Run) -> list[int]:
        """Height and width of the pictures of a run, in pixels."""
        there = (row for row in run.shown if row and row["input_height"] and row["input_width"])
        row = next(there, {"input_height": self._side, "input_width": self._side})
        return list(self._reduced(row["input_height"], row["input_width"]))

    def _reduced(self, height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, self._side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _picture(self, index: int, view: str) -> str:
        for run, own in zip(self._runs, self.views, strict=True):
            if own != view:
                continue
            try:
                picture = run.results.picture(index)
            except Exception:  # whatever decoders raise: what cannot be read has no picture here
                continue
            if picture is not None:
                return "p" + self._encoded(render.for_display(picture[None]))
        return ""

    def _map(self, n: int, index: int) -> str:
        run = self._runs[n]
        self.legends[n].append(None)
        if index not in run.number:
            return ""
        row = dict(run.results[run.number[index]])
        try:
            found = explanation_of(row, run.method, run.threshold, run.sigma, None)
        except InputError:  # an error row, or one without a map
            return ""
        self.means[n].add(subject(row), found.heatmap)
        if found.winner is not None and found.map is not None:
            return "c" + self._dominance(n, row, found)
        own = found.map if found.map is not None else found.heatmap
        if row["map_kind"] == "rectified-first":
            own = own.clamp_min(0)
        if row["map_kind"] == "points" or own[0].numel() > _SMALL or max(own.shape) > 255:
            return "g" + self._encoded(render.normalize(found.heatmap)[:, None], 80)
        return "m" + packed(own[0].nan_to_num(0, 0, 0), 0.0 if row["map_kind"] == "rectified-last" else None)

    def _dominance(self, n: int, row: dict[str, Any], found: Explanation) -> str:
        assert found.winner is not None
        assert found.map is not None
        (hues,) = render.class_hues(found.winner, found.map)
        if 0 < self._runs[n].classes <= len(render.HUES):
            hues = {index: render.HUES[index % len(render.HUES)] for index in hues}
        self.legends[n][-1] = [(index, round(hues[index] * 360)) for index in list(hues)[:_LEGEND]]
        label = row["label"] if row["label"] is not None else subject(row)
        if hues and label is not None:
            self.dominant[n].append((label, next(iter(hues))))
        shown = self._small(render.dominance(found.winner, found.map, [hues]))
        # Fine lines fade when they are made smaller.
        return self._encoded(shown / shown.amax().clamp_min(1e-6), 80)

    def _small(self, image: Tensor) -> Tensor:
        size = self._reduced(*image.shape[2:])
        if size == tuple(image.shape[2:]):
            return image
        return functional.interpolate(image, size, mode="bilinear", antialias=True)

    def _encoded(self, image: Tensor, quality: int = 75) -> str:
        """An image `[1, 1 or 3, H, W]` in 0..1 as WebP in base64, no larger than asked for."""
        from PIL import Image

        pixels = (self._small(image)[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        sink = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(sink, "WEBP", quality=quality)
        return base64.b64encode(sink.getvalue()).decode()


def _geometry(run: Run) -> dict[str, Any]:
    """What decides which pixels a network sees."""
    told = run.results.manifest.described.get("preprocess")
    return {k: v for k, v in told.items() if k not in ("mean", "std")} if isinstance(told, dict) else {}
