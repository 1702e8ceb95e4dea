"""Finer-CAM (Zhang et al., 2025): what tells a class from those that are nearest to it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.cam import GradCAM, GradCAMSettings
from pyfast_xai.explainers.common.cam_rules import RULES, CamRule
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.layer_explainer import LayerName
from pyfast_xai.explainers.common.output_gradients import OutputGradients, one_hot
from pyfast_xai.explainers.common.targets import class_columns, logits_of
from pyfast_xai.tape import Tape, Value


class FinerCAM(GradCAM):
    """Finer-CAM: the map of a class less that of the classes with the nearest scores (Zhang et al., 2025).

    The map is that of `y_c - gamma mean_d y_d` over the `n_rivals` classes d whose outputs are nearest to y_c. All
    targets of an image share the walk.

    Args:
        model: in evaluation mode; a classifier of two classes or more.
        layer: see `GradCAM`.
        base: the method whose map it is, a name of the table of rules such as "grad-cam" or "layer-cam".
        gamma: how much of the others is taken off.
        n_rivals: how many classes a class is compared with, as far as there are.
        **settings: those of `GradCAM`.

    Raises:
        InputError: a setting that does not exist or is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import FinerCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> FinerCAM(net, layer="1", n_rivals=2)(torch.randn(2, 3, 8, 8), target=[0, 4]).target.tolist()
        [0, 4]
    """

    method = "finer-cam"
    paper = "Finer-CAM: spotting the difference reveals finer details for visual explanation (Zhang et al., 2025)"
    takes_functions = takes_gradients = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        base: CamRule = "grad-cam",
        gamma: float = 0.6,
        n_rivals: int = 3,
        **settings: Unpack[GradCAMSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.rule = RULES[one_of("base", base, RULES)]
        if not 0 <= gamma < float("inf"):
            raise InputError(f"gamma must be finite and not negative, got {gamma}")
        self.share, self.n_rivals = gamma, at_least(1, "n_rivals", n_rivals)

    def _starts(self, tape: Tape, seeds: OutputGradients) -> Mapping[Value, Tensor]:
        value, logits = logits_of(tape)
        assert seeds.target is not None
        rivals = nearest_classes(class_columns(logits), seeds.target, self.n_rivals)  # [N, K, R]
        others = [one_hot(classes, logits) for classes in rivals.unbind(2)]
        return {value: seeds.grads[value] - self.share * torch.stack(others).mean(0)}


def nearest_classes(outputs: Tensor, target: Tensor, count: int) -> Tensor:
    """Returns the classes whose outputs are nearest to those of some classes, the nearest first.

    Args:
        outputs: `[N, classes]`.
        target: int64 `[N, K]`.
        count: how many, as far as there are others.

    Returns:
        int64 `[N, K, R]`.

    Raises:
        InputError: there is a single class.
    """
    classes = outputs.shape[1]
    if classes < 2:
        raise InputError(f"model must have two classes or more to compare them, got {classes}")
    output = outputs.gather(1, target)
    distance = (outputs[:, None] - output[..., None]).abs().scatter(2, target[..., None], torch.inf)
    return distance.topk(min(count, classes - 1), dim=2, largest=False).indices
