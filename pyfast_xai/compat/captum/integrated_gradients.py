"""Integrated gradients (Sundararajan, Taly and Yan, 2017)."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, cat

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    baselines_for,
    further,
    like,
    refuse,
    repeated,
    repeated_further,
)
from pyfast_xai.compat.captum.attribution import GradientAttribution


def places_and_weights(method: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nodes and weights of a quadrature of an integral from 0 to 1.

    Raises:
        InputError: a rule that does not exist, or too few steps for it.
    """
    if method == "gausslegendre":
        if steps < 1:
            refuse(f"n_steps must be at least 1, got {steps}")
        places, weights = np.polynomial.legendre.leggauss(steps)
        return (places + 1) / 2, weights / 2
    if steps < 2:
        refuse(f"n_steps must be at least 2 for a Riemann sum, got {steps}")
    weights = np.full(steps, 1 / steps)
    ends = {
        "riemann_left": (0, 1 - 1 / steps),
        "riemann_right": (1 / steps, 1),
        "riemann_middle": (1 / (2 * steps), 1 - 1 / (2 * steps)),
        "riemann_trapezoid": (0, 1),
    }
    if method not in ends:
        refuse(f"method must be one of {', '.join(map(repr, [*ends, 'gausslegendre']))}, got {method!r}")
    if method == "riemann_trapezoid":
        weights[[0, -1]] /= 2
    return np.linspace(*ends[method], steps), weights


def path_points(inputs: Sequence[Tensor], starts: Sequence[Tensor | float], places: np.ndarray) -> tuple[Tensor, ...]:
    """Returns points on the straight way from each baseline to each input, place by place, `[places * N, ...]`."""
    return tuple(
        cat([start + float(place) * (tensor - start) for place in places])
        for tensor, start in zip(inputs, starts, strict=True)
    )


class IntegratedGradients(GradientAttribution):
    """Gradients summed on the way from a baseline to the input.

    Args:
        forward_func: a module or a function.
        multiply_by_inputs: by the difference of input and baseline, so that attributions add up to the change of the
            output; without, they are mean gradients.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import IntegratedGradients
        >>> method = IntegratedGradients(demo.load())
        >>> attributions, delta = method.attribute(
        ...     torch.rand(1, 3, 96, 96), target=3, n_steps=8, return_convergence_delta=True
        ... )
        >>> attributions.shape, delta.shape
        (torch.Size([1, 3, 96, 96]), torch.Size([1]))
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
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them, floating-point.
            baselines: where the way starts, one an input: a number, a row for all, or of the input's shape; 0 for None.
            target: see `Saliency.attribute`.
            additional_forward_args: further arguments; tensors `[N, ...]` go with their rows.
            n_steps: places on the way.
            method: "gausslegendre", "riemann_left", "riemann_right", "riemann_middle" or "riemann_trapezoid".
            internal_batch_size: rows that go through the model at once; None for all of all steps.
            return_convergence_delta: return by how much the sum is off, too.

        Returns:
            Of the shape of the inputs; with a delta `[N]`, a pair.

        Raises:
            InputError: arguments that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        starts = baselines_for(baselines, tensors)
        places, weights = places_and_weights(method, n_steps)
        rows = len(tensors[0])
        if internal_batch_size is not None and internal_batch_size < rows:
            warnings.warn(
                f"internal_batch_size should be at least the number of inputs, {rows}, and is taken as that, got "
                f"{internal_batch_size}",
                stacklevel=2,
            )
        at_once = n_steps if internal_batch_size is None else max(1, internal_batch_size // rows)
        totals: list[Tensor] = []
        for first in range(0, n_steps, at_once):
            part = slice(first, first + at_once)
            part_sums = self._sum(tensors, starts, places[part], weights[part], target, additional_forward_args)
            totals = [total + tensor for total, tensor in zip(totals, part_sums, strict=True)] if totals else part_sums
        if self._multiply_by_inputs:
            totals = [total * (tensor - start) for total, tensor, start in zip(totals, tensors, starts, strict=True)]
        return self._with_delta(
            *(like(inputs, totals), totals, baselines, inputs, target, additional_forward_args),
            return_delta=return_convergence_delta,
        )

    def _sum(
        self,
        inputs: tuple[Tensor, ...],
        starts: tuple[Tensor | float, ...],
        places: np.ndarray,
        weights: np.ndarray,
        target: Target,
        additional_forward_args: Any,
    ) -> list[Tensor]:
        """Returns the gradients at some places, weighed and added up."""
        steps = len(places)
        more = repeated_further(further(additional_forward_args), steps)
        gradients = self._gradients(path_points(inputs, starts, places), repeated(target, steps), more)
        return [weighted_sum(gradient, weights) for gradient in gradients]

    def has_convergence_delta(self) -> bool:
        return True


def weighted_sum(gradient: Tensor, weights: np.ndarray) -> Tensor:
    """Returns gradients at some places, `[places * N, ...]`, weighed and added up, `[N, ...]`."""
    by_place = gradient.unflatten(0, (len(weights), -1))
    return (by_place * gradient.new_tensor(weights).view(-1, *[1] * gradient.dim())).sum(0)
