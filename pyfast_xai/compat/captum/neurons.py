"""Attributions of one neuron of a layer to the inputs: each is a method whose output is that neuron."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.compat.called import Forward, modules_behind, tensors_of
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    further,
    like,
    one_number_a_row,
    refuse,
    repeated,
    repeated_further,
)
from pyfast_xai.compat.captum.attribution import GradientAttribution
from pyfast_xai.compat.captum.deep_lift import DeepLift, DeepLiftShap, GradientShap, full_baselines, input_values
from pyfast_xai.compat.captum.gradients import Deconvolution, GuidedBackprop, Saliency
from pyfast_xai.compat.captum.integrated_gradients import (
    IntegratedGradients,
    path_points,
    places_and_weights,
    weighted_sum,
)
from pyfast_xai.compat.captum.layers import checked_layer
from pyfast_xai.compat.recording import Recording
from pyfast_xai.rules.gradient import backward_pass
from pyfast_xai.tape.module_hooks import following, unwrap

Selector = int | tuple[int | slice, ...] | Callable[..., Tensor]


class _LayerReached(BaseException):
    """Leaves the forward at the layer; not an Exception, so that no model catches it by accident."""


class Neuron(nn.Module):
    """A forward function that goes as far as a layer and returns one neuron of it, `[N]`.

    Args:
        function: a module or a function.
        layer: a module that it runs; of several calls the first counts.
        selector: an index, or a tuple of them behind the first dimension, in which a slice means the sum; or a function
            of what the layer returned that gives one number a row.
        at_input: take what goes into the layer.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum.neurons import Neuron
        >>> model = demo.load()
        >>> Neuron(model, model.block, (3, 5, 5))(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2])
    """

    def __init__(self, function: Forward, layer: nn.Module, selector: Selector, at_input: bool = False) -> None:
        super().__init__()
        self._function, self._layer, self._selector, self._at_input = [function], [unwrap(layer)], selector, at_input
        self.models = nn.ModuleList(modules_behind(function))

    def forward(self, *args: Any) -> Tensor:
        """Returns the neuron of each row."""
        outputs: list[Any] = []

        def look(module: nn.Module, tensors: Any) -> None:
            if module is self._layer[0]:
                outputs.append(tensors)
                raise _LayerReached

        def ignore(module: nn.Module, tensors: Any) -> None:
            pass

        try:
            with following(look if self._at_input else ignore, ignore if self._at_input else look):
                self._function[0](*args)
        except _LayerReached:
            pass
        if not outputs:
            refuse(f"layer must run in the forward pass, got {type(self._layer[0]).__name__}, which did not")
        return selected(outputs[0], self._selector)


def selected(output: Any, selector: Selector) -> Tensor:
    """Returns one number a row of what a layer returned.

    Raises:
        InputError: a selector that leaves more than one number of a row.
    """
    tensors = tensors_of(output)
    if callable(selector):
        return selector(tensors[0] if len(tensors) == 1 else tuple(tensors))
    index = selector if isinstance(selector, tuple) else (selector,)
    if len(index) >= tensors[0].dim():
        refuse(f"neuron_selector must index {tensors[0].dim() - 1} dimensions of a row or fewer, got {selector!r}")
    place: Any = (slice(None), *index)
    neuron = tensors[0][place]
    neuron = neuron.reshape(len(neuron), -1)
    if neuron.shape[1] != 1 and not any(isinstance(one, slice) for one in index):
        refuse(
            f"neuron_selector must choose one number of each row of {list(tensors[0].shape)}, or have slices, whose "
            f"numbers are added up, got {selector!r}"
        )
    return neuron.sum(1)


class NeuronAttribution(GradientAttribution):
    """Base of methods that attribute a neuron.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.
    """

    def __init__(self, forward_func: Forward, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func)
        self.layer, self.device_ids = checked_layer(layer), device_ids

    def _neuron(self, selector: Selector, at_input: bool) -> Neuron:
        return Neuron(self.forward_func, self.layer, selector, at_input)


class NeuronByInputs(NeuronAttribution):
    """Base of methods of a neuron that multiply by the difference of inputs and baselines, or do not.

    Args:
        forward_func: see `NeuronAttribution`.
        layer: likewise.
        device_ids: likewise.
        multiply_by_inputs: by that difference.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: nn.Module,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self._multiply_by_inputs = multiply_by_inputs


class NeuronGradient(NeuronAttribution):
    """The gradient of a neuron with respect to the inputs.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronGradient
        >>> model = demo.load()
        >>> NeuronGradient(model, model.block).attribute(torch.rand(2, 3, 96, 96), (3, 5, 5)).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Attributes the neuron to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            neuron_selector: an index or a tuple of them behind the first dimension, in which a slice means the sum, or
                a function of the activation.
            additional_forward_args: further arguments of the forward function.
            attribute_to_neuron_input: take the neuron of what goes into the layer.

        Returns:
            Of the shape of the inputs.

        Raises:
            InputError: arguments that do not fit, or a layer that did not run.
        """
        neuron = self._neuron(neuron_selector, attribute_to_neuron_input)
        return Saliency(neuron).attribute(inputs, abs=False, additional_forward_args=additional_forward_args)


class NeuronConductance(NeuronByInputs):
    """The part of integrated gradients that flows through a neuron (Dhamdhere, Sundararajan and Yan, 2018).

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.
        multiply_by_inputs: see `IntegratedGradients`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronConductance
        >>> model = demo.load()
        >>> explain = NeuronConductance(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), (3, 5, 5), target=3, n_steps=4).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "riemann_trapezoid",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attribute what the output owes to the neuron to the inputs.

        At each place on the way from the baselines the gradient of the output with respect to the neuron is multiplied
        by that of the neuron with respect to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            neuron_selector: see `NeuronGradient.attribute`.
            baselines: see `IntegratedGradients.attribute`.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
            n_steps: places on the way.
            method: of the quadrature, see `IntegratedGradients.attribute`.
            internal_batch_size: rows that go through the model at once; None for all of all steps.
            attribute_to_neuron_input: take the neuron of what goes into the layer.
            grad_kwargs: accepted as by `LayerGradCam.attribute`.

        Returns:
            Of the shape of the inputs.

        Raises:
            InputError: arguments that do not fit, or a layer that did not run.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        starts = full_baselines(baselines, tensors)
        places, weights = places_and_weights(method, n_steps)
        at_once = n_steps if internal_batch_size is None else max(1, internal_batch_size // len(tensors[0]))
        totals = [torch.zeros_like(tensor) for tensor in tensors]
        for first in range(0, n_steps, at_once):
            part = slice(first, first + at_once)
            steps = len(places[part])
            recording = self._record(
                path_points(tensors, starts, places[part]),
                repeated_further(further(additional_forward_args), steps),
                layers=[self.layer],
                at_input=attribute_to_neuron_input,
            )
            scores = one_number_a_row(repeated(target, steps))
            at_layer = recording.gradients(scores, recording.layers[0], retain=True)
            through = selected(at_layer, neuron_selector)
            for total, gradient in zip(totals, _neuron_gradients(recording, neuron_selector, tensors), strict=True):
                total += weighted_sum(gradient * through.view(-1, *[1] * (gradient.dim() - 1)), weights[part])
        if self._multiply_by_inputs:
            totals = [total * (tensor - start) for total, tensor, start in zip(totals, tensors, starts, strict=True)]
        return like(inputs, totals)


def _neuron_gradients(recording: Recording, selector: Selector, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the gradients of a neuron of the recorded layer with respect to the inputs."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in recording.activations[0]]
        seeds = torch.autograd.grad(selected(leaves, selector).sum(), leaves, allow_unused=True)
    at_layer = zip(recording.layers[0], seeds, strict=True)
    starts = {value: seed[None] for value, seed in at_layer if seed is not None}
    gradients = backward_pass(recording.policy, recording.tape, starts, input_values(recording, inputs))
    return [gradient[0] for gradient in gradients]


class NeuronIntegratedGradients(NeuronByInputs):
    """Integrated gradients of a neuron.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.
        multiply_by_inputs: see `IntegratedGradients`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronIntegratedGradients
        >>> model = demo.load()
        >>> explain = NeuronIntegratedGradients(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), (3, 5, 5), n_steps=4).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        baselines: Baselines = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Attributes the neuron to the inputs; see `IntegratedGradients.attribute`."""
        base = IntegratedGradients(self._neuron(neuron_selector, attribute_to_neuron_input), self._multiply_by_inputs)
        return base.attribute(
            inputs,
            baselines,
            additional_forward_args=additional_forward_args,
            n_steps=n_steps,
            method=method,
            internal_batch_size=internal_batch_size,
        )


class NeuronGradientShap(NeuronIntegratedGradients):
    """GradientShap of a neuron.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.
        multiply_by_inputs: see `GradientShap`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronGradientShap
        >>> model = demo.load()
        >>> explain = NeuronGradientShap(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), (3, 5, 5), torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float = 0.0,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Attributes the neuron to the inputs; see `GradientShap.attribute`."""
        base = GradientShap(self._neuron(neuron_selector, attribute_to_neuron_input), self._multiply_by_inputs)
        return base.attribute(inputs, baselines, n_samples, stdevs, None, additional_forward_args)


class NeuronDeepLift(NeuronAttribution):
    """DeepLift of a neuron.

    Args:
        model: a module.
        layer: a module of it.
        multiply_by_inputs: see `DeepLift`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronDeepLift
        >>> model = demo.load()
        >>> NeuronDeepLift(model, model.block).attribute(torch.rand(2, 3, 96, 96), (3, 5, 5)).shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, model: nn.Module, layer: nn.Module, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, layer)
        self._multiply_by_inputs = multiply_by_inputs

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        baselines: Baselines = None,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """Attributes the neuron to the inputs; see `DeepLift.attribute`."""
        base = DeepLift(self._neuron(neuron_selector, attribute_to_neuron_input), self._multiply_by_inputs)
        return base.attribute(
            inputs,
            baselines,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class NeuronDeepLiftShap(NeuronDeepLift):
    """DeepLiftShap of a neuron.

    Args:
        model: a module.
        layer: a module of it.
        multiply_by_inputs: see `DeepLiftShap`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronDeepLiftShap
        >>> model = demo.load()
        >>> explain = NeuronDeepLiftShap(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), (3, 5, 5), torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 3, 96, 96])
    """

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        baselines: Any,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Any = None,
    ) -> Any:
        """Attributes the neuron to the inputs; see `DeepLiftShap.attribute`."""
        base = DeepLiftShap(self._neuron(neuron_selector, attribute_to_neuron_input), self._multiply_by_inputs)
        return base.attribute(
            inputs,
            baselines,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class NeuronGuidedBackprop(NeuronAttribution):
    """Guided backprop of a neuron.

    Args:
        model: a module.
        layer: a module of it.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronGuidedBackprop
        >>> model = demo.load()
        >>> NeuronGuidedBackprop(model, model.block).attribute(torch.rand(2, 3, 96, 96), (3, 5, 5)).shape
        torch.Size([2, 3, 96, 96])
    """

    base: type[GuidedBackprop] | type[Deconvolution] = GuidedBackprop

    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(model, layer, device_ids)

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Attributes the neuron to the inputs; see `NeuronGradient.attribute`."""
        base = self.base(self._neuron(neuron_selector, attribute_to_neuron_input))
        return base.attribute(inputs, None, additional_forward_args)


class NeuronDeconvolution(NeuronGuidedBackprop):
    """Deconvolution of a neuron.

    Args:
        model: a module.
        layer: a module of it.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NeuronDeconvolution
        >>> model = demo.load()
        >>> NeuronDeconvolution(model, model.block).attribute(torch.rand(2, 3, 96, 96), (3, 5, 5)).shape
        torch.Size([2, 3, 96, 96])
    """

    base = Deconvolution
