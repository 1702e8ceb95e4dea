"""The result of an evaluation: figures with intervals, as a table, as files and as a plot."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation.metrics import METRICS


@dataclass(frozen=True)
class Figure:
    """A figure of one method, metric and subset of pictures.

    Attributes:
        method: the method that was measured.
        metric: its name in `METRICS`.
        subset: "all" pictures, or the "small" ones, whose largest object covers under a quarter.
        value: the figure; shares are 0..1.
        low: lower end of the 95 % interval over pictures.
        high: upper end.
        pictures: the pictures that counted.
    """

    method: str
    metric: str
    subset: str
    value: float
    low: float
    high: float
    pictures: int


def interval(
    rows: Tensor, reduce: Callable[[Tensor, Tensor], Tensor], resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns a figure and its 95 % interval by the percentile bootstrap over pictures (Efron, 1979).

    Args:
        rows: numbers of each picture, float64 `[N, ...]`.
        reduce: from sums `[R, ...]` over `[R]` pictures to R figures.
        resamples: how often N pictures are drawn, with replacement; 0 for no interval.
        seed: seed of the draws.

    Returns:
        The figure and both ends; NaN without pictures, or without resamples.
    """
    count = len(rows)
    if count == 0:
        return (torch.nan,) * 3
    value = float(reduce(rows.sum(0, keepdim=True), torch.tensor([float(count)]))[0])
    if resamples == 0:
        return value, torch.nan, torch.nan
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    often = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    totals = (often @ rows.reshape(count, -1)).view(resamples, *rows.shape[1:])
    figures = reduce(totals, torch.full((resamples,), float(count), dtype=torch.float64))
    low, high = figures.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


def subsets(rows: Tensor, small: Tensor) -> dict[str, Tensor]:
    """Returns the pictures that count, of all and of those with small objects, each bool `[N]`.

    Args:
        rows: numbers of each picture, `[N, ...]`; NaN for a picture that does not count.
        small: whether the objects of a picture are small, bool `[N]`.
    """
    counted = ~rows.reshape(len(rows), -1).isnan().any(1)
    return {"all": counted, "small": counted & small}


@dataclass
class Evaluation:
    """Figures of some methods on some pictures.

    Attributes:
        figures: one for each method, metric and subset.
        cost: cost of each method, in forward passes of the model on the same images, median over batches.
        pictures: the pictures that were measured.
        small: how many of them have small objects only.
        errors: pictures that could not be read, and why.
        threads: number of threads of torch.
        device: device of the model.
        rows: numbers of each picture by method and metric, float64 `[pictures, ...]`; NaN where a picture lacks what
            the metric needs.
        is_small: whether the objects of a picture are small, bool `[pictures]`.
    """

    figures: list[Figure]
    cost: dict[str, float]
    pictures: int
    small: int
    errors: list[tuple[str, str]] = field(default_factory=list)
    threads: int = 1
    device: str = "cpu"
    rows: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)
    is_small: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), repr=False)

    def figure(self, method: str, metric: str, subset: str = "all") -> Figure:
        """Returns one of the figures.

        Raises:
            InputError: it was not measured.
        """
        for figure in self.figures:
            if (figure.method, figure.metric, figure.subset) == (method, metric, subset):
                return figure
        raise InputError(f"figure must be one that was measured, got {metric!r} of {method!r} on {subset!r}")

    def difference(
        self, method: str, other: str, metric: str, subset: str = "all", resamples: int = 1000, seed: int = 0
    ) -> Figure:
        """Returns how far the figure of a method lies above that of another, with a paired interval.

        Both are taken on the same pictures, which are drawn together: what makes a picture hard for both cancels, so
        two methods can differ for certain where their own intervals overlap.

        Args:
            method: the method.
            other: the method whose figure is subtracted.
            metric: one that was measured.
            subset: "all" pictures or the "small" ones.
            resamples: how often the pictures are drawn, with replacement.
            seed: seed of the draws.

        Returns:
            The difference with its 95 % interval; its method is "METHOD - OTHER". An interval without zero is a
            difference beyond chance, as far as one comparison goes.

        Raises:
            InputError: one of them was not measured.
        """
        for name in (method, other):
            self.figure(name, metric, subset)
        rows = [self.rows[name, metric] for name in (method, other)]
        selected = torch.stack([subsets(values, self.is_small)[subset] for values in rows]).all(0)

        def reduce(total: Tensor, count: Tensor) -> Tensor:
            return METRICS[metric].reduce(total[:, 0], count) - METRICS[metric].reduce(total[:, 1], count)

        ends = interval(torch.stack([values[selected] for values in rows], 1), reduce, resamples, seed)
        return Figure(f"{method} - {other}", metric, subset, *ends, int(selected.sum()))

    def columns(self) -> list[tuple[str, str]]:
        """Returns the metric and subset of each column of the table: small objects where places are compared."""
        return list(
            dict.fromkeys(
                (figure.metric, figure.subset)
                for figure in self.figures
                if figure.subset == "all" or set(METRICS[figure.metric].needs) & {"boxes", "mask"}
            )
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Returns the heads and rows: a row a method, a column a metric and subset, with half the interval."""
        heads = ["method", "cost, forwards"]
        for name, subset in self.columns():
            metric = METRICS[name]
            heads.append(f"{metric.title}{', small' if subset == 'small' else ''} {_ARROWS[metric.better]}")
        rows = []
        for method, cost in self.cost.items():
            cells = [method, f"{cost:.2f}"]
            for name, subset in self.columns():
                figure = self.figure(method, name, subset)
                spread = (figure.high - figure.low) / 2
                cells.append(
                    METRICS[name].shown(figure.value)
                    + ("" if spread != spread else f" ± {METRICS[name].shown(spread)}")
                )
            rows.append(cells)
        return heads, rows

    def markdown(self) -> str:
        """Returns the table for a document."""
        heads, rows = self.table()
        lines = [heads, ["---"] * len(heads), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"

    def write(self, folder: str | Path) -> list[Path]:
        """Writes `evaluation.csv`, `evaluation.json` and, if matplotlib is installed, a plot for each metric.

        Args:
            folder: made if it is not there.

        Returns:
            The paths written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(figure), "cost_forwards": self.cost[figure.method]} for figure in self.figures]
        paths = [folder / "evaluation.csv", folder / "evaluation.json"]
        with paths[0].open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        whole = {
            **{"pictures": self.pictures, "small": self.small, "threads": self.threads, "device": self.device},
            **{"figures": rows, "errors": [{"file": name, "error": error} for name, error in self.errors]},
        }
        paths[1].write_text(json.dumps(whole, indent=1) + "\n")
        for metric in dict.fromkeys(figure.metric for figure in self.figures):
            try:
                figure = self.plot(metric)
            except ImportError:
                break
            paths.append(folder / f"{metric}.png")
            figure.savefig(paths[-1], dpi=150)
        return paths

    def plot(self, metric: str, subsets: Sequence[str] = ("all", "small")) -> Any:
        """Plots accuracy against cost: a point a method with its interval, a panel a subset.

        Args:
            metric: one that was measured.
            subsets: panels; those that were not measured are left out.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed (the extra `plot`).
        """
        from matplotlib.figure import Figure as Canvas

        chosen, available = METRICS[metric], {figure.subset for figure in self.figures if figure.metric == metric}
        shown = [subset for subset in subsets if subset in available]
        scale = 100 if chosen.percent else 1
        canvas = Canvas(figsize=(5.6 * len(shown), 4.2), layout="constrained")
        for axes, subset in zip(canvas.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for method, cost in self.cost.items():
                figure = self.figure(method, metric, subset)
                value = scale * figure.value
                spread = [[max(0.0, value - scale * figure.low)], [max(0.0, scale * figure.high - value)]]
                axes.errorbar(max(cost, 0.01), value, yerr=spread, fmt="o", capsize=2, markersize=5)
                axes.annotate(method, (max(cost, 0.01), value), (5, 4), textcoords="offset points", fontsize=7)
            axes.set_xscale("log")
            axes.set_xlabel("cost, forward passes of the model")
            axes.set_ylabel(f"{chosen.title}, {chosen.better} is better")
            axes.set_title("all pictures" if subset == "all" else "small objects only", fontsize=10)
            axes.grid(alpha=0.25)
            axes.margins(x=0.15)
        return canvas


_ARROWS = {"lower": "↓", "higher": "↑"}
