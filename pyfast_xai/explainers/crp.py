"""Concept relevance propagation (Achtibat et al., 2023): relevance that flows through chosen channels of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import Reduction
from pyfast_xai.explainers.common.explainer import Settings, at_least
from pyfast_xai.explainers.common.layer_search import LayerSearch, class_scores
from pyfast_xai.explainers.common.output_gradients import OutputGradients, output_gradients
from pyfast_xai.explainers.common.targets import Goal, Targets, check_target, named_classes
from pyfast_xai.explainers.common.tensors import targets_to_rows
from pyfast_xai.explainers.lrp import LRP, relevance_of_outputs
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.rules.kinds import kind_of
from pyfast_xai.rules.relevance import Composite
from pyfast_xai.tape import Tape, Value
from pyfast_xai.tape.module_hooks import modules_of


@dataclass(eq=False, repr=False)
class ConditionalExplanation(Explanation):
    """The relevance of pixels under a condition.

    Attributes:
        conditions: the channels through which the relevance of a row flows, bool `[N, channels]`.
        relevance: what flows through them in all, `[N]`, in units of the score.
    """

    conditions: Tensor | None = None
    relevance: Tensor | None = None


class _LayerRelevance(NamedTuple):
    """The relevance at a layer.

    Attributes:
        tape: the recorded forward.
        seeds: the gradients at the outputs, and the targets.
        policy: the rules of the composite on this tape.
        value: the layer's output.
        dim: the dimension of its channels, behind the targets.
        relevance: `[K, N, channels, *positions]`.
    """

    tape: Tape
    seeds: OutputGradients
    policy: GradientRules
    value: Value
    dim: int
    relevance: Tensor


class CRP(LRP):
    """Shares the part of a score that flows through chosen channels of a layer (Achtibat et al., 2023).

    LRP goes from the score to the layer; what does not belong to the channels is set to zero there, and LRP goes on
    from the layer alone, so that what passes beside it, along a skip, is left out. Each channel or group of channels is
    a condition, and has a row; all conditions of all targets go down together. A condition of all channels is LRP where
    all relevance passes the layer.

    Args:
        model: in evaluation mode.
        layer: the path of a module, or the name of an operation; of several calls the last counts. None for the last
            convolution at which relevance arrives, or, without convolutions, the last layer that holds a map.
        channels: conditions, each a channel or a sequence of channels; None for those with the most relevance, which
            may differ from target to target. Where too few have a positive one, those with the most negative follow.
        n_channels: how many of these.
        channel_dim: the dimension of a named layer's channels, 1 in maps and -1 in tokens.
        composite: see `LRP`.
        reduction: how the heat map is made of the channels of the image, see `Saliency`.
        **settings: those of `Explainer`; see `LRP` for targets. Rows are image by image, target by target, condition by
            condition.

    An explanation has `conditions`, the channels of each row, and `relevance`, what flows through them.

    Raises:
        InputError: a layer or a channel that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import CRP, demo
        >>> explain = CRP(demo.load(), layer="block", channels=[3, (5, 7)])
        >>> explanation = explain(torch.rand(2, 3, 96, 96), target=3)
        >>> explanation.attribution.shape, explanation.relevance.shape
        (torch.Size([4, 3, 96, 96]), torch.Size([4]))
    """

    zero_reason = "nothing that flows through its condition arrives at the image; name other channels or another layer"
    method = "crp"
    paper = "From attribution maps to human-understandable explanations through concept relevance propagation (2023)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | None = None,
        channels: Sequence[int | Sequence[int]] | None = None,
        n_channels: int = 1,
        channel_dim: int = 1,
        composite: Composite | str = "epsilon-plus-flat",
        reduction: Reduction | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, composite=composite, reduction=reduction, **settings)
        self.folds = False  # a layer that is folded into another has no value
        self.layer, self.channel_dim = layer, channel_dim
        self.channels = None if channels is None else [*channels]
        if self.channels == []:
            raise InputError("channels must be one or more, got none")
        self.n_channels = at_least(1, "n_channels", n_channels)

    def at_layer(self, images: Tensor, target: Goal = None, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the relevance at the layer, `[N * K, channels, *positions]`, image by image, target by target.

        Args:
            images: `[N, C, H, W]`, as the model takes them; they go through the model together.
            target: see `Explainer`.
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Raises:
            InputError: images or a target that do not fit.

        Example:
            >>> import torch
            >>> from pyfast_xai import CRP, demo
            >>> CRP(demo.load(), layer="block").at_layer(torch.rand(2, 3, 96, 96), target=3).shape
            torch.Size([2, 80, 12, 12])
        """
        self.check(images)
        check_target(self.method, target, functions=self.takes_functions, gradients=self.takes_gradients)
        with torch.inference_mode(False), torch.no_grad():
            layer = self._to_layer(images.detach(), named_classes(target, self.labels), args, kwargs)
            return targets_to_rows(layer.relevance)

    def _to_layer(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> _LayerRelevance:
        tape = self.record(images, *args, policy=self.rules, **kwargs)
        seeds = output_gradients(tape, target, self.outputs, self.labels)
        is_start = isinstance(target, Tensor) and target.is_floating_point()
        start = seeds.grads if is_start else relevance_of_outputs(tape, seeds.grads)
        policy = self.rules.by(self.composite, tape, {path: module for module, path in modules_of(self.model).items()})
        layers = _layers(tape, len(images)) if self.layer is None else [(tape.find(self.layer), self.channel_dim)]
        for value, channels in layers:
            dim = channels % len(value.shape) + 1  # behind the targets
            relevance = backward_pass(policy, tape, start, [value], retain=True)[0].movedim(dim, 2)
            if bool(relevance.any()):  # none arrives at convolutions that make a gate
                break
        return _LayerRelevance(tape, seeds, policy, value, dim, relevance)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> ConditionalExplanation:
        tape, seeds, policy, value, dim, relevance = self._to_layer(images, target, args, kwargs)
        each = relevance.flatten(3).sum(3)  # [K, N, channels]
        conditions = self._conditions(each)
        masks = conditions.view(*conditions.shape, *[1] * (relevance.dim() - 3))
        below = (relevance[:, :, None] * masks).transpose(1, 2).flatten(0, 1).movedim(2, dim)
        attribution = targets_to_rows(backward_pass(policy, tape, {value: below}, [tape.inputs[0]])[0])
        count = conditions.shape[2]
        rows = targets_to_rows(conditions.transpose(1, 2).flatten(0, 1))
        return ConditionalExplanation(
            **self._fields(images, _repeated(seeds, count), len(each) * count),
            heatmap=self.heatmap(
                attribution,
                {row * count + i: reason for row, reason in seeds.zero_reasons.items() for i in range(count)},
            ),
            attribution=attribution,
            conditions=rows,
            relevance=(rows * targets_to_rows(each).repeat_interleave(count, 0)).sum(1),
        )

    def _conditions(self, relevance: Tensor) -> Tensor:
        """Returns the channels of each condition, bool `[K, N, conditions, C]`, for relevance `[K, N, C]`."""
        total = relevance.shape[-1]
        if self.channels is None:
            rank = torch.where(relevance > 0, relevance, -relevance.abs().reciprocal())  # no relevance comes last
            highest = rank.topk(min(self.n_channels, total), -1).indices
            return nn.functional.one_hot(highest, total).bool()
        masks = torch.zeros(len(self.channels), total, dtype=torch.bool, device=relevance.device)
        for mask, condition in zip(masks, self.channels, strict=True):
            for channel in [condition] if isinstance(condition, int) else condition:
                if not -total <= channel < total:
                    raise InputError(
                        f"channels must lie in [0, {total}) of {self.layer or 'the last convolution'!r}, got {channel}"
                    )
                mask[channel] = True
        return masks.expand(*relevance.shape[:2], -1, -1)


def _layers(tape: Tape, count: int) -> list[tuple[Value, int]]:
    """Returns the convolutions, the last first, or the last map where there are none; and the dimension of channels.

    Convolutions of heads or windows, which have more rows than there are images, are left out.

    Raises:
        InputError: the model has neither.
    """
    results = [node.outputs[0] for node in tape if kind_of(node) == "convolution"]
    values = [(value, 1) for value in reversed(results) if value is not None and value.shape[0] == count]
    if not values:
        layer = LayerSearch(tape, class_scores(tape)).last()
        values = [(layer.value, layer.layout.channels)]
    return values


def _repeated(targets: Targets, count: int) -> Targets:
    """Returns targets `[N, K]` with each so many times in a row."""
    classes, score = (
        None if tensor is None else tensor.repeat_interleave(count, 1) for tensor in (targets.target, targets.score)
    )
    return Targets(targets.logits, classes, score, targets.kinds)
