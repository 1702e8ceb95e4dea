"""Attributions to a layer: activations, gradients, and sums of them on the way from a baseline."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.above_layer import AboveLayer
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    further,
    one_number_a_row,
    repeated,
    repeated_further,
)
from pyfast_xai.compat.captum.deep_lift import attributions, between, distribution, full_baselines
from pyfast_xai.compat.captum.integrated_gradients import IntegratedGradients, path_points, places_and_weights
from pyfast_xai.compat.captum.layers import LayerByInputs, LayerOf, of_layer, split
from pyfast_xai.compat.captum.noise_tunnel import NoiseTunnel
from pyfast_xai.compat.recording import Recording
from pyfast_xai.tape.module_hooks import following, unwrap


class LayerActivation(LayerOf):
    """The activation of a layer.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs, or several in a list; of several calls the last counts.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerActivation
        >>> model = demo.load()
        >>> LayerActivation(model, model.block).attribute(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 80, 12, 12])
    """

    _multiply_by_inputs = True

    def attribute(
        self, inputs: Inputs, additional_forward_args: Any = None, attribute_to_layer_input: bool = False
    ) -> Any:
        """Returns the activation.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            additional_forward_args: further arguments of the forward function.
            attribute_to_layer_input: take what goes into the layer.

        Returns:
            What the layer returned: a tensor, a tuple for several; of several layers a list.

        Raises:
            InputError: a layer that did not run.
        """
        recording = self._record(
            as_tuple(inputs), additional_forward_args, layers=self.layers, at_input=attribute_to_layer_input, stop=True
        )
        results = [of_layer([output.contiguous() for output in one]) for one in recording.activations]
        return results if isinstance(self.layer, (list, tuple)) else results[0]


class LayerGradientXActivation(LayerOf):
    """The activation of a layer times its gradient.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs, or several in a list.
        device_ids: accepted for data-parallel models, which are looked through.
        multiply_by_inputs: by the activation; without, these are the gradients.
        memory_efficient: accepted; all layers come from one pass anyway.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerGradientXActivation
        >>> model = demo.load()
        >>> LayerGradientXActivation(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 80, 12, 12])
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Any,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self._multiply_by_inputs, self.memory_efficient = multiply_by_inputs, memory_efficient

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes the output to the layer; see `LayerGradCam.attribute`.

        Returns:
            Of the shape of the layer, a tuple for several tensors; of several layers a list.
        """
        recording = self._record(
            as_tuple(inputs),
            additional_forward_args,
            layers=self.layers,
            at_input=attribute_to_layer_input,
            to_inputs=len(self.layers) > 1,
        )
        values = [value for layer_values in recording.layers for value in layer_values]
        gradients = iter(recording.gradients(one_number_a_row(target), values))
        results = []
        for activations in recording.activations:
            pairs = [(next(gradients), activation) for activation in activations]
            results.append(of_layer([g * a.contiguous() if self._multiply_by_inputs else g for g, a in pairs]))
        return results if isinstance(self.layer, (list, tuple)) else results[0]


class _Path(LayerOf):
    """Base of methods that look at a layer on the way from a baseline to the inputs."""

    def _path_gradients(
        self,
        inputs: tuple[Tensor, ...],
        starts: tuple[Tensor, ...],
        places: np.ndarray,
        target: Target,
        additional_forward_args: Any,
        at_input: bool,
        internal_batch_size: int | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns activations and gradients of each tensor of the layer, `[steps, N, ...]`."""
        rows = len(inputs[0])
        at_once = len(places) if internal_batch_size is None else max(1, internal_batch_size // rows)
        activations: list[list[Tensor]] = []
        gradients: list[list[Tensor]] = []
        for first in range(0, len(places), at_once):
            part = places[first : first + at_once]
            steps = len(part)
            recording = self._record(
                path_points(inputs, starts, part),
                repeated_further(further(additional_forward_args), steps),
                layers=self.layers,
                at_input=at_input,
                to_inputs=False,
            )
            chunk = recording.gradients(one_number_a_row(repeated(target, steps)), recording.layers[0])
            gradients.append([tensor.unflatten(0, (steps, -1)) for tensor in chunk])
            activations.append([tensor.contiguous().unflatten(0, (steps, -1)) for tensor in recording.activations[0]])
        return (
            [torch.cat(parts) for parts in zip(*activations, strict=True)],
            [torch.cat(parts) for parts in zip(*gradients, strict=True)],
        )


class InternalInfluence(_Path):
    """Gradients of a layer, averaged on the way from a baseline to the inputs (Leino et al., 2018).

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import InternalInfluence
        >>> model = demo.load()
        >>> InternalInfluence(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3, n_steps=4).shape
        torch.Size([2, 80, 12, 12])
    """

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes the output to the layer; see `IntegratedGradients.attribute`.

        Returns:
            Of the shape of the layer, a tuple for several tensors.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        places, weights = places_and_weights(method, n_steps)
        _, gradients = self._path_gradients(
            tensors,
            full_baselines(baselines, tensors),
            places,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            internal_batch_size,
        )
        return of_layer([torch.tensordot(gradient.new_tensor(weights), gradient, 1) for gradient in gradients])


class LayerConductance(_Path):
    """Gradients of a layer times the change of its activation, on the way from a baseline (Dhamdhere et al., 2018).

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerConductance
        >>> model = demo.load()
        >>> LayerConductance(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3, n_steps=4).shape
        torch.Size([2, 80, 12, 12])
    """

    _multiply_by_inputs = True

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes the output to the layer; see `IntegratedGradients.attribute`.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            baselines: see `IntegratedGradients.attribute`.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the forward function.
            n_steps: places on the way.
            method: method of the quadrature.
            internal_batch_size: rows that go through the model at once.
            return_convergence_delta: return by how much the sum is off, too.
            attribute_to_layer_input: take what goes into the layer.
            grad_kwargs: accepted as by `LayerGradCam.attribute`.

        Returns:
            Of the shape of the layer, a tuple for several tensors; with a delta `[N]`, a pair.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        starts = full_baselines(baselines, tensors)
        places, _ = places_and_weights(method, n_steps + 1)
        activations, gradients = self._path_gradients(
            tensors, starts, places, target, additional_forward_args, attribute_to_layer_input, internal_batch_size
        )
        result = [
            (gradient[:-1] * (activation[1:] - activation[:-1])).sum(0)
            for activation, gradient in zip(activations, gradients, strict=True)
        ]
        return self._with_delta(
            of_layer(result),
            result,
            starts,
            tensors,
            target,
            additional_forward_args,
            return_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True


class LayerGradientShap(LayerByInputs):
    """Gradients of a layer at random places between baselines and noisy inputs, times the change of its activation.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs.
        device_ids: accepted for data-parallel models, which are looked through.
        multiply_by_inputs: by the change of the activation.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerGradientShap
        >>> model = demo.load()
        >>> explain = LayerGradientShap(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), torch.rand(3, 3, 96, 96), target=3).shape
        torch.Size([2, 80, 12, 12])
    """

    def attribute(
        self,
        inputs: Inputs,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Attributes the output to the layer; see `GradientShap.attribute`.

        Returns:
            Of the shape of the layer, a tuple for several tensors; with a delta `[N * n_samples]`, a pair.
        """
        base = _LayerBetween(self.forward_func, self.layer, self._multiply_by_inputs, attribute_to_layer_input)
        return NoiseTunnel(base).attribute(
            inputs,
            nt_samples=n_samples,
            stdevs=stdevs,
            draw_baseline_from_distrib=True,
            baselines=distribution(baselines, inputs, at_least=1),
            target=target,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True


class _LayerBetween(LayerOf):
    def __init__(self, forward_func: Forward, layer: nn.Module, multiply_by_inputs: bool, at_input: bool) -> None:
        super().__init__(forward_func, layer)
        self._multiply_by_inputs, self._at_input = multiply_by_inputs, at_input

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        tensors = as_tuple(inputs)
        starts = full_baselines(baselines, tensors)

        def recorded(points: tuple[Tensor, ...], **settings: Any) -> Recording:
            return self._record(
                points, additional_forward_args, layers=self.layers, at_input=self._at_input, **settings
            )

        places = recorded(between(tensors, starts), to_inputs=False)
        gradients = places.gradients(one_number_a_row(target), places.layers[0])
        ends, begins = (
            tuple(tensor.contiguous() for tensor in recorded(points, stop=True).activations[0])
            for points in (tensors, starts)
        )
        result = attributions(gradients, ends, begins, self._multiply_by_inputs, None)
        return self._with_delta(
            of_layer(result),
            result,
            starts,
            tensors,
            target,
            additional_forward_args,
            return_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True


class LayerIntegratedGradients(LayerByInputs):
    """Integrated gradients on the way between the activations of a layer for a baseline and for the inputs.

    Args:
        forward_func: a module or a function.
        layer: a module that it runs, or several in a list, of which all go their ways together.
        device_ids: accepted for data-parallel models, which are looked through.
        multiply_by_inputs: by the difference of the activations.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerIntegratedGradients
        >>> model = demo.load()
        >>> explain = LayerIntegratedGradients(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), target=3, n_steps=4).shape
        torch.Size([2, 80, 12, 12])
    """

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes the output to the layer; see `IntegratedGradients.attribute`.

        Returns:
            Of the shape of the layer, a tuple for several tensors; of several layers a list. With a delta `[N]`, a
            pair.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        starts = full_baselines(baselines, tensors)
        activation = LayerActivation(self.forward_func, self.layers)
        ends, begins = (
            [as_tuple(one) for one in activation.attribute(points, additional_forward_args, attribute_to_layer_input)]
            for points in (tensors, starts)
        )
        counts = [len(one) for one in ends]
        above: Forward | None = None
        if counts == [1] and additional_forward_args is None and not attribute_to_layer_input:
            above = AboveLayer.of(self.forward_func, self.layers[0], tensors)
        if above is None:
            above = WithLayers(self.forward_func, self.layers, tensors, counts, attribute_to_layer_input)
        result = IntegratedGradients(above, self._multiply_by_inputs).attribute(
            tuple(itertools.chain(*ends)),
            tuple(itertools.chain(*begins)),
            target,
            additional_forward_args,
            n_steps,
            method,
            internal_batch_size,
        )
        results = [of_layer(part) for part in split(result, counts)]
        return self._with_delta(
            results if isinstance(self.layer, (list, tuple)) else results[0],
            result,
            starts,
            tensors,
            target,
            additional_forward_args,
            return_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True


class WithLayers:
    """The forward function with other numbers for what layers return or are given, of any number of copies of rows.

    Args:
        function: a module or a function.
        layers: modules that it runs.
        inputs: `[N, ...]` each.
        counts: numbers of tensors of the layers, which are the first arguments of a call, layer by layer.
        at_input: replace what the layers are given.
    """

    def __init__(
        self,
        function: Forward,
        layers: Sequence[nn.Module],
        inputs: tuple[Tensor, ...],
        counts: Sequence[int],
        at_input: bool,
    ) -> None:
        self._function, self._layers, self._inputs = function, [unwrap(layer) for layer in layers], inputs
        self._counts, self._at_input = counts, at_input

    def __call__(self, *args: Any) -> Any:
        count = sum(self._counts)
        by_layer = dict(zip(self._layers, split(args[:count], self._counts), strict=True))
        copies = len(args[0]) // max(1, len(self._inputs[0]))
        inputs = tuple(torch.cat([tensor] * copies) for tensor in self._inputs)

        def replace(module: nn.Module, _: Any) -> Any:
            activations = by_layer.get(module)
            if activations is None:
                return None
            return activations if self._at_input or len(activations) > 1 else activations[0]

        def ignore(module: nn.Module, _: Any) -> None:
            pass

        with following(replace, ignore) if self._at_input else following(ignore, replace):
            return self._function(*inputs, *args[count:])
