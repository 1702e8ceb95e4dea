"""CLEAR (Kumar, Wong and Taylor, 2017): which class every pixel speaks for, and how strongly.

The response of each class is projected back to the image; at every pixel the strongest wins. Classes come a few at a
time and are folded into the winner at once, so that a thousand need the memory of a handful.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyfast_xai import memory, ops
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, Target, choose, logits_of, one_of, probability, rows_of
from pyfast_xai.explainers.pooled_tail import PooledTail, pooled_tail
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.response import DECONVNET, GUIDED, LINEAR, NEAREST, Response, Table, rectifies, walk
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import Keep

logger = logging.getLogger("pyfast_xai")

VARIANTS: dict[str, Table] = {"linear": LINEAR, "deconvnet": DECONVNET, "guided": GUIDED}
UNPOOLING: dict[str, Table] = {"switches": {}, "nearest": NEAREST}
ACTIVATIONS = ("all", "positive", "strongest")
SCALES = ("joint", "class")

# Of a response [K, N, C, H, W]; the op that finds the winner sums the channels by itself.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda response: response,
    "norm": lambda response: torch.linalg.vector_norm(_wide(response), dim=2, keepdim=True),
    "max": lambda response: response.amax(2, keepdim=True),
}


class CLEAR(Explainer):
    """Dominant class and dominant response at every pixel.

    R(x|c), the attentive response of class c, is what the last layer says for c, walked down to the image through the
    adjoint of every convolution, without biases, and the inverse of every max-pool (Eqs. 1 to 3). The dominant class is
    argmax_c R(x|c) (Eq. 4), the dominant response R at that class (Eq. 5), and the picture has the colour of the one
    with the brightness of the other (Eq. 6).

    The paper leaves much open; `docs/clear.md` has the reasons for the defaults.

    Args:
        model: in evaluation mode; any classifier.
        classes: which classes compete: an int for so many with the largest outputs of each image (all, where there
            are no more), a sequence for these, None for all. The paper has ten, and proposes the ten most active
            where there are more.
        variant: what rectifiers do on the way down: "guided" keeps the positive part of the signal where the
            activation was positive; "deconvnet" keeps the positive part; "linear" lets it pass, as in the equations.
        unpooling: "switches" puts the signal where the maximum was; "nearest" spreads it over the window.
        start: "map" starts from the map of each class, for networks whose outputs are an average over the image of
            such maps or a linear layer on averaged features, which is the same; "logit" from the output itself; None
            takes the map where there is one.
        activations: what is taken of a class's map: "all"; "positive", the part above zero; or "strongest", its
            largest value alone.
        reduction: what is taken of the channels of R: their "sum", Euclidean "norm", or "max".
        scale: "joint" compares responses as they are; "class" first divides each by its largest magnitude.
        chunk: classes walked back at once; None for as many as make 64 responses, but on a CPU 32 after
            `keep_freed_memory()` and 16 without, where more spend their time on fresh memory.
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "clear"
    paper = "Explaining the unexplained: a class-enhanced attentive response (CLEAR) approach (Kumar et al., 2017)"

    def __init__(
        self,
        model: nn.Module,
        classes: int | Sequence[int] | None = 10,
        *,
        variant: Literal["guided", "deconvnet", "linear"] = "guided",
        unpooling: Literal["switches", "nearest"] = "switches",
        start: Literal["map", "logit"] | None = None,
        activations: Literal["all", "positive", "strongest"] = "all",
        reduction: Literal["sum", "norm", "max"] = "sum",
        scale: Literal["joint", "class"] = "joint",
        chunk: int | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, labels=labels)
        self.classes = _classes(classes)
        self.variant = one_of("variant", variant, VARIANTS)
        self.unpooling = one_of("unpooling", unpooling, UNPOOLING)
        self.start = one_of("start", start, (None, "map", "logit"))
        self.activations = one_of("activations", activations, ACTIVATIONS)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.scale = one_of("scale", scale, SCALES)
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk must be at least 1, got {chunk}")
        self.chunk = chunk
        self._pool: str | None = None
        self._said = False

    def __call__(self, images: Tensor, target: Target = None, *args: Any, **kwargs: Any) -> Explanation:
        """Find the dominant class of every pixel.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: the class that binary maps set against all others: None for the largest output, an int, N ints or
                `[N, K]` ints (a row for each). It does not change which classes compete.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            An explanation with `winner`, the dominant class; `map`, the dominant response, signed; `heatmap`, its
            positive part; and `attribution`, the response of the target, signed.

        Raises:
            InputError: images, classes or a target that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            source = self._record(images, args, kwargs)
            chosen = choose(source.logits, target).view(len(images), -1)
            rows = self._rows(source.logits)
            wanted = chosen.T
            # Targets that do not compete are walked back in the end, for themselves.
            alone = wanted[~(rows[:, None] == wanted).any(0).all(1)]

            size = (len(images), *images.shape[2:])
            best = torch.full(size, -torch.inf, dtype=_wide(images[:0]).dtype, device=images.device)
            winner = torch.full(size, -1, device=images.device)
            attribution = images.new_empty(len(wanted), *images.shape)
            for part, response in self._responses(source, rows):
                k, target_row, n = (part[:, None] == wanted).nonzero(as_tuple=True)
                attribution[target_row, n] = response[k, n]
                ops.response_argmax(self._reduced(response), part, best, winner)
            for part, response in self._responses(source, alone):
                k, target_row, n = (part[:, None] == wanted).nonzero(as_tuple=True)
                attribution[target_row, n] = response[k, n]
            best.masked_fill_(winner < 0, 0)  # responses that are no numbers at all

            each = len(wanted)
            return Explanation(
                method=self.method,
                heatmap=rows_of(best.clamp_min(0), each),
                target=chosen.flatten(),
                score=probability(source.logits, chosen).flatten(),
                attribution=attribution.transpose(0, 1).flatten(0, 1).contiguous(),
                map=rows_of(best, each),
                winner=rows_of(winner, each),
                images=rows_of(images, each),
                labels=self.labels,
            )

    def responses(self, images: Tensor, classes: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """The attentive responses of some classes, one number a pixel.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            classes: K of them.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Returns:
            R(x|c), reduced and scaled as the explainer is set, signed, `[N, K, H, W]`.

        Raises:
            InputError: images or classes that do not fit.
        """
        self.check(images)
        with torch.inference_mode(False), torch.no_grad():
            source = self._record(images, args, kwargs)
            rows = _of_all(_listed(classes), source.logits)
            maps = [_wide(self._reduced(response)).sum(2) for _, response in self._responses(source, rows)]
            return torch.cat(maps).transpose(0, 1).contiguous()

    def _record(self, images: Tensor, args: Any, kwargs: Any) -> "_Source":
        """Run the model and find out where back projections start."""
        overlay = {**VARIANTS[self.variant], **UNPOOLING[self.unpooling]}
        reading = _Reading(overlay, self._pool)
        tape = self.record(images, *args, reading=reading, **kwargs)
        value, logits = logits_of(tape)
        if logits.dim() != 2:
            raise InputError(f"model must return [N, classes] to be explained, got {list(logits.shape)}")
        maps = None if self.start == "logit" else class_maps(tape)
        if maps is not None and _AVERAGED not in maps.pool.saved:
            # Seen for the first time: which of a network's averages is the last is known only in the end.
            self._pool = maps.pool.name
            reading = _Reading(overlay, self._pool)
            tape = self.record(images, *args, reading=reading, **kwargs)
            maps = class_maps(tape)
            _, logits = logits_of(tape)
        self._say(tape, maps)
        if maps is None:
            if self.start == "map":
                raise InputError("start must be 'logit' or None for a model whose outputs are no average, got 'map'")
            return _Source(tape, reading, logits, value, self._activations(logits), None)
        activations = self._activations(_maps(maps, maps.pool.saved[_AVERAGED].tensor))
        return _Source(tape, reading, logits, maps.source, activations, maps.weight)

    def _say(self, tape: Tape, maps: PooledTail | None) -> None:
        if self._said:
            return
        self._said = True
        where = "the outputs" if maps is None else f"the class maps that {maps.pool.name!r} averages"
        logger.info("clear starts from %s", where)
        if self.variant != "linear" and not any(map(rectifies, tape)):
            logger.warning("clear found no rectifier in the model: variant %r is the linear one", self.variant)
        if self.unpooling != "switches" and not any(key(node.op) in NEAREST for node in tape):
            logger.warning("clear found no max-pool in the model: unpooling has no effect")

    def _activations(self, maps: Tensor) -> Tensor:
        """The part of class maps `[N, classes, ...]` that is projected back."""
        if self.activations == "positive":
            return maps.clamp_min(0)
        if self.activations == "strongest":
            flat = maps.flatten(2) if maps.dim() > 2 else maps[..., None]
            at = flat.argmax(2, keepdim=True)
            return torch.zeros_like(flat).scatter_(2, at, flat.gather(2, at)).view(maps.shape)
        return maps

    def _rows(self, logits: Tensor) -> Tensor:
        """The classes that compete, int64 `[K, N]`."""
        count = logits.shape[1]
        if self.classes is None or (isinstance(self.classes, int) and self.classes >= count):
            return _of_all(list(range(count)), logits)
        if isinstance(self.classes, int):
            return logits.argsort(dim=1, descending=True, stable=True)[:, : self.classes].T
        return _of_all(self.classes, logits)

    def _responses(self, source: "_Source", rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Classes `[k, N]` with their responses `[k, N, C, H, W]`, chunk by chunk."""
        images = rows.shape[1]
        at_once = 64 if rows.device.type != "cpu" else 32 if memory.is_kept() else 16
        chunk = self.chunk or max(1, at_once // images)
        # Ten in chunks of at most eight are two of five.
        for part in rows.tensor_split(math.ceil(len(rows) / chunk)) if len(rows) else ():
            yield part, source.project(part)

    def _reduced(self, response: Tensor) -> Tensor:
        """A response `[K, N, C, H, W]` as it competes, with one channel or several to be summed."""
        reduced = REDUCTIONS[self.reduction](response)
        if self.scale == "class":
            reduced = _wide(reduced).sum(2, keepdim=True)
            largest = reduced.abs().amax((3, 4), keepdim=True)
            reduced = reduced / largest.clamp_min(torch.finfo(reduced.dtype).tiny)
        return reduced


_AVERAGED = "averaged"


class _Reading(Response):
    """A dense reading that also keeps what one pool averages.

    Args:
        overlay: rules that replace those of the gradient.
        pool: name of the operation; None for none.
    """

    def __init__(self, overlay: Table, pool: str | None) -> None:
        super().__init__(overlay)
        self._pool = pool

    def save(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().save(node, keep, args, kwargs)
        if node.name == self._pool:
            keep(_AVERAGED, args[0])


@dataclass
class _Source:
    """A recorded forward and where back projections start.

    Attributes:
        tape: of the forward.
        reading: the one it was recorded with.
        logits: the outputs `[N, classes]`.
        value: where projections start, `[N, classes, ...]` or, with a weight, `[N, C, ...]`.
        activations: of the classes, `[N, classes, ...]`.
        weight: of the linear layer between the two, `[classes, C]`.
    """

    tape: Tape
    reading: Response
    logits: Tensor
    value: Value
    activations: Tensor
    weight: Tensor | None

    def project(self, classes: Tensor) -> Tensor:
        """Responses `[K, N, C, H, W]` of classes `[K, N]`."""
        return walk(self.reading, self.tape, {self.value: self._seeds(classes)}, [self.tape.inputs[0]], retain=True)[0]

    def _seeds(self, classes: Tensor) -> Tensor:
        """What is projected back, with all classes but one at zero (Eq. 3), `[K, N, ...]`."""
        images = torch.arange(classes.shape[1], device=classes.device)
        own = self.activations[images, classes]
        if self.weight is not None:
            weight = self.weight.detach()[classes]
            seeds = own[:, :, None] * weight.view(*weight.shape, *[1] * (own.dim() - 2))
        else:
            seeds = own.new_zeros(len(classes), *self.activations.shape)
            seeds[torch.arange(len(classes), device=classes.device)[:, None], images, classes] = own
        # In the memory format of the value, which the whole walk then has: convolutions are nearly twice as fast.
        last = len(self.value.shape) == 4 and self.value.stride[1] == 1
        return seeds.movedim(2, -1).contiguous().movedim(-1, 2) if last else seeds


def class_maps(tape: Tape) -> PooledTail | None:
    """Where the outputs are the average of a map of each class; None where they are not.

    A linear layer on averaged features is the average of that layer at every position, so such networks have maps,
    too (Zhou et al., 2016).

    Args:
        tape: of a whole forward pass.
    """
    tail = pooled_tail(tape)
    return None if tail is None or tail.channels != 1 else tail


def _maps(tail: PooledTail, averaged: Tensor) -> Tensor:
    """The maps `[N, classes, ...]` that belong to what is averaged."""
    if tail.weight is None:
        return averaged
    weight, bias = tail.weight.detach(), None if tail.bias is None else tail.bias.detach()
    return torch.nn.functional.linear(averaged.movedim(1, -1), weight, bias).movedim(-1, 1)


def _classes(given: Any) -> int | list[int] | None:
    """The setting `classes`, checked as far as it can be without a model."""
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise InputError(f"classes must be at least 1, got {given}")
        return given
    return _listed(given)


def _listed(given: Any) -> list[int]:
    try:
        listed = given.tolist() if isinstance(given, Tensor) else list(given)
    except TypeError:
        listed = [given]
    if not listed or not all(isinstance(c, int) and not isinstance(c, bool) for c in listed):
        raise InputError(f"classes must be None, an int or a sequence of ints, got {given!r}")
    return listed


def _of_all(classes: list[int], logits: Tensor) -> Tensor:
    """The same classes for every image, `[K, N]`."""
    worst = next((c for c in classes if not 0 <= c < logits.shape[1]), None)
    if worst is not None:
        raise InputError(f"classes must lie in [0, {logits.shape[1]}), got {worst}")
    return torch.tensor(classes, device=logits.device)[:, None].expand(-1, len(logits))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
