"""Ablation-CAM and Shapley-CAM: what a score loses without a channel, and a second-order account of that."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.channel_ablation import scores_without_channels, share_lost
from pyfast_xai.explainers.common.curvature import gradient_less_half_curvature
from pyfast_xai.explainers.common.explainer import one_of
from pyfast_xai.explainers.common.layer_explainer import LayerName, LayerSettings
from pyfast_xai.explainers.common.perturbation_scores import SCORES, PerturbationScores, Score
from pyfast_xai.explainers.common.suffix_cam import Record, SuffixCAM
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.tape import Tape, Value


class AblationCAM(SuffixCAM):
    """Ablation-CAM: channels weighed by the share of the score that is lost without them (Desai and Ramaswamy, 2020).

    With y the score and y_k the score when channel k is zero, the map is `sum_k w_k A_k` with

        w_k = (y - y_k) / |y|

    where the paper divides by y, which turns the map of a negative score upside down. Where only an average and a
    linear layer follow, all y_k are known from one recorded forward; where another linear layer reads the channels, its
    results are; what depends on them, or on the layer, is replayed, `batch_size` rows at a time. So an image costs
    little more than a forward on a ResNet, and tens of forwards or more where a convolution makes the classes, as in
    SqueezeNet.

    Args:
        model: in evaluation mode.
        layer: a module, its path or the name of an operation; several give the mean of their heat maps; "auto" takes
            the last map of features on which the target depends at every position, of a detector all levels of its
            pyramid.
        score: the "logit" of the class, or its "probability".
        **settings: those of `LayerExplainer`.

    Raises:
        InputError: the model draws random numbers or takes decisions from numbers above the layer, or a setting that
            does not exist.
        UnsupportedOpError: what lies above the layer cannot be replayed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import AblationCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> AblationCAM(net, layer="1")(torch.randn(2, 3, 8, 8), [[0, 1], [2, 3]]).signed_map.shape
        torch.Size([4, 6, 6])
    """

    method = "ablation-cam"
    paper = "Ablation-CAM: visual explanations for deep convolutional network (Desai and Ramaswamy, 2020)"
    default_batch_size = 32
    batch_size: int

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        score: Score = "logit",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.score = one_of("score", score, SCORES)

    def _weights(self, tape: Tape, value: Value, record: Record, scores: PerturbationScores, dim: int) -> Tensor:
        def read(result: Any, rows: Tensor) -> Tensor:
            return scores.read(result, rows, self.score)

        count = value.shape[0]
        before, after = scores_without_channels((tape, value), record, count, dim, self.batch_size, read)
        return share_lost(before, after).permute(2, 1, 0)


class ShapleyCAM(SuffixCAM):
    """Shapley-CAM: channels weighed by the gradient less half of the curvature along the activation (Cai, 2025).

    With g the gradient and H the Hessian of the score at the activation A, the map is `sum_k w_k A_k` with

        w_k = mean_p (g - H A / 2)_kp

    a second-order account of what the score loses without a channel. The score of a class is its residual softmax
    `y_c + log softmax(y)_c`, whose curvature is not zero where that of the logit is. Derivatives go through what
    depends on the layer only.

    All settings are those of `GradCAM`.

    Raises:
        InputError: the model draws random numbers or takes decisions from numbers above the layer.
        UnsupportedOpError: an operation above the layer has no second derivative, as fused attention.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import ShapleyCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> ShapleyCAM(net, layer="1")(torch.randn(2, 3, 8, 8), [[0, 1], [2, 3]]).signed_map.shape
        torch.Size([4, 6, 6])
    """

    method = "shapley-cam"
    paper = "CAMs as Shapley value-based explainers (Cai, 2025)"

    def _weights(self, tape: Tape, value: Value, record: Record, scores: PerturbationScores, dim: int) -> Tensor:
        rows = torch.arange(value.shape[0], device=value.device)

        def residual_softmax(result: Any) -> Tensor:
            if scores.function is not None:
                return scores.numbers(result, rows)
            logits = at_least_float32(scores.logits(result))
            return scores.scores(logits + logits.log_softmax(1), rows, "logit")

        weights = at_least_float32(gradient_less_half_curvature(tape, value, residual_softmax))
        space = [d for d in range(2, weights.dim()) if d != dim + 1]
        return weights.mean(space)
