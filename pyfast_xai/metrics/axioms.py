"""Axioms: properties that attributions should have for every model."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import Score
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.explain import Explain, maps_of
from pyfast_xai.metrics.perturbation import Baseline, Removal, patches
from pyfast_xai.metrics.scorer import Scorer
from pyfast_xai.tape.module_hooks import unwrap


def completeness(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    baseline: Baseline = "zero",
    score: Score = "logit",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures how much the attributions miss the score that they are to explain (Sundararajan et al., 2017).

    The measure is `|sum of the attributions - (f(x) - f(baseline))|`; 0 is complete. It costs one forward. Quantus asks
    whether the two are the same number, which rounding alone denies.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: signed, `[R, H, W]` or `[R, C, H, W]`, R being N images times K targets, image by image.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        baseline: the image that stands for nothing, see `deletion`.
        score: "logit" of the class, or its "probability".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`, in units of the score.

    Raises:
        InputError: attributions of another size or with NaN, or images, a target or a baseline that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import IntegratedGradients, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> attributions = IntegratedGradients(model)(images).attribution
        >>> metrics.completeness(model, images, attributions).shape
        torch.Size([2])
    """
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs)
    all_pixels = removal.values.new_ones(1, removal.values.shape[1]).bool()
    lost = removal.before - removal.shared(all_pixels)[:, 0]
    return (removal.values.double().sum(1) - lost).abs().float()


def non_sensitivity(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    patch: int = 8,
    threshold: float = 1e-5,
    baseline: Baseline = "zero",
    score: Score = "probability",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Counts the features that have an attribution and no effect, or the reverse (Nguyen and Martinez, 2020).

    It is the size of the symmetric difference of the two sets; 0 is best. It costs a forward a feature, which all
    targets of an image share.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: `[R, H, W]` or `[R, C, H, W]`, R being N images times K targets, image by image.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        patch: side in pixels of the squares that are a feature each; with 1, and maps, the features are pixels.
        threshold: threshold of the sum of the magnitudes in a patch, and of the change of the score: what is below is
            none.
        baseline: the values that pixels get, see `deletion`.
        score: "probability" of the class, or its "logit".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        int64 `[R]`.

    Raises:
        InputError: attributions of another size or with NaN, settings, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.non_sensitivity(model, images, GradCAM(model)(images).heatmap, patch=32).shape
        torch.Size([2])
    """
    groups = patches(images, patch)
    removal = Removal(model, images, attributions.abs(), target, baseline, score, batch_size, outputs, groups=groups)
    each_alone = torch.eye(removal.values.shape[1], dtype=torch.bool, device=images.device)
    change = (removal.shared(each_alone) - removal.before[:, None]).abs()
    return ((change < threshold) ^ (removal.values < threshold)).sum(1)


def input_invariance(
    model: nn.Module,
    method: Callable[[nn.Module], Explain],
    images: Tensor,
    target: Target = None,
    *,
    shift: float | Tensor = 1.0,
) -> Tensor:
    """Measures how far attributions move when a constant is added to the images and taken off in the model.

    The two models are the same function, so attributions should be the same (Kindermans et al., 2019): 0 is best. The
    measure is the distance as a share of the length of the attribution. Where the paper and Quantus put the constant
    into the first bias, which is another function at the borders of a padded convolution, a copy of the model here
    subtracts it from its input.

    Args:
        model: in evaluation mode; it stays as it is.
        method: makes an explainer for a model, for example `Saliency`.
        images: `[N, C, H, W]`, as the model takes them.
        target: None for the class with the largest output, an int for all, or one an image.
        shift: what is added, a number or a tensor that broadcasts to the images.

    Returns:
        float32 `[N]`; where an attribution is zero the distance itself.

    Raises:
        InputError: images or a target that do not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> bool((metrics.input_invariance(demo.load(), Saliency, torch.rand(2, 3, 96, 96), 3) < 1e-3).all())
        True
    """
    chosen = Scorer(model, images, target).target
    moved = torch.as_tensor(shift, dtype=images.dtype, device=images.device)
    try:
        moved = moved.expand(images.shape) if moved.dim() else moved
    except RuntimeError:
        raise InputError(f"shift must broadcast to {list(images.shape)}, got {list(moved.shape)}") from None
    if moved.dim() and len(images) > 1 and bool((moved != moved[:1]).any()):
        raise InputError("shift must be the same for all images, got several")
    constant = moved[:1].clone() if moved.dim() else moved.clone()
    before = maps_of(method(model)(images, chosen), images, signed=True).flatten(1)
    shifted = copy.deepcopy(unwrap(model))
    # A hook, and not a module around the model: layers keep their names.
    shifted.register_forward_pre_hook(lambda _, args: (args[0] - constant, *args[1:]))
    after = maps_of(method(shifted)(images.detach() + constant, chosen), images, signed=True).flatten(1)
    length = torch.linalg.vector_norm(before, dim=1)
    return torch.linalg.vector_norm(after - before, dim=1) / torch.where(length > 0, length, 1)
