"""Sanity checks: a map should depend on the class and on what was learned, not on noise.

An explainer is here any function of images `[N, C, H, W]` and classes, int64 `[N]` or None, that returns an
`Explanation` or a tensor with a row an image. The user's model is never changed, and gradients never reach it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.explanation import Explanation
from pyfast_xai.metrics.scorer import Scorer
from pyfast_xai.tape.module_hooks import unwrap

Explain = Callable[[Tensor, Any], Explanation | Tensor]
Similarity = Callable[[Tensor, Tensor], Tensor]


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of the angle between maps of two batches `[N, ...]`, `[N]`; 0 where one is zero.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.cosine_similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.])
    """
    a, b = _flat(a, b)
    return (_unit(a) * _unit(b)).sum(1)


def _unit(values: Tensor) -> Tensor:
    """Returns the rows of `[N, P]` at length 1; one that is zero stays so."""
    # Scaled first: squares of small gradients would vanish.
    largest = values.abs().amax(1, keepdim=True)
    return functional.normalize(values / torch.where(largest > 0, largest, 1), dim=1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Spearman's correlation of the ranks of two batches of maps `[N, ...]`, `[N]`; 0 where one is constant.

    Equal values share the mean of their ranks.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> metrics.rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, 100.0]])).round()
        tensor([1.])
    """
    a, b = _flat(a, b)
    return (_unit(_ranks(a)) * _unit(_ranks(b))).sum(1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in each row of `[N, P]`, around 0 and within -1..1."""
    ordered, order = values.sort(1)
    count = values.shape[1]
    place = torch.arange(count, device=values.device).expand_as(order)
    new = functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 1), value=True)
    first = torch.where(new[:, :-1], place, 0).cummax(1).values
    last = torch.where(new[:, 1:], place, count).flip(1).cummin(1).values.flip(1)
    middle = (first + last - (count - 1)).to(values.dtype) / count
    return torch.zeros_like(values).scatter_(1, order, middle)


def ssim(a: Tensor, b: Tensor, *, data_range: float = 1.0, sigma: float = 1.5) -> Tensor:
    """Returns the structural similarity of two batches of maps `[N, H, W]`, `[N]` (Wang et al., 2004, Eq. 13).

    Means and variances are those of a Gaussian window of 11 pixels for `sigma` 1.5, taken where it lies within the map.

    Args:
        a: maps.
        b: maps to compare with them.
        data_range: between the least and the largest possible value.
        sigma: of the window, in pixels.

    Raises:
        InputError: other shapes, NaN, or maps smaller than the window.

    Example:
        >>> import torch
        >>> from pyfast_xai import metrics
        >>> maps = torch.rand(2, 32, 32)
        >>> metrics.ssim(maps, maps)
        tensor([1., 1.])
    """
    reach = int(3.5 * sigma + 0.5)
    if a.shape != b.shape or a.dim() != 3:
        raise InputError(f"a and b must both have shape [N, H, W], got {list(a.shape)} and {list(b.shape)}")
    if min(a.shape[1:]) < 2 * reach + 1:
        least = 2 * reach + 1
        raise InputError(f"a and b must be at least {least} x {least} for sigma {sigma}, got {list(a.shape[1:])}")
    x, y = (flat.view(a.shape) for flat in _flat(a, b))
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (taps / sigma) ** 2)
    window = window / window.sum()
    # Variances are differences of squares: around zero they lose the fewest digits.
    center = (x + y).mean((1, 2), keepdim=True) / 2
    x, y = x - center, y - center
    stack = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    stack = functional.conv2d(functional.conv2d(stack, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = stack.view(5, len(a), *stack.shape[2:]).unbind(0)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    structure = (2 * (xy - mx * my) + c2) / ((xx - mx * mx) + (yy - my * my) + c2)
    mx, my = mx + center, my + center
    return ((2 * mx * my + c1) / (mx * mx + my * my + c1) * structure).mean((1, 2))


def _stretched_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Returns the SSIM of maps stretched to 0..1, as Adebayo et al. compare maps, whose scale says nothing."""
    return ssim(render.normalize(a), render.normalize(b))


SIMILARITIES: dict[str, Similarity] = {
    "cosine": cosine_similarity,
    "rank": rank_correlation,
    "ssim": _stretched_ssim,
}


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dim() < 2:
        raise InputError(f"a and b must have the same shape [N, ...], got {list(a.shape)} and {list(b.shape)}")
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise InputError("a and b must be finite, got NaN or infinity")
    a, b = a.detach().flatten(1), b.detach().flatten(1)
    return (a, b) if a.dtype == torch.float64 else (a.float(), b.float())


def _compared(a: Tensor, b: Tensor, similarities: Sequence[str]) -> dict[str, Tensor]:
    return {name: SIMILARITIES[name](a, b) for name in similarities}


def _check_similarities(similarities: Sequence[str]) -> None:
    if isinstance(similarities, str):
        raise InputError(f"similarities must be a list of names, got the string {similarities!r}")
    for name in similarities:
        if name not in SIMILARITIES:
            raise InputError(f"similarities must be among {', '.join(map(repr, SIMILARITIES))}, got {name!r}")


def _shown(made: Explanation | Tensor, images: Tensor, *, signed: bool = False) -> Tensor:
    """Returns the heat maps an explainer returned, or its attributions where they are asked for and there."""
    maps = made
    if isinstance(made, Explanation):
        maps = made.attribution if signed and made.attribution is not None else made.heatmap
    if not isinstance(maps, Tensor) or maps.dim() < 2 or len(maps) != len(images):
        got = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"explain must return a row for each of {len(images)} images, got {got}")
    maps = maps.detach() if maps.dtype == torch.float64 else maps.detach().float()
    if not bool(torch.isfinite(maps).all()):
        raise InputError("explain must return finite maps, got NaN or infinity")
    return maps


def _classes(target: Target, images: Tensor) -> Tensor | None:
    """Returns the classes as int64 `[N]`; None is left to the explainer."""
    if target is None:
        return None
    chosen = torch.as_tensor(target, device=images.device)
    if chosen.dim() == 0:
        chosen = chosen.expand(len(images))
    if chosen.shape != (len(images),) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        got = f"{list(chosen.shape)} of {chosen.dtype}"
        raise InputError(f"target must be an int or one for each of {len(images)} images, got {got}")
    return chosen.long()


def class_sensitivity(explain: Explain, images: Tensor, targets: Tensor) -> Tensor:
    """Returns the distance between the maps of two classes (Nie et al., 2018, section 4.3, Fig. 7).

    The distance is Euclidean, between attributions (heat maps, where a method has none) scaled to unit length: 0 is a
    method that does not look at the class, 1.41 one whose maps have nothing in common, 2 is the opposite. The paper
    draws the two classes at random and takes the mean over images.

    Args:
        explain: the method.
        images: `[N, C, H, W]`.
        targets: two classes an image, int `[N, 2]`.

    Returns:
        float32 `[N]`; a map that is zero everywhere has length 0.

    Raises:
        InputError: not two classes an image, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> images, targets = torch.rand(2, 3, 96, 96), torch.tensor([[3, 7], [1, 2]])
        >>> metrics.class_sensitivity(Saliency(demo.load()), images, targets).shape
        torch.Size([2])
    """
    if not isinstance(targets, Tensor) or targets.shape != (len(images), 2) or targets.is_floating_point():
        got = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets must be integers of shape [{len(images)}, 2], got {got}")
    first, second = (_shown(explain(images, chosen), images, signed=True) for chosen in targets.long().unbind(1))
    first, second = _flat(first, second)
    return torch.linalg.vector_norm(_unit(first) - _unit(second), dim=1)


class Randomization(NamedTuple):
    """The similarity between the maps of a model and of a randomised one.

    Attributes:
        layers: paths of the randomised modules, from the output down.
        similarity: of each measure, float32 `[L, N]`. A method that shows what was learned comes near 0.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> images = torch.rand(1, 3, 96, 96)
        >>> result = metrics.parameter_randomization(demo.load(), Saliency, images, layers=["classifier"])
        >>> result.layers, sorted(result.similarity)
        (['classifier'], ['cosine', 'rank', 'ssim'])
    """

    layers: list[str]
    similarity: dict[str, Tensor]


def parameter_randomization(
    model: nn.Module,
    method: Callable[[nn.Module], Explain],
    images: Tensor,
    target: Target = None,
    *,
    order: Literal["cascading", "independent"] = "cascading",
    layers: Sequence[str] | None = None,
    similarities: Sequence[str] = ("rank", "ssim", "cosine"),
    seed: int = 0,
) -> Randomization:
    """Do maps change when what was learned is forgotten (Adebayo et al., Sanity checks for saliency maps, 2018)?

    A copy of the model is randomised layer by layer from the output down, and the heat maps of the class are compared
    with those of the model itself. Layers are initialised anew as their modules do it (`reset_parameters`); parameters
    of other modules are drawn from a normal distribution with their own mean and deviation.

    Args:
        model: in evaluation mode; it stays as it is.
        method: makes an explainer for a model, for example `Saliency`.
        images: `[N, C, H, W]`.
        target: None for the class with the largest output of the model, an int for all, or one an image.
        order: "cascading", all layers down to this one, or "independent", this one alone.
        layers: paths of the modules to randomise, in this order; None for all that hold parameters, in the reverse
            order of their last call.
        similarities: "rank" (Spearman), "ssim" (of maps stretched to 0..1) and "cosine".
        seed: of the random parameters.

    Raises:
        InputError: a model without parameters, a layer or measure that does not exist, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> layers = ["classifier", "hidden"]
        >>> result = metrics.parameter_randomization(model, Saliency, images, layers=layers, similarities=["ssim"])
        >>> result.similarity["ssim"].shape
        torch.Size([2, 2])
    """
    _check_similarities(similarities)
    if order not in ("cascading", "independent"):
        raise InputError(f"order must be 'cascading' or 'independent', got {order!r}")
    chosen = Scorer(model, images, target).target
    before = _shown(method(model)(images, chosen), images)
    forgetful = copy.deepcopy(unwrap(model))
    groups = _layers(forgetful, images[:1], layers)
    series: dict[str, list[Tensor]] = {name: [] for name in similarities}
    for depth, group in enumerate(groups.values()):
        with _randomized(group, seed + depth, keep=order == "cascading"):
            after = _shown(method(forgetful)(images, chosen), images)
        for name, value in _compared(before, after, similarities).items():
            series[name].append(value)
    return Randomization(list(groups), {name: torch.stack(values) for name, values in series.items()})


def _layers(model: nn.Module, images: Tensor, names: Sequence[str] | None) -> dict[str, list[nn.Module]]:
    """Returns the paths of layers, the last one called first, each with the modules that are randomised together."""
    modules = dict(model.named_modules())
    if names is not None:
        for name in names:
            if name not in modules or not any(True for _ in modules[name].parameters()):
                raise InputError(f"layers must name modules with parameters, got {name!r}")
        return {name: [m for m in modules[name].modules() if _has_parameters(m)] for name in names}
    called: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        def noted(*_: Any) -> None:
            called.pop(name, None)
            called[name] = None

        return noted

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        with torch.inference_mode(False), torch.no_grad():
            model(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, list[nn.Module]] = {name: [] for name in reversed(called)}
    for name, module in modules.items():
        # A module that its parent reads without calling it (as attention does its projection) goes with the parent.
        owner = name
        while owner and owner not in called:
            owner = owner.rpartition(".")[0]
        if _has_parameters(module) and (owner or not name):
            groups[owner].append(module)
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        raise InputError("model must have layers with parameters to randomise, got none")
    return groups


def _has_parameters(module: nn.Module) -> bool:
    """Returns whether a module holds parameters itself."""
    return any(parameter is not None for parameter in module._parameters.values())


@contextmanager
def _randomized(modules: Sequence[nn.Module], seed: int, keep: bool) -> Iterator[None]:
    """Yields the parameters drawn anew, until the end or for good."""
    saved = [{name: tensor.detach().clone() for name, tensor in _state(module).items()} for module in modules]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # Drawn on the CPU, the numbers are the same on every device, and no other generator moves.
        torch.default_generator.manual_seed(seed)
        _load(modules, [_state(_initialized(module)) for module in modules])
    try:
        yield
    finally:
        if not keep:
            _load(modules, saved)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers a module holds itself."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _load(modules: Sequence[nn.Module], states: Sequence[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for module, state in zip(modules, states, strict=True):
            for name, tensor in _state(module).items():
                tensor.copy_(state[name])


def _initialized(module: nn.Module) -> nn.Module:
    """Returns a copy on the CPU as it is before training."""
    fresh = copy.deepcopy(module).cpu()
    reset: Any = getattr(fresh, "reset_parameters", None)
    if callable(reset):
        reset()
        return fresh
    for parameter in fresh._parameters.values():
        if parameter is not None:
            spread = parameter.float().std(correction=0)
            parameter.copy_(torch.randn(parameter.shape) * spread + parameter.float().mean())
    return fresh


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
        radius: of the perturbation of each number, in units of the images.
        samples: perturbations; they are the same for all images.
        seed: of the perturbations.

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
    if radius <= 0 or samples < 1:
        raise InputError(f"radius and samples must be positive, got {radius} and {samples}")
    classes = _classes(target, images)
    before = _shown(explain(images, classes), images, signed=True).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    farthest = before.new_zeros(len(images))
    for _ in range(samples):
        noise = (2 * torch.rand(1, *images.shape[1:], generator=generator) - 1) * radius
        after = _shown(explain(images + noise.to(images), classes), images, signed=True).flatten(1)
        farthest = torch.maximum(farthest, torch.linalg.vector_norm(after - before, dim=1))
    length = torch.linalg.vector_norm(before, dim=1)
    return farthest / torch.where(length > 0, length, 1)


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
        iterations: at most; an image that still keeps its class is returned as far as it came.

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
    _check_similarities(similarities)
    if images.shape != adversarial.shape:
        raise InputError(f"adversarial must have shape {list(images.shape)}, got {list(adversarial.shape)}")
    classes = _classes(target, images)
    before, after = (_shown(explain(x, classes), x) for x in (images, adversarial))
    return _compared(before, after, similarities)


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

    The method is asked to generate the least likely class of each image, or the second least likely where the former is
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
    made: Any = generate(images, target)
    shown = getattr(made, "perturbed", made)
    if not isinstance(shown, Tensor) or shown.shape != images.shape:
        got = list(shown.shape) if isinstance(shown, Tensor) else type(shown).__name__
        raise InputError(f"generate must return images {list(images.shape)}, got {got}")
    return AdversarialEvidence(scorer.outputs(shown.detach()).argmax(1) == target, target)
