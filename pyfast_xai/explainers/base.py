"""What all explainers share: checking what comes in, choosing the neuron, and handing back ordinary tensors."""

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.heard import waiting
from pyfast_xai.explanation import Explanation
from pyfast_xai.tape import Tape, Value, record
from pyfast_xai.tape.accelerated import Accelerated
from pyfast_xai.tape.captured import Again
from pyfast_xai.tape.watch import modules_of, unwrap, watching

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")
Own = TypeVar("Own", bound="Explainer")
Target = int | Sequence[int] | Tensor | None


class Explainer:
    """Base of all explainers.

    Args:
        model: in evaluation mode; compiled and data-parallel wrappers are looked through. It is never changed.
        labels: names of the classes, passed on to explanations.
    """

    method: str
    paper: str
    slow = False  # takes tens of forward passes or more
    folds = True  # reads a convolution with its batch norm folded in as it reads the two

    def __init__(self, model: nn.Module, *, labels: Sequence[str] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = unwrap(model)
        self.labels = None if labels is None else list(labels)
        self._channels_last = True
        self._accelerated: Accelerated | None = None

    def accelerate(self: Own) -> Own:
        """Replay the model from now on instead of running it: same explanations up to rounding, sooner.

        On the first images of a shape the model runs twice, and its replay must agree with it: batch norm is folded
        into convolutions, weights are packed for the CPU, branches that lead nowhere are dropped. The model itself is
        left alone. A change to its weights, modules, hooks or mode is noticed; one to other attributes that its
        `forward` looks at is not. A model that cannot be replayed runs as before, which is logged once.

        On a CUDA device steps that are run for the second time become CUDA graphs.

        Takes memory for a second and third copy of the weights of convolutions, twice that where single images and
        batches are explained, and for the graphs. On a CPU copies of 3 x 3 kernels are four times as large.

        Returns:
            The explainer itself.
        """
        if self._accelerated is None:
            self._accelerated = Accelerated(self.model, fold=self.folds)
        return self

    @property
    def accelerated(self) -> bool:
        """Whether the model is replayed."""
        return self._accelerated is not None

    @property
    def accelerated_model(self) -> Accelerated | None:
        """What replays the model; None where it runs itself."""
        return self._accelerated

    def __call__(self, images: Tensor, target: Target = None) -> Explanation:
        """Explain a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: the class to explain: None for the one with the largest output, an int for all images, or one an
                image.
        """
        raise NotImplementedError

    def check(self, images: Tensor) -> None:
        """Refuse what no explainer can work with.

        Raises:
            InputError: naming the argument, what was expected and what came.
        """
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a tensor [N, C, H, W], got {type(images).__name__}")
        if images.dim() != 4:
            raise InputError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"images must have a floating-point dtype, got {images.dtype}")
        if images.numel() == 0:
            raise InputError(f"images must hold at least one image, got shape {list(images.shape)}")
        if not bool(torch.isfinite(images).all()):
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
            raise InputError(
                f"images must be finite, got NaN or infinity in image {bad[0]} ({len(bad)} of {len(images)})"
            )
        for module, name in modules_of(self.model).items():
            if module.training:
                where = f"module {name!r} of it" if name else "it"
                raise InputError(f"model must be in evaluation mode (call model.eval()), got {where} in training mode")

    def record(self, images: Tensor, *args: Any, **kwargs: Any) -> Tape:
        """`tape.record` of the model on a batch of images.

        On a CPU the images are handed over in channels_last: convolutions are faster and receptive fields lie
        together. A model that cannot take them so (`x.view` of a map) is run again with the images as they are, and
        from then on at once.
        """
        tape = self._recorded(images, args, kwargs)
        if kwargs.get("until") is None:
            self.tell(images, tape)
        return tape

    def tell(self, images: Tensor, tape: Tape) -> None:
        """Tell those who wait for it what the model returned for these images."""
        heard = waiting(images)
        if heard is not None:
            with contextlib.suppress(InputError):  # a model that returns no outputs of classes
                heard.logits = logits_of(tape)[1]

    def repeating(self, function: Callable[..., T], *arguments: Any, key: Hashable) -> AbstractContextManager[Again[T]]:
        """Calls a step again and again, on tensors that it writes to; see `Captured.repeating`."""
        if self._accelerated is None:
            return contextlib.nullcontext(Again(function, arguments))
        return self._accelerated.repeating(function, *arguments, key=key)

    def _recorded(self, images: Tensor, args: Any, kwargs: Any) -> Tape:
        if self._wants_channels_last(images) and not images.is_contiguous(memory_format=torch.channels_last):
            try:
                return self._tape(images.contiguous(memory_format=torch.channels_last), *args, **kwargs)
            except RuntimeError as error:
                tape = self._tape(images, *args, **kwargs)
                self._channels_last = False
                logger.info("%s: the model cannot take channels_last images (%s)", self.method, error)
                return tape
        return self._tape(images, *args, **kwargs)

    def _tape(self, *args: Any, **kwargs: Any) -> Tape:
        if self._accelerated is not None:
            return self._accelerated.record(*args, **kwargs)
        return record(self.model, *args, **kwargs)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, in inference mode and without a tape; by the very kernels that `record` runs.

        For a model that `record` has seen: what it writes to is not put back.
        """
        if self._wants_channels_last(images):
            images = images.contiguous(memory_format=torch.channels_last)
        if self._accelerated is not None:
            return self._accelerated.record(images, *args, **kwargs).result
        with watching(modules_of(self.model), lambda path, output: None), torch.inference_mode():
            return self.model(images, *args, **kwargs)

    def _wants_channels_last(self, images: Tensor) -> bool:
        return self._channels_last and images.device.type == "cpu" and images.dtype != torch.float64


def logits_of(tape: Tape) -> tuple[Value, Tensor]:
    """The output that classes are read from: the first tensor the model returned, or the one named "logits"/"out".

    Raises:
        InputError: the model returned no tensor that depends on its input.
    """
    outputs, result = tape.outputs, tape.result
    if isinstance(outputs, dict):
        name = next((n for n in ("logits", "out") if n in outputs), None)
        if name is not None:
            outputs, result = outputs[name], result[name]
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(result), strict=True)
    for value, tensor in pairs:
        if isinstance(value, Value):
            return value, tensor
    raise InputError("model must return a tensor that depends on its input, got none")


def choose(logits: Tensor, target: Target) -> Tensor:
    """The classes to explain, int64 `[N]` or `[N, K]`.

    Args:
        logits: outputs `[N, classes]`.
        target: None for the largest output of each image, an int for all, N ints, or `[N, K]` ints.

    Raises:
        InputError: another length, or a class that does not exist.
    """
    if logits.dim() != 2:
        raise InputError(f"model must return [N, classes] for a target to be chosen, got {list(logits.shape)}")
    images, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    chosen = given(target, images, logits.device)
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        worst = chosen[(chosen < 0) | (chosen >= classes)].flatten()[0]
        raise InputError(f"target must lie in [0, {classes}), got {int(worst)}")
    return chosen.long()


def given(target: Any, images: int, device: torch.device) -> Tensor:
    """Classes that were asked for, integers `[N]` or `[N, K]`, whether they exist or not.

    Raises:
        InputError: something else, or of another length.
    """
    if callable(target) or isinstance(target, (str, float)):
        raise InputError(f"target must be None, an int, N ints or [N, K] ints, got {type(target).__name__}")
    try:
        chosen = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError):
        kind = type(target).__name__
        raise InputError(f"target must be None, an int, N ints or [N, K] ints, got a {kind} of others") from None
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise InputError(f"target must hold integers, got {chosen.dtype}")
    if chosen.dim() == 0:
        chosen = chosen.expand(images)
    if chosen.dim() > 2 or len(chosen) != images or chosen.numel() == 0:
        raise InputError(f"target must have one entry for each of {images} images, got shape {list(chosen.shape)}")
    return chosen


def is_distribution(logits: Tensor) -> bool:
    """Whether outputs `[N, classes]` are probabilities already."""
    return bool((logits >= 0).all() & ((logits.sum(1) - 1).abs() < 1e-3).all())


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax probability of the chosen classes; outputs that are a distribution already are taken as they are."""
    logits = logits.float()
    shares = logits if is_distribution(logits) else logits.softmax(1)
    return shares.gather(1, target.view(len(target), -1)).view(target.shape)


def one_of(argument: str, given: Any, known: Any) -> Any:
    """A setting that must be one of some names."""
    if given not in known:
        raise InputError(f"{argument} must be one of {', '.join(map(repr, known))}, got {given!r}")
    return given


def rows_of(images: Tensor, each: int) -> Tensor:
    """The images of a result with `each` rows an image."""
    return images if each == 1 else images.repeat_interleave(each, 0)


def ordinary(tensor: Any) -> Any:
    """A tensor made in inference mode, as one that can be used anywhere."""
    if not isinstance(tensor, Tensor) or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
