"""Targets: which output of a model is explained, which of its classes, and with which score."""

import abc
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import OutputKinds, Outputs, is_probability, kinds_of
from pyfast_xai.explainers.common.tensors import outside_inference_mode
from pyfast_xai.tape import Tape, Value

Target = int | str | Sequence[int] | Sequence[str] | Tensor | None
Goal = Target | Callable[[Any], Tensor]

UNRELATED = (
    "model must return a tensor that depends on its input, got none, as where numbers pass through NumPy or are "
    "constants: make it compute its scores in PyTorch"
)


class TargetByImage(abc.ABC):
    """Base of functions as targets that are not the same for every image."""

    @abc.abstractmethod
    def rows(self, rows: Tensor) -> "TargetByImage":
        """Returns the target of some of the images, int64 `[M]`, which may repeat."""

    @abc.abstractmethod
    def __call__(self, output: Any) -> Tensor:
        """Returns one number an image, `[N]`, or K, `[N, K]`, of what the model returned for the images."""

    def zero_reasons(self, output: Any) -> dict[int, str]:
        """Returns why numbers are zero for what the model returned, by row, image by image; none where it is unknown.

        A warning of a map of zeros gives the reason, which so says what to do.
        """
        return {}


@dataclass
class Targets:
    """The classes that are explained.

    Attributes:
        logits: the outputs of the model for the images, `[N, ...]`; None where it returned nothing with a row for each.
        target: the classes, int64 `[N, K]`; None where something else than classes is explained.
        score: score of each, float32 `[N, K]`: a probability, or a value as the model returned it; None without
            classes.
        kinds: kinds of the outputs; None without classes.
        count: numbers that a function as target gives for an image.
        zero_reasons: why a function as target is zero, by row, where it says so.
    """

    logits: Tensor | None = None
    target: Tensor | None = None
    score: Tensor | None = None
    kinds: OutputKinds | None = None
    count: int = 1
    zero_reasons: dict[int, str] = field(default_factory=dict)

    @property
    def each(self) -> int:
        """Returns the targets of an image."""
        return self.count if self.target is None else self.target.shape[1]


def numbers_of(function: Callable[[Any], Tensor], result: Any, images: int | None = None) -> Tensor:
    """Returns what a function as target gives for what a model returned: `[N]`, or `[N, K]` of a `TargetByImage`.

    Args:
        function: the target.
        result: of the model.
        images: number of images; None where it may also give one number for all of them.

    Raises:
        InputError: something else.
    """
    answer = function(result)
    fits = isinstance(answer, Tensor) and answer.dim() <= (2 if isinstance(function, TargetByImage) else 1)
    if not fits or (images is not None and (not answer.dim() or len(answer) != images)):
        received = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        expected = "N" if images is None else images
        raise InputError(f"target must return a tensor of one number an image, [{expected}], got {received}")
    return answer


def zero_reasons(function: Callable[[Any], Tensor], result: Any, numbers: Tensor) -> dict[int, str]:
    """Returns why numbers that a function as target gave on a CPU are zero, by row; see `TargetByImage`."""
    if not isinstance(function, TargetByImage) or numbers.device.type != "cpu" or bool(numbers.all()):
        return {}
    return function.zero_reasons(result)


def targets_of(
    tape: Tape,
    target: Target,
    outputs: Outputs = "auto",
    labels: Sequence[str] | None = None,
) -> Targets:
    """Returns the classes to explain, with their scores.

    Args:
        tape: tape of the model on N images.
        target: None for the largest output, classes as an int, N ints or `[N, K]` ints.
        outputs: the kind of the outputs, see `kinds_of`.
        labels: names of the classes.

    Raises:
        InputError: a target that does not fit the output, or another number of labels than of outputs.
    """
    value, logits = logits_of(tape)
    return targets_among(logits, target, outputs, labels, made=is_probability(tape, value))


def targets_among(
    logits: Tensor, target: Target, outputs: Outputs, labels: Sequence[str] | None, *, made: bool
) -> Targets:
    """Returns the targets for outputs `[N, classes]`, as `targets_of` does for a tape."""
    columns = class_columns(logits)
    check_labels(labels, columns)
    classes = resolve_target(columns, target).view(len(columns), -1)
    kinds = kinds_of(columns, made, outputs)
    score = kinds.scores(columns).gather(1, classes).float()
    logits, classes, score = map(outside_inference_mode, (logits, classes, score))
    return Targets(logits, classes, score, kinds)


def check_target(method: str, target: Any, *, functions: bool, gradients: bool) -> None:
    """Refuses a kind of target that a method cannot explain.

    Raises:
        InputError: a function, or a floating-point tensor, where the method takes none.
    """
    if callable(target) and not functions:
        raise InputError(f"target must be None, an int, N ints or [N, K] ints for {method}, got a function")
    if isinstance(target, Tensor) and target.is_floating_point() and not gradients:
        raise InputError(f"target must hold integers for {method}, got {target.dtype}")


def take_targets(target: Any, images: int, rows: Tensor) -> Any:
    """Returns the target of some rows of so many images.

    Raises:
        InputError: a target without one entry for each image.
    """
    if isinstance(target, Tensor) and target.is_floating_point() and target.dim():
        if len(target) != images:
            raise InputError(f"target must have one row for each of {images} images, got shape {list(target.shape)}")
        return target[rows.to(target.device)]
    if isinstance(target, TargetByImage):
        return target.rows(rows)
    if target is None or callable(target) or isinstance(target, (int, str, float)):
        return target
    return as_class_indices(target, images, rows.device)[rows]


def check_labels(labels: Sequence[str] | None, columns: Tensor) -> None:
    """Refuses names of classes that are not one for each of the outputs `[N, classes]`.

    Raises:
        InputError: there are more or fewer.
    """
    if labels is not None and len(labels) != columns.shape[1]:
        raise InputError(f"labels must be one for each of {columns.shape[1]} outputs of the model, got {len(labels)}")


def rows_returned(tape: Tape, count: int) -> Tensor | None:
    """Returns the outputs that classes are read from; None where there is not one row for each of `count` images."""
    if isinstance(tape.result, list) and not all(isinstance(one, Tensor) for one in tape.result):
        return None  # an entry for each image, whose rows are detections
    try:
        logits = logits_of(tape)[1]
    except InputError:
        return None
    return outside_inference_mode(logits) if logits.dim() and len(logits) == count else None


def class_columns(logits: Tensor) -> Tensor:
    """Returns outputs as `[N, classes]`: `[N]` is one class, and `[N, classes, 1, 1]` is flattened.

    Raises:
        InputError: the outputs have another shape, or are no real numbers.
    """
    if not logits.is_floating_point():
        raise InputError(
            f"model must return floating-point outputs, got {logits.dtype}, as argmax returns: make it return the "
            "scores that these were made of, or give a method that perturbs the image (occlusion, RISE) a function as "
            "target"
        )
    if logits.dim() == 1:
        return logits[:, None]
    if logits.dim() < 2 or logits.shape[:2].numel() != logits.numel():
        raise InputError(
            f"model must return [N, classes], got {list(logits.shape)}: give a function of such outputs as target"
        )
    return logits.flatten(1)


def logits_of(tape: Tape) -> tuple[Value, Tensor]:
    """Returns the output that classes are read from, see `choose_logits`, as a value of the tape and a tensor.

    Raises:
        InputError: the model returned no tensor that depends on its input, or several that may be class scores.
    """
    _refuse_detections(tape.result)
    pairs = zip(pytree.tree_leaves(tape.outputs), pytree.tree_leaves(tape.result), strict=True)
    leaves = [(value, tensor) for value, tensor in pairs if isinstance(value, Value)]
    if not leaves:
        raise InputError(UNRELATED)
    named = named_logits(tape.outputs)
    if isinstance(named, Value):
        return next(pair for pair in leaves if pair[0] is named)
    place = choose_logits([value.shape for value, _ in leaves], lambda: _made_of(tape, [value for value, _ in leaves]))
    return leaves[place]


def logits_in(result: Any) -> Tensor:
    """Returns the output that classes are read from, see `choose_logits`, of what a model returned.

    Raises:
        InputError: the model returned no tensor, or several that may be class scores.
    """
    _refuse_detections(result)
    named = named_logits(result)
    if isinstance(named, Tensor):
        return named
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    if not leaves:
        raise InputError(f"model must return a tensor, got {type(result).__name__}")
    return leaves[choose_logits([tuple(leaf.shape) for leaf in leaves], lambda: [set() for _ in leaves])]


def _refuse_detections(result: Any) -> None:
    """Refuses a list of dicts, one for each image, whose rows are detections and not images.

    Raises:
        InputError: with the targets that such outputs need.
    """
    if isinstance(result, list) and any(isinstance(one, dict) for one in result):
        raise InputError(
            "model must return [N, classes], got a list of dicts, as of a detector: give a DetectionTarget, or a "
            "function of such outputs, as target"
        )


def named_logits(output: Any) -> Any:
    """Returns the entry of a dict or the field of a named tuple that is called "logits" or "out"; None without."""
    for name in ("logits", "out"):
        if isinstance(output, dict) and name in output:
            return output[name]
        if isinstance(output, tuple) and name in getattr(output, "_fields", ()):
            return getattr(output, name)
    return None


def choose_logits(shapes: Sequence[Sequence[int]], sources: Callable[[], Sequence[set[int]]]) -> int:
    """Returns which of several outputs is the one that classes are read from.

    It is the only one of shape `[N, classes]`; of several with as many columns the first; of a feature vector and what
    is computed from it the latter; and the first of all where none has this shape.

    Args:
        shapes: shapes of the outputs.
        sources: gives for each output those that it was computed from.

    Raises:
        InputError: several may be class scores.
    """
    vectors = [place for place, shape in enumerate(shapes) if len(shape) == 2]
    if len({shapes[place][1] for place in vectors}) > 1:
        made_of = sources()
        ends = [one for one in vectors if not any(one in made_of[other] for other in vectors)]
        vectors = ends or vectors
    if len({shapes[place][1] for place in vectors}) > 1:
        shown = " and ".join(str(list(shapes[place])) for place in vectors)
        raise InputError(
            f"model must return one tensor of class scores, got {shown}: wrap it so that it returns one of them, or "
            "in a dict under the name 'logits'"
        )
    return vectors[0] if vectors else 0


def _made_of(tape: Tape, values: Sequence[Value]) -> list[set[int]]:
    """Returns for each of some values the places of the others that it was computed from."""
    below: dict[Value, frozenset[int]] = {}
    places = {value: place for place, value in enumerate(values)}
    for node in tape:
        sources = frozenset().union(
            *(below.get(value, frozenset()) | ({places[value]} if value in places else set()) for value in node.inputs)
        )
        below.update((value, sources) for value in node.outputs if value is not None)
    return [set(below.get(value, ())) for value in values]


def resolve_target(logits: Tensor, target: Target) -> Tensor:
    """Returns the classes to explain, int64 `[N]` or `[N, K]`.

    Args:
        logits: outputs `[N, classes]`.
        target: None for the largest output of each image, an int for all, N ints, or `[N, K]` ints.

    Raises:
        InputError: another length, a class that does not exist, or one-hot rows.
    """
    images, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    chosen = as_class_indices(target, images, logits.device)
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        worst = chosen[(chosen < 0) | (chosen >= classes)].flatten()[0]
        raise InputError(f"target must lie in [0, {classes}), got {int(worst)}")
    # Class indices that are all 0 or 1 repeat themselves in a row of three or more.
    if chosen.dim() == 2 and chosen.shape[1] == classes > 2 and bool((chosen <= 1).all()):
        raise InputError(
            f"target must hold class indices, got rows of 0 and 1 for each of {classes} classes (one-hot?); "
            "give target.argmax(1)"
        )
    return chosen.long()


def as_class_indices(target: Any, images: int, device: torch.device) -> Tensor:
    """Returns classes as integers `[N]` or `[N, K]`, whether they exist or not.

    Raises:
        InputError: something else, or of another length.
    """
    if callable(target) or isinstance(target, (str, float)):
        hint = ": a name needs the argument labels of the explainer" if isinstance(target, str) else ""
        raise InputError(f"target must be None, an int, N ints or [N, K] ints, got {type(target).__name__}{hint}")
    try:
        chosen = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError):
        kinds = sorted({type(part).__name__ for part in target}) if isinstance(target, (list, tuple)) else []
        received = " of ".join([type(target).__name__, *([" and ".join(kinds)] if kinds else [])])
        raise InputError(f"target must be None, an int, N ints or [N, K] ints, got {received}") from None
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise InputError(f"target must hold integers, got {chosen.dtype}")
    if chosen.dim() == 0:
        chosen = chosen.expand(images)
    if chosen.dim() > 2 or len(chosen) != images or chosen.numel() == 0:
        raise InputError(f"target must have one entry for each of {images} images, got shape {list(chosen.shape)}")
    return chosen


def named_classes(target: Any, labels: Sequence[str] | None) -> Any:
    """Returns a target with every name of a class replaced by its index.

    A name is a label, or one of the synonyms that a label lists between commas; capitals do not matter.

    Args:
        target: a name, names in a sequence or in a sequence of sequences; anything else is returned unchanged.
        labels: names of the classes; None where there are none, and names stay.

    Raises:
        InputError: no label, or several, have the name.
    """
    if labels is None or isinstance(target, Tensor):
        return target
    if isinstance(target, (list, tuple)):
        return [named_classes(part, labels) for part in target]
    return _index_of(target, labels) if isinstance(target, str) else target


def _index_of(name: str, labels: Sequence[str]) -> int:
    word = name.strip().lower()
    synonyms = [[part.strip().lower() for part in label.split(",")] for label in labels]
    whole = [place for place, label in enumerate(labels) if label.strip().lower() == word]
    places = whole or [place for place, names in enumerate(synonyms) if word in names]
    if len(places) == 1:
        return places[0]
    if places:
        raise InputError(f"target must name one class, got {name!r}, the label of classes {places}: give the index")
    close = difflib.get_close_matches(word, sorted({part for names in synonyms for part in names}), n=3)
    hint = f" such as {', '.join(map(repr, close))}" if close else ""
    raise InputError(f"target must be one of the labels{hint}, got {name!r}")
