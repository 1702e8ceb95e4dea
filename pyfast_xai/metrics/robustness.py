"""Robustness: how far attributions move when images hardly do."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.checks import check_classes
from pyfast_xai.metrics.explain import Explain, classes_of, maps_of
from pyfast_xai.metrics.scorer import Scorer


def max_sensitivity(
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Tensor:
    """Measures how far an attribution moves when the image hardly does (max-sensitivity, Yeh et al., 2019).

    The largest distance over random perturbations, as a share of the length of the attribution, as in Captum's
    `sensitivity_max`.

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        target: an int for all, or one an image; None leaves the choice to the explainer, at each call.
        radius: radius of the perturbation of each number, in units of the images.
        samples: perturbations; they are the same for all images.
        seed: seed of the perturbations.

    Returns:
        float32 `[N]`; where an attribution is zero the distance itself.

    Raises:
        InputError: a target that does not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> metrics.max_sensitivity(Saliency(demo.load()), torch.rand(2, 3, 96, 96), target=3, samples=2).shape
        torch.Size([2])
    """
    moves = _moves(explain, images, target, radius, samples, seed)
    return torch.stack(list(_shares(moves))).amax(0)


def average_sensitivity(
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Tensor:
    """Measures how far an attribution moves on average when the image hardly does (Yeh et al., 2019; Quantus).

    It is `max_sensitivity` with the mean over perturbations in place of the maximum.

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        target: an int for all, or one an image; None leaves the choice to the explainer, at each call.
        radius: radius of the perturbation of each number, in units of the images.
        samples: perturbations; they are the same for all images.
        seed: seed of the perturbations.

    Returns:
        float32 `[N]`; where an attribution is zero the distance itself.

    Raises:
        InputError: a target that does not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> metrics.average_sensitivity(Saliency(demo.load()), torch.rand(2, 3, 96, 96), target=3, samples=2).shape
        torch.Size([2])
    """
    moves = _moves(explain, images, target, radius, samples, seed)
    return torch.stack(list(_shares(moves))).mean(0)


def local_lipschitz(
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Tensor:
    """Measures the largest distance of attributions over that of the images (Alvarez-Melis and Jaakkola, 2018).

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        target: an int for all, or one an image; None leaves the choice to the explainer, at each call.
        radius: radius of the perturbation of each number, in units of the images.
        samples: perturbations; they are the same for all images.
        seed: seed of the perturbations.

    Returns:
        float32 `[N]`, both distances being Euclidean; low is stable.

    Raises:
        InputError: a target that does not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> metrics.local_lipschitz(Saliency(demo.load()), torch.rand(2, 3, 96, 96), target=3, samples=2).shape
        torch.Size([2])
    """
    moves = _moves(explain, images, target, radius, samples, seed)
    return torch.stack([_length(after - before) / _length(moved - images) for before, after, moved in moves]).amax(0)


def relative_stability(
    model: nn.Module,
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    beside: Literal["input", "output"] = "input",
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    least: float = 1e-6,
) -> Tensor:
    """Measures the largest relative move of attributions over that of the input or output (Agarwal et al., 2022).

    Differences of attributions, and of images, are divided number by number by what was there. Of the output the plain
    difference of the logits counts. Perturbations that change the predicted class do not count.

    Args:
        model: in evaluation mode.
        explain: the method.
        images: `[N, C, H, W]`.
        target: an int for all, or one an image; None for the class with the largest output of the image.
        beside: "input" (RIS) or "output" (ROS).
        radius: radius of the perturbation of each number, in units of the images.
        samples: perturbations; they are the same for all images.
        seed: seed of the perturbations.
        least: stands for numbers that are 0 in a denominator.

    Returns:
        float32 `[N]`, low is stable; NaN where every perturbation changes the class.

    Raises:
        InputError: images or a target that do not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.relative_stability(model, Saliency(model), images, samples=2).shape
        torch.Size([2])
    """
    if beside not in ("input", "output"):
        raise InputError(f"beside must be 'input' or 'output', got {beside!r}")
    scorer = Scorer(model, images, target)
    predicted = scorer.columns.argmax(1)
    changes = []
    for before, after, moved in _moves(explain, images, scorer.target, radius, samples, seed):
        logits = scorer.outputs(moved)
        by = _relative(images.detach(), moved, least) if beside == "input" else _length(logits - scorer.columns)
        by = torch.where(by > 0, by, least)
        changes.append(torch.where(logits.argmax(1) == predicted, _relative(before, after, least) / by, -torch.inf))
    largest = torch.stack(changes).amax(0).float()
    return torch.where(largest == -torch.inf, torch.nan, largest)


def continuity(
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    steps: int = 28,
    baseline: float = 0.0,
) -> Tensor:
    """Measures the largest change of a map over that of the image while the image is shifted (Montavon et al., 2018).

    The image moves sideways from -W to W pixels in so many steps. The change of the map is the sum of the magnitudes,
    that of the image Euclidean, as in Quantus. A method that follows the object does not get 0 but a small value.

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        target: an int for all, or one an image; None leaves the choice to the explainer, at each call.
        steps: shifts.
        baseline: what comes in at the side.

    Returns:
        float32 `[N]`, low is continuous. Attributions are stretched to a largest magnitude of 1.

    Raises:
        InputError: a target that does not fit, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> metrics.continuity(Saliency(demo.load()), torch.rand(2, 3, 96, 96), target=3, steps=2).shape
        torch.Size([2])
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    classes, images = classes_of(target, images), images.detach()
    width = images.shape[-1]
    before = _stretched(maps_of(explain(images, classes), images, signed=True))
    largest = before.new_zeros(len(images))
    for step in range(1, steps + 1):
        shift = -width + step * ((2 * width + 1) // steps)
        moved = torch.full_like(images, baseline)
        if abs(shift) < width:
            destination, source = (
                slice(max(shift, 0), width + min(shift, 0)),
                slice(max(-shift, 0), width + min(-shift, 0)),
            )
            moved[..., destination] = images[..., source]
        after = _stretched(maps_of(explain(moved, classes), images, signed=True))
        largest = torch.maximum(largest, (after - before).abs().sum(1) / (_length(moved - images) + 1e-9))
    return largest


def consistency(attributions: Tensor, predicted: Tensor) -> Tensor:
    """Returns, for each image, how many of those with the same explanation have the same class (Dasgupta et al., 2022).

    Explanations are the same where the signs of all attributions are.

    Args:
        attributions: `[N, ...]`.
        predicted: classes, int64 `[N]`.

    Returns:
        float32 `[N]`, in 0..1; 0 where no other image has the same explanation.

    Raises:
        InputError: not one class for each.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.consistency(torch.tensor([[1.0, -1.0], [2.0, -3.0], [1.0, 1.0]]), torch.tensor([4, 4, 5]))
        tensor([1., 1., 0.])
    """
    signs = attributions.detach().flatten(1).sign().unique(dim=0, return_inverse=True)[1]
    return _agreement(signs[:, None] == signs, predicted)


def sufficiency(attributions: Tensor, predicted: Tensor, *, threshold: float = 0.6) -> Tensor:
    """Returns, for each image, how many of those with a similar explanation have its class (Dasgupta et al., 2022).

    Args:
        attributions: `[N, ...]`.
        predicted: classes, int64 `[N]`.
        threshold: explanations are similar up to this Euclidean distance, every feature in units of its standard
            deviation over the images, as a share of the largest distance.

    Returns:
        float32 `[N]`, in 0..1; 0 where no other image has a similar explanation.

    Raises:
        InputError: not one class for each.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.sufficiency(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([4, 4, 5]))
        tensor([1., 1., 0.])
    """
    flat = attributions.detach().flatten(1).double()
    spread = flat.std(0)
    flat = flat / torch.where(spread > 0, spread, 1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return _agreement(distances <= threshold * distances.amax(), predicted)


def _agreement(alike: Tensor, predicted: Tensor) -> Tensor:
    classes = check_classes(predicted, len(alike), "predicted").to(alike.device)
    alike = alike & ~torch.eye(len(alike), dtype=torch.bool, device=alike.device)
    agree = alike & (classes[:, None] == classes)
    return agree.sum(1) / alike.sum(1).clamp_min(1)


def _moves(
    explain: Explain, images: Tensor, target: Target, radius: float, samples: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields attributions of the images and of perturbed ones, both `[N, P]`, and these."""
    if radius <= 0 or samples < 1:
        raise InputError(f"radius and samples must be positive, got {radius} and {samples}")
    classes, images = classes_of(target, images), images.detach()
    before = maps_of(explain(images, classes), images, signed=True).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        noise = (2 * torch.rand(1, *images.shape[1:], generator=generator) - 1) * radius
        moved = images + noise.to(images)
        yield before, maps_of(explain(moved, classes), images, signed=True).flatten(1), moved


def _shares(moves: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yields the distance of each perturbed attribution as a share of the length of the attribution, `[N]`."""
    for before, after, _ in moves:
        length = _length(before)
        yield _length(after - before) / torch.where(length > 0, length, 1)


def _relative(before: Tensor, after: Tensor, least: float) -> Tensor:
    """Returns the length of the difference, number by number as a share of what was there, `[N]`."""
    return _length((before - after) / torch.where(before == 0, least, before))


def _length(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def _stretched(attributions: Tensor) -> Tensor:
    flat = attributions.flatten(1).abs()
    largest = flat.amax(1, keepdim=True)
    return flat / torch.where(largest > 0, largest, 1)
