"""CNN-Fixations (Mopuri, Garg and Babu, 2018)."""

from functools import partial
from typing import Any

import torch

from pyfast_xai import metrics, render
from pyfast_xai.evaluation import Annotation, Centre
from pyfast_xai.explainers import CNNFixations
from pyfast_xai.images import find_images, load_image
from pyfast_xai.reproduce import captions, saliency, stability
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome
from pyfast_xai.reproduce.protocol import METHODS, Make, fitting, like, measured, placed

NETWORKS = ("alexnet", "vgg16", "googlenet", "resnet101", "densenet121")
# Table I: top-1 localisation error, percent; AlexNet, VGG-16, GoogLeNet, ResNet-101, DenseNet-121.
TABLE_1 = {
    "Backprop": (65.17, 61.12, 61.31, 57.97, 67.49),
    "CAM": (67.19, 57.20, 60.09, 48.34, 55.37),
    "cMWP": (72.31, 64.18, 69.25, 65.94, 64.97),
    "Grad-CAM": (71.16, 56.51, 74.26, 64.84, 75.29),
    "CNN-Fixations": (65.70, 55.22, 57.53, 54.31, 56.72),
}
# Table III: mean recall and precision of a single proposal on PASCAL VOC 2007.
TABLE_3 = {
    "Backprop": ".32/.36",
    "CAM": ".30/.33",
    "cMWP": ".23/.26",
    "Grad-CAM": ".18/.21",
    "CNN-Fixations": ".32/.36",
}


def table_1(data: Data) -> Outcome:
    """Measures Table I: whether the box lies on the object, as the top-1 localisation error on ILSVRC."""
    pictures = data.imagenet()
    metrics = ["top1-box-error", "box-error", "best-box-error", "pointing"]
    rows: list[list[str]] = []
    deviations = [f"{len(pictures)} pictures of ILSVRC's validation set instead of 50,000, and one crop of each."]
    for loaded, result in measured(data, NETWORKS, METHODS, metrics, pictures, deviations):
        column = like(loaded.name, NETWORKS)
        for method in result.cost:
            paper = "-" if column is None or method not in TABLE_1 else f"{TABLE_1[method][column]:.1f}"
            rows.append([loaded.name, method, paper, *placed(metrics, result, method)])
    heads = ["network", "method", "paper, top-1 box error of its family's network"]
    for metric in ("top-1 box error", "box error", "box error at the best threshold", "pointing"):
        heads += [metric, f"{metric}, small"]
    deviations += [
        "Networks are other trainings, some pruned; compare methods, not columns.",
        "Boxes of maps are cut at each explainer's default; the paper takes each method's own recommendation.",
        "The best threshold is one for all pictures of a network, with the largest segment: how good the map is "
        "whatever threshold was published. The centre's box is 80 % of each side.",
    ]
    return Outcome("CNN-Fixations, Table I: localisation error on ILSVRC, percent", heads, rows, deviations)


def table_1_boxes(data: Data) -> Outcome:
    """Measures Table I from the boxes the authors published, which checks the evaluator."""
    boxes, truth = data.published_boxes()
    labels = torch.from_numpy(truth["label"]).long()
    objects = (torch.from_numpy(truth["box_xyxy"]).float(), torch.from_numpy(truth["box_offset"]).long())
    paper = {"alexNet": 65.70, "vgg16": 55.22, "googleNet": 57.53, "resNet152": 54.31}
    rows = []
    for name, figure in paper.items():
        published = torch.from_numpy(boxes[f"{name}_box_xyxy"]).float()
        predicted = torch.from_numpy(boxes[f"{name}_label"]).long()
        top = float(metrics.localization_error(published, objects, predicted, labels))
        known = float(metrics.localization_error(published, objects))
        rows.append([name, f"{figure:.2f}", f"{100 * top:.2f}", f"{100 * known:.2f}"])
        data.advance("Table I from published boxes", len(published))
    heads = ["network", "paper, top-1", "top-1", "class-agnostic"]
    return Outcome("CNN-Fixations, Table I from the authors' published boxes, percent", heads, rows)


def table_3(data: Data) -> Outcome:
    """Measures Table III: one proposal an image, PASCAL VOC 2007."""
    voc = (data.root / "VOC2007").is_dir()
    pictures = [entry for entry in (data.voc() if voc else data.coco()) if len(entry.boxes)]
    kinds = sorted({str(kind) for entry in pictures for kind in entry.kinds})
    rows, deviations = [], []
    for loaded in data.networks(("googlenet",)):
        usable, reasons = fitting(METHODS, loaded, data.inputs(pictures[:1], loaded.preprocess))
        deviations += reasons
        for method, make in usable.items():
            explainer, metric = make(loaded.model), metrics.SingleProposal(len(kinds))
            for entry in pictures:
                box = explainer(data.inputs([entry], loaded.preprocess)).boxes()
                placed = loaded.preprocess.boxes_in(box, load_image(entry.path).size)
                metric.update(placed, [entry.boxes], [torch.tensor([kinds.index(str(kind)) for kind in entry.kinds])])
                data.advance(f"{loaded.name}, Table III", 1)
            score = metric.compute()
            measured = f"{float(score.recall):.2f}/{float(score.precision):.2f}"
            rows.append([loaded.name, method, TABLE_3.get(method, "-"), measured])
    dataset = "PASCAL VOC 2007" if voc else "COCO, whose scenes are fuller,"
    deviations.append(f"{len(pictures)} pictures of {dataset} and networks trained on ImageNet, as in the paper.")
    heads = ["network", "method", "paper, GoogLeNet, mean recall/precision", "measured"]
    return Outcome("CNN-Fixations, Table III: a single proposal an image", heads, rows, deviations)


CHOICES: dict[str, Make] = {
    "centre": Centre,
    "default (center)": CNNFixations,
    "location product": partial(CNNFixations, location="product"),
    "location activation": partial(CNNFixations, location="activation"),
    "hull of the points": partial(CNNFixations, box_rule="hull"),
    "unsigned": partial(CNNFixations, signed=False),
    "first_fc argmax": partial(CNNFixations, first_fc="argmax"),
    "outliers 0.10, 0.05": partial(CNNFixations, radius_share=0.10, min_neighbour_share=0.05),
    "no outliers removed": partial(CNNFixations, min_neighbour_share=0.0),
    "density 0.04": partial(CNNFixations, sigma_share=0.04),
    "five crops": partial(CNNFixations, crops=192),
    "variant paper": partial(CNNFixations, variant="paper"),
    "variant authors": partial(CNNFixations, variant="authors"),
}


def ablation(data: Data) -> Outcome:
    """Measures the cost of each choice that the paper leaves open."""
    pictures = data.imagenet()
    metrics = ["box-error", "best-box-error", "pointing"]
    rows: list[list[str]] = []
    deviations: list[str] = []
    for loaded, result in measured(data, NETWORKS, CHOICES, metrics, pictures, deviations):
        rows += [[loaded.name, name, *placed(metrics, result, name)] for name in result.cost]
    heads = ["network", "choice"]
    for metric in ("box error", "map's box error at the best threshold", "pointing"):
        heads += [metric, f"{metric}, small"]
    deviations.append(f"The paper has no such table. {len(pictures)} pictures.")
    return Outcome("CNN-Fixations: what the open choices cost, percent", heads, rows, deviations)


def layers(data: Data) -> Outcome:
    """Draws Fig. 5: fixations at layers in between."""
    pictures = data.at_most(4).imagenet()
    shown: dict[str, Any] = {}
    for loaded in data.networks(("vgg16",)):
        images = data.inputs(pictures, loaded.preprocess)
        explainer = CNNFixations(loaded.model)
        tape = explainer.record(images)
        rectified = [node for node in tape if "relu" in node.name.rsplit(".", 1)[-1]]
        maps = [n.name for n in rectified if n.outputs[0] is not None and len(n.outputs[0].shape) == 4]
        chosen = [maps[round(i * (len(maps) - 1) / 4)] for i in range(4, -1, -1)] if maps else []
        explained = [CNNFixations(loaded.model, stop_layer=name)(images) for name in chosen] + [explainer(images)]
        ground = data.shown(pictures, loaded.preprocess)
        overlays = [explanation.overlay(ground) for explanation in explained]
        rows = [[column[i] for column in overlays] for i in range(len(images))]
        titles = [[*chosen, "image"]] + [[] for _ in rows[1:]]
        shown[loaded.name] = render.montage(rows, titles=titles)
    return Outcome("CNN-Fixations, Fig. 5: from the last layer down to the image", [], [], pictures=shown)


def sketches(data: Data) -> Outcome:
    """Draws section IV-F: another modality, human sketches."""
    folder = data.folder_of("sketches", "the sketches of TU-Berlin, a folder a class,")
    pictures = [Annotation(path, path.parent.name) for path in find_images([folder])][: data.at_most(12).count]
    shown = {}
    for loaded in data.networks(("alexnet",)):
        explanation = CNNFixations(loaded.model)(data.inputs(pictures, loaded.preprocess))
        data.advance(f"{loaded.name}, sketches", len(pictures))
        overlays = list(explanation.overlay(data.shown(pictures, loaded.preprocess)))
        rows = [overlays[i : i + 6] for i in range(0, len(overlays), 6)]
        titles = [[str(entry.label) for entry in pictures[i : i + 6]] for i in range(0, len(pictures), 6)]
        shown[loaded.name] = render.montage(rows, titles=titles)
    deviations = ["Networks trained on photographs; the paper's was trained on sketches."]
    return Outcome("CNN-Fixations on sketches", [], [], deviations, shown)


EXPERIMENTS: dict[str, Experiment] = {
    "table-1": table_1,
    "table-1-boxes": table_1_boxes,
    "table-2": saliency.table_2,
    "table-3": table_3,
    "figure-5": layers,
    "adversarial": stability.adversarial,
    "ablation": ablation,
    "sketches": sketches,
    "captions": captions.captions,
}
