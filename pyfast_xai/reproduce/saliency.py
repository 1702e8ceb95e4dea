"""CNN-Fixations, Table II: the pixels of an object, by a network that was told only what is in a picture."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Annotation
from pyfast_xai.evaluation.metrics import METRICS
from pyfast_xai.evaluation.result import interval
from pyfast_xai.models import LoadedModel
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Outcome, percent
from pyfast_xai.reproduce.protocol import METHODS, Make, fitting, rows_of
from pyfast_xai.reproduce.transfer import last_features, with_classes

# Pixel precision at equal error rate on Graz-02, percent, mean of bike, car and person. Some digits of others are lost.
TABLE_2 = {"Backprop": "36.88", "cMWP": "50.89", "Grad-CAM": "60.09", "CNN-Fixations": "64.88"}
LEAST = 5
"""Pictures that a class must have to be learnt."""
FOLDS = 5
EER = METRICS["eer-precision"]


def table_2(data: Data) -> Outcome:
    """Measures Table II: pixel precision at equal error rate, of maps of a class that is in the picture."""
    pictures = [entry for entry in data.masked() if entry.shapes]
    counts = Counter(kind for entry in pictures for kind in set(entry.shape_kinds))
    classes = [kind for kind, count in sorted(counts.items()) if count >= LEAST]
    if not classes:
        raise InputError(f"data must hold {LEAST} pictures with masks of a class, got {dict(counts)}")
    rows: list[list[str]] = []
    deviations: list[str] = []
    for loaded in data.networks(("vgg16",)):
        usable, reasons = fitting(METHODS, loaded, data.inputs(pictures[:1], loaded.preprocess))
        deviations += reasons
        try:
            pixels, right = _pixels(data, loaded, pictures, classes, usable)
        except InputError as error:
            deviations.append(f"{loaded.name} is left out: {error}.")
            continue
        deviations.append(
            f"{loaded.name} knows of {percent(right)} % of the held-out pictures whether a class is in it."
        )
        for method, hottest in pixels.items():
            value, low, high = interval(hottest, _mean_precision, seed=data.seed)
            each = _precisions(hottest.sum(0, keepdim=True))[0].tolist()
            cells = [percent(value), f"{percent(low)} to {percent(high)}", *map(percent, each)]
            rows.append([loaded.name, method, TABLE_2.get(method, "-"), *cells])
    graz = (data.root / "graz02").is_dir()
    sizes = ", ".join(f"{counts[kind]} of {kind}" for kind in classes)
    deviations.append(
        f"{len(pictures)} pictures of {'Graz-02' if graz else 'COCO, whose scenes are fuller'}, {sizes}. A new last "
        f"layer is fitted in {FOLDS} folds of the pictures, so that none is explained by a network that learnt from "
        "it; the paper fine-tunes all of VGG-16 on 150 pictures of each of Graz-02's three classes and measures on "
        "150 others."
    )
    heads = [
        "network",
        "method",
        "paper, VGG-16, Graz-02, mean",
        "mean of the classes",
        "95 % interval",
        *map(str, classes),
    ]
    return Outcome("CNN-Fixations, Table II: pixel precision at equal error rate, percent", heads, rows, deviations)


def _pixels(
    data: Data,
    loaded: LoadedModel,
    pictures: Sequence[Annotation],
    classes: Sequence[int | str],
    usable: dict[str, Make],
) -> tuple[dict[str, Tensor], float]:
    """Returns the pixels of each method, `[N, K, 2, bins + 1]` as `PrecisionAtEER` counts them, and the accuracy."""
    images = data.inputs(pictures, loaded.preprocess)
    present = torch.tensor([[kind in entry.shape_kinds for kind in classes] for entry in pictures])
    features, name = last_features(loaded.model, images)
    pixels: dict[str, Tensor] = {}
    right = 0
    for fold in range(FOLDS):
        held = torch.arange(len(pictures)) % FOLDS == fold
        model = with_classes(loaded.model, name, features[~held], present[~held].to(images.device))
        with torch.no_grad():
            scores = model(images[held])
        right += int(((scores > 0).cpu() == present[held]).sum())
        for method, make in usable.items():
            explainer = make(model)
            for number, kind in enumerate(classes):
                chosen = (held & present[:, number]).nonzero().flatten().tolist()
                if not chosen:
                    continue
                target = torch.full((len(chosen),), number, device=images.device)
                truth = [pictures[i].of_class(kind) for i in chosen]
                explanation = explainer(images[chosen], target)
                counted = rows_of("eer-precision", explainer, explanation, truth, loaded.preprocess)
                whole = pixels.setdefault(method, counted.new_zeros(len(pictures), len(classes), *counted.shape[1:]))
                whole[chosen, number] = counted
                data.advance(f"{loaded.name}, Table II", len(chosen))
    return pixels, right / present.numel()


def _precisions(totals: Tensor) -> Tensor:
    """Returns the precision of each class, `[R, K]`, from sums of pixels; NaN where no picture has it."""
    return torch.stack([EER.reduce(pixels, pixels.new_ones(len(pixels))) for pixels in totals.unbind(1)], 1)


def _mean_precision(totals: Tensor, count: Tensor) -> Tensor:
    return _precisions(totals).nanmean(1)
