"""The base of all explainers: it checks the images, records the model and replays it."""

import abc
import contextlib
import functools
import inspect
import logging
import reprlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai import localize
from pyfast_xai.acceleration import weight_layouts
from pyfast_xai.acceleration.cache_key import cache_key
from pyfast_xai.acceleration.cuda_graphs import Repeatable
from pyfast_xai.acceleration.replayed_model import MEMORY_LIMIT, ReplayedModel
from pyfast_xai.errors import InputError, PyFastXaiError
from pyfast_xai.explainers.common.checks import check_images, check_model, misfit
from pyfast_xai.explainers.common.memory_format import in_channels_last, kind_of_call, run_in_channels_last
from pyfast_xai.explainers.common.outputs import Outputs, check_outputs
from pyfast_xai.explainers.common.replay_trial import ReplayTrial, nearly_same
from pyfast_xai.explainers.common.targets import Goal, Targets, check_target, named_classes, take_targets
from pyfast_xai.explainers.common.tensors import repeat_rows, take_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import SEGMENT, BoxRule
from pyfast_xai.tape import Tape, record
from pyfast_xai.tape.isolation import isolated
from pyfast_xai.tape.module_hooks import unwrap
from pyfast_xai.tape.record import copies, tensors_in

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")
Self = TypeVar("Self", bound="Explainer")
Accelerate = bool | Literal["auto"]

# The explainer whose `run_whole_model` block runs; each thread has its own, so that several may share an explainer.
_running_whole_model: "ContextVar[Explainer | None]" = ContextVar("_running_whole_model", default=None)


class Settings(TypedDict, total=False):
    """The keyword arguments that all explainers take, see `Explainer`."""

    outputs: Outputs
    labels: Sequence[str] | None
    box_rule: BoxRule | str | None
    batch_size: int | None
    accelerate: Accelerate


class Explainer(abc.ABC):
    """Base of all explainers.

    Args:
        model: in evaluation mode; compiled and data-parallel wrappers are looked through. It is never changed.
        outputs: the kind of the model's outputs, on which scores depend: "logits" of one choice among the classes
            (the score is their softmax), "independent logits" of labels that do not exclude each other (the sigmoid),
            "probabilities", or "values" that are no probabilities, as of a regression (both as they are). "auto"
            decides for each image: outputs that a sigmoid or softmax made, and rows that sum to one, are probabilities,
            any other single output is a value, and several are logits.
        labels: names of the classes, one for each output; targets can be given by them, and explanations show them.
        box_rule: how `Explanation.boxes` makes boxes, a rule of `localize` or its text: "segment:0.4", "mass:0.05" or
            "hull"; None for the one that was measured to serve the method best, `default_box_rule`.
        batch_size: images that go through the model at once; None for all of them, or for `default_batch_size`.
            Results do not depend on it but for rounding.
        accelerate: "auto" to replay the model instead of running it once that has proven faster for images of one
            shape: the first calls, and a short run altogether, record the model, preparing a replay takes at most a
            quarter of the time of the calls so far, and replays of all explainers together keep at most 1 GiB. What is
            recorded and what is replayed differ by rounding, 1e-5 of the largest number. False, or
            `torch.use_deterministic_algorithms(True)`, to record the model in every call: the same numbers to the last
            bit. True to replay it from the first call on, see `Explainer.accelerate`.

    Raises:
        InputError: the model is no module, or a setting does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import METHODS, demo
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> [METHODS[name](model)(images).heatmap.shape for name in ("saliency", "grad-cam")]
        [torch.Size([2, 96, 96]), torch.Size([2, 96, 96])]
    """

    method: str
    paper: str
    default_box_rule: ClassVar[BoxRule] = SEGMENT
    default_batch_size: ClassVar[int | None] = None
    ranks: ClassVar[tuple[int, ...]] = (4,)  # dimensions of the images: 5 of volumes and clips, 3 of signals
    takes_functions: ClassVar[bool] = True  # a target may be a function of what the model returned
    takes_gradients: ClassVar[bool] = True  # a target may be a gradient to start from
    needs_attention: ClassVar[bool] = False  # explains transformers alone
    needs_detections: ClassVar[bool] = False  # explains detectors alone
    slow = False  # takes tens of forward passes or more, whatever the model
    folds = True  # reads a convolution with its batch norm folded in as it reads the two
    _arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Shows the settings of the base classes in the signature, which `help` and the command line read."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__signature__ = _signature(cls)

    def __new__(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        """Refuses unknown settings, and keeps the others as the user wrote them, for `repr`."""
        explainer = super().__new__(cls)
        if not args and not kwargs:  # a copy, which is given its attributes, or a mistake that `__init__` reports
            return explainer
        try:
            cls.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}") from None
        explainer._arguments = (
            args[1:],
            {name: value for name, value in kwargs.items() if name not in ("model", "labels")},
        )
        return explainer

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Returns the arguments of a copy, before it gets the attributes of the original."""
        return (self.model,)

    def __init__(
        self,
        model: nn.Module,
        *,
        outputs: Outputs = "auto",
        labels: Sequence[str] | None = None,
        box_rule: BoxRule | str | None = None,
        batch_size: int | None = None,
        accelerate: Accelerate = "auto",
    ) -> None:
        check_model(model)
        self.model = unwrap(model)
        self.outputs: Outputs = check_outputs(outputs)
        self.labels = None if labels is None else list(labels)
        self.box_rule = self.default_box_rule if box_rule is None else localize.box_rule(box_rule)
        self.batch_size = self.default_batch_size if batch_size is None else at_least(1, "batch_size", batch_size)
        self.warned: set[str] = set()  # what the user was warned of
        self._accelerated: ReplayedModel | None = None
        self._trial: ReplayTrial | None = None
        if one_of("accelerate", accelerate, (True, False, "auto")) == "auto":
            self._trial = ReplayTrial(self.model, fold=self.folds, job=self.method)
        elif accelerate:
            self.accelerate()

    def __repr__(self) -> str:
        positional, named = self._arguments
        shown = [*map(brief_repr, positional), *(f"{name}={brief_repr(value)}" for name, value in named.items())]
        return f"{type(self).__name__}({', '.join([type(self.model).__name__, *shown])})"

    def accelerate(self: Self, *, memory_limit: int = MEMORY_LIMIT) -> Self:
        """Replays the model from now on instead of running it: same explanations up to rounding, sooner.

        On the first images of a shape the model runs, too, and its replay must agree with it: batch norm is folded
        into convolutions, weights are packed for the CPU, branches that lead nowhere are dropped. The model itself is
        left alone. A change to its weights, modules, attributes, hooks, functions or mode is noticed, and the
        replay is made anew; that of a few numbers of a tensor of more than 8,192 may be noticed late, when the model
        runs beside its replay, as it does at the 2nd, 4th, 8th and so on call. A model that cannot be replayed, or that
        cannot be watched, runs as before, which is logged once.

        On a CUDA device steps that are run for the second time become CUDA graphs.

        Args:
            memory_limit: bytes that replays, CUDA graphs and copies of weights may take. What was used longest ago is
                let go, and weights that there is no room for are not copied. Explaining single images and batches in
                turn takes up to four copies of the weights of convolutions; copies of 3 x 3 kernels on a CPU can be
                four times as large.

        Returns:
            The explainer itself.

        Raises:
            InputError: a limit below zero.
        """
        if memory_limit < 0:
            raise InputError(f"memory_limit must be a number of bytes, 0 or larger, got {memory_limit!r}")
        if self._accelerated is None:
            self._accelerated = ReplayedModel(self.model, fold=self.folds, memory_limit=memory_limit)
        self._trial = None
        return self

    @property
    def accelerated(self) -> bool:
        """Returns whether the model is replayed; where it is tried out, whether in the call that runs."""
        return self.accelerated_model is not None

    @property
    def accelerated_model(self) -> ReplayedModel | None:
        """Returns the object that replays the model; None if the model runs itself."""
        return self._accelerated if self._trial is None else self._trial.current

    def __call__(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Explanation:
        """Explains a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them; for most methods also volumes and clips `[N, C, D, H, W]`
                and signals `[N, C, L]`, see `ranks`.
            target: None for the class with the largest output of each image; a class, by its index or its label, for
                all images; N classes; or `[N, K]` classes, which give K rows an image. Where the explainer takes them,
                a floating-point tensor of the shape of the output as the gradient to start from, or a function of what
                the model returned that gives one number an image.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            An explanation with N rows, or N times K, image by image.

        Raises:
            InputError: images or a target that do not fit.
            UnsupportedOpError: the model has an op for which the explainer has no rule.
        """
        try:
            self.check(images)
            check_target(self.method, target, functions=self.takes_functions, gradients=self.takes_gradients)
            with torch.inference_mode(False), torch.no_grad():
                explanation = self._in_batches(images.detach(), named_classes(target, self.labels), args, kwargs)
            return check_rows(explanation, len(images))
        except PyFastXaiError:
            raise
        except Exception as error:
            reason = misfit(self.model, images, error)
            if reason is None:
                raise
            raise InputError(reason) from error

    @contextlib.contextmanager
    def run_whole_model(self) -> Iterator[None]:
        """Runs the model to its end in a `with` block, so that the explanation has its `logits`.

        Methods that need no more than a layer (Eigen-CAM and its kin) stop there otherwise.
        """
        token = _running_whole_model.set(self)
        try:
            yield
        finally:
            _running_whole_model.reset(token)

    @property
    def _runs_whole_model(self) -> bool:
        """Returns whether the model runs to its end where a layer would do."""
        return _running_whole_model.get() is self

    def _in_batches(self, images: Tensor, target: Any, args: Any, kwargs: Any) -> Explanation:
        """Returns the explanation of all images, `batch_size` of them at a time."""
        if self.batch_size is None or len(images) <= self.batch_size:
            return self._explain_batch(images, target, args, kwargs)
        parts = []
        for rows in torch.arange(len(images), device=images.device).split(self.batch_size):
            part_args, part_kwargs = take_rows((args, kwargs), len(images), rows)
            part_target = take_targets(target, len(images), rows)
            parts.append(self._explain_batch(images[rows], part_target, part_args, part_kwargs))
        return Explanation.concatenate(parts)

    def _explain_batch(self, images: Tensor, target: Any, args: Any, kwargs: Any) -> Explanation:
        """Returns the explanation of images that go through the model together, which may be a trial of replays."""
        explain = functools.partial(self._explain, images, target, args, kwargs)
        if self._trial is None:
            return explain()
        if self._trial.model is not self.model:
            self._trial = ReplayTrial(self.model, fold=self.folds, job=self.method)
        goal = (type(target).__name__, *(target.shape if isinstance(target, Tensor) else ()))
        key = cache_key((images, *args), kwargs)
        return self._trial(
            explain,
            signature=None if key is None else (key, goal),
            described=f"{images.dtype}{list(images.shape)}{list(images.stride())}, {goal}",
            device=images.device,
            agree=None if self.slow else lambda actual, expected: nearly_same([actual.heatmap], [expected.heatmap]),
        )

    @abc.abstractmethod
    def _explain(self, images: Tensor, target: Any, args: Any, kwargs: Any) -> Explanation:
        """Returns the explanation of images that were checked, without a gradient and outside inference mode."""

    def _fields(self, images: Tensor, targets: Targets, each: int | None = None) -> dict[str, Any]:
        """Returns the fields that every explanation of some targets has besides its maps.

        Args:
            images: the images that are explained.
            targets: their targets.
            each: rows an image; None for one a target.
        """
        each = targets.each if each is None else each
        kinds = None if targets.kinds is None else targets.kinds.names(len(images))
        return {
            "method": self.method,
            "target": None if targets.target is None else targets.target.flatten(),
            "score": None if targets.score is None else targets.score.flatten(),
            "outputs": None if kinds is None else [kind for kind in kinds for _ in range(each)],
            "logits": None if targets.logits is None else repeat_rows(targets.logits, each),
            "images": repeat_rows(images, each),
            "box_rule": self.box_rule,
            "labels": self.labels,
        }

    def warn(self, reason: str, *values: Any) -> None:
        """Logs a warning the first time there is a reason to."""
        if reason not in self.warned:
            self.warned.add(reason)
            logger.warning(f"%s: {reason}", self.method, *values)

    def check(self, images: Tensor) -> None:
        """Refuses images that no explainer can work with.

        Raises:
            InputError: naming the argument, the expected value and the actual one.
        """
        low, high = check_images(self.model, images, self.ranks)
        if low >= 0 and high > 64:
            self.warn(
                "images hold values up to %.0f, as pixels do before they are scaled and normalised (said once)", high
            )

    def record(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        """Returns `tape.record` of the model on a batch of images.

        On a CPU the model gets the images in channels_last: convolutions are faster and receptive fields lie
        together. A model that fails on them (`x.view` of a map), or computes something else, gets unchanged images from
        then on. To find out, the model runs once more on the first call of a kind, for up to eight kinds.
        """
        return self._recorded(images, args, kwargs)

    def record_unaccelerated(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        """Returns `tape.record` of the model itself, also where it is accelerated."""
        return self._recorded(images, args, kwargs, self._record_unaccelerated)

    def captured(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> T:
        """Returns `function(*arguments)`, which reads no number and so may be a CUDA graph; see `CudaGraphCache`."""
        accelerated = self.accelerated_model
        return function(*arguments) if accelerated is None else accelerated.run(function, *arguments, key=key)

    def repeating(
        self, function: Callable[..., T], *arguments: Any, key: Hashable
    ) -> AbstractContextManager[Repeatable[T]]:
        """Repeats a step on tensors that it writes to; see `CudaGraphCache.repeating`."""
        accelerated = self.accelerated_model
        if accelerated is None:
            return contextlib.nullcontext(Repeatable(function, arguments))
        return accelerated.repeating(function, *arguments, key=key)

    def _recorded(self, images: Tensor, args: Any, kwargs: Any, recording: Callable[..., Tape] | None = None) -> Tape:
        call = {name: value for name, value in kwargs.items() if name != "policy"}
        recording = recording or self._tape
        return run_in_channels_last(
            self.model,
            run=lambda inputs: recording(*inputs, *args, **kwargs),
            compared=lambda inputs: _answers(record(self.model, *inputs, *args, **call)),
            answers=_answers,
            arguments=[images],
            faster=[in_channels_last(self.model, images)],
            key=kind_of_call(images, args, call),
        )

    def _tape(self, *args: Any, **kwargs: Any) -> Tape:
        accelerated = self.accelerated_model
        if accelerated is not None:
            return accelerated.record(*args, **kwargs)
        return self._record_unaccelerated(*args, **kwargs)

    def _record_unaccelerated(self, *args: Any, **kwargs: Any) -> Tape:
        return record(self.model, *args, prepare=weight_layouts.LAYOUTS.begin(), **kwargs)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the model without gradients and without a tape, by the very kernels that `record` runs.

        Serves models that write to none of their own tensors, as `record` has checked: nothing is restored.
        """
        images = in_channels_last(self.model, images)
        accelerated = self.accelerated_model
        if accelerated is not None:
            return accelerated.record(images, *args, **kwargs).result
        with isolated():
            images, args, kwargs = copies((images, args, kwargs))
            return self.model(images, *args, **kwargs)


def _answers(tape: Tape) -> list[Tensor]:
    return tensors_in(tape.result if tape.reached is None else tape.reached)


def check_rows(explanation: Explanation, images: int) -> Explanation:
    """Returns an explanation that has N rows, or N times K.

    Raises:
        InputError: another number of rows, or fields with different numbers of them.
    """
    counts = {name: len(part) for name, part in explanation.by_row().items()}
    if len(set(counts.values())) != 1 or counts["heatmap"] % images or not counts["heatmap"]:
        rows = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise InputError(f"model must keep one row an image, got {rows} for {images} images")
    return explanation


def one_of(argument: str, value: Any, known: Any) -> Any:
    """Returns a setting that must be one of some names."""
    if value not in known:
        raise InputError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def at_least(low: int, argument: str, value: int) -> int:
    """Returns a whole number that must not be smaller than `low`."""
    if value < low:
        raise InputError(f"{argument} must be at least {low}, got {value}")
    return value


def _signature(cls: type) -> inspect.Signature:
    """Returns the signature of a class; `**settings: Unpack[...]` becomes the arguments of the base classes."""
    _, *declared = inspect.signature(vars(cls)["__init__"]).parameters.values()
    parameters = {parameter.name: parameter for parameter in declared}
    rest = parameters.get("settings")
    if rest is not None and get_origin(rest.annotation) is Unpack:
        del parameters["settings"]
        (settings,) = get_args(rest.annotation)
        bases = [inspect.signature(base).parameters for base in reversed(cls.__bases__)]
        inherited = {name: parameter for base in bases for name, parameter in base.items()}
        parameters |= {name: inherited[name] for name in get_type_hints(settings) if name not in parameters}
    return inspect.Signature(list(parameters.values()))


Explainer.__signature__ = _signature(Explainer)


def brief_repr(value: Any) -> str:
    """Returns a setting as `repr` shows it: tensors by their shape, functions and modules by their names."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", None) or reprlib.repr(value)
