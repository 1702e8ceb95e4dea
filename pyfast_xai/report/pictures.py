"""Pictures and heat maps as text, small enough that ten thousand fit into a page.

A field of a page's block begins with a letter: `p` for a picture, `m` for a map in 256 levels at the resolution of its
layer, which the page enlarges and colours, `g` for a finer map as a grey picture, which the page colours, and `c` for
one in colours.
"""

import base64
import contextlib
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyfast_xai import render
from pyfast_xai.datasets.columns import explanation_of
from pyfast_xai.datasets.decode import pillow_for_threads
from pyfast_xai.datasets.sources import Item
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.clear import ClassExplanation
from pyfast_xai.report.rows import Run, subject
from pyfast_xai.report.thumbnails import as_image, reduced, small, thumbnail
from pyfast_xai.report.views import Means, packed, stretched

_SMALL = 1024  # numbers of a map that goes into the page as it is; as many bytes as its picture has
_LEGEND = 4  # dominant classes that are named
_AHEAD = 8  # items a thread that are drawn before their turn; each holds its maps


@dataclass
class _Map:
    """The map of a row: its field, and its share in the views of the data set."""

    field: str = ""
    mean: tuple[int | None, Tensor] | None = None
    dominant: tuple[int, int] | None = None
    legend: list[tuple[int, str]] | None = None


@dataclass
class _Drawn:
    pictures: list[str]
    maps: list[_Map] = field(default_factory=list)


class Drawer:
    """Draws items of several runs.

    Args:
        runs: over the same source.
        side: longer side of a picture, in pixels.

    Attributes:
        means: of the maps of each run that were drawn.
        dominant: for each run, the class of each row that was drawn and the class that dominates its picture.
        legends: for each run, the dominant classes of each row with their colours, as #rrggbb.
        pictures: items that have a picture.
    """

    def __init__(self, runs: Sequence[Run], side: int) -> None:
        self._runs, self._side = runs, side
        # Networks of the same input see the same.
        self.views = [json.dumps(_geometry(run), sort_keys=True) for run in runs]
        self._sets = list(dict.fromkeys(self.views))
        self.means = [Means() for _ in runs]
        self.dominant: list[list[tuple[int, int]]] = [[] for _ in runs]
        self.legends: list[list[list[tuple[int, str]] | None]] = [[] for _ in runs]
        self.pictures = 0

    @property
    def map_positions(self) -> list[int]:
        """Returns the field of the picture of each run; the fields of maps follow those of pictures."""
        return [self._sets.index(view) for view in self.views]

    def draw(self, indices: Sequence[int], workers: int) -> Iterator[list[str]]:
        """Yields the fields of each item: a picture for each kind of input and a map for each run, or nothing.

        Pictures are read, decoded and encoded on threads; what they make does not depend on how many there are.

        Args:
            indices: of the items, ascending.
            workers: threads.
        """
        pending: deque[Future[_Drawn]] = deque()
        with contextlib.ExitStack() as stack:
            stack.enter_context(pillow_for_threads(max(run.max_pixels for run in self._runs)))
            pool = ThreadPoolExecutor(workers, "draw")
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            for items, rows in self._items_and_rows(indices):
                pending.append(pool.submit(self._draw, items, rows))
                if len(pending) > _AHEAD * workers:
                    yield self._counted(pending.popleft().result())
            while pending:
                yield self._counted(pending.popleft().result())

    def size(self, run: Run) -> list[int]:
        """Returns height and width of the pictures of a run, in pixels."""
        rows = (row for row in run.rows_shown if row and row["input_height"] and row["input_width"])
        row = next(rows, {"input_height": self._side, "input_width": self._side})
        return list(reduced(row["input_height"], row["input_width"], self._side))

    def _items_and_rows(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[list[Item | None], list[Mapping[str, Any] | None]]]:
        """Yields the item and the row of each run, item after item; one thread reads sources and parts."""
        indices_of_runs = [[index for index in indices if index in run.number] for run in self._runs]
        rows = [
            run.results.rows([run.number[index] for index in present])
            for run, present in zip(self._runs, indices_of_runs, strict=True)
        ]
        items = [run.results.items(indices) for run in self._runs]
        for index in indices:
            yield (
                [next(column, None) for column in items],
                [next(column) if index in run.number else None for run, column in zip(self._runs, rows, strict=True)],
            )

    def _counted(self, item_pictures: _Drawn) -> list[str]:
        self.pictures += any(item_pictures.pictures)
        for n, drawn_map in enumerate(item_pictures.maps):
            self.legends[n].append(drawn_map.legend)
            if drawn_map.mean is not None:
                self.means[n].add(*drawn_map.mean)
            if drawn_map.dominant is not None:
                self.dominant[n].append(drawn_map.dominant)
        return [*item_pictures.pictures, *(drawn_map.field for drawn_map in item_pictures.maps)]

    def _draw(self, items: Sequence[Item | None], rows: Sequence[Mapping[str, Any] | None]) -> _Drawn:
        maps = [_Map() if row is None else self._map(run, row) for run, row in zip(self._runs, rows, strict=True)]
        return _Drawn([self._picture(items, view) for view in self._sets], maps)

    def _picture(self, items: Sequence[Item | None], view: str) -> str:
        for run, item, item_view in zip(self._runs, items, self.views, strict=True):
            if item_view != view or item is None:
                continue
            # Whatever decoders raise: what cannot be read has no picture here.
            with contextlib.suppress(Exception):
                thumbnail_ = thumbnail(item, run.results.preprocess, self._side, run.max_pixels)
                return "p" + _encoded(thumbnail_, 75)
        return ""

    def _map(self, run: Run, row: Mapping[str, Any]) -> _Map:
        try:
            explanation = explanation_of(dict(row), run.method, run.box_rule, run.sigma, None)
        except InputError:  # an error row, or one without a map
            return _Map()
        item_map = _Map(mean=(subject(row), stretched(explanation.heatmap)))
        values = explanation.signed_map if explanation.signed_map is not None else explanation.heatmap
        if isinstance(explanation, ClassExplanation):
            self._dominance(item_map, run, row, explanation)
        elif row["map_kind"] == "points" or values[0].numel() > _SMALL or max(values.shape) > 255:
            grey = small(render.normalize(explanation.heatmap)[:, None], self._side)
            item_map.field = "g" + _encoded(as_image(grey), 80)
        else:
            if row["map_kind"] == "rectified-first":
                values = values.clamp_min(0)
            zero = 0.0 if row["map_kind"] == "rectified-last" else None
            item_map.field = "m" + packed(values[0].nan_to_num(0, 0, 0), zero)
        return item_map

    def _dominance(self, item_map: _Map, run: Run, row: Mapping[str, Any], explanation: ClassExplanation) -> None:
        assert explanation.dominant_class is not None
        assert explanation.signed_map is not None
        (colors,) = render.class_colors(explanation.dominant_class, explanation.signed_map)
        if 0 < run.classes <= len(render.CLASS_COLORS):
            colors = {index: render.CLASS_COLORS[index % len(render.CLASS_COLORS)] for index in colors}
        item_map.legend = [(index, _hexadecimal(colors[index])) for index in list(colors)[:_LEGEND]]
        label = row["label"] if row["label"] is not None else subject(row)
        if colors and label is not None:
            item_map.dominant = (label, next(iter(colors)))
        reduced_ = small(render.dominance(explanation.dominant_class, explanation.signed_map, [colors]), self._side)
        # Fine lines fade when they are made smaller.
        item_map.field = "c" + _encoded(as_image(reduced_ / reduced_.amax().clamp_min(1e-6)), 80)


def _hexadecimal(color: render.Color) -> str:
    return "#" + bytes(round(255 * part) for part in color).hex()


def _encoded(image: Any, quality: int) -> str:
    """Returns a PIL image as WebP in base64."""
    sink = io.BytesIO()
    # Half the time of what is usual, for 4 % more bytes.
    image.save(sink, "WEBP", quality=quality, method=2)
    return base64.b64encode(sink.getvalue()).decode()


def _geometry(run: Run) -> dict[str, Any]:
    """Returns what decides which pixels a network sees."""
    settings = run.results.manifest.described.get("preprocess")
    if not isinstance(settings, dict):
        return {}
    return {name: value for name, value in settings.items() if name not in ("mean", "std")}
