"""FullGrad with the numbers of pytorch-grad-cam, in which every channel weighs the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_xai.compat.grad_cam.cams import BaseCAM, Targets
from pyfast_xai.compat.grad_cam.find_layers import find_layer_predicate_recursive
from pyfast_xai.compat.grad_cam.pictures import scaled
from pyfast_xai.compat.grad_cam.projection import Sign, project
from pyfast_xai.compat.grad_cam.rows import rows_of
from pyfast_xai.compat.recording import evaluating
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.layer_explainer import resized
from pyfast_xai.explainers.common.output_gradients import output_gradients
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.tape import record
from pyfast_xai.tape.module_hooks import modules_of, unwrap


class FullGrad(BaseCAM):
    """The shares of the input and every bias in a score (Srinivas and Fleuret, 2019), each channel scaled by itself.

    The biases are those of convolutions and batch norms that are exactly of these types. `pyfast_xai.FullGrad` has the
    numbers of the paper, in which the channels of a layer keep their sizes, and every bias there is.

    Args:
        model: see `BaseCAM`.
        target_layers: without effect, as there.
        reshape_transform: without effect.
        sign: see `BaseCAM`.

    Raises:
        InputError: no layer has a bias.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.grad_cam import FullGrad
        >>> FullGrad(demo.load(), [])(torch.rand(2, 3, 96, 96)).shape
        (2, 96, 96)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[..., Tensor] | None = None,
        *,
        sign: Sign = "fixed",
    ) -> None:
        layers = find_layer_predicate_recursive(model, _has_bias)
        if not layers:
            raise InputError("model must have a Conv2d or BatchNorm2d with a bias for FullGrad, got none")
        super().__init__(model, layers, reshape_transform, compute_input_gradient=True, sign=sign)
        self.bias_data = [_bias(layer) for layer in layers]

    def _maps(self, images: Tensor, targets: Targets, eigen_smooth: bool) -> Tensor:
        images = images.detach().to(self.bias_data[0].device)
        model, policy = unwrap(self.model), GradientRules()
        paths = modules_of(model)
        with evaluating(model):
            tape = record(model, images, policy=policy)
        self.outputs = tape.result
        chosen = self._targets(targets)
        assert chosen is not None

        def score(output: Any) -> Tensor:
            return torch.cat([target(row).flatten() for target, row in zip(chosen, rows_of(output), strict=True)])

        biased = [
            (value, bias)
            for layer, bias in zip(self.target_layers, self.bias_data, strict=True)
            for (value, *_) in tape.modules.get(paths[layer], [])
        ]
        seeds = output_gradients(tape, score)
        values = [tape.inputs[0], *(value for value, _ in biased)]
        at_input, *gradients = backward_pass(policy, tape, seeds.grads, values)
        products = [(at_input[0] * images).abs()]
        products += [
            (gradient[0] * bias[:, None, None]).abs() for gradient, (_, bias) in zip(gradients, biased, strict=True)
        ]
        size = images.shape[2:]
        # Each channel is scaled by itself. As resizing is linear, one resize serves all channels of a layer.
        at_pixels = [scaled(product.flatten(0, 1)).unflatten(0, product.shape[:2]) for product in products]
        maps = [at_pixels[0], *(resized(product.sum(1, keepdim=True), size) for product in at_pixels[1:])]
        stacked = torch.cat(maps, 1)
        if not eigen_smooth:
            return scaled(stacked.sum(1))
        small = scaled(stacked.flatten(0, 1), [side // 8 for side in size]).unflatten(0, stacked.shape[:2])
        return scaled(scaled(project(small, self.sign), size))


def _has_bias(layer: nn.Module) -> bool:
    return type(layer) in (nn.Conv2d, nn.BatchNorm2d) and layer.bias is not None


def _bias(layer: Any) -> Tensor:
    """Returns the bias that a layer adds to each channel."""
    if isinstance(layer, nn.Conv2d):
        assert layer.bias is not None
        return layer.bias.detach()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    shift = layer.bias - layer.running_mean * layer.weight / (layer.running_var + layer.eps).sqrt()
    return shift.detach()
