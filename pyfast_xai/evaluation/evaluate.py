"""The loop: pictures in, every method on each, every metric of each."""

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.evaluation.annotations import Annotation
from pyfast_xai.evaluation.metrics import METRICS, Metric, Part
from pyfast_xai.evaluation.result import Evaluation, Figure, interval, subsets
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.common.explainer import Explainer, one_of
from pyfast_xai.explainers.common.targets import class_columns, logits_in
from pyfast_xai.images import ImageError, Preprocess, load_image
from pyfast_xai.progress import Progress, ProgressCallback

logger = logging.getLogger("pyfast_xai")

SMALL = 0.25
"""Objects under this share of the picture are small: where they lie cannot be guessed."""

T = TypeVar("T")
Make = Callable[[nn.Module], Explainer]


def evaluate(
    model: nn.Module,
    annotations: Sequence[Annotation],
    preprocess: Preprocess,
    methods: Mapping[str, Make] | Sequence[str],
    metrics: Sequence[str] = ("box-error", "pointing"),
    *,
    target: Literal["predicted", "label"] = "predicted",
    labels: Sequence[str] | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    resamples: int = 1000,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measures explainers on annotated pictures.

    Every method explains the same images and the same classes. Boxes and peaks are compared in pixels of the picture,
    masks and what is asked of the model in those of its input. Pictures whose largest object covers under a quarter of
    them are measured apart as well: on others the middle of the picture is a good guess.

    Args:
        model: in evaluation mode, on `device`.
        annotations: annotations of the pictures; a picture that cannot be read is listed in `Evaluation.errors` and
            left out.
        preprocess: makes the model's input from a picture.
        methods: names of `METHODS`, or functions that make an explainer for a model, by the name shown.
        metrics: names of `METRICS`.
        target: explain the class the model predicts, or the one that is annotated.
        labels: names of the model's outputs, for annotations that have names.
        batch_size: images at a time.
        device: device of the model.
        resamples: number of resamples of the pictures, for the intervals.
        seed: seed of the resampling.
        progress: called with a `Progress` after each method on each batch; a picture counts once for each method.

    Returns:
        A figure for each method, metric and subset, with a bootstrap interval.

    Raises:
        InputError: a method or metric that does not exist, no picture that can be read, or classes that do not fit.
        UnsupportedOpError: a method cannot explain the model.
    """
    made: dict[str, Make] = (
        dict(methods)
        if isinstance(methods, Mapping)
        else {name: METHODS[one_of("methods", name, METHODS)] for name in methods}
    )
    chosen_metrics = [METRICS[one_of("metrics", name, METRICS)] for name in metrics]
    one_of("target", target, ("predicted", "label"))
    if not made or not chosen_metrics or not annotations:
        missing = "methods" if not made else "metrics" if not chosen_metrics else "annotations"
        raise InputError(f"{missing} must hold at least one, got none")
    explainers = {name: make(model) for name, make in made.items()}
    rows: dict[tuple[str, str], list[Tensor | int]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    small: list[Tensor] = []
    errors: list[tuple[str, str]] = []
    done = 0
    for images, truth, sizes in _batches(annotations, preprocess, batch_size, errors):
        images = images.to(device)
        forward, logits = _timed(partial(_logits, model, images), images)
        predicted = logits.argmax(1)
        right = torch.tensor([_index(annotation.label, labels, logits.shape[1]) for annotation in truth]).to(predicted)
        chosen = predicted if target == "predicted" else right
        if bool((chosen < 0).any()):
            unlabelled = truth[int((chosen < 0).int().argmax())]
            raise InputError(
                f"annotations must have a class of the model where target is 'label', got {unlabelled.label!r} "
                f"for {unlabelled.path.name!r}"
            )
        small.append(torch.tensor([_is_small(annotation, size) for annotation, size in zip(truth, sizes, strict=True)]))
        for name, explainer in explainers.items():
            seconds, explanation = _timed(partial(explainer, images, chosen), images)
            costs[name].append(seconds / forward)
            part = Part(
                *(model, made[name], explainer, explanation, images, chosen, predicted, right, truth, sizes),
                preprocess,
            )
            for metric in chosen_metrics:
                rows[name, metric.name].append(_rows(metric, part))
            if progress is not None:
                done += len(truth)
                progress(Progress(done, len(annotations) * len(explainers)))
    if not small:
        raise InputError(f"annotations must be of pictures that can be read, got {len(errors)} that cannot")
    subset = torch.cat(small)
    figures = []
    numbers = {}
    for name in explainers:
        for metric in chosen_metrics:
            values = numbers[name, metric.name] = _joined(metric, rows[name, metric.name])
            for group, selected in subsets(values, subset).items():
                if group == "all" or bool(selected.any()):
                    ends = interval(values[selected], metric.reduce, resamples, seed)
                    figures.append(Figure(name, metric.name, group, *ends, int(selected.sum())))
    return Evaluation(
        figures=figures,
        rows=numbers,
        is_small=subset,
        cost={name: statistics.median(forwards) for name, forwards in costs.items()},
        pictures=len(subset),
        small=int(subset.sum()),
        errors=errors,
        threads=torch.get_num_threads(),
        device=str(device),
    )


def _batches(
    annotations: Sequence[Annotation], preprocess: Preprocess, batch_size: int, errors: list[tuple[str, str]]
) -> Iterator[tuple[Tensor, list[Annotation], list[tuple[int, int]]]]:
    images: list[Tensor] = []
    truth: list[Annotation] = []
    sizes: list[tuple[int, int]] = []
    for annotation in annotations:
        try:
            picture = load_image(annotation.path)
            image = preprocess(picture)[0]
        except ImageError as error:
            errors.append((str(annotation.path), str(error)))
            continue
        images.append(image)
        truth.append(annotation)
        sizes.append(picture.size)
        if len(images) == batch_size:
            yield torch.stack(images), truth, sizes
            images, truth, sizes = [], [], []
    if images:
        yield torch.stack(images), truth, sizes


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return class_columns(logits_in(model(images.clone()))).float()


def _timed(call: Callable[[], T], images: Tensor) -> tuple[float, T]:
    """Returns the seconds, and the result."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    began = time.perf_counter()
    result = call()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began, result


def _index(label: int | str | None, labels: Sequence[str] | None, outputs: int) -> int:
    """Returns the output a label stands for; -1 where there is none."""
    if isinstance(label, str):
        names = [name.casefold() for name in labels or ()]
        return names.index(label.casefold()) if label.casefold() in names else -1
    if label is None:
        return -1
    if not 0 <= label < outputs:
        raise InputError(f"annotations must have labels in [0, {outputs}), got {label}")
    return label


def _is_small(annotation: Annotation, size: tuple[int, int]) -> bool:
    if len(annotation.boxes) == 0:
        return False
    sides = annotation.boxes[:, 2:] - annotation.boxes[:, :2] + 1
    return float(sides.prod(1).max()) < SMALL * size[0] * size[1]


def _rows(metric: Metric, part: Part) -> Tensor | int:
    """Returns the numbers of each picture, NaN if it lacks what the metric needs; a count if all do."""
    having = torch.stack([torch.ones(len(part.truth), dtype=torch.bool), *map(part.having, metric.needs)]).all(0)
    if bool(having.all()):
        return metric.rows(part).detach().cpu().double()
    indices = having.nonzero().flatten().tolist()
    if not indices:
        return len(part.truth)
    rows = metric.rows(part.only(indices)).detach().cpu().double()
    whole = torch.full((len(part.truth), *rows.shape[1:]), torch.nan, dtype=rows.dtype)
    whole[having] = rows
    return whole


def _joined(metric: Metric, parts: Sequence[Tensor | int]) -> Tensor:
    known = [part for part in parts if isinstance(part, Tensor)]
    if not known:
        needs = " and ".join(metric.needs)
        raise InputError(f"annotations must have a {needs} of a picture for {metric.name!r}, got none")
    shape = known[0].shape[1:]
    return torch.cat([p if isinstance(p, Tensor) else torch.full((p, *shape), torch.nan).double() for p in parts])
