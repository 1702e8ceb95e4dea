"""Grad-CAM at a layer, and guided Grad-CAM."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.arguments import Inputs, Target, as_tuple, like, one_number_a_row, refuse
from pyfast_xai.compat.captum.attribution import GradientAttribution, input_gradients
from pyfast_xai.compat.recording import Recording
from pyfast_xai.rules.gradient import GUIDED, GradientRules


class LayerAttribution:
    """Base of methods whose attribution has the shape of a layer.

    Example:
        >>> import torch
        >>> from pyfast_xai.compat.captum import LayerAttribution
        >>> LayerAttribution.interpolate(torch.rand(2, 1, 12, 12), (96, 96)).shape
        torch.Size([2, 1, 96, 96])
    """

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """Brings an attribution `[N, C, ...]` to another size.

        Args:
            layer_attribution: `[N, C, ...]` with one to three dimensions of space.
            interpolate_dims: the size.
            interpolate_mode: a mode of `torch.nn.functional.interpolate`.
        """
        return functional.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


def checked_layer(layer: Any) -> nn.Module:
    """Returns a layer that is a module.

    Raises:
        InputError: another thing.
    """
    if not isinstance(layer, nn.Module):
        refuse(f"layer must be a torch.nn.Module, got {type(layer).__name__}")
    return layer


class LayerOf(LayerAttribution, GradientAttribution):
    """Base of methods that attribute the output to a layer.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs, or several in a list.
        device_ids: accepted for data-parallel models, which are looked through.
    """

    def __init__(self, forward_func: Forward, layer: Any, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func)
        several = isinstance(layer, (list, tuple))
        self.layers = [checked_layer(one) for one in (layer if several else [layer])]
        self.layer, self.device_ids = layer, device_ids


class LayerByInputs(LayerOf):
    """Base of methods of a layer that multiply by the change of its activation, or do not.

    Args:
        forward_func: see `LayerOf`.
        layer: likewise.
        device_ids: likewise.
        multiply_by_inputs: by the change of the activation.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Any,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self._multiply_by_inputs = multiply_by_inputs


def of_layer(tensors: Sequence[Tensor]) -> Any:
    """Returns the tensors of a layer as a user gets them: one by itself, several as a tuple."""
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Returns the tensors of each layer, of which there are so many."""
    remaining = iter(tensors)
    return [tuple(itertools.islice(remaining, count)) for count in counts]


# What `torch.autograd.grad` would do otherwise and a walk does anyway, or does not know.
_DOES_ANYWAY = {"allow_unused", "materialize_grads", "retain_graph"}


class LayerGradCam(LayerOf):
    """Channels of a layer, weighed by their mean gradient (Selvaraju et al., 2017).

    Args:
        forward_func: a module or a function.
        layer: a module that it runs; of several calls the last counts.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerGradCam
        >>> model = demo.load()
        >>> LayerGradCam(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 1, 12, 12])
    """

    def __init__(self, forward_func: Forward, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, checked_layer(layer), device_ids)

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes the output to the layer.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, of any dtype.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the forward function.
            attribute_to_layer_input: take what goes into the layer.
            relu_attributions: what is positive only.
            attr_dim_summation: add the channels up.
            grad_kwargs: what would go to `torch.autograd.grad`; a graph cannot be created.

        Returns:
            `[N, 1, ...]`, or `[N, C, ...]` without the sum, of the size of the layer; a tuple for several tensors.

        Raises:
            InputError: inputs, a layer or a target that do not fit.
            UnsupportedOpError: an op above the layer cannot be differentiated.
        """
        requested = {name for name, value in (grad_kwargs or {}).items() if value} - _DOES_ANYWAY
        if requested:
            refuse(f"grad_kwargs must be of {', '.join(sorted(_DOES_ANYWAY))}, got {', '.join(sorted(requested))}")
        maps = self._read(
            as_tuple(inputs),
            additional_forward_args,
            lambda recording: _maps(recording, recording.policy, target, attr_dim_summation),
            layers=[self.layer],
            at_input=attribute_to_layer_input,
            to_inputs=False,
        )
        maps = [layer_map.clamp_min(0) for layer_map in maps] if relu_attributions else maps
        return of_layer(maps)


def _maps(recording: Recording, policy: GradientRules, target: Target, summed: bool) -> list[Tensor]:
    gradients = recording.gradients(one_number_a_row(target), recording.layers[0], policy, retain=True)
    maps = []
    for gradient, activation in zip(gradients, recording.activations[0], strict=True):
        weight = gradient.mean(tuple(range(2, gradient.dim())), keepdim=True) if gradient.dim() > 2 else gradient
        # The gradient has the layout of the tape, in which a map may be channels_last.
        weighted = weight * activation.contiguous()
        maps.append(weighted.sum(1, keepdim=True) if summed else weighted)
    return maps


class GuidedGradCam(GradientAttribution):
    """Guided backprop times the positive part of Grad-CAM, brought to the size of the input (Selvaraju et al., 2017).

    Both are read from one forward pass.

    Args:
        model: a module.
        layer: a module of it.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import GuidedGradCam
        >>> model = demo.load()
        >>> GuidedGradCam(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    overlay = GUIDED

    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(model)
        for name, module in (("model", model), ("layer", layer)):
            if not isinstance(module, nn.Module):
                refuse(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        self.model, self.layer, self.device_ids = model, layer, device_ids

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, C, ...]` or a tuple of them, floating-point.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the model.
            interpolate_mode: mode of `LayerAttribution.interpolate`.
            attribute_to_layer_input: take what goes into the layer.

        Returns:
            Of the shape of the inputs; empty, with a warning, for one to which the map cannot be brought.

        Raises:
            InputError: inputs, a layer of several tensors, or a target that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        tensors = as_tuple(inputs)

        def read(recording: Recording) -> tuple[Tensor, list[Tensor]]:
            if len(recording.layers[0]) > 1:
                refuse(f"layer must have one tensor for guided Grad-CAM, got {len(recording.layers[0])}")
            # What rectifiers keep for guided backprop serves the plain gradient as well.
            positive = _maps(recording, GradientRules(), target, True)[0].clamp_min(0)
            return positive, input_gradients(recording, tensors, target)

        positive, guided = self._read(
            tensors, additional_forward_args, read, layers=[self.layer], at_input=attribute_to_layer_input
        )
        return like(
            inputs,
            [_times(gradient, positive, tensors[i].shape[2:], interpolate_mode) for i, gradient in enumerate(guided)],
        )


def _times(guided: Tensor, layer_map: Tensor, size: Sequence[int], mode: str) -> Tensor:
    try:
        return guided * LayerAttribution.interpolate(layer_map, tuple(size), mode)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        warnings.warn(
            f"Grad-CAM {list(layer_map.shape)} cannot be brought to an input of size {list(size)} ({error}); its "
            "attribution is empty",
            stacklevel=3,
        )
        return guided.new_zeros(0)
