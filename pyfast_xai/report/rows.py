"""The rows of a run as words and numbers of a report."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pyfast_xai.datasets import Results
from pyfast_xai.datasets.manifest import NAME
from pyfast_xai.datasets.schema import COLUMNS, OK, SWAPPED
from pyfast_xai.errors import InputError
from pyfast_xai.images import MAX_PIXELS

_NUMBER = (int, float)
_ORDERS = [list(order) for order in itertools.permutations(range(3))]

Word = Callable[[str | None], int | None]

# All but what is large: maps are read when they are drawn.
_SMALL = [name for name in COLUMNS.names if name not in ("map", "dominant_class", "points")]


class Run:
    """A run as a report needs it.

    Attributes:
        results: its rows.
        name: the method; two runs of the same method differ by their folders.
        table: the small columns of all rows.
        number: of the row of each index, in `results`.
        max_pixels: of a picture, as the run allowed them.
        swaps: which channel went where when the model ran with colours swapped, too; empty where it did not.
        rows_shown: the rows that are shown, one an item; None where this run has no row of it yet.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        described = results.manifest.described
        self.method = _checked(str, described["method"].get("name"), "method.name")
        self.box_rule: str = _checked(str, described["method"].get("box_rule"), "method.box_rule")
        sigma = described["method"].get("sigma")
        self.sigma = None if sigma is None else float(_checked(_NUMBER, sigma, "method.sigma"))
        self.items: int = _checked(int, described["source"].get("items"), "source.items")
        self.ids: str = _checked(str, described["source"].get("ids"), "source.ids")
        rows = described.get("rows")
        pixels = rows.get("max_pixels") if isinstance(rows, dict) else None
        self.max_pixels: int = pixels if isinstance(pixels, int) and pixels > 0 else MAX_PIXELS
        self.swaps = _swaps(rows.get("color_swap") if isinstance(rows, dict) else None)
        self.name = self.method
        # A run without any part has no columns either.
        columns = [*_SMALL, *(name for name, _ in SWAPPED if self.swaps)]
        expected = pa.schema([*COLUMNS, *(pa.field(*column) for column in SWAPPED)])
        table = results.table(columns) if len(results) else expected.empty_table().select(columns)
        # A folder may come from an untrusted source.
        if missing := set(columns) - set(table.column_names):
            raise InputError(f"parts in {str(results.folder)!r} must have a column {min(missing)!r}, got none")
        self.table: pa.Table = table
        self.number = {index: row for row, index in enumerate(self.table["index"].to_pylist())}
        self.rows_shown: list[dict[str, Any] | None] = []
        labels = results.manifest.made.get("labels")
        self._labels = labels if isinstance(labels, list) else []

    @property
    def classes(self) -> int:
        """Returns the number of classes that have names."""
        return len(self._labels)

    def load(self, indices: Sequence[int]) -> None:
        """Chooses the rows that are shown."""
        numbers = [self.number[index] for index in indices if index in self.number]
        rows = {row["index"]: row for row in self.table.take(pa.array(numbers, pa.int64())).to_pylist()}
        self.rows_shown = [rows.get(index) for index in indices]

    def class_name(self, index: int | None) -> str | None:
        """Returns the name of a class; a number where it has no name."""
        if index is None:
            return None
        named = 0 <= index < len(self._labels) and isinstance(self._labels[index], str)
        return self._labels[index] if named else f"class {index}"

    def predictions(self) -> np.ndarray:
        """Returns the class that the model gave each row the most to, -1 where none is known.

        The first of the top classes; where the run has none, the class that was explained.
        """
        return _numbers(pc.coalesce(self._nth("topk_index"), self.table["target"]))

    def swapped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the probability of each row's prediction, and the predictions for S swaps of colours.

        Returns:
            The probabilities, float64 `[N]`, NaN where none is stored; the predictions with colours swapped, int64
            `[N, S]`, -1 where none is stored; their probabilities of the class predicted before, float64 `[N, S]`.
        """
        positions = range(len(self.swaps))
        predictions = np.stack([_numbers(self._nth("swapped_index", n)) for n in positions], 1)
        scores = np.stack([_floats(self._nth("swapped_score", n)) for n in positions], 1)
        return _floats(self._nth("topk_score")), predictions, scores

    def _nth(self, column: str, n: int = 0) -> Any:
        return pc.list_element(pc.list_slice(self.table[column], n, n + 1, return_fixed_size_list=True), 0)

    def subjects(self) -> np.ndarray:
        """Returns the class that was explained, and the answer where a method explains none; -1 where none is known."""
        return _numbers(pc.coalesce(self.table["target"], self._nth("topk_index")))

    def scores(self) -> np.ndarray:
        """Returns the score of `subjects`, NaN where none is known."""
        return _floats(pc.coalesce(self.table["score"], self._nth("topk_score")))

    def labels(self) -> np.ndarray:
        """Returns the class that the source gave each row, -1 where it gave none."""
        return _numbers(self.table["label"])

    def data(self, intern: Word) -> dict[str, Any]:
        """Returns the run and its rows, column by column, JSON-ready."""
        rows = self.rows_shown
        status = pc.equal(self.table["status"], OK)
        explained = pc.sum(status, min_count=0).as_py()
        return {
            "name": self.name,
            "facts": self._facts(),
            "rows": self.table.num_rows,
            "errors": self.table.num_rows - explained,
            "columns": {
                # 0 for no row yet, 1 for an explanation, 2 for an error
                "status": [0 if row is None else 1 if row["status"] == OK else 2 for row in rows],
                "class": [row and intern(row["class_name"] or self.class_name(subject(row))) for row in rows],
                "answer": [row and _head(row["topk_index"], row["target"]) for row in rows],
                "score": [
                    row and _rounded(_head(row["topk_score"]) if row["score"] is None else row["score"]) for row in rows
                ],
                "top": [row and self._top(row, intern) for row in rows],
                "box": [row and _box(row) for row in rows],
                "swapped": [row and self._swapped(row, intern) for row in rows] if self.swaps else None,
                "ms": [row and _rounded(row["explain_ms"]) for row in rows],
                "error": [
                    None if row is None or row["status"] == OK else [intern(row["error_type"]), row["error_message"]]
                    for row in rows
                ],
            },
        }

    def _top(self, row: dict[str, Any], intern: Word) -> list[Any] | None:
        if not row["topk_index"] or not row["topk_score"]:
            return None
        names = row["topk_name"] or [self.class_name(index) for index in row["topk_index"]]
        return [
            part
            for name, score in zip(names, row["topk_score"], strict=False)
            for part in (intern(name), _rounded(score))
        ]

    def _swapped(self, row: dict[str, Any], intern: Word) -> list[Any] | None:
        """Returns for each swap the answer, its name, and the probability of the answer without a swap."""
        indices, scores = row["swapped_index"], row["swapped_score"]
        if not indices or not scores or len(indices) != len(self.swaps) or len(scores) != len(self.swaps):
            return None
        pairs = zip(indices, scores, strict=True)
        return [part for index, score in pairs for part in (index, intern(self.class_name(index)), _rounded(score))]

    def _facts(self) -> list[list[str]]:
        """Returns the manifest of the run as names and values for people."""
        facts = [["folder", str(self.results.folder)]]
        for part in ("model", "method", "source", "preprocess", "rows", "versions"):
            section = self.results.manifest.described.get(part)
            for key, value in section.items() if isinstance(section, dict) else ():
                facts.append([f"{part}.{key}", str(value)])
        return facts


def subject(row: Mapping[str, Any]) -> int | None:
    """Returns the class that was explained; the answer, where a method explains none."""
    return _head(row["topk_index"]) if row["target"] is None else row["target"]


def named_apart(runs: Sequence[Run]) -> None:
    """Gives runs of the same method names that differ."""
    methods = [run.method for run in runs]
    for n, run in enumerate(runs):
        if methods.count(run.method) > 1:
            run.name = f"{run.method} {n + 1} ({os.path.basename(str(run.results.folder))})"


def chosen(runs: Sequence[Run], limit: int | None) -> list[int]:
    """Returns the indices that are shown: all that have a row, or so many of them, evenly spread."""
    indices = sorted(set().union(*(run.number for run in runs)))
    if limit is None or len(indices) <= limit:
        return indices
    return [indices[n * len(indices) // limit] for n in range(limit)]


def _checked(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = {str: "a text", int: "a whole number"}.get(kind, "a number")
        raise InputError(f"{name} in {NAME} must be {expected}, got {value!r}")
    return value


def _head(values: list[Any] | None, otherwise: Any = None) -> Any:
    return values[0] if values else otherwise


def _swaps(orders: Any) -> list[list[int]]:
    if orders is None:
        return []
    if not isinstance(orders, list) or not orders or any(swap not in _ORDERS for swap in orders):
        raise InputError(f"rows.color_swap in {NAME} must hold channels 0 to 2 in other orders, got {orders!r}")
    return orders


def _numbers(column: Any) -> np.ndarray:
    return pc.fill_null(column, -1).to_numpy()


def _floats(column: Any) -> np.ndarray:
    return pc.fill_null(column, np.nan).to_numpy().astype(np.float64)


def _rounded(value: float | None) -> float | None:
    """Returns a number with the digits that are shown, so that the page is smaller."""
    return None if value is None else float(f"{value:.4g}")


def _box(row: dict[str, Any]) -> list[float] | None:
    """Returns a box as left, top, width and height in thousandths of the input."""
    if not row["box"] or len(row["box"]) != 4 or not row["input_width"] or not row["input_height"]:
        return None
    left, top, right, bottom = row["box"]
    x_scale, y_scale = 1000 / row["input_width"], 1000 / row["input_height"]
    sides = (left * x_scale, top * y_scale, (right + 1 - left) * x_scale, (bottom + 1 - top) * y_scale)
    return [round(side) for side in sides] if np.isfinite(sides).all() else None
