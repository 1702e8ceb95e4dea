"""The outcome of an experiment, beside the figures of its paper."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyfast_xai import render
from pyfast_xai.reproduce.data import Data


@dataclass
class Outcome:
    """A table, pictures, and the deviations from the paper.

    Attributes:
        title: what was measured.
        heads: headings of the columns.
        rows: cells, as text.
        deviations: differences from the paper: networks, data, protocol.
        pictures: PIL images by name.
    """

    title: str
    heads: Sequence[str]
    rows: list[list[str]]
    deviations: Sequence[str] = ()
    pictures: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Returns the table for a document, with the deviations below."""
        lines = [self.title, ""]
        if self.rows:
            lines += [f"| {' | '.join(cells)} |" for cells in (self.heads, ["---"] * len(self.heads), *self.rows)]
            lines.append("")
        if self.deviations:
            lines += ["Not as in the paper:", "", *(f"- {difference}" for difference in self.deviations), ""]
        return "\n".join(lines)

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Writes `<name>.md`, `<name>.csv` if there is a table, and a PNG for each picture.

        Args:
            folder: made if it is not there.
            name: name of the experiment.

        Returns:
            The paths written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.md"]
        paths[0].write_text(self.markdown())
        if self.rows:
            paths.append(folder / f"{name}.csv")
            with paths[-1].open("w", newline="") as file:
                csv.writer(file).writerows([self.heads, *self.rows])
        for title, picture in self.pictures.items():
            paths.append(folder / f"{name}.{title}.png")
            paths[-1].write_bytes(render.png_bytes(picture))
        return paths


Experiment = Callable[[Data], Outcome]


def percent(share: float) -> str:
    """Returns a share as tables have it; a dash for none."""
    return "-" if share != share else f"{100 * share:.1f}"
