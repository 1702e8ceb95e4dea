"""What every explainer returns."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfast_xai import localize, render
from pyfast_xai.errors import InputError


@dataclass(eq=False)
class Explanation:
    """Why a model answered as it did, for a batch of images.

    Tensors stay on the device of the input until someone asks for something else.

    Where several targets or components of an image were asked for, each is a row, image by image.

    Attributes:
        method: the explainer that made it.
        heatmap: float32 `[N, H, W]` at the resolution of the input, >= 0, larger is more important.
        target: the class (or neuron) explained, int64 `[N]`; None where the method needs none.
        score: the model's probability for the target (the activation, for a neuron), float32 `[N]`.
        points: fixations of each row, int64 `[P, 2]` as (y, x) pixels of the input; None for other methods.
        attribution: signed, one number for each number of the image, `[N, C, H, W]`; None for methods without.
        map: the method's own signed map at the resolution of its layer, `[N, h, w]`; None where there is none.
        winner: the dominant class of every pixel, int64 `[N, H, W]`, -1 where there is none; None for methods without.
        images: what was explained, `[N, C, H, W]`, as the model took it; the ground of pictures.
        threshold: share of its range at which `boxes` cuts the heat map by default.
        labels: names of the classes, used in pictures and files.
    """

    method: str
    heatmap: Tensor
    target: Tensor | None = None
    score: Tensor | None = None
    points: list[Tensor] | None = None
    attribution: Tensor | None = None
    map: Tensor | None = None
    winner: Tensor | None = None
    images: Tensor | None = None
    threshold: float = 0.15
    labels: list[str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.heatmap)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "Explanation":
        """Some of the rows; an int gives an explanation of one."""
        if not isinstance(rows, (int, slice)):
            chosen: dict[str, Any] = {
                name: value[torch.tensor(rows, dtype=torch.int64, device=value.device)]
                if isinstance(value, Tensor)
                else [value[row] for row in rows]
                for name, value in self._by_row().items()
            }
            return replace(self, **chosen)
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row must lie in [{-len(self)}, {len(self)}), got {rows}")
            rows = slice(rows, rows + 1 or None)
        parts: dict[str, Any] = {name: value[rows] for name, value in self._by_row().items()}
        return replace(self, **parts)

    def __iter__(self) -> Iterator["Explanation"]:
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device | str) -> "Explanation":
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]
            for name, value in self._by_row().items()
        }
        return replace(self, **moved)

    def _by_row(self) -> dict[str, Any]:
        """What has one entry a row."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {
            name: value for name, value in values.items() if isinstance(value, Tensor) or (name == "points" and value)
        }

    # Other libraries

    def numpy(self) -> np.ndarray:
        """The heat map as a NumPy array `[N, H, W]`."""
        return self.heatmap.detach().cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array.astype(dtype) if dtype is not None else array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.heatmap.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.heatmap.__dlpack_device__()

    # Places

    def boxes(self, threshold: float | None = None) -> Tensor:
        """One box an image around the evidence, float32 `[N, 4]` as (x1, y1, x2, y2) in inclusive pixels of the input.

        Args:
            threshold: cut the heat map at this share of its range and take the largest 8-connected segment. None
                takes the hull of the fixations where there are any, else the explainer's own threshold.

        Returns:
            Boxes; a row of NaN where there is no evidence.
        """
        if threshold is None and self.points is not None:
            return localize.hull(self.points).to(self.heatmap.device)
        return localize.largest_segment(self.heatmap, self.threshold if threshold is None else threshold)

    def peak(self) -> Tensor:
        """Where each heat map is largest, int64 `[N, 2]` as (y, x) pixels of the input."""
        return localize.peak(self.heatmap)

    # Pictures

    def overlay(self, images: Tensor | None = None, alpha: float = 0.5, colormap: str = "turbo") -> Tensor:
        """The heat map over the images, float32 `[N, 3, H, W]` in 0..1, with fixations drawn where there are any.

        Dominant classes, where there are any, are shown in their colours over the images in grey, see `legends`.

        Args:
            images: `[N, C, H', W']` to draw on; None for those that were explained.
            alpha: opacity where the map is hottest; how far the images are darkened under dominant classes.
            colormap: "turbo", "jet", "viridis", "inferno" or "gray"; dominant classes have their own.
        """
        ground = self.images if images is None else images
        if ground is None:
            raise InputError("images must be given to an explanation that does not hold its own, got None")
        if self.winner is not None and self.map is not None:
            return render.overlay_dominance(render.for_display(ground), self.winner, self.map, alpha=alpha)
        shown = render.overlay(render.for_display(ground), self.heatmap, alpha=alpha, colormap=colormap)
        if self.points is None:
            return shown
        scale = torch.tensor([shown.shape[-2] / self.heatmap.shape[-2], shown.shape[-1] / self.heatmap.shape[-1]])
        return render.draw_points(shown, [((p.cpu() + 0.5) * scale).long() for p in self.points])

    def rgb(self) -> Tensor:
        """The attribution as pictures `[N, 3, H, W]` in 0..1, each stretched from its least to its largest value.

        As in Nie et al., 2018: signed, so that what has no influence is a mid grey. Of any other number of channels
        than three the mean is shown.

        Raises:
            InputError: the method has no attribution.
        """
        if self.attribution is None:
            raise InputError(f"attribution must be there to be shown, got an explanation by {self.method}")
        shown = self.attribution.float()
        if shown.shape[1] != 3:
            shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return render.stretch(shown)

    def binary(self, constant: bool = False) -> Tensor:
        """What speaks for the target and what against it, `[N, 3, H, W]` in 0..1; see `render.binary`.

        Args:
            constant: False for the heat map, hot for the target and green for others; True for plain red and blue.

        Raises:
            InputError: the method knows no dominant classes.
        """
        if self.winner is None or self.map is None or self.target is None:
            raise InputError(f"winner must be there to be shown, got an explanation by {self.method}")
        own = self.winner == self.target[:, None, None]
        # Where the target dominates, no other is larger; where it does not, it is not the larger one.
        nothing = torch.full_like(self.map, -torch.inf)
        return render.binary(torch.where(own, self.map, nothing), torch.where(own, nothing, self.map), constant)

    def legends(self, side: int = 192) -> list[Any]:
        """The dominant classes of each image in the colours of `overlay`, largest first, as PIL images.

        Args:
            side: width in pixels.

        Raises:
            InputError: the method knows no dominant classes.
        """
        if self.winner is None or self.map is None:
            raise InputError(f"winner must be there to be shown, got an explanation by {self.method}")
        legends = []
        for i, hues in enumerate(render.class_hues(self.winner, self.map)):
            seen = next(iter(render.class_hues(self.winner[i : i + 1], self.map[i : i + 1])))
            legends.append(render.legend([self._name(c) for c in seen], [hues[c] for c in seen], side))
        return legends

    def _name(self, index: int) -> str:
        return self.labels[index] if self.labels and index < len(self.labels) else f"class {index}"

    def captions(self) -> list[str]:
        """A line for each image: class and probability."""
        if self.target is None:
            return [self.method] * len(self)
        lines = []
        for i in range(len(self)):
            score = "" if self.score is None else f" {float(self.score[i]):.0%}"
            lines.append(f"{self._name(int(self.target[i]))}{score}")
        return lines

    def plot(self, images: Tensor | None = None, columns: int = 4) -> Any:
        """A contact sheet of overlays, as a PIL image; dominant classes have their legends below."""
        shown, captions = self.overlay(images), self.captions()
        legends = [] if self.winner is None else [render.from_pil(legend) for legend in self.legends()]
        rows, titles = [], []
        for i in range(0, len(shown), columns):
            rows.append(list(shown[i : i + columns]))
            titles.append(captions[i : i + columns])
            if legends:
                rows.append(legends[i : i + columns])
                titles.append([])
        return render.montage(rows, titles=titles)

    def save(self, folder: str | Path, names: list[str] | None = None) -> list[Path]:
        """Write one overlay PNG an image and `<method>.json` with targets, scores, boxes and points.

        Args:
            folder: made if it is not there.
            names: stems of the files; None numbers them.

        Returns:
            The paths written, the JSON last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{i:04d}" for i in range(len(self))] if names is None else names
        if len(names) != len(self):
            raise InputError(f"names must be one for each of {len(self)} images, got {len(names)}")
        paths = []
        boxes = self.boxes()
        for name, picture, box in zip(names, self.overlay(), boxes, strict=True):
            path = folder / f"{name}.{self.method}.png"
            path.write_bytes(render.png_bytes(render.to_pil(render.draw_boxes(picture[None], box[None].cpu())[0])))
            paths.append(path)
        table = folder / f"{self.method}.json"
        table.write_text(json.dumps([{"name": n, **row} for n, row in zip(names, self.rows(), strict=True)], indent=1))
        return [*paths, table]

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready record an image: method, size, target, score, box and points."""
        boxes = self.boxes().cpu()
        records = []
        for i in range(len(self)):
            record: dict[str, Any] = {"method": self.method, "size": list(self.heatmap.shape[-2:])}
            if self.target is not None:
                record["target"] = self.target[i].tolist()
            if self.score is not None:
                record["score"] = self.score[i].tolist()
            record["box"] = None if bool(boxes[i].isnan().any()) else boxes[i].tolist()
            if self.points is not None:
                record["points"] = self.points[i].tolist()
            records.append(record)
        return records

    def _repr_png_(self) -> bytes | None:
        if self.images is None:
            return None
        return render.png_bytes(self[:16].plot())
