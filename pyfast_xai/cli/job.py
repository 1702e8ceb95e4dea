"""The work of `explain`, batch by batch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyfast_xai import render
from pyfast_xai.cli import results
from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess, load_image

if TYPE_CHECKING:
    from pyfast_xai.cli.progress import Bar
    from pyfast_xai.explainers import Explainer
    from pyfast_xai.models import LoadedModel

SIDE = 448  # about how many pixels the shorter side of a picture is drawn with
COLUMNS = 6  # of a sheet; what belongs together stays on one line


@dataclass
class Picture:
    """An image on its way through: its input, and what is drawn on."""

    path: Path
    stem: str
    input: Tensor  # [C, H, W]
    display: Tensor  # [3, zoom H, zoom W]
    size: tuple[int, int]  # (W, H) of the file, in pixels


@dataclass
class Job:
    """One call of `explain`: settings, and the loop over batches.

    Of a picture called a.jpg the results are a.METHOD.png and a.sheet.png, so that pictures whose names differ never
    share one.
    """

    loaded: "LoadedModel"
    explainers: "dict[str, Explainer]"
    target: int | None
    folder: Path
    device: str
    colormap: str
    alpha: float
    box_rule: str | None
    max_pixels: int

    @property
    def preprocess(self) -> Preprocess:
        return self.loaded.preprocess

    def run(self, files: Sequence[Path], batch_size: int, bar: "Bar") -> tuple[list[dict], list[dict]]:
        """Explain every file.

        Returns:
            A record for each image that was explained, and one for each that was not.
        """
        records: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        stems: set[str] = set()
        for start in range(0, len(files), batch_size):
            pictures = []
            for path in files[start : start + batch_size]:
                try:
                    pictures.append(self.open(path, _stem(path, stems)))
                except InputError as error:
                    errors.append({"file": str(path), "error": str(error)})
            try:
                records += self.explain(pictures)
            except InputError:
                # One image can spoil a batch; the fault of a setting shows in every one.
                if len(pictures) == 1 and not records:
                    raise
                done, failed = self.one_by_one(pictures)
                if not records and not done:
                    raise
                records += done
                errors += failed
            bar.advance(len(files[start : start + batch_size]))
        return records, errors

    def open(self, path: Path, stem: str) -> Picture:
        image = load_image(path, self.max_pixels)
        zoom = max(1, round(SIDE / min(self.preprocess.shape)))
        return Picture(path, stem, self.preprocess(image)[0], self.preprocess.shown(image, zoom), image.size)

    def one_by_one(self, pictures: Sequence[Picture]) -> tuple[list[dict], list[dict]]:
        records, errors = [], []
        for picture in pictures:
            try:
                records += self.explain([picture])
            except InputError as error:
                errors.append({"file": str(picture.path), "error": f"image {str(picture.path)!r}: {error}"})
        return records, errors

    def explain(self, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
        """Explain a batch by every method, write its pictures, and return a record for each image."""
        if not pictures:
            return []
        inputs = torch.stack([picture.input for picture in pictures]).to(self.device)
        displays = torch.stack([picture.display for picture in pictures])
        zoom = displays.shape[-1] // inputs.shape[-1]
        # All methods first: a batch that fails leaves no half of its pictures.
        explanations = {name: explainer(inputs, self.target) for name, explainer in self.explainers.items()}
        records: list[dict[str, Any]] = [
            {"file": str(p.path), "size": {"original": [p.size[1], p.size[0]], "input": list(inputs.shape[2:])}}
            for p in pictures
        ]
        # The sheet of each picture: lines of what is shown and its title.
        sheets: list[list[list[tuple[Tensor, str]]]] = [[[(p.display, p.path.name)]] for p in pictures]
        keys: dict[render.Key, None] = {}  # each one time, in order
        for name, explanation in explanations.items():
            keys |= dict.fromkeys(explanation.keys(self.colormap))
            boxes = explanation.boxes(self.box_rule).cpu()
            drawings = explanation.overlay(displays, alpha=self.alpha, colormap=self.colormap)
            drawings = render.draw_boxes(drawings, results.zoomed(boxes, zoom))
            colours = None if explanation.attribution is None else explanation.rgb()
            for n, picture in enumerate(pictures):
                overlay = f"{picture.stem}.{name}.png"
                results.write_png(self.folder / overlay, render.to_pil(drawings[n]))
                points = None if explanation.points is None else explanation.points[n].cpu()
                records[n][name] = {**self.record(explanation, n, boxes[n], points, picture), "overlay": overlay}
                cells = [(drawings[n], _title(name, records[n][name]))]
                if colours is not None:
                    cells.append((colours[n], f"{name} in colour"))
                if len(sheets[n][-1]) + len(cells) > COLUMNS:
                    sheets[n].append([])
                sheets[n][-1] += cells
        keys[render.Key("box")] = None
        for picture, record, lines in zip(pictures, records, sheets, strict=True):
            record["sheet"] = f"{picture.stem}.sheet.png"
            images = [[image for image, _ in line] for line in lines]
            titles = [[title for _, title in line] for line in lines]
            sheet = render.montage(images, titles=titles, side=SIDE, keys=list(keys))
            results.write_png(self.folder / record["sheet"], sheet)
        return records

    def record(self, explanation: Any, n: int, box: Tensor, points: Any, picture: Picture) -> dict[str, Any]:
        """Returns the record of one image by one method."""
        record: dict[str, Any] = {}
        if explanation.target is not None:
            target = int(explanation.target[n])
            names = self.loaded.labels
            record["target"] = target
            record["class"] = names[target] if names and target < len(names) else None
        if explanation.score is not None:
            record["score"] = float(explanation.score[n])
        has_box = not bool(box.isnan().any())
        original = self.preprocess.boxes_in(box[None], picture.size)[0]
        record["box"] = {
            "original": original.int().tolist() if has_box else None,
            "input": box.int().tolist() if has_box else None,
        }
        if points is not None:
            placed = self.preprocess.points_in(points, picture.size)
            record["points"] = {"original": placed.tolist(), "input": points.tolist()}
        return record


def _stem(path: Path, used: set[str]) -> str:
    """Returns a name for the results of an image that no other image has, not even where letter case does not count."""
    # Room for what is appended, in bytes, as file systems count.
    stem = os.fsdecode(os.fsencode(path.stem or path.name)[:160])
    name, number = stem, 1
    while name.casefold() in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name.casefold())
    return name


def _title(method: str, record: dict[str, Any]) -> str:
    if "target" not in record:
        return method
    name = record["class"] or f"class {record['target']}"
    return f"{method}: {name}" + (f" {record['score']:.0%}" if "score" in record else "")
