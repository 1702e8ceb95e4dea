"""Adversarial examples, and explanations of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.explain import Explain, classes_of, maps_of
from pyfast_xai.metrics.scorer import Scorer
from pyfast_xai.metrics.similarity import check_similarities, compared


def fgsm(model: nn.Module, images: Tensor, target: Target = None, *, epsilon: float, toward: bool = False) -> Tensor:
    """Computes adversarial examples by one step along the sign of the gradient (Goodfellow et al., 2015).

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`.
        target: the class to lead away from: None for the one with the largest output, an int for all, or one an image.
        epsilon: how far each number moves, in units of the images.
        toward: lead towards the target instead.

    Returns:
        Images of the shape of those given.

    Raises:
        InputError: images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> images = torch.rand(2, 3, 96, 96)
        >>> adversarial = metrics.fgsm(demo.load(), images, target=3, epsilon=0.01)
        >>> float((adversarial - images).abs().max()) < 0.0101
        True
    """
    scorer = Scorer(model, images, target)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        assert scorer.targets.kinds is not None
        likelihood = scorer.targets.kinds.log_scores(scorer.logits(model(leaf.clone())))
        loss = functional.nll_loss(likelihood, scorer.target.clone(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return images.detach() + (-epsilon if toward else epsilon) * gradient.sign()


def deepfool(
    model: nn.Module, images: Tensor, *, candidates: int = 10, overshoot: float = 0.02, iterations: int = 50
) -> Tensor:
    """Computes nearby adversarial examples: steps to the nearest linearised border (Moosavi-Dezfooli et al., 2016).

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`.
        candidates: classes with the largest outputs whose borders are looked at, the predicted one among them.
        overshoot: by which the perturbation is scaled to cross the border.
        iterations: at most; an image that still keeps its class is returned as it is after them.

    Returns:
        Images of the shape of those given.

    Raises:
        InputError: images that do not fit, or a number that is too small.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo, metrics
        >>> model, images = demo.load(), torch.rand(1, 3, 96, 96)
        >>> adversarial = metrics.deepfool(model, images, candidates=3)
        >>> bool((model(adversarial).argmax(1) != model(images).argmax(1)).all())
        True
    """
    if candidates < 2 or iterations < 1:
        raise InputError(f"candidates must be at least 2 and iterations 1, got {candidates} and {iterations}")
    scorer = Scorer(model, images)
    count = scorer.columns.shape[1]
    if count < 2:
        raise InputError(f"model must tell at least two classes apart, got {count}")
    classes = scorer.columns.topk(min(candidates, count), 1).indices
    images = images.detach()
    moved = images.clone()
    rows = torch.arange(len(images), device=images.device)
    for _ in range(iterations):
        outputs, slopes = _slopes(model, scorer, moved[rows], classes[rows])
        held = outputs.argmax(1) == classes[rows, 0]
        rows, outputs, slopes = rows[held], outputs[held].gather(1, classes[rows[held]]), slopes[:, held]
        if not len(rows):
            break
        gap, normal = outputs[:, :1] - outputs[:, 1:], slopes[1:] - slopes[:1]
        length = normal.flatten(2).norm(dim=2).T.clamp_min(torch.finfo(normal.dtype).tiny)
        nearest = (gap / length).argmin(1)
        row = torch.arange(len(rows), device=images.device)
        # A little more than to the border, on which the outputs are equal.
        step = (gap[row, nearest] + 1e-4) / length[row, nearest] ** 2
        total = (moved[rows] - images[rows]) / (1 + overshoot) + step.view(-1, 1, 1, 1) * normal[nearest, row]
        moved[rows] = (images[rows] + (1 + overshoot) * total).to(images.dtype)
    return moved


def _slopes(model: nn.Module, scorer: Scorer, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns outputs `[M, classes]`, and gradients `[K, M, C, H, W]` of those of K classes of each image `[M, K]`."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.clone().requires_grad_()
        outputs = scorer.logits(model(leaf.clone())).float()
        sums = outputs.gather(1, classes.clone()).sum(0)
        slopes = [torch.autograd.grad(one, leaf, retain_graph=True)[0].float() for one in sums]
    return outputs.detach(), torch.stack(slopes)


def adversarial_stability(
    explain: Explain,
    images: Tensor,
    adversarial: Tensor,
    target: Target = None,
    *,
    similarities: Sequence[str] = ("rank", "ssim", "cosine"),
) -> dict[str, Tensor]:
    """Returns the similarity between the heat maps of images and of their adversarial examples.

    Nie et al. (2018, section 4.4) find that guided backprop and DeconvNet hardly change although the class does: there
    stability is a fault. For one and the same class it is a merit.

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        adversarial: their adversarial examples, for example by `fgsm` or `deepfool`.
        target: None for what the explainer takes of each, an int for all, or one an image.
        similarities: "rank" (Spearman), "ssim" (of maps stretched to 0..1) and "cosine".

    Returns:
        Similarity of each measure, float32 `[N]`.

    Raises:
        InputError: images of other shapes, a measure that does not exist, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> adversarial = metrics.fgsm(model, images, epsilon=0.01)
        >>> sorted(metrics.adversarial_stability(Saliency(model), images, adversarial))
        ['cosine', 'rank', 'ssim']
    """
    check_similarities(similarities)
    if images.shape != adversarial.shape:
        raise InputError(f"adversarial must have shape {list(images.shape)}, got {list(adversarial.shape)}")
    classes = classes_of(target, images)
    before, after = (maps_of(explain(x, classes), x) for x in (images, adversarial))
    return compared(before, after, similarities)


class AdversarialEvidence(NamedTuple):
    """The images that could be made to show a class that is not in them.

    Attributes:
        generated: whether the model sees the class in the result, bool `[N]`; its mean is the rate, 0 is best.
        target: the class, int64 `[N]`.

    Example:
        >>> import torch
        >>> from pyfast_xai import FGVis, demo, metrics
        >>> model = demo.load()
        >>> generate = FGVis(model, game="generation", sparsity=0, n_iterations=2)
        >>> result = metrics.adversarial_evidence(model, generate, torch.rand(2, 3, 96, 96))
        >>> result.generated.shape, result.target.shape
        (torch.Size([2]), torch.Size([2]))
    """

    generated: Tensor
    target: Tensor


def adversarial_evidence(
    model: nn.Module, generate: Explain, images: Tensor, *, batch_size: int = 64
) -> AdversarialEvidence:
    """Measures whether a method that optimises finds evidence that is not there (FGVis, Table 1).

    The method generates the least likely class of each image, or the second least likely where the former is
    what the model sees in the zero image. The paper takes images of which the model is sure, and no sparsity.

    Args:
        model: in evaluation mode.
        generate: function of images and classes that returns what is to be shown to the model: a tensor like the
            images, or an explanation with `perturbed`, as `FGVis(model, game="generation", sparsity=0)` does.
        images: `[N, C, H, W]`.
        batch_size: images the model is given at once.

    Raises:
        InputError: images that do not fit, or a result of another shape.

    Example:
        >>> import torch
        >>> from pyfast_xai import FGVis, demo, metrics
        >>> model = demo.load()
        >>> generate = FGVis(model, game="generation", sparsity=0, n_iterations=2)
        >>> metrics.adversarial_evidence(model, generate, torch.rand(2, 3, 96, 96)).generated.dtype
        torch.bool
    """
    scorer = Scorer(model, images, None, batch_size)
    if scorer.columns.shape[1] < 2:
        raise InputError(f"model must tell at least two classes apart, got {scorer.columns.shape[1]}")
    least, second = scorer.columns.topk(2, 1, largest=False).indices.unbind(1)
    target = torch.where(least == scorer.outputs(torch.zeros_like(images[:1])).argmax(1), second, least)
    generated: Any = generate(images, target)
    adversarial_images = getattr(generated, "perturbed", generated)
    if not isinstance(adversarial_images, Tensor) or adversarial_images.shape != images.shape:
        received = (
            list(adversarial_images.shape)
            if isinstance(adversarial_images, Tensor)
            else type(adversarial_images).__name__
        )
        raise InputError(f"generate must return images {list(images.shape)}, got {received}")
    return AdversarialEvidence(scorer.outputs(adversarial_images.detach()).argmax(1) == target, target)
