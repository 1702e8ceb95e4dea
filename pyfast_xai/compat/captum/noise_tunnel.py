"""SmoothGrad and its kind: the attributions of noisy copies of the input, averaged."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfast_xai.compat.captum.arguments import (
    Inputs,
    as_tuple,
    baselines_for,
    further,
    refuse,
    repeated,
    repeated_further,
)
from pyfast_xai.compat.captum.attribution import Attribution

KINDS = ("smoothgrad", "smoothgrad_sq", "vargrad")


class NoiseTunnel(Attribution):
    """Attributions over noisy copies of the input: their mean (Smilkov et al., 2017), mean square or variance.

    Args:
        attribution_method: any method of this module.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import NoiseTunnel, Saliency
        >>> smooth = NoiseTunnel(Saliency(demo.load()))
        >>> smooth.attribute(torch.rand(2, 3, 96, 96), nt_samples=4, stdevs=0.1, target=3).shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(self, attribution_method: Attribution) -> None:
        self.attribution_method = attribution_method
        super().__init__(attribution_method.forward_func)

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.attribution_method.multiplies_by_inputs

    def has_convergence_delta(self) -> bool:
        return self.attribution_method.has_convergence_delta()

    def attribute(
        self,
        inputs: Inputs,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Attributes the output to the inputs.

        The noise is drawn from PyTorch's global generator, as Captum draws it.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them.
            nt_type: "smoothgrad", "smoothgrad_sq" or "vargrad".
            nt_samples: noisy copies of each row.
            nt_samples_batch_size: copies of each row that go through the method at once; None for all.
            stdevs: standard deviations of the noise, one for all inputs or one each.
            draw_baseline_from_distrib: draw a row of the baselines for every copy.
            **kwargs: keyword arguments of the method: `target`, `baselines`, `additional_forward_args` and others.

        Returns:
            What the method returns; with `return_convergence_delta`, a pair with a delta for each copy.

        Raises:
            InputError: arguments that do not fit.
        """
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        if nt_type not in KINDS:
            refuse(f"nt_type must be one of {', '.join(map(repr, KINDS))}, got {nt_type!r}")
        if nt_samples < 1:
            refuse(f"nt_samples must be at least 1, got {nt_samples}")
        spread = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(tensors)
        if len(spread) != len(tensors) or not all(isinstance(one, (int, float)) for one in spread):
            refuse(f"stdevs must be a number, or one for each of {len(tensors)} inputs, got {stdevs!r}")
        returns_delta = bool(kwargs.get("return_convergence_delta")) and self.has_convergence_delta()
        at_once = min(nt_samples_batch_size or nt_samples, nt_samples)
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        deltas = []
        in_tuple = isinstance(inputs, tuple)
        with torch.no_grad():
            for first in range(0, nt_samples, at_once):
                times = min(at_once, nt_samples - first)
                # In the order in which Captum draws: the first batch's baselines, noise, and so on.
                settings = _expanded(kwargs, tensors, times, draw_baseline_from_distrib)
                noisy = tuple(_noisy(tensor, one, times) for tensor, one in zip(tensors, spread, strict=True))
                answer = self.attribution_method.attribute(noisy if in_tuple else noisy[0], **settings)
                if returns_delta:
                    answer, delta = answer
                    deltas.append(delta)
                is_tuple = isinstance(answer, tuple)
                parts = [tensor.unflatten(0, (-1, times)) for tensor in (answer if is_tuple else (answer,))]
                sums = _added(sums, [tensor.sum(1) for tensor in parts])
                squares = _added(squares, [tensor.square().sum(1) for tensor in parts])
            means = [tensor / nt_samples for tensor in sums]
            if nt_type != "smoothgrad":
                means = [
                    square / nt_samples - (mean.square() if nt_type == "vargrad" else 0)
                    for mean, square in zip(means, squares, strict=True)
                ]
        result = tuple(means) if is_tuple else means[0]
        return (result, torch.cat(deltas)) if returns_delta else result


def _added(totals: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [total + tensor for total, tensor in zip(totals, more, strict=True)] if totals else more


def _noisy(tensor: Tensor, spread: float, times: int) -> Tensor:
    copies = tensor.repeat_interleave(times, 0)
    return copies + torch.normal(0.0, torch.full(copies.shape, float(spread), device=tensor.device))


def _expanded(kwargs: dict[str, Any], inputs: tuple[Tensor, ...], times: int, draw: bool) -> dict[str, Any]:
    """Returns the settings of the method for a batch that holds every row several times."""
    settings = dict(kwargs)
    if kwargs.get("additional_forward_args") is not None:
        settings["additional_forward_args"] = repeated_further(
            further(kwargs["additional_forward_args"]), times, each=True
        )
    if "target" in kwargs:
        settings["target"] = repeated(kwargs["target"], times, each=True)
    if kwargs.get("feature_mask") is not None:
        masks = tuple(
            mask.repeat_interleave(times, 0) if mask.dim() == tensor.dim() and len(mask) == len(tensor) > 1 else mask
            for mask, tensor in zip(as_tuple(kwargs["feature_mask"]), inputs, strict=True)
        )
        settings["feature_mask"] = masks if isinstance(kwargs["feature_mask"], tuple) else masks[0]
    if kwargs.get("baselines") is None:
        return settings
    if draw:
        baselines = kwargs["baselines"] if isinstance(kwargs["baselines"], tuple) else (kwargs["baselines"],)
        settings["baselines"] = tuple(_drawn(one, len(inputs[0]) * times) for one in baselines)
    else:
        settings["baselines"] = tuple(
            one.repeat_interleave(times, 0) if isinstance(one, Tensor) and len(one) == len(tensor) > 1 else one
            for one, tensor in zip(baselines_for(kwargs["baselines"], inputs), inputs, strict=True)
        )
    return settings


def _drawn(baseline: Any, count: int) -> Any:
    if not isinstance(baseline, Tensor):
        return baseline
    return baseline[torch.from_numpy(np.random.choice(len(baseline), count))]
