"""Infidelity (Yeh et al., 2019): the error of attributions as a linear model of what perturbations do to the score."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import Score
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.checks import check_attributions
from pyfast_xai.metrics.perturbation import versions_of
from pyfast_xai.metrics.scorer import Scorer

Perturb = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def infidelity(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    perturb: Perturb | float = 0.003,
    samples: int = 10,
    normalize: bool = False,
    score: Score = "logit",
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures the mean squared error of attributions as predictions of the change of the score (Yeh et al., 2019).

    With perturbations I it is the mean of `(I . attributions - (f(x) - f(x - I)))²`; 0 is best. Perturbations are the
    same for all images and targets, which share the forwards: `samples` an image. Numbers are those of Captum's
    `infidelity` for the same perturbations.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: gradients, or other factors of a change of the input, `[R, C, H, W]`, or `[R, H, W]`
            where all channels of a pixel share its attribution; R is N images times K targets, image by image.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        perturb: standard deviation of Gaussian noise in units of the images; or a function of one image `[C, H, W]` and
            a generator that returns I and the perturbed image, both `[C, H, W]`. For attributions that hold the input
            already (input x gradient) let I be 1 where the image is removed, else 0.
        samples: perturbations.
        normalize: whether attributions are scaled by the factor that fits best, image by image.
        score: "logit" of the class, or its "probability".
        seed: seed of the perturbations.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`.

    Raises:
        InputError: attributions of another size or with NaN, settings, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.infidelity(model, images, Saliency(model)(images).attribution, samples=4).shape
        torch.Size([2])
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    scorer = Scorer(model, images, target, batch_size, outputs, score=score, several=True)
    weights = check_attributions(attributions, images, scorer.each)
    weights = weights if weights.dim() == 4 else weights[:, None].expand(-1, images.shape[1], -1, -1)
    weights = weights.reshape(len(images), scorer.each, -1)
    make = perturb if callable(perturb) else _noise(perturb)
    images = images.detach()
    predicted, actual = [], []
    for rows, versions in versions_of(len(images), samples, batch_size, images.device):
        pairs = [
            make(images[row], torch.Generator().manual_seed(seed * 1_000_003 + version))
            for row, version in zip(rows.tolist(), versions.tolist(), strict=True)
        ]
        changes, changed = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        if changes.shape != (len(rows), *images.shape[1:]) or changed.shape != changes.shape:
            received = f"{list(changes.shape[1:])} and {list(changed.shape[1:])}"
            raise InputError(f"perturb must return two tensors of the shape {list(images.shape[1:])}, got {received}")
        flat = changes.flatten(1).to(weights.dtype)
        predicted.append((weights[rows] @ flat[:, :, None])[..., 0])
        actual.append(scorer.before[rows] - scorer.scores_of(changed.to(images), rows))
    predicted_rows, actual_rows = (
        torch.cat(parts).view(len(images), samples, -1).mT.flatten(0, 1).double() for parts in (predicted, actual)
    )
    if normalize:
        square = predicted_rows.square().sum(1, keepdim=True)
        factor = (predicted_rows * actual_rows).sum(1, keepdim=True) / torch.where(square > 0, square, 1)
        predicted_rows = predicted_rows * factor
    return (predicted_rows - actual_rows).square().mean(1).float()


def _noise(deviation: float) -> Perturb:
    if deviation <= 0:
        raise InputError(f"perturb must be a positive deviation or a function, got {deviation}")

    def noise(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        change = deviation * torch.randn(image.shape, generator=generator).to(image)
        return change, image - change

    return noise
