"""The loop: pictures in, every method on each, every measure of each."""

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
from pyfast_xai.evaluation.measures import MEASURES, Measure, Part
from pyfast_xai.evaluation.result import Evaluation, Figure, interval
from pyfast_xai.explainers import METHODS
from pyfast_xai.explainers.base import Explainer, one_of
from pyfast_xai.images import ImageError, Preprocess, load_image
from pyfast_xai.metrics.scorer import logits_of

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
    measures: Sequence[str] = ("box-error", "pointing"),
    *,
    target: Literal["predicted", "label"] = "predicted",
    classes: Sequence[str] | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure explainers on annotated pictures.

    Every method explains the same images and the same classes. Boxes and peaks are compared in pixels of the picture,
    masks and what is asked of the model in those of its input. Pictures whose largest object covers under a quarter of
    them are measured apart as well: on others the middle of the picture is a good guess.

    Args:
        model: in evaluation mode, on `device`.
        annotations: of the pictures; a picture that cannot be read is listed in `Evaluation.errors` and left out.
        preprocess: makes the model's input from a picture.
        methods: names of `METHODS`, or functions that make an explainer for a model, by the name shown.
        measures: names of `MEASURES`.
        target: explain the class the model predicts, or the one that is annotated.
        classes: names of the model's outputs, for annotations that have names.
        batch: images at a time.
        device: of the model.
        resamples: of the pictures, for the intervals.
        seed: of the resampling.
        progress: called with the number of pictures done, after each method on each batch divided by the methods.

    Returns:
        A figure for each method, measure and subset, with a bootstrap interval.

    Raises:
        InputError: a method or measure that does not exist, no picture that can be read, or classes that do not fit.
        UnsupportedOpError: a method cannot explain the model.
    """
    made: dict[str, Make] = (
        dict(methods)
        if isinstance(methods, Mapping)
        else {name: METHODS[one_of("methods", name, METHODS)] for name in methods}
    )
    asked = [MEASURES[one_of("measures", name, MEASURES)] for name in measures]
    one_of("target", target, ("predicted", "label"))
    if not made or not asked or not annotations:
        missing = "methods" if not made else "measures" if not asked else "annotations"
        raise InputError(f"{missing} must hold at least one, got none")
    explainers = {name: make(model) for name, make in made.items()}
    rows: dict[tuple[str, str], list[Tensor | int]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    small: list[Tensor] = []
    errors: list[tuple[str, str]] = []
    for images, truth, sizes in _batches(annotations, preprocess, batch, errors):
        images = images.to(device)
        forward, logits = _timed(partial(_logits, model, images), images)
        predicted = logits.argmax(1)
        labels = torch.tensor([_index(own.label, classes, logits.shape[1]) for own in truth]).to(predicted)
        chosen = predicted if target == "predicted" else labels
        if bool((chosen < 0).any()):
            which = truth[int((chosen < 0).int().argmax())]
            raise InputError(
                f"annotations must have a class of the model where target is 'label', got {which.label!r} "
                f"for {which.path.name!r}"
            )
        small.append(torch.tensor([_is_small(own, size) for own, size in zip(truth, sizes, strict=True)]))
        for name, explainer in explainers.items():
            taken, explanation = _timed(partial(explainer, images, chosen), images)
            costs[name].append(taken / forward)
            part = Part(
                *(model, made[name], explainer, explanation, images, chosen, predicted, labels, truth, sizes),
                preprocess,
            )
            for measure in asked:
                rows[name, measure.name].append(_rows(measure, part))
            if progress is not None:
                progress(len(truth))
    if not small:
        raise InputError(f"annotations must be of pictures that can be read, got {len(errors)} that cannot")
    subset = torch.cat(small)
    figures = []
    for name in explainers:
        for measure in asked:
            values = _joined(measure, rows[name, measure.name])
            counted = ~values.reshape(len(values), -1).isnan().any(1)
            for group, kept in (("all", counted), ("small", counted & subset)):
                if group == "all" or bool(kept.any()):
                    ends = interval(values[kept], measure.reduce, resamples, seed)
                    figures.append(Figure(name, measure.name, group, *ends, int(kept.sum())))
    return Evaluation(
        figures=figures,
        cost={name: statistics.median(own) for name, own in costs.items()},
        pictures=len(subset),
        small=int(subset.sum()),
        errors=errors,
        threads=torch.get_num_threads(),
        device=str(device),
    )


def _batches(
    annotations: Sequence[Annotation], preprocess: Preprocess, batch: int, errors: list[tuple[str, str]]
) -> Iterator[tuple[Tensor, list[Annotation], list[tuple[int, int]]]]:
    images: list[Tensor] = []
    truth: list[Annotation] = []
    sizes: list[tuple[int, int]] = []
    for own in annotations:
        try:
            picture = load_image(own.path)
            image = preprocess(picture)[0]
        except ImageError as error:
            errors.append((str(own.path), str(error)))
            continue
        images.append(image)
        truth.append(own)
        sizes.append(picture.size)
        if len(images) == batch:
            yield torch.stack(images), truth, sizes
            images, truth, sizes = [], [], []
    if images:
        yield torch.stack(images), truth, sizes


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return logits_of(model(images)).float()


def _timed(call: Callable[[], T], images: Tensor) -> tuple[float, T]:
    """Seconds, and what came of it."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    began = time.perf_counter()
    result = call()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began, result


def _index(label: int | str | None, classes: Sequence[str] | None, outputs: int) -> int:
    """The output a label stands for; -1 where there is none."""
    if isinstance(label, str):
        names = [name.casefold() for name in classes or ()]
        return names.index(label.casefold()) if label.casefold() in names else -1
    if label is None:
        return -1
    if not 0 <= label < outputs:
        raise InputError(f"annotations must have labels in [0, {outputs}), got {label}")
    return label


def _is_small(own: Annotation, size: tuple[int, int]) -> bool:
    if len(own.boxes) == 0:
        return False
    sides = own.boxes[:, 2:] - own.boxes[:, :2] + 1
    return float(sides.prod(1).max()) < SMALL * size[0] * size[1]


def _rows(measure: Measure, part: Part) -> Tensor | int:
    """Numbers of each picture, NaN where it lacks what the measure needs; the count of pictures where all do."""
    having = torch.stack([torch.ones(len(part.truth), dtype=torch.bool), *map(part.having, measure.needs)]).all(0)
    if bool(having.all()):
        return measure.rows(part).detach().cpu().double()
    kept = having.nonzero().flatten().tolist()
    if not kept:
        return len(part.truth)
    rows = measure.rows(part.only(kept)).detach().cpu().double()
    whole = torch.full((len(part.truth), *rows.shape[1:]), torch.nan, dtype=rows.dtype)
    whole[having] = rows
    return whole


def _joined(measure: Measure, parts: Sequence[Tensor | int]) -> Tensor:
    known = [part for part in parts if isinstance(part, Tensor)]
    if not known:
        needs = " and ".join(measure.needs)
        raise InputError(f"annotations must have a {needs} of a picture for {measure.name!r}, got none")
    shape = known[0].shape[1:]
    return torch.cat([p if isinstance(p, Tensor) else torch.full((p, *shape), torch.nan).double() for p in parts])
