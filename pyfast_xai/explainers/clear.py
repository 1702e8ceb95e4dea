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
from typing_extensions import Unpack

from pyfast_xai import memory, ops, render
from pyfast_xai.acceleration.cuda_graphs import is_capturing
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.classifier_head import PooledHead, classifier_head
from pyfast_xai.explainers.common.explainer import Explainer, Settings, at_least, one_of
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.targets import Target, class_columns, logits_of
from pyfast_xai.explainers.common.tensors import at_least_float32, repeat_rows, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.gradient import DECONVNET, GUIDED, LINEAR, NEAREST, GradientRules, Table, backward_pass, rectifies
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import SaveTensor

logger = logging.getLogger("pyfast_xai")

VARIANTS: dict[str, Table] = {"linear": LINEAR, "deconvnet": DECONVNET, "guided": GUIDED}
UNPOOLING: dict[str, Table] = {"switches": {}, "nearest": NEAREST}
ACTIVATIONS = ("all", "positive", "strongest")
SCALES = ("joint", "class")

# Of a response [K, N, C, H, W]; the op that finds the winner sums the channels by itself.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda response: response,
    "norm": lambda response: torch.linalg.vector_norm(at_least_float32(response), dim=2, keepdim=True),
    "max": lambda response: response.amax(2, keepdim=True),
}


@dataclass(eq=False, repr=False)
class ClassExplanation(Explanation):
    """The class that every pixel supports most, and how much.

    The dominant response is `signed_map`, at the resolution of the images.

    Attributes:
        dominant_class: the class with the largest response at every pixel, int64 `[N, H, W]`; -1 where there is none.
    """

    dominant_class: Tensor | None = None

    def overlay(
        self, images: Tensor | None = None, alpha: float = 0.5, colormap: str | None = None, signed: bool = False
    ) -> Tensor:
        """Returns dominant classes in their colours over the images in grey, float32 `[N, 3, H, W]` in 0..1.

        Args:
            images: `[N, C, H', W']` to draw on; None for those that were explained.
            alpha: how far the images are darkened under dominant classes.
            colormap: without effect, since the classes have colours of their own, see `legends`.
            signed: without effect, as all classes that do not respond are dark.
        """
        classes, responses = self._dominance()
        return render.overlay_dominance(self._ground(images), classes, responses, alpha=alpha)

    def binary(self, constant: bool = False) -> Tensor:
        """Returns where the target dominates and where other classes do, `[N, 3, H, W]` in 0..1; see `render.binary`.

        Args:
            constant: False for the strength of the response, hot for the target and green for others; True for plain
                red and blue.
        """
        classes, responses = self._dominance()
        assert self.target is not None
        is_target = classes == self.target[:, None, None]
        # Where the target dominates, no other is larger; where it does not, it is not the larger one.
        minimum = torch.full_like(responses, -torch.inf)
        return render.binary(
            torch.where(is_target, responses, minimum), torch.where(is_target, minimum, responses), constant
        )

    def keys(self, colormap: str | None = None, signed: bool = False) -> list[render.Key]:
        """Returns the meaning of brightness; `legends` shows the colours.

        Args:
            colormap: without effect.
            signed: without effect.
        """
        return [render.Key("colour: the class a pixel supports most, brightness: how much", mark="none")]

    def legends(self, side: int = 192) -> list[Any]:
        """Returns the dominant classes of each image in the colours of `overlay`, largest first, as PIL images.

        Args:
            side: width in pixels.
        """
        classes, responses = self._dominance()
        legends = []
        for i, colors in enumerate(render.class_colors(classes, responses)):
            dominant = next(iter(render.class_colors(classes[i : i + 1], responses[i : i + 1])))
            legends.append(render.legend([self._name(c) for c in dominant], [colors[c] for c in dominant], side))
        return legends

    def _dominance(self) -> tuple[Tensor, Tensor]:
        assert self.dominant_class is not None
        assert self.signed_map is not None
        return self.dominant_class, self.signed_map


class CLEAR(Explainer):
    """Dominant class and dominant response at every pixel.

    R(x|c), the attentive response of class c, is what the last layer says for c, walked down to the image through the
    adjoint of every convolution, without biases, and the inverse of every max-pool (Eqs. 1 to 3). The dominant class is
    argmax_c R(x|c) (Eq. 4), the dominant response R at that class (Eq. 5), and the picture has the colour of the one
    with the brightness of the other (Eq. 6).

    An explanation has `dominant_class`; `signed_map`, the dominant response; `heatmap`, its positive part;
    and `attribution`, the response of the target, signed. The target is the class that binary maps set against all
    others; it does not change which classes compete.

    The paper leaves much open; `docs/clear.md` has the reasons for the defaults.

    Args:
        model: in evaluation mode; any classifier.
        candidates: which classes compete: an int for so many with the largest outputs of each image (all, where there
            are no more), a sequence for these, None for all. The paper has ten, and proposes the ten most active
            where there are more.
        variant: what rectifiers do on the way down: "guided" keeps the positive part of the signal where the
            activation was positive; "deconvnet" keeps the positive part; "linear" lets it pass, as in the equations.
        unpooling: "switches" puts the signal where the maximum was; "nearest" spreads it over the window.
        project_from: "map" starts from the map of each class, for networks whose outputs are an average over the image
            of such maps or a linear layer on averaged features, which is the same; "logit" from the output itself; None
            takes the map where there is one.
        activations: what is taken of a class's map: "all"; "positive", the part above zero; or "strongest", its
            largest value alone.
        reduction: what is taken of the channels of R: their "sum", Euclidean "norm", or "max".
        scale: "joint" compares responses as they are; "class" first divides each by its largest magnitude.
        chunk_size: classes walked back at once; None for as many as make 64 responses, but on a CPU 32 after
            `keep_freed_memory()` and 16 without, where more spend their time on fresh memory.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import CLEAR, demo
        >>> explanation = CLEAR(demo.load(), candidates=4)(torch.rand(2, 3, 96, 96))
        >>> explanation.overlay().shape
        torch.Size([2, 3, 96, 96])
    """

    method = "clear"
    ranks = (3, 4, 5)
    takes_functions = takes_gradients = False
    paper = "Explaining the unexplained: a class-enhanced attentive response (CLEAR) approach (Kumar et al., 2017)"

    def __init__(
        self,
        model: nn.Module,
        *,
        candidates: int | Sequence[int] | None = 10,
        variant: Literal["guided", "deconvnet", "linear"] = "guided",
        unpooling: Literal["switches", "nearest"] = "switches",
        project_from: Literal["map", "logit"] | None = None,
        activations: Literal["all", "positive", "strongest"] = "all",
        reduction: Literal["sum", "norm", "max"] = "sum",
        scale: Literal["joint", "class"] = "joint",
        chunk_size: int | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, **settings)
        self.candidates = _candidates(candidates)
        self.variant = one_of("variant", variant, VARIANTS)
        self.unpooling = one_of("unpooling", unpooling, UNPOOLING)
        self.project_from = one_of("project_from", project_from, (None, "map", "logit"))
        self.activations = one_of("activations", activations, ACTIVATIONS)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.scale = one_of("scale", scale, SCALES)
        self.chunk_size = None if chunk_size is None else at_least(1, "chunk_size", chunk_size)
        self._pool: str | None = None
        self._reported = False

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> ClassExplanation:
        competing = (
            None if not isinstance(self.candidates, list) else torch.tensor(self.candidates, device=images.device)
        )
        # Of the classes with the largest outputs, and of all, the largest is one.
        sure = self.candidates is None or (isinstance(self.candidates, int) and target is None)
        key = (CLEAR._step, self.variant, self.unpooling, self.project_from, self.activations, self.reduction)
        _, targets, (best, winner, attribution) = run_step(
            *(self, self._step, images, target, competing, sure, args, kwargs),
            key=(*key, self.scale, self.chunk_size, repr(self.candidates)),
        )
        each = targets.each
        return ClassExplanation(
            **self._fields(images, targets),
            heatmap=repeat_rows(best.clamp_min(0), each),
            attribution=targets_to_rows(attribution),
            signed_map=repeat_rows(best, each),
            dominant_class=repeat_rows(winner, each),
        )

    def _step(
        self, start: Start, images: Tensor, competing: Tensor | None, sure: bool, args: Any, kwargs: Any
    ) -> tuple[Tape, tuple[Tensor, Tensor, Tensor]]:
        """Returns the tape, and the largest response, its class, and the responses of the targets.

        Args:
            start: returns the targets on a tape.
            images: `[N, C, H, W]`.
            competing: the classes that compete, where they are named.
            sure: the targets compete.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.
        """
        source = self._record(images, args, kwargs)
        chosen = start(source.tape).target
        assert chosen is not None
        rows, chosen = self._rows(source.logits, competing), chosen.T
        count, numbers = len(chosen), torch.arange(len(images), device=images.device)

        size = (len(images), *images.shape[2:])
        best = torch.full(size, -torch.inf, dtype=at_least_float32(images[:0]).dtype, device=images.device)
        winner = torch.full(size, -1, device=images.device)
        # The last row takes the responses that are no target's.
        attribution = images.new_empty(count + 1, *images.shape)
        for part, response in self._responses(source, rows):
            attribution[_places(part, chosen), numbers] = response
            reduced = self._reduced(response)
            lines = len(images), -1, images.shape[-1]  # volumes and signals as images of as many pixels
            ops.response_argmax(
                reduced.reshape(*reduced.shape[:3], -1, lines[2]), part, best.view(lines), winner.view(lines)
            )
        for part, response in self._responses(source, chosen[:0] if sure else self._alone(rows, chosen)):
            attribution[_places(part, chosen), numbers] = response
        best.masked_fill_(winner < 0, 0)  # responses that are no numbers at all
        # A class that is a target more than once lies where the first of them does.
        return source.tape, (best, winner, attribution[_places(chosen, chosen), numbers])

    def _alone(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Returns the targets `[T, N]` that are walked back for themselves, since they may not be among the others.

        Which these are is not read from a device: there all are.
        """
        if rows.device.type != "cpu" or is_capturing():
            return chosen
        return chosen[~(rows[:, None] == chosen).any(0).all(1)]

    def responses(self, images: Tensor, classes: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the attentive responses of some classes, one number a pixel.

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
            listed = _as_class_list("classes", classes)
            _check_classes("classes", listed, source.logits.shape[1])
            rows = torch.tensor(listed, device=images.device)[:, None].expand(-1, len(images))
            maps = [at_least_float32(self._reduced(response)).sum(2) for _, response in self._responses(source, rows)]
            return torch.cat(maps).transpose(0, 1).contiguous()

    def _record(self, images: Tensor, args: Any, kwargs: Any) -> "_Source":
        """Runs the model and finds where back projections start."""
        overlay = {**VARIANTS[self.variant], **UNPOOLING[self.unpooling]}
        policy = _Reading(overlay, self._pool, self.warned)
        tape = self.record(images, *args, policy=policy, **kwargs)
        value, logits = logits_of(tape)
        logits = class_columns(logits)
        maps = None if self.project_from == "logit" else class_maps(tape)
        if maps is not None and _AVERAGED not in maps.pool.saved:
            # Seen for the first time: which of a network's averages is the last is known only in the end.
            self._pool = maps.pool.name
            policy = _Reading(overlay, self._pool, self.warned)
            tape = self.record(images, *args, policy=policy, **kwargs)
            maps = class_maps(tape)
            logits = class_columns(logits_of(tape)[1])
        self._report(tape, maps)
        if maps is None:
            if self.project_from == "map":
                raise InputError(
                    "project_from must be 'logit' or None for a model whose outputs are no average, got 'map'"
                )
            return _Source(tape, policy, logits, value, self._activations(logits), None)
        activations = self._activations(_maps(maps, maps.pool.saved[_AVERAGED].tensor))
        return _Source(tape, policy, logits, maps.source, activations, maps.weight)

    def _report(self, tape: Tape, maps: PooledHead | None) -> None:
        if self._reported:
            return
        self._reported = True
        source = "the outputs" if maps is None else f"the class maps that {maps.pool.name!r} averages"
        logger.info("clear starts from %s", source)
        if self.variant != "linear" and not any(map(rectifies, tape)):
            logger.warning("clear found no rectifier in the model: variant %r is the linear one", self.variant)
        if self.unpooling != "switches" and not any(key(node.op) in NEAREST for node in tape):
            logger.warning("clear found no max-pool in the model: unpooling has no effect")

    def _activations(self, maps: Tensor) -> Tensor:
        """Returns the part of class maps `[N, classes, ...]` that is projected back."""
        if self.activations == "positive":
            return maps.clamp_min(0)
        if self.activations == "strongest":
            flat = maps.flatten(2) if maps.dim() > 2 else maps[..., None]
            at = flat.argmax(2, keepdim=True)
            return torch.zeros_like(flat).scatter_(2, at, flat.gather(2, at)).view(maps.shape)
        return maps

    def _rows(self, logits: Tensor, competing: Tensor | None) -> Tensor:
        """Returns the classes that compete, int64 `[K, N]`."""
        images, count = logits.shape
        if isinstance(self.candidates, list):
            _check_classes("candidates", self.candidates, count)
        elif isinstance(self.candidates, int) and self.candidates < count:
            return logits.argsort(dim=1, descending=True, stable=True)[:, : self.candidates].T
        if competing is None:
            competing = torch.arange(count, device=logits.device)
        return competing[:, None].expand(-1, images)

    def _responses(self, source: "_Source", rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the classes `[k, N]` with their responses `[k, N, C, H, W]`, chunk by chunk."""
        images = rows.shape[1]
        rows_at_a_time = 64 if rows.device.type != "cpu" else 32 if memory.is_kept() else 16
        chunk = self.chunk_size or max(1, rows_at_a_time // images)
        # Ten in chunks of at most eight are two of five.
        for part in rows.tensor_split(math.ceil(len(rows) / chunk)) if len(rows) else ():
            yield part, source.project(part)

    def _reduced(self, response: Tensor) -> Tensor:
        """Returns a response `[K, N, C, H, W]` as it competes, with one channel or several to be summed."""
        reduced = REDUCTIONS[self.reduction](response)
        if self.scale == "class":
            reduced = at_least_float32(reduced).sum(2, keepdim=True)
            largest = reduced.abs().amax(tuple(range(3, reduced.dim())), keepdim=True)
            reduced = reduced / largest.clamp_min(torch.finfo(reduced.dtype).tiny)
        return reduced


_AVERAGED = "averaged"


class _Reading(GradientRules):
    """A dense reading that also keeps what one pool averages.

    Args:
        overlay: rules that replace those of the gradient.
        pool: name of the operation; None for none.
        warned: see `GradientRules`.
    """

    def __init__(self, overlay: Table, pool: str | None, warned: set[str]) -> None:
        super().__init__(overlay, warned)
        self._pool = pool

    def save(self, node: Node, keep: SaveTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().save(node, keep, args, kwargs)
        if node.name == self._pool:
            keep(_AVERAGED, args[0])


@dataclass
class _Source:
    """A recorded forward and where back projections start.

    Attributes:
        tape: tape of the forward.
        reading: the one it was recorded with.
        logits: the outputs `[N, classes]`.
        value: where projections start, `[N, classes, ...]` or, with a weight, `[N, C, ...]`.
        activations: activations of the classes, `[N, classes, ...]`.
        weight: weight of the linear layer between the two, `[classes, C]`.
    """

    tape: Tape
    policy: GradientRules
    logits: Tensor
    value: Value
    activations: Tensor
    weight: Tensor | None

    def project(self, classes: Tensor) -> Tensor:
        """Returns the responses `[K, N, C, H, W]` of classes `[K, N]`."""
        return backward_pass(
            self.policy, self.tape, {self.value: self._seeds(classes)}, [self.tape.inputs[0]], retain=True
        )[0]

    def _seeds(self, classes: Tensor) -> Tensor:
        """Returns the start of the projection, with all classes but one at zero (Eq. 3), `[K, N, ...]`."""
        images = torch.arange(classes.shape[1], device=classes.device)
        activations = self.activations[images, classes]
        if self.weight is not None:
            weight = self.weight.detach()[classes]
            seeds = activations[:, :, None] * weight.view(*weight.shape, *[1] * (activations.dim() - 2))
        else:
            seeds = activations.new_zeros(len(classes), *self.activations.shape)
            seeds[torch.arange(len(classes), device=classes.device)[:, None], images, classes] = activations
            seeds = seeds.view(len(classes), *self.value.shape)
        # In the memory format of the value, which the whole walk then has: convolutions are nearly twice as fast.
        last = len(self.value.shape) == 4 and self.value.stride[1] == 1
        return seeds.movedim(2, -1).contiguous().movedim(-1, 2) if last else seeds


def class_maps(tape: Tape) -> PooledHead | None:
    """Finds the class maps whose averages are the outputs; None if they are something else.

    A linear layer on averaged features is the average of that layer at every position, so such networks have maps,
    too (Zhou et al., 2016).

    Args:
        tape: tape of a whole forward pass.
    """
    head = classifier_head(tape)
    return None if head is None or head.channels != 1 else head


def _maps(head: PooledHead, averaged: Tensor) -> Tensor:
    """Returns the maps `[N, classes, ...]` that belong to what is averaged."""
    if head.weight is None:
        return averaged
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    return torch.nn.functional.linear(averaged.movedim(1, -1), weight, bias).movedim(-1, 1)


def _candidates(candidates: Any) -> int | list[int] | None:
    """Returns the setting `candidates`, checked as far as it can be without a model."""
    if candidates is None:
        return None
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        return at_least(1, "candidates", candidates)
    return _as_class_list("candidates", candidates)


def _as_class_list(argument: str, classes: Any) -> list[int]:
    try:
        listed = classes.tolist() if isinstance(classes, Tensor) else list(classes)
    except TypeError:
        listed = [classes]
    if not listed or not all(isinstance(c, int) and not isinstance(c, bool) for c in listed):
        raise InputError(f"{argument} must be None, an int or a sequence of ints, got {classes!r}")
    return listed


def _check_classes(argument: str, classes: Sequence[int], count: int) -> None:
    worst = next((c for c in classes if not 0 <= c < count), None)
    if worst is not None:
        raise InputError(f"{argument} must lie in [0, {count}), got {worst}")


def _places(part: Tensor, chosen: Tensor) -> Tensor:
    """Returns which of the targets `[T, N]` each of some classes `[k, N]` is, the first of equals; T for none."""
    same = part[:, None] == chosen
    return torch.where(same.any(1), same.byte().argmax(1), len(chosen))
