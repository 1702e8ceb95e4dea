"""Sanity checks by randomisation: a map should depend on the class and on what was learned.

The user's model is never changed, and gradients never reach it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.explain import Explain, maps_of
from pyfast_xai.metrics.scorer import Scorer
from pyfast_xai.metrics.similarity import check_similarities, compared, flat, unit
from pyfast_xai.tape.module_hooks import unwrap


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
        received = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets must be integers of shape [{len(images)}, 2], got {received}")
    first, second = (maps_of(explain(images, chosen), images, signed=True) for chosen in targets.long().unbind(1))
    first, second = flat(first, second)
    return torch.linalg.vector_norm(unit(first) - unit(second), dim=1)


class Randomization(NamedTuple):
    """The similarity between the maps of a model and of a randomised one.

    Attributes:
        layers: paths of the randomised modules, from the output down.
        similarity: similarity of each measure, float32 `[L, N]`. A method that shows what was learned comes near 0.

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
    """Measures whether maps change with random parameters (Adebayo et al., Sanity checks for saliency maps, 2018)?

    A copy of the model is randomised layer by layer from the output down, and the heat maps of the class are compared
    with those of the model itself. Layers are initialised again by their modules (`reset_parameters`); parameters
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
        seed: seed of the random parameters.

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
    check_similarities(similarities)
    if order not in ("cascading", "independent"):
        raise InputError(f"order must be 'cascading' or 'independent', got {order!r}")
    chosen = Scorer(model, images, target).target
    before = maps_of(method(model)(images, chosen), images)
    forgetful = copy.deepcopy(unwrap(model))
    groups = _layers(forgetful, images[:1], layers)
    series: dict[str, list[Tensor]] = {name: [] for name in similarities}
    for depth, group in enumerate(groups.values()):
        with _randomized(group, seed + depth, keep=order == "cascading"):
            after = maps_of(method(forgetful)(images, chosen), images)
        for name, value in compared(before, after, similarities).items():
            series[name].append(value)
    return Randomization(list(groups), {name: torch.stack(values) for name, values in series.items()})


def smooth_parameter_randomization(
    model: nn.Module,
    method: Callable[[nn.Module], Explain],
    images: Tensor,
    target: Target = None,
    *,
    noise: float = 0.1,
    samples: int = 50,
    layers: Sequence[str] | None = None,
    similarities: Sequence[str] = ("rank", "ssim", "cosine"),
    seed: int = 0,
) -> Randomization:
    """Runs `parameter_randomization` on maps that are averaged over noise (sMPRT, Hedström et al., 2023).

    Noise in the gradient alone makes maps of two models differ, which flatters noisy methods; the mean has less of it.
    As in Quantus the last sample has no noise.

    Args:
        model: in evaluation mode; it stays as it is.
        method: makes an explainer for a model, for example `Saliency`.
        images: `[N, C, H, W]`.
        target: None for the class with the largest output of the model, an int for all, or one an image.
        noise: standard deviation, as a share of the range of each image.
        samples: maps that are averaged.
        layers: see `parameter_randomization`.
        similarities: see `parameter_randomization`.
        seed: seed of the random parameters and of the noise.

    Raises:
        InputError: as `parameter_randomization`, or settings that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model, images, layers = demo.load(), torch.rand(1, 3, 96, 96), ["classifier"]
        >>> result = metrics.smooth_parameter_randomization(model, Saliency, images, samples=2, layers=layers)
        >>> result.similarity["rank"].shape
        torch.Size([1, 1])
    """
    if noise <= 0 or samples < 1:
        raise InputError(f"noise and samples must be positive, got {noise} and {samples}")

    def smooth(model: nn.Module) -> Explain:
        explain = method(model)

        def mean(images: Tensor, classes: Any) -> Tensor:
            low, high = (bound.view(-1, 1, 1, 1) for bound in images.flatten(1).aminmax(dim=1))
            generator = torch.Generator().manual_seed(seed)
            total = maps_of(explain(images, classes), images)
            for _ in range(samples - 1):
                drawn = torch.randn(images.shape, generator=generator).to(images)
                total = total + maps_of(explain(images + noise * (high - low) * drawn, classes), images)
            return total / samples

        return mean

    return parameter_randomization(model, smooth, images, target, layers=layers, similarities=similarities, seed=seed)


def efficient_parameter_randomization(
    model: nn.Module,
    method: Callable[[nn.Module], Explain],
    images: Tensor,
    target: Target = None,
    *,
    bins: int = 100,
    seed: int = 0,
) -> Tensor:
    """Measures the rise of a map's entropy when the whole model is randomised (eMPRT, Hedström et al., 2023).

    The measure is `(after - before) / before` of the entropies of the histograms of the maps' values; a method that
    shows what was learned rises. One randomisation and two explanations, and no measure of likeness, are all it needs.

    Args:
        model: in evaluation mode; it stays as it is.
        method: makes an explainer for a model, for example `Saliency`.
        images: `[N, C, H, W]`.
        target: None for the class with the largest output of the model, an int for all, or one an image.
        bins: number of bins of the histogram, between the least and the largest value of a map.
        seed: seed of the random parameters.

    Returns:
        float32 `[N]`; the entropy itself where it was 0.

    Raises:
        InputError: a model without parameters, maps that are none, or settings that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> images = torch.rand(2, 3, 96, 96)
        >>> metrics.efficient_parameter_randomization(demo.load(), Saliency, images).shape
        torch.Size([2])
    """
    if bins < 2:
        raise InputError(f"bins must be at least 2, got {bins}")
    chosen = Scorer(model, images, target).target
    before = _entropy(maps_of(method(model)(images, chosen), images, signed=True), bins)
    forgetful = copy.deepcopy(unwrap(model))
    group = next(iter(_layers(forgetful, images[:1], ("",)).values()))
    with _randomized(group, seed, keep=True):
        after = _entropy(maps_of(method(forgetful)(images, chosen), images, signed=True), bins)
    return ((after - before) / torch.where(before > 0, before, 1)).float()


def _entropy(maps: Tensor, bins: int) -> Tensor:
    """Returns the entropy of the histogram of each row's values, float64 `[N]`, in nats."""
    flat = maps.flatten(1).double()
    low, high = flat.aminmax(dim=1, keepdim=True)
    place = ((flat - low) / torch.where(high > low, high - low, 1) * bins).long().clamp_max(bins - 1)
    shares = flat.new_zeros(len(flat), bins).scatter_add(1, place, torch.ones_like(flat)) / flat.shape[1]
    return torch.special.entr(shares).sum(1)


def random_logit(
    model: nn.Module,
    explain: Explain,
    images: Tensor,
    target: Target = None,
    *,
    similarity: str = "ssim",
    seed: int = 0,
) -> Tensor:
    """Returns the similarity of the maps of a class and of another one drawn at random (Sixt et al., 2020).

    A method that looks at the class comes near 0; 1 is one that does not. `class_sensitivity` measures distances.

    Args:
        model: in evaluation mode.
        explain: the method.
        images: `[N, C, H, W]`.
        target: None for the class with the largest output, an int for all, or one an image.
        similarity: "ssim" (of maps stretched to 0..1), "rank" (Spearman) or "cosine".
        seed: seed of the other class.

    Returns:
        float32 `[N]`.

    Raises:
        InputError: a model of one class, a measure that does not exist, or maps that are none.

    Example:
        >>> import torch
        >>> from pyfast_xai import Saliency, demo, metrics
        >>> model = demo.load()
        >>> metrics.random_logit(model, Saliency(model), torch.rand(2, 3, 96, 96)).shape
        torch.Size([2])
    """
    check_similarities((similarity,))
    scorer = Scorer(model, images, target)
    classes = scorer.columns.shape[1]
    if classes < 2:
        raise InputError(f"model must tell at least two classes apart, got {classes}")
    step = torch.randint(1, classes, (len(images),), generator=torch.Generator().manual_seed(seed))
    other = (scorer.target + step.to(scorer.target)) % classes
    before, after = (maps_of(explain(images, chosen), images) for chosen in (scorer.target, other))
    return compared(before, after, (similarity,))[similarity]


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
    """Draws new parameters, and restores the old ones at the end unless `keep` is set."""
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
