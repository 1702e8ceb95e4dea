"""CNN-Fixations, section IV-F, and Eigen-CAM, section IV-B: what becomes of explanations of adversarial images."""

from typing import Any

import torch

from pyfast_xai import metrics, render
from pyfast_xai.explainers import EigenCAM
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Outcome
from pyfast_xai.reproduce.protocol import METHODS, Make, fitting, mean_of, rows_of

STABLE: dict[str, Make] = {**METHODS, "Eigen-CAM": EigenCAM}
"""The methods of both papers' tables."""


def adversarial(data: Data) -> Outcome:
    """Measures how explanations move, and whether they still show the object, where DeepFool changes the class."""
    pictures = data.at_most(60).imagenet()
    rows: list[list[str]] = []
    deviations: list[str] = []
    shown: dict[str, Any] = {}
    for loaded in data.networks(("vgg16",)):
        images = data.inputs(pictures, loaded.preprocess)
        moved = torch.cat([metrics.deepfool(loaded.model, part) for part in images.split(data.batch_size)])
        with torch.no_grad():
            changed = loaded.model(images).argmax(1) != loaded.model(moved).argmax(1)
        data.advance(f"{loaded.name}, DeepFool", len(images))
        count = f"{int(changed.sum())} of {len(images)}"
        usable, reasons = fitting(STABLE, loaded, images[:1])
        deviations += reasons
        if not bool(changed.any()):
            rows += [[loaded.name, method, count, *["-"] * 6] for method in usable]
            continue
        truth = [pictures[i] for i in changed.nonzero().flatten().tolist()]
        ground = data.shown(truth[:4], loaded.preprocess)
        sheet, labels = [], []
        for method, make in usable.items():
            explainer = make(loaded.model)
            before, after = explainer(images[changed]), explainer(moved[changed])
            cells = [
                mean_of(metrics.cosine_similarity(before.heatmap, after.heatmap), data),
                mean_of(metrics.iou(before.boxes(), after.boxes()), data),
            ]
            for metric in ("box-error", "pointing"):
                for explanation in (before, after):
                    values = rows_of(metric, explainer, explanation, truth, loaded.preprocess)
                    cells.append(mean_of(values, data, scale=100, digits=1))
            rows.append([loaded.name, method, count, *cells])
            sheet += [list(before[:4].overlay(ground)), list(after[:4].overlay(ground))]
            labels += [method, f"{method}, attacked"]
            data.advance(f"{loaded.name}, {method} under DeepFool", len(truth))
        shown[loaded.name] = render.montage(sheet, labels=labels)
    deviations += [
        f"The papers show two pictures each, by VGG-16; these are means over those of {len(pictures)} pictures whose "
        "class DeepFool changes, and ± is half of the 95 % interval over pictures.",
        "Each method explains the class that the network sees, before and after; boxes are those of the methods' "
        "defaults, right if they overlap the object by half, whatever the class.",
    ]
    heads = ["network", "method", "class changed", "cosine of maps", "overlap of boxes"]
    for metric in ("box error, %", "pointing, %"):
        heads += [metric, f"{metric}, attacked"]
    title = "CNN-Fixations, Fig. 9, and Eigen-CAM, Fig. 4: explanations before and after DeepFool"
    return Outcome(title, heads, rows, deviations, shown)
