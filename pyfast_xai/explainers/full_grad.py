"""FullGrad (Srinivas and Fleuret, 2019): what the input and every bias add to a score."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.axes import axes_of, layout_of, space_of
from pyfast_xai.explainers.common.explainer import Explainer, Settings
from pyfast_xai.explainers.common.layer_explainer import resized
from pyfast_xai.explainers.common.output_gradients import output_gradients
from pyfast_xai.explainers.common.targets import Goal
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument

_LAYERS = {f"aten::conv{rank}d" for rank in (1, 2, 3)} | {"aten::convolution", "aten::_convolution", "aten::linear"}
_LAYERS |= {f"aten::conv_transpose{rank}d" for rank in (1, 2, 3)}
_NORMS = {"aten::batch_norm", "aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training"}

# Below so many units of rounding of the largest magnitude of any layer, a map is rounding alone: as that of a layer
# whose length is divided out, or of the keys of attention to one token.
ROUNDING = 64


class FullGrad(Explainer):
    """FullGrad: the input times its gradient, and every bias times its own, in one map (Srinivas and Fleuret, 2019).

    Where all nonlinearities are piecewise linear the score is `x . df/dx + sum_l b_l . df/dz_l` (Eq. 3), with b_l the
    bias of a convolution, a linear layer or a batch norm and z_l what that layer returns. The map is (Eq. 6)

        psi(x * df/dx) + sum_l psi(b_l * df/dz_l)

    over the layers that hold a map of the image, with psi the magnitude, scaled to [0, 1] over a layer as a whole,
    summed over channels and brought to the size of the image with aligned corners, as in the authors' code. A layer
    whose map is rounding alone is left out, where theirs scales it to [0, 1]. All gradients come from one walk.

    Args:
        model: in evaluation mode.
        **settings: those of `Explainer`.

    Example:
        >>> import torch
        >>> from pyfast_xai import FullGrad
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> FullGrad(net)(torch.randn(2, 3, 8, 8), [[0, 1], [2, 3]]).heatmap.shape
        torch.Size([4, 8, 8])
    """

    method = "full-grad"
    paper = "Full-gradient representation for neural network visualization (Srinivas and Fleuret, 2019)"
    ranks = (3, 4, 5)
    folds = False  # a layer that is folded into another is none of its own any more

    def __init__(self, model: nn.Module, **settings: Unpack[Settings]) -> None:
        super().__init__(model, **settings)
        self.policy = GradientRules(warned=self.warned)

    def _explain(self, images: Tensor, target: Goal, args: Any, kwargs: Any) -> Explanation:
        tape = self.record(images, *args, policy=self.policy, **kwargs)
        seeds = output_gradients(tape, target, self.outputs, self.labels)
        axes, space = axes_of(tape), space_of(tape.inputs[0])
        layers = biased(tape)
        shown = [(value, bias, layout) for value, bias in layers if (layout := layout_of(axes.get(value, ()), space))]
        values = [tape.inputs[0], *(value for value, _, _ in shown)]
        gradients = backward_pass(self.policy, tape, seeds.grads, values)
        size = images.shape[2:]
        maps = [at_least_float32(gradients[0] * images).abs().flatten(0, 1)]
        for (_, bias, layout), gradient in zip(shown, gradients[1:], strict=True):
            cells = at_least_float32(layout.cells(gradient.flatten(0, 1)))  # [K * N, h, w, C]
            maps.append((cells * at_least_float32(bias)).abs().movedim(-1, 1))
        largest = torch.stack([layer_maps.flatten(1).amax(1) for layer_maps in maps]).amax(0)
        flat = ROUNDING * torch.finfo(maps[0].dtype).eps * largest
        heat: Any = 0
        for layer_maps in maps:
            one = _scaled(layer_maps, flat).sum(1, keepdim=True)
            heat = heat + resized(one, size, align_corners=True)[:, 0]
        heat = heat.unflatten(0, gradients[0].shape[:2])
        return Explanation(**self._fields(images, seeds), heatmap=targets_to_rows(heat).float())


def biased(tape: Tape) -> list[tuple[Value, Tensor]]:
    """Returns the result and the bias of each layer with a bias, one number a channel.

    A batch norm adds `beta - gamma mean / sqrt(variance + epsilon)`.
    """
    layers = []
    for node in tape:
        bias = _bias(node)
        if bias is not None and node.outputs[0] is not None:
            layers.append((node.outputs[0], bias.detach()))
    return layers


def _bias(node: Node) -> Tensor | None:
    name = key(node.op)
    if name in _LAYERS:
        bias = argument(node, "bias")
        return bias if isinstance(bias, Tensor) else None
    if name not in _NORMS:
        return None
    mean, variance, epsilon = (argument(node, part) for part in ("running_mean", "running_var", "eps"))
    weight, bias = argument(node, "weight"), argument(node, "bias")
    shift = -mean / (variance + epsilon).sqrt()
    shift = shift if weight is None else shift * weight
    return shift if bias is None else shift + bias


def _scaled(maps: Tensor, flat: Tensor) -> Tensor:
    """Returns maps `[R, C, h, w]`, each row from 0 to 1 over its numbers; a row that spans `flat [R]` is zero."""
    every = tuple(range(1, maps.dim()))
    low = maps.amin(every, keepdim=True)
    span = maps.amax(every, keepdim=True) - low
    return torch.where(span > flat.view(-1, *[1] * len(every)), (maps - low) / span, 0)
