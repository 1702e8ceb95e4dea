"""FGVis (Wagner et al., 2019)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfast_xai import metrics, render
from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Centre
from pyfast_xai.explainers import LIME, RISE, FGVis, GradCAM, Occlusion
from pyfast_xai.explainers.fgvis import GAMES
from pyfast_xai.images import load_image
from pyfast_xai.metrics.faithfulness import SWAPS
from pyfast_xai.models import LoadedModel
from pyfast_xai.reproduce import lesions
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome, percent
from pyfast_xai.reproduce.protocol import Make, measured

NETWORKS = ("vgg16", "alexnet", "resnet50", "googlenet")
# Table 1: percent of absent classes that could be generated, undefended and defended.
TABLE_1 = {"vgg16": (100.0, 0.2), "alexnet": (100.0, 0.0), "resnet50": (100.0, 0.0), "googlenet": (100.0, 0.0)}
# Table 2: area under the deletion curve; ResNet-50, VGG-16.
TABLE_2 = {
    "Grad-CAM": (0.1232, 0.1087),
    "sliding window": (0.1421, 0.1158),
    "LIME": (0.1217, 0.1014),
    "RISE": (0.1076, 0.0980),
    "FGVis": (0.0644, 0.0636),
}


def _family(name: str, known: Sequence[str]) -> str | None:
    return next((family for family in known if name.startswith(family)), None)


def _sure(loaded: LoadedModel, data: Data, count: int, least: float = 0.995) -> Tensor:
    """Returns the pictures that the network classifies correctly with at least this probability."""
    selected: list[Tensor] = []
    pictures = replace(data, count=None).imagenet()
    for start in range(0, len(pictures), data.batch_size):
        part = pictures[start : start + data.batch_size]
        images = data.inputs(part, loaded.preprocess)
        with torch.no_grad():
            shares = loaded.model(images).softmax(1)
        labels = torch.tensor([int(entry.label or 0) for entry in part], device=images.device)
        selected += list(images[shares.gather(1, labels[:, None])[:, 0] >= least])
        if len(selected) >= count:
            break
    if not selected:
        raise InputError(f"data must hold pictures that {loaded.name} is sure of, got none with p >= {least}")
    return torch.stack(selected[:count])


def table_1(data: Data) -> Outcome:
    """Measures Table 1: the rate at which explanations of absent classes can be generated."""
    rows, count = [], data.at_most(32).count or 32
    for loaded in data.networks(NETWORKS):
        images = _sure(loaded, data, count)
        for defence in ("none", "gradient"):
            game: dict[str, Any] = {"game": "generation", "sparsity": 0.0, "stop_at": "class", "patience": 0}
            explain = FGVis(loaded.model, defence=defence, n_iterations=100, **game)
            shares = []
            for part in images.split(data.batch_size):
                shares.append(metrics.adversarial_evidence(loaded.model, explain, part).generated)
                data.advance(f"{loaded.name}, {defence} defence", len(part))
            generated = torch.cat(shares).float().mean()
            family = _family(loaded.name, NETWORKS)
            paper = "-" if family is None else f"{TABLE_1[family][defence == 'gradient']:.1f}"
            rows.append([loaded.name, defence, paper, percent(float(generated)), str(len(images))])
    heads = ["network", "defence", "paper", "generated", "pictures"]
    deviations = [
        "The paper takes 1000 pictures; here as many of those the network is sure of (p >= 0.995) as asked for, and at "
        "most 100 iterations of a search that stops at the class."
    ]
    return Outcome("FGVis, Table 1: absent classes that can be generated, percent", heads, rows, deviations)


def table_2(data: Data) -> Outcome:
    """Measures Table 2: the area under the deletion curve."""
    pictures = data.at_most(24).imagenet()
    methods: dict[str, Make] = {
        "centre": Centre,
        "Grad-CAM": GradCAM,
        "sliding window": Occlusion,
        "LIME": LIME,
        "RISE": partial(RISE, n_masks=2000),
        "FGVis": partial(FGVis, game="deletion"),
    }
    rows: list[list[str]] = []
    deviations: list[str] = []
    networks, metrics = ("resnet50", "vgg16"), ("deletion", "insertion")
    for loaded, result in measured(data, networks, methods, metrics, pictures, deviations, resamples=1000):
        family = _family(loaded.name, networks)
        for method in result.cost:
            paper = "-" if family is None or method not in TABLE_2 else f"{TABLE_2[method][family == 'vgg16']:.4f}"
            figure = result.figure(method, "deletion")
            cells = [f"{figure.value:.4f}", f"{figure.low:.4f} to {figure.high:.4f}"]
            cells += [f"{result.figure(method, 'insertion').value:.4f}", f"{result.cost[method]:.0f}"]
            rows.append([loaded.name, method, paper, *cells])
    heads = ["network", "method", "paper", "deletion AUC", "95 % interval", "insertion AUC", "cost, forwards"]
    deviations.append(
        f"{len(pictures)} pictures instead of ILSVRC's validation set; RISE has 2000 masks instead of 8000; steps of "
        "the deletion are those of RISE's evaluator, 28 of 1792 pixels."
    )
    return Outcome("FGVis, Table 2: area under the deletion curve", heads, rows, deviations)


def color_swap(data: Data) -> Outcome:
    """Measures section 4.3: the classes that the model knows by their colour."""
    pictures = data.imagenet()
    rows = []
    for loaded in data.networks(("vgg16",)):
        unchanged: dict[int, list[bool]] = defaultdict(list)
        for start in range(0, len(pictures), data.batch_size):
            part = pictures[start : start + data.batch_size]
            shown = [load_image(entry.path) for entry in part]
            classes = [
                _predictions(loaded, data, shown),
                *(_predictions(loaded, data, [_swapped(i, s) for i in shown]) for s in SWAPS),
            ]
            for i, entry in enumerate(part):
                if classes[0][i] == entry.label:
                    unchanged[entry.label] += [answers[i] == entry.label for answers in classes[1:]]
            data.advance(f"{loaded.name}, colour swap", len(part))
        every = [stays for answers in unchanged.values() for stays in answers]
        lost = sum(sum(answers) <= 0.25 * len(answers) for answers in unchanged.values())
        share = sum(every) / max(1, len(every))
        rows.append([loaded.name, str(len(every) // len(SWAPS)), percent(share), f"{lost} of {len(unchanged)}"])
    heads = ["network", "pictures that are right", "keep their label", "classes that lose 75 % of theirs"]
    deviations = [
        f"Of {len(pictures)} pictures most classes have one or two. The paper, on VGG-16 and ILSVRC's whole validation "
        "set: minivan keeps its label in 83.3 % of 21, school bus in 8.3 % of 42; 80 classes lose 75 % and more."
    ]
    return Outcome("FGVis, section 4.3: labels kept when colours trade places, percent", heads, rows, deviations)


def _predictions(loaded: LoadedModel, data: Data, shown: Sequence[Any]) -> list[int]:
    images = torch.stack([loaded.preprocess(image)[0] for image in shown]).to(data.device)
    with torch.no_grad():
        return loaded.model(images).argmax(1).tolist()


def _swapped(image: Any, swap: Sequence[int]) -> Any:
    from PIL import Image

    bands = image.split()
    return Image.merge("RGB", [bands[i] for i in swap])


def games(data: Data) -> Outcome:
    """Draws Figs. 1 and 5: the four games, with and without defence."""
    pictures = data.at_most(3).imagenet()
    shown = {}
    for loaded in data.networks(("resnet50",)):
        images = data.inputs(pictures, loaded.preprocess)
        rows, names = [list(data.shown(pictures, loaded.preprocess))], ["image"]
        for defence in ("gradient", "none"):
            for game in GAMES:
                settings: dict[str, Any] = {"game": game, "defence": defence}
                explanation = FGVis(loaded.model, n_iterations=200, **settings)(images)
                rows.append(list(explanation.rgb()))
                names.append(f"{game}{', undefended' if defence == 'none' else ''}")
                data.advance(f"{loaded.name}, {game}", len(images))
        shown[loaded.name] = render.montage(rows, labels=names)
    return Outcome("FGVis: the four games", [], [], pictures=shown)


EXPERIMENTS: dict[str, Experiment] = {
    "table-1": table_1,
    "table-2": table_2,
    "table-3": lesions.table_3,
    "color-swap": color_swap,
    "games": games,
}
