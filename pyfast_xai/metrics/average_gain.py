"""Average gain (Zhang et al., Opti-CAM, 2024): how much of what a probability can rise by the map alone brings."""

from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.faithfulness import masked_scores


def average_gain(
    model: nn.Module,
    images: Tensor,
    heatmaps: Tensor,
    target: Target = None,
    *,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures the average gain in confidence (Zhang et al., Opti-CAM, 2024, Eq. 12); high is good.

    With p the probability for the image and o that for the image times its map, stretched to 0..1 as for
    `drop_increase`, the gain is `max(0, o - p) / (1 - p)`: the counterpart of the drop, which is `max(0, p - o) / p`.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        heatmaps: `[N, H, W]`.
        target: None for the class with the largest output, an int for all, or one an image.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which scores depend, see `Explainer`.

    Returns:
        The gain of each image, 0 where nothing is gained or nothing was left to gain, float32 `[N]`; its mean is the
        average gain.

    Raises:
        InputError: maps of another size or with NaN, images or a target that do not fit, or outputs that are no
            probabilities.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.average_gain(model, images, GradCAM(model)(images).heatmap).shape
        torch.Size([2])
    """
    before, after = masked_scores(model, images, heatmaps, target, batch_size, outputs)
    outside = before[(before < 0) | (before > 1)]
    if len(outside):
        raise InputError(f"scores must be probabilities for the average gain, got {float(outside[0]):.3g}")
    return ((after - before).clamp_min(0) / (1 - before)).nan_to_num(nan=0.0)
