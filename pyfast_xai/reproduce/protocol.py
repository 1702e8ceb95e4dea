"""One protocol for all tables: the same pictures, the same classes, each method with what it can explain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Annotation, Centre, Evaluation, evaluate
from pyfast_xai.evaluation.metrics import METRICS, Part
from pyfast_xai.evaluation.result import interval
from pyfast_xai.explainers import CAM, CNNFixations, ExcitationBackprop, Explainer, GradCAM, Saliency
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess, load_image
from pyfast_xai.models import LoadedModel
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import percent

Make = Callable[[nn.Module], Explainer]

METHODS: dict[str, Make] = {
    "centre": Centre,
    "Backprop": Saliency,
    "CAM": CAM,
    "cMWP": partial(ExcitationBackprop, contrastive=True),
    "Grad-CAM": GradCAM,
    "CNN-Fixations": CNNFixations,
}
"""What CNN-Fixations and Eigen-CAM compare themselves with, by the papers' names; the centre is ours."""


def measured(
    data: Data,
    networks: Sequence[str],
    methods: Mapping[str, Make],
    metrics: Sequence[str],
    pictures: Sequence[Annotation],
    deviations: list[str],
    resamples: int = 0,
) -> Iterator[tuple[LoadedModel, Evaluation]]:
    """Measures methods on the pictures, network by network.

    Args:
        data: where networks come from.
        networks: networks of the paper.
        methods: by the names that tables have; `Evaluation.cost` holds those that can explain the network.
        metrics: names of `evaluation.METRICS`.
        pictures: annotated.
        deviations: takes a sentence for each method that is left out.
        resamples: for intervals.
    """
    for loaded in data.networks(networks):
        usable, reasons = fitting(methods, loaded, data.inputs(pictures[:1], loaded.preprocess))
        deviations += reasons
        title = f"{loaded.name}, {', '.join(metrics)}"
        yield (
            loaded,
            evaluate(
                *(loaded.model, pictures, loaded.preprocess, usable, metrics),
                batch_size=data.batch_size,
                device=data.device,
                resamples=resamples,
                progress=data.progress_of(title),
            ),
        )


def fitting(methods: Mapping[str, Make], loaded: LoadedModel, images: Tensor) -> tuple[dict[str, Make], list[str]]:
    """Returns the methods that can explain a network, and why others cannot."""
    usable, reasons = {}, []
    for name, make in methods.items():
        try:
            make(loaded.model)(images[:1])
        except InputError as error:
            reasons.append(f"{name} is left out on {loaded.name}: {error}.")
        else:
            usable[name] = make
    return usable, reasons


def rows_of(
    metric: str, explainer: Explainer, explanation: Explanation, truth: Sequence[Annotation], preprocess: Preprocess
) -> Tensor:
    """Returns the numbers of each picture by a metric of places, float64 `[N, ...]`.

    Args:
        metric: name of one of `evaluation.METRICS` that needs boxes or masks alone.
        explainer: made the explanation.
        explanation: a row a picture.
        truth: annotations of the pictures.
        preprocess: made the explained images.
    """
    images = explanation.images
    assert images is not None
    unknown = torch.full((len(truth),), -1)
    sizes = [load_image(entry.path).size for entry in truth]
    classes = (unknown, unknown, unknown)
    part = Part(explainer.model, type(explainer), explainer, explanation, images, *classes, truth, sizes, preprocess)
    return METRICS[metric].rows(part).cpu().double()


def mean_of(values: Tensor, data: Data, scale: float = 1.0, digits: int = 2) -> str:
    """Returns a mean over pictures and half of its 95 % interval, as tables have them."""
    value, low, high = interval(values.cpu().double(), lambda total, count: total / count, seed=data.seed)
    return f"{scale * value:.{digits}f} ± {scale * (high - low) / 2:.{digits}f}"


def placed(metrics: Sequence[str], result: Evaluation, method: str) -> list[str]:
    """Returns the cells of a method: each metric on all pictures and on those with small objects."""
    cells = []
    for metric in metrics:
        for subset in ("all", "small"):
            matching = [f for f in result.figures if (f.method, f.metric, f.subset) == (method, metric, subset)]
            cells.append(percent(matching[0].value) if matching else "-")
    return cells


def like(name: str, networks: Sequence[str]) -> int | None:
    """Returns the index of that network of a paper that is of the same family."""
    families = [network.rstrip("0123456789_") for network in networks]
    return next((i for i, family in enumerate(families) if name.startswith(family)), None)
