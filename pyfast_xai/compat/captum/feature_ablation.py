"""Feature ablation and permutation: how far the output drops where a feature has another value."""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyfast_xai.acceleration.local_replay import Box
from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.ablation import Ablation, hidden_values
from pyfast_xai.compat.captum.arguments import Baselines, Inputs, Target, as_tuple, like, refuse
from pyfast_xai.compat.captum.attribution import Attribution
from pyfast_xai.compat.captum.feature_masks import FeatureMask, masks_for
from pyfast_xai.compat.captum.layer_methods import LayerActivation, WithLayers
from pyfast_xai.compat.captum.layers import LayerAttribution, checked_layer, of_layer
from pyfast_xai.compat.captum.neurons import Neuron, Selector

logger = logging.getLogger("pyfast_xai")

# A feature: its number, and the inputs that have it.
Feature = tuple[int, list[int]]


class FeatureAblation(Ablation):
    """Drop of the output where a feature is replaced by the baseline.

    Args:
        forward_func: a module or a function that gives a number a row; or some numbers for the whole batch, which are
            then what attributions have in place of rows.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import FeatureAblation
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> FeatureAblation(demo.load()).attribute(torch.rand(1, 3, 96, 96), target=3, feature_mask=mask).shape
        torch.Size([1, 3, 96, 96])
    """

    _least_rows: ClassVar[int] = 1

    def __init__(self, forward_func: Forward) -> None:
        super().__init__(forward_func)

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            baselines: what hidden elements become, one an input: a number, a row for all, or of the input's shape.
            target: which output of each row: None, an int, a tuple, N ints in a list or tensor, or N tuples.
            additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
            feature_mask: integers that broadcast to the input, one mask an input; equal ones are hidden together, also
                those of different inputs. None for each element by itself.
            perturbations_per_eval: features that go through the model at once.
            show_progress: write how far it is to stderr.
            **kwargs: accepted, as there.

        Returns:
            Of the shape of the inputs, in the dtype of the output.

        Raises:
            InputError: arguments that do not fit.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        masks = masks_for(feature_mask, tensors)
        features: dict[int, list[int]] = {}
        for i, mask in enumerate(masks):
            for feature in mask.unique().tolist():
                features.setdefault(feature, []).append(i)
        few = {i for i, tensor in enumerate(tensors) if len(tensor) < self._least_rows}
        if not few.isdisjoint(itertools.chain(*features.values())):
            logger.warning("%s: inputs must have at least two rows; attributions are zero", self.get_name())
            features = {feature: places for feature, places in features.items() if few.isdisjoint(places)}
        changed = self._changed(tensors, masks, hidden_values(baselines, tensors))
        with torch.no_grad():
            before, drops = self._drops(
                tensors,
                list(features.items()),
                changed,
                target,
                additional_forward_args,
                perturbations_per_eval,
                show_progress,
                lambda feature: self._box(masks[0] == feature[0]),
            )
            totals = [
                torch.zeros(before.numel(), *tensor.shape[1:], dtype=before.dtype, device=tensor.device)
                for tensor in tensors
            ]
            for (feature, places), drop in drops:
                for i in places:
                    rows = drop.to(totals[i]).view(-1, *[1] * (tensors[i].dim() - 1))
                    totals[i] += rows * (masks[i] == feature).to(before.dtype)
        return like(inputs, totals)

    def _box(self, places: Tensor) -> Box | None:
        """Returns the box around the places of a feature, `[1 or N, 1 or C, 1 or H, 1 or W]`; None for all others."""
        if places.dim() != 4 or 1 in places.shape[2:]:
            return None
        rows, columns = (places.any(dim).any((0, 1)).nonzero().flatten().tolist() for dim in (3, 2))
        return Box(rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)

    def _changed(
        self, inputs: tuple[Tensor, ...], masks: tuple[Tensor, ...], hidden: list[Tensor]
    ) -> Callable[[Sequence[Feature]], list[Tensor]]:
        """Returns a function that gives the inputs once for each feature, `[features * N, ...]`, with it changed."""

        def changed(features: Sequence[Feature]) -> list[Tensor]:
            touched = {i for _, places in features for i in places}
            copies = []
            for i, tensor in enumerate(inputs):
                if i in touched:
                    copies.append(
                        torch.cat([self._without(tensor, masks[i] == feature, hidden[i]) for feature, _ in features])
                    )
                else:
                    copies.append(torch.cat([tensor] * len(features)))
            return copies

        return changed

    def _without(self, tensor: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        """Returns an input without a feature."""
        # A baseline of 0.5 makes numbers of what were integers.
        kind = torch.result_type(tensor, hidden)
        return torch.where(mask, hidden.to(kind), tensor.to(kind))


def _permute_feature(x: Tensor, feature_mask: Tensor) -> Tensor:
    """Returns rows of which each has the feature of another, in an order that is not their own."""
    count = len(x)
    if count < 2:
        refuse(f"inputs must have at least two rows to be permuted, got {count}")
    order = torch.randperm(count)
    while (order == torch.arange(count)).all():
        order = torch.randperm(count)
    return torch.where(feature_mask, x[order.to(x.device)], x)


class FeaturePermutation(FeatureAblation):
    """Drop of the output where a feature is permuted among the rows.

    Args:
        forward_func: see `FeatureAblation`.
        perm_func: returns rows `[N, ...]` of which the elements in a mask, bool and broadcastable, are permuted.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import FeaturePermutation
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> FeaturePermutation(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3, feature_mask=mask).shape
        torch.Size([2, 3, 96, 96])
    """

    _least_rows = 2

    def __init__(self, forward_func: Forward, perm_func: Callable[[Tensor, Tensor], Tensor] = _permute_feature) -> None:
        super().__init__(forward_func)
        self.perm_func = perm_func

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Attributes the output to the inputs; see `FeatureAblation.attribute`.

        The random numbers are those of the process, drawn in the same order as there.
        """
        return super().attribute(
            inputs, None, target, additional_forward_args, feature_mask, perturbations_per_eval, show_progress
        )

    def _box(self, places: Tensor) -> Box | None:
        return None  # a function of the user's may change more

    def _without(self, tensor: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        return self.perm_func(tensor, mask)


class _AtLayer(Attribution):
    """Base of methods at a layer."""

    def __init__(self, forward_func: Forward, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func)
        self.layer, self.device_ids = checked_layer(layer), device_ids


class LayerFeatureAblation(LayerAttribution, _AtLayer, Ablation):
    """Drop of the output where a feature of a layer is replaced by the baseline.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerFeatureAblation
        >>> model, channels = demo.load(), torch.arange(80).view(1, 80, 1, 1)
        >>> explain = LayerFeatureAblation(model, model.block)
        >>> explain.attribute(torch.rand(1, 3, 96, 96), target=3, layer_mask=channels).shape
        torch.Size([1, 80, 12, 12])
    """

    def attribute(
        self,
        inputs: Inputs,
        layer_baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        layer_mask: FeatureMask = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int = 1,
    ) -> Any:
        """Attributes the output to the layer; see `FeatureAblation.attribute`.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            layer_baselines: what hidden elements of the layer become, one a tensor.
            target: see `FeatureAblation.attribute`.
            additional_forward_args: further arguments of the forward function.
            layer_mask: the features of the layer, one mask a tensor.
            attribute_to_layer_input: take what goes into the layer.
            perturbations_per_eval: features that go through the model at once.

        Returns:
            Of the shape of the layer, a tuple for several tensors.
        """
        above, activations = _above(self, inputs, additional_forward_args, attribute_to_layer_input)
        return of_layer(
            FeatureAblation(above).attribute(
                activations, layer_baselines, target, additional_forward_args, layer_mask, perturbations_per_eval
            )
        )


class LayerFeaturePermutation(LayerAttribution, _AtLayer, FeaturePermutation):
    """Drop of the output where a feature of a layer is permuted among the rows.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerFeaturePermutation
        >>> model, channels = demo.load(), torch.arange(80).view(1, 80, 1, 1)
        >>> explain = LayerFeaturePermutation(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), target=3, layer_mask=channels).shape
        torch.Size([2, 80, 12, 12])
    """

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        layer_mask: FeatureMask = None,
        perturbations_per_eval: int = 1,
    ) -> Any:
        """Attributes the output to the layer; see `LayerFeatureAblation.attribute`."""
        above, activations = _above(self, inputs, additional_forward_args, False)
        return of_layer(
            FeaturePermutation(above, self.perm_func).attribute(
                activations, target, additional_forward_args, layer_mask, perturbations_per_eval
            )
        )


class NeuronFeatureAblation(_AtLayer, Ablation):
    """Drop of a neuron where a feature of the inputs is replaced by the baseline.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronFeatureAblation
        >>> model = demo.load()
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> explain = NeuronFeatureAblation(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), (3, 5, 5), feature_mask=mask).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        baselines: Baselines = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        attribute_to_neuron_input: bool = False,
        perturbations_per_eval: int = 1,
    ) -> Any:
        """Attributes the neuron to the inputs; see `FeatureAblation.attribute` and `NeuronGradient.attribute`."""
        neuron = Neuron(self.forward_func, self.layer, neuron_selector, attribute_to_neuron_input)
        return FeatureAblation(neuron).attribute(
            inputs, baselines, None, additional_forward_args, feature_mask, perturbations_per_eval
        )


def _above(
    explainer: LayerFeatureAblation | LayerFeaturePermutation,
    inputs: Inputs,
    additional_forward_args: Any,
    at_input: bool,
) -> tuple[WithLayers, tuple[Tensor, ...]]:
    """Returns the forward function from the results of a layer on, and these results."""
    activation = LayerActivation(explainer.forward_func, explainer.layer)
    activations = as_tuple(activation.attribute(inputs, additional_forward_args, at_input))
    tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
    return WithLayers(explainer.forward_func, [explainer.layer], tensors, [len(activations)], at_input), activations
