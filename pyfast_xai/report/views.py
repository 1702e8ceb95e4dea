"""The data set at a glance: how sure the model is, what it takes for what, and where the evidence lies."""

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.report.rows import Run, Word

BINS = 20
CLASSES = 24  # of a matrix: more cannot be read
MEANS = 120  # classes with a mean map
MEAN_SIDE = 32
COLORED = 300  # classes whose dependence on colour is listed
LOST = 0.25  # of its pictures, or fewer, keep the class: the paper counts such classes


def stretched(heatmap: Tensor) -> Tensor:
    """Returns a heat map `[1, H, W]` as `Means` takes it, `[h, w]`: stretched to 0..1."""
    return functional.adaptive_avg_pool2d(render.normalize(heatmap), MEAN_SIDE)[0].double()


class Means:
    """The mean heat map of each class."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: Counter[int] = Counter()

    def add(self, target: int | None, heat: Tensor) -> None:
        """Adds one heat map of a class, `stretched`; -1 stands for no class."""
        index = -1 if target is None else target
        self._sums[index] = self._sums[index] + heat if index in self._sums else heat
        self._counts[index] += 1

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields class, number of maps and their mean, the most frequent class first."""
        return ((index, count, self._sums[index] / count) for index, count in self._counts.most_common())


def data(run: Run, means: Means, dominant: list[tuple[int, int]], intern: Word) -> dict[str, Any]:
    """Returns the views of a run, JSON-ready.

    Args:
        run: of which all rows are counted.
        means: of the maps that are shown.
        dominant: class of the row and class that dominates its picture, of the rows that are shown; empty for methods
            without.
        intern: number of a name.
    """
    labels, predictions = run.labels(), run.predictions()
    labelled = (labels >= 0) & (predictions >= 0)
    pairs = list(zip(labels[labelled].tolist(), predictions[labelled].tolist(), strict=True))
    return {
        "right": int((labels[labelled] == predictions[labelled]).sum()),
        "labelled": int(labelled.sum()),
        "scores": _histogram(run, labels, predictions),
        "confusion": matrix(pairs, run, intern),
        "dominance": matrix(dominant, run, intern),
        "colors": colors(run, intern),
        "means": [
            [index, intern("all" if index < 0 else run.class_name(index)), count, packed(mean)]
            for index, count, mean in list(means)[:MEANS]
        ],
    }


def colors(run: Run, intern: Word) -> dict[str, Any] | None:
    """Returns how far answers depend on colour: the share that stays when red, green and blue trade places.

    As FGVis counts (section 4.3), over the pictures that were right; over all where the source gives no labels. A
    picture keeps its class where the model still answers it.

    Args:
        run: that knows, or None comes back.
        intern: number of a name.
    """
    if not run.swaps:
        return None
    labels, predictions = run.labels(), run.predictions()
    before, swapped, after = run.swapped()
    labelled = bool((labels >= 0).any())
    complete = (predictions >= 0) & (swapped >= 0).all(1) & np.isfinite(before) & np.isfinite(after).all(1)
    counted = complete & ((labels == predictions) | (not labelled))
    counts = {"labelled": labelled, "swaps": run.swaps, "pictures": int(counted.sum())}
    if not counted.any():
        return counts
    classes, order, numbers = np.unique(predictions[counted], return_inverse=True, return_counts=True)
    # Columns averaged over the pictures of each class: whether it stays, its score, and its score after each swap.
    values = np.column_stack([swapped == predictions[:, None], before, after])[counted]
    means = np.stack([np.bincount(order, column) for column in values.T], 1) / numbers[:, None]
    swaps = len(run.swaps)
    unchanged, scores, later = means[:, :swaps], means[:, swaps], means[:, swaps + 1 :]
    often = np.argsort(-numbers, kind="stable")[:COLORED]
    return {
        **counts,
        "classes": len(classes),
        "lost": int((unchanged.mean(1) <= LOST).sum()),
        "kept": values[:, :swaps].mean(0).tolist(),
        "rows": [
            [index, intern(run.class_name(index)), number, *figures]
            for index, number, *figures in zip(
                *(column[often].tolist() for column in (classes, numbers, unchanged, scores, later)), strict=True
            )
        ],
    }


def _histogram(run: Run, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any] | None:
    scores = run.scores().astype(np.float64)
    finite = np.isfinite(scores)
    if not finite.any():
        return None
    # Probabilities; neurons answer with what they like.
    low, high = min(0.0, scores[finite].min()), max(1.0, scores[finite].max())
    labelled = finite & (labels >= 0) & (predictions >= 0)
    parts = {
        "right": labelled & (labels == predictions),
        "wrong": labelled & (labels != predictions),
        "unknown": finite & ~labelled,
    }
    counts = {name: np.histogram(scores[rows], BINS, (low, high))[0].tolist() for name, rows in parts.items()}
    return {"low": low, "high": high, **counts}


def matrix(pairs: list[tuple[int, int]], run: Run, intern: Word) -> dict[str, Any] | None:
    """Returns how often each pair of classes comes, for the most frequent classes; the others are counted together.

    Args:
        pairs: of classes; the first is the row.
        run: that knows what classes are called.
        intern: number of a name.
    """
    if not pairs:
        return None
    occurrences = Counter(index for pair in pairs for index in pair)
    classes = sorted(index for index, _ in occurrences.most_common(CLASSES))
    position = {index: n for n, index in enumerate(classes)}
    extent = len(classes) + (len(occurrences) > len(classes))
    counts = np.zeros((extent, extent), int)
    for first, second in pairs:
        counts[position.get(first, extent - 1), position.get(second, extent - 1)] += 1
    names: list[Any] = [intern(run.class_name(index)) for index in classes]
    if extent > len(classes):
        classes, names = [*classes, -1], [*names, intern(f"{len(occurrences) - len(classes)} others")]
    return {"classes": classes, "names": names, "counts": counts.tolist()}


def packed(values: Tensor, zero: float | None = None) -> str:
    """Returns a map as text: height, width, the level below which nothing shows, and 256 levels from least to largest.

    Args:
        values: `[h, w]`, each side at most 255.
        zero: what is cut off after resizing; None for nothing.
    """
    low, high = float(values.min()), float(values.max())
    scale = 255 / (high - low) if high > low else 0.0
    level = 0 if zero is None else round(min(1.0, max(0.0, (zero - low) * scale / 255)) * 255)
    levels = ((values - low) * scale).round().to(torch.uint8)
    return base64.b64encode(bytes([*levels.shape, level]) + levels.numpy().tobytes()).decode()
