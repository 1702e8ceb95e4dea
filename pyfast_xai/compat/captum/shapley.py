"""Shapley values of features: by random orders in which they join, and exact."""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.ablation import (
    check_at_once,
    check_growth,
    hidden_values,
    number,
    recorded,
    reporter,
    select_or_number,
)
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    further,
    like,
    refuse,
    repeated,
    repeated_further,
)
from pyfast_xai.compat.captum.attribution import Attribution, AwaitedAttribution
from pyfast_xai.compat.captum.feature_masks import FeatureMask, features_in, masks_for
from pyfast_xai.compat.replayed import Replayed


def _perm_generator(num_features: int, num_samples: int) -> Iterable[Sequence[int]]:
    for _ in range(num_samples):
        yield torch.randperm(num_features).tolist()


def _all_perm_generator(num_features: int, num_samples: int) -> Iterable[Sequence[int]]:
    yield from itertools.permutations(range(num_features))


class ShapleyValueSampling(AwaitedAttribution):
    """Computes the average gain in output when a feature joins those before it in a random order.

    No subset of the features goes through the model twice.

    Args:
        forward_func: a module or a function that gives numbers a row, or some numbers for the whole batch.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import ShapleyValueSampling
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> explain = ShapleyValueSampling(demo.load())
        >>> explain.attribute(torch.rand(1, 3, 96, 96), target=3, feature_mask=mask, n_samples=2).shape
        torch.Size([1, 3, 96, 96])
    """

    _multiply_by_inputs = True

    def __init__(self, forward_func: Forward) -> None:
        super().__init__(forward_func)
        self.permutation_generator = _perm_generator

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            baselines: what absent elements are, one an input: a number, a row for all, or of the input's shape.
            target: see `FeatureAblation.attribute`.
            additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
            feature_mask: see `FeatureAblation.attribute`.
            n_samples: orders; the random numbers are those of the process, drawn as there.
            perturbations_per_eval: subsets that go through the model at once.
            show_progress: write how far it is to stderr.

        Returns:
            Of the shape of the output, followed by that of the inputs behind their first dimension; at least float32.

        Raises:
            InputError: arguments that do not fit.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        masks = masks_for(feature_mask, tensors)
        features = features_in(masks)
        orders = [list(order) for order in self.permutation_generator(features, n_samples)]
        # A subset is a number with a bit for each of its features.
        paths = [list(itertools.accumulate((1 << feature for feature in order), initial=0)) for order in orders]
        subsets = _Subsets(self, tensors, masks, baselines, target, additional_forward_args, perturbations_per_eval)
        with torch.no_grad():
            outputs = subsets.outputs(dict.fromkeys(itertools.chain([0], *paths)), show_progress)
            values = torch.zeros(features, *outputs[0].shape, dtype=outputs[0].dtype, device=outputs[0].device)
            for order, path in zip(orders, paths, strict=True):
                values[torch.tensor(order)] += torch.stack([outputs[subset] for subset in path]).diff(dim=0)
            return like(inputs, _at_features(values / len(orders), masks, tensors))


class ShapleyValues(ShapleyValueSampling):
    """Shapley values: what a feature adds to the output, averaged over all orders in which features could join.

    Every subset of F features goes through the model once, 2^F in all, and not each of F! orders.

    Args:
        forward_func: see `ShapleyValueSampling`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import ShapleyValues
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> ShapleyValues(demo.load()).attribute(torch.rand(1, 3, 96, 96), target=3, feature_mask=mask).shape
        torch.Size([1, 3, 96, 96])
    """

    def __init__(self, forward_func: Forward) -> None:
        super().__init__(forward_func)
        self.permutation_generator = _all_perm_generator

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Attributes the output to the inputs; see `ShapleyValueSampling.attribute`."""
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        masks = masks_for(feature_mask, tensors)
        features = features_in(masks)
        if features >= 10:
            warnings.warn(f"ShapleyValues asks 2^{features} subsets of {features} features", stacklevel=2)
        # The share of the orders in which exactly so many features come first, before one more.
        shares = [1 / (features * math.comb(features - 1, size)) for size in range(features)]
        subsets = _Subsets(self, tensors, masks, baselines, target, additional_forward_args, perturbations_per_eval)
        with torch.no_grad():
            outputs = torch.stack(list(subsets.outputs(dict.fromkeys(range(2**features)), show_progress).values()))
            numbers = torch.arange(2**features)
            sizes = (numbers[:, None] >> torch.arange(features) & 1).sum(1)
            values = []
            for feature in range(features):
                without = numbers[(numbers >> feature & 1) == 0]
                gains = outputs[without | 1 << feature] - outputs[without]
                values.append(torch.tensordot(gains.new_tensor(shares)[sizes[without]], gains, 1))
            return like(inputs, _at_features(torch.stack(values), masks, tensors))


class _Subsets:
    """The outputs of the forward function where some features are present and the others have the baseline.

    Args:
        explainer: whose forward function it is.
        inputs: `[N, ...]` each.
        masks: masks of them.
        baselines: see `ShapleyValueSampling.attribute`.
        target: likewise.
        additional_forward_args: likewise.
        perturbations_per_eval: likewise.
    """

    def __init__(
        self,
        explainer: Attribution,
        inputs: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        baselines: Baselines,
        target: Target,
        additional_forward_args: Any,
        perturbations_per_eval: int,
    ) -> None:
        check_at_once(perturbations_per_eval)
        self._explainer, self._inputs, self._masks = explainer, inputs, masks
        self._hidden = hidden_values(baselines, inputs)
        self._target, self._more = target, further(additional_forward_args)
        self._at_once = perturbations_per_eval

    def outputs(self, subsets: dict[int, Any], show_progress: bool) -> dict[int, Tensor]:
        """Returns the output of each subset, the first of which is empty, at least float32."""
        first, *rest = subsets
        empty = self._without([first])
        call, whole, tape = recorded(self._explainer.forward_func, (*empty, *self._more))
        replayed = Replayed.of(self._explainer.forward_func, None if self._more else tape, empty[0], [None] * len(rest))
        before = self._selected(whole, 1)
        if before.numel() == 1 and len(self._inputs[0]) > 1 and any(len(mask) > 1 for mask in self._masks):
            refuse("feature_mask must be the same for all rows where forward_func returns one number for the batch")
        outputs = {first: before}
        chunks = range(0, len(rest), self._at_once)
        report = reporter(f"{self._explainer.get_name()} attribution", len(chunks) + 1) if show_progress else None
        for start in chunks:
            if report is not None:
                report(start // self._at_once + 1)
            part = rest[start : start + self._at_once]
            if replayed is not None:
                answer = replayed(self._without(part)[0], [None] * len(part))
            else:
                answer = call(*self._without(part), *repeated_further(self._more, len(part)))
            after = self._selected(answer, len(part))
            check_growth(before, after, len(part), self._at_once)
            outputs |= zip(part, after.reshape(len(part), *before.shape), strict=True)
        if report is not None:
            report(len(chunks) + 1)
        return outputs

    def _selected(self, answer: Any, times: int) -> Tensor:
        output = number(select_or_number(answer, repeated(self._target, times)))
        output = output if output.dim() else output[None]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _without(self, subsets: list[int]) -> list[Tensor]:
        """Returns the inputs once for each subset, `[subsets * N, ...]`."""
        features = features_in(self._masks)
        present = torch.tensor([[subset >> feature & 1 for feature in range(features)] for subset in subsets]).bool()
        results = []
        for tensor, mask, hidden in zip(self._inputs, self._masks, self._hidden, strict=True):
            kind = torch.result_type(tensor, hidden)
            there = present.to(tensor.device)[:, mask]
            results.append(torch.where(there, tensor.to(kind), hidden.to(kind)).flatten(0, 1))
        return results


def _at_features(values: Tensor, masks: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns values `[F, *output]` at the places of the features, `[*output, ...]` for each input."""
    by_row, results = values.movedim(0, -1), []
    for mask, tensor in zip(masks, inputs, strict=True):
        whole = mask.expand(-1, *tensor.shape[1:])
        shared = len(whole) == 1
        results.append(
            by_row[..., whole[0]]
            if shared
            else torch.stack([row[..., place] for row, place in zip(by_row, whole, strict=True)])
        )
    return results
