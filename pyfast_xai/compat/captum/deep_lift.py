"""DeepLift, DeepLiftShap and GradientShap, for inputs and for layers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    baselines_for,
    like,
    one_number_a_row,
    refuse,
)
from pyfast_xai.compat.captum.attribution import GradientAttribution
from pyfast_xai.compat.captum.layers import LayerOf, of_layer
from pyfast_xai.compat.captum.noise_tunnel import NoiseTunnel
from pyfast_xai.compat.recording import Recording
from pyfast_xai.rules.rescale import RescaleRules

Custom = Callable[..., tuple[Tensor, ...]] | None


class DeepLift(GradientAttribution):
    """The difference of the output from that of a baseline, shared by the rescale rule (Shrikumar et al., 2017).

    It adds up on any network, with functions, modules that run twice, GELU, SiLU, softmax, attention and layer norm.

    Args:
        model: a module.
        multiply_by_inputs: by the difference of input and baseline; without, these are the multipliers.
        eps: accepted; where input and baseline are equal up to rounding, the derivative is taken.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import DeepLift
        >>> DeepLift(demo.load()).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, model: nn.Module, multiply_by_inputs: bool = True, eps: float = 1e-10) -> None:
        super().__init__(checked_module(model))
        self.model, self.eps = model, eps
        self._multiply_by_inputs = multiply_by_inputs

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Custom = None,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            baselines: one an input: a number, a row for all, or of the input's shape; 0 for None.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the model.
            return_convergence_delta: return by how much the sum is off, too.
            custom_attribution_func: makes attributions of the multipliers, the inputs and the baselines.

        Returns:
            Of the shape of the inputs; with a delta `[N]`, a pair.

        Raises:
            InputError: arguments that do not fit, or a model that runs other operations on the baselines.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        starts = full_baselines(baselines, tensors)
        recording = self._record(tensors, additional_forward_args, rules=RescaleRules())
        factors = multipliers(
            self, recording, starts, target, additional_forward_args, input_values(recording, tensors)
        )
        result = attributions(factors, tensors, starts, self._multiply_by_inputs, custom_attribution_func)
        return self._with_delta(
            *(like(inputs, result), result, starts, inputs, target, additional_forward_args),
            return_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True


class DeepLiftShap(DeepLift):
    """DeepLift, averaged over baselines (Lundberg and Lee, 2017).

    Args:
        model: a module.
        multiply_by_inputs: see `DeepLift`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import DeepLiftShap
        >>> explain = DeepLiftShap(demo.load())
        >>> explain.attribute(torch.rand(2, 3, 96, 96), torch.rand(3, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, model: nn.Module, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, multiply_by_inputs)

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        baselines: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Custom = None,
    ) -> Any:
        """Attributes the output to the inputs; see `DeepLift.attribute`.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            baselines: `[B, ...]`, one an input, or a function that returns them.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the model.
            return_convergence_delta: return by how much the sum is off for each input and baseline, too.
            custom_attribution_func: see `DeepLift.attribute`.

        Returns:
            Of the shape of the inputs; with a delta `[N * B]`, a pair.

        Raises:
            InputError: see `DeepLift.attribute`; fewer than two baselines.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        rows = distribution(baselines, inputs, at_least=2)
        recording = self._record(tensors, additional_forward_args, rules=RescaleRules())
        values = input_values(recording, tensors)

        def shared(starts: tuple[Tensor, ...]) -> list[Tensor]:
            factors = multipliers(self, recording, starts, target, additional_forward_args, values)
            return attributions(factors, tensors, starts, self._multiply_by_inputs, custom_attribution_func)

        parts = [(starts, shared(starts)) for starts in one_by_one(rows, tensors)]
        return _mean(
            self,
            partial(like, inputs),
            parts,
            tensors,
            target,
            additional_forward_args,
            return_delta=return_convergence_delta,
        )


class GradientShap(GradientAttribution):
    """Gradients at random places between baselines and noisy inputs (Lundberg and Lee, 2017).

    Random numbers are drawn as Captum draws them: places and baselines by NumPy, noise by PyTorch.

    Args:
        forward_func: a module or a function.
        multiply_by_inputs: by the difference of input and baseline.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import GradientShap
        >>> explain = GradientShap(demo.load())
        >>> explain.attribute(torch.rand(2, 3, 96, 96), torch.rand(3, 3, 96, 96), target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, forward_func: Forward, multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    def attribute(
        self,
        inputs: Inputs,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            baselines: `[B, ...]`, one an input, or a function that returns them.
            n_samples: random places for each row.
            stdevs: standard deviations of the noise on the inputs.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
            return_convergence_delta: return by how much the sum is off for each place, too.

        Returns:
            Of the shape of the inputs; with a delta `[N * n_samples]`, a pair.

        Raises:
            InputError: arguments that do not fit.
        """
        rows = distribution(baselines, inputs, at_least=1)
        return NoiseTunnel(self._base()).attribute(
            inputs,
            nt_samples=n_samples,
            stdevs=stdevs,
            draw_baseline_from_distrib=True,
            baselines=rows,
            target=target,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )

    def _base(self) -> GradientAttribution:
        return InputBaselineXGradient(self.forward_func, self._multiply_by_inputs)

    def has_convergence_delta(self) -> bool:
        return True


class InputBaselineXGradient(GradientAttribution):
    """The gradient at a random place between baseline and input, times their difference.

    Args:
        forward_func: a module or a function.
        multiply_by_inputs: by the difference.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum.deep_lift import InputBaselineXGradient
        >>> InputBaselineXGradient(demo.load()).attribute(torch.rand(2, 3, 96, 96), 0.0, target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, forward_func: Forward, multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Attributes the output to the inputs; see `DeepLift.attribute`."""
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        starts = full_baselines(baselines, tensors)
        places = between(tensors, starts)
        gradients = self._gradients(places, target, additional_forward_args)
        result = attributions(gradients, tensors, starts, self._multiply_by_inputs, None)
        return self._with_delta(
            *(like(inputs, result), result, starts, tensors, target, additional_forward_args),
            return_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True


class LayerDeepLift(LayerOf):
    """DeepLift of a layer: its multipliers times the difference of its activation from that for the baseline.

    Args:
        model: a module.
        layer: a module of it.
        multiply_by_inputs: by the difference of the activations.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerDeepLift
        >>> model = demo.load()
        >>> LayerDeepLift(model, model.block).attribute(torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 80, 12, 12])
    """

    def __init__(self, model: nn.Module, layer: nn.Module, multiply_by_inputs: bool = True) -> None:
        super().__init__(checked_module(model), layer)
        self.model, self._multiply_by_inputs = model, multiply_by_inputs

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Custom = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes the output to the layer; see `DeepLift.attribute`.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            baselines: see `DeepLift.attribute`.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments of the model.
            return_convergence_delta: return by how much the sum is off, too.
            attribute_to_layer_input: take what goes into the layer.
            custom_attribution_func: see `DeepLift.attribute`.
            grad_kwargs: accepted as by `LayerGradCam.attribute`.

        Returns:
            Of the shape of the layer, a tuple for several tensors; with a delta `[N]`, a pair.

        Raises:
            InputError: arguments that do not fit, or a layer that did not run.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        result = self._shared(
            tensors,
            full_baselines(baselines, tensors),
            target,
            additional_forward_args,
            attribute_to_layer_input,
            custom_attribution_func,
        )
        return self._with_delta(
            *(of_layer(result), result, baselines, inputs, target, additional_forward_args),
            return_delta=return_convergence_delta,
        )

    def _shared(
        self,
        inputs: tuple[Tensor, ...],
        starts: tuple[Tensor, ...],
        target: Target,
        additional_forward_args: Any,
        at_input: bool,
        custom: Custom,
    ) -> list[Tensor]:
        rules = RescaleRules()
        settings = {"layers": [self.layer], "at_input": at_input, "to_inputs": False}
        recording = self._record(inputs, additional_forward_args, rules=rules, **settings)
        reference = self._record(starts, additional_forward_args, rules=rules, **settings)
        policy = recording.policy.with_rules(rules.against(recording.tape, reference.tape))
        factors = recording.gradients(one_number_a_row(target), recording.layers[0], policy)
        ends, begins = (tuple(tensor.contiguous() for tensor in one.activations[0]) for one in (recording, reference))
        return attributions(factors, ends, begins, self._multiply_by_inputs, custom)

    def has_convergence_delta(self) -> bool:
        return True


class LayerDeepLiftShap(LayerDeepLift):
    """DeepLift of a layer, averaged over baselines.

    Args:
        model: a module.
        layer: a module of it.
        multiply_by_inputs: see `LayerDeepLift`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LayerDeepLiftShap
        >>> model = demo.load()
        >>> explain = LayerDeepLiftShap(model, model.block)
        >>> explain.attribute(torch.rand(2, 3, 96, 96), torch.rand(2, 3, 96, 96), target=3).shape
        torch.Size([2, 80, 12, 12])
    """

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        baselines: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Custom = None,
    ) -> Any:
        """Attributes the output to the layer; see `LayerDeepLift.attribute` and `DeepLiftShap.attribute`."""
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        rows = distribution(baselines, inputs, at_least=2)
        settings = (target, additional_forward_args, attribute_to_layer_input, custom_attribution_func)
        parts = [(starts, self._shared(tensors, starts, *settings)) for starts in one_by_one(rows, tensors)]
        return _mean(
            self, of_layer, parts, tensors, target, additional_forward_args, return_delta=return_convergence_delta
        )


def checked_module(model: Any) -> nn.Module:
    """Returns a model that is a module.

    Raises:
        InputError: another thing.
    """
    if not isinstance(model, nn.Module):
        refuse(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def full_baselines(baselines: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns a baseline of the shape of each input.

    Raises:
        InputError: baselines that do not fit.
    """
    return tuple(
        start.detach().to(tensor).expand_as(tensor) if isinstance(start, Tensor) else torch.full_like(tensor, start)
        for start, tensor in zip(baselines_for(baselines, inputs), inputs, strict=True)
    )


def one_by_one(rows: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Yields each of some baselines `[B, ...]`, of the shape of each input."""
    for number in range(len(rows[0])):
        yield full_baselines(tuple(tensor[number : number + 1] for tensor in rows), inputs)


def _mean(
    method: GradientAttribution,
    returned: Callable[[list[Tensor]], Any],
    parts: Sequence[tuple[tuple[Tensor, ...], list[Tensor]]],
    inputs: tuple[Tensor, ...],
    target: Target,
    additional_forward_args: Any,
    *,
    return_delta: bool,
) -> Any:
    """Returns the mean over pairs of a baseline and its attributions, with the deltas of all where they are wanted."""
    means = [torch.stack(rows).mean(0) for rows in zip(*(attribution for _, attribution in parts), strict=True)]
    if not return_delta:
        return returned(means)
    more = {"target": target, "additional_forward_args": additional_forward_args}
    deltas = [
        method.compute_convergence_delta(tuple(attribution), starts, inputs, **more) for starts, attribution in parts
    ]
    return returned(means), torch.stack(deltas, 1).flatten()


def distribution(baselines: Any, inputs: Inputs, at_least: int) -> tuple[Tensor, ...]:
    """Returns baselines `[B, ...]` for each input.

    Args:
        baselines: these, or a function of the inputs, or of nothing, that returns them.
        inputs: as the method got them.
        at_least: the smallest B.

    Raises:
        InputError: fewer of them, or another number of tensors.
    """
    if callable(baselines) and not isinstance(baselines, Tensor):
        try:
            baselines = baselines(inputs)
        except TypeError:
            baselines = baselines()
    result = baselines if isinstance(baselines, tuple) else (baselines,)
    if not all(isinstance(tensor, Tensor) for tensor in result) or len(result) != len(as_tuple(inputs)):
        kinds = ", ".join(type(tensor).__name__ for tensor in result)
        refuse(f"baselines must be a tensor for each of {len(as_tuple(inputs))} inputs, got {kinds}")
    if len(result[0]) < at_least:
        refuse(f"baselines must have at least {at_least} rows, got {len(result[0])}")
    return tuple(tensor.detach() for tensor in result)


def input_values(recording: Recording, inputs: Sequence[Tensor]) -> list[Any]:
    """Returns the values of the inputs on a tape."""
    return [value for value in recording.inputs[: len(inputs)] if value is not None]


def multipliers(
    method: GradientAttribution,
    recording: Recording,
    starts: tuple[Tensor, ...],
    target: Target,
    additional_forward_args: Any,
    to: list[Any],
) -> list[Tensor]:
    """Returns the multipliers of some values between a recording and baselines."""
    rules = recording.rules
    reference = method._record(starts, additional_forward_args, rules=rules)
    assert isinstance(rules, RescaleRules)
    policy = rules.against(recording.tape, reference.tape)
    return recording.gradients(one_number_a_row(target), to, policy, retain=True)


def attributions(
    factors: Sequence[Tensor],
    inputs: tuple[Tensor, ...],
    starts: tuple[Tensor, ...],
    multiply: bool,
    custom: Custom,
) -> list[Tensor]:
    """Returns attributions of multipliers, as a user's function makes them or by the difference of the inputs."""
    if custom is not None:
        arguments = (tuple(factors), inputs, starts)
        count = custom.__code__.co_argcount if hasattr(custom, "__code__") else 3
        return list(custom(*arguments[: max(1, min(3, count))]))
    if not multiply:
        return list(factors)
    return [tensor * (end - start) for tensor, end, start in zip(factors, inputs, starts, strict=True)]


def between(inputs: tuple[Tensor, ...], starts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns a random place on the way of each row, drawn by NumPy."""
    drawn = np.random.uniform(0.0, 1.0, len(inputs[0]))
    places = []
    for tensor, start in zip(inputs, starts, strict=True):
        alpha = torch.tensor(drawn, dtype=tensor.dtype, device=tensor.device)
        alpha = alpha.view(-1, *[1] * (tensor.dim() - 1))
        places.append(alpha * tensor + (1.0 - alpha) * start)
    return tuple(places)
