"""A theoretical explanation for perplexing behaviors of backpropagation-based visualizations (Nie et al., 2018)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai import metrics, render
from pyfast_xai.explainers import DeconvNet, Explainer, GuidedBackprop, Saliency
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Experiment, Outcome

METHODS: dict[str, type[Explainer]] = {"saliency": Saliency, "DeconvNet": DeconvNet, "guided backprop": GuidedBackprop}
SIDE, PATCH, STRIDE, CLASSES = 64, 7, 2, 10
FILTERS = (16, 64, 256, 1024)


def normal(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Draws weights of zero mean, truncated at two deviations, and no bias, as sections 3 and 4 assume."""
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.zeros_(weight)
    return module.eval()


def three_layers(filters: int, pool: int | None = None, side: int = SIDE) -> nn.Module:
    """Builds the network of section 3.1: convolution, ReLU, fully connected; a max-pool in between for section 3.2.

    Args:
        filters: number of filters of the convolution, 7 x 7 with stride 2 (N).
        pool: side of the pool's windows.
        side: side of the images, in pixels.
    """
    positions = (side - PATCH) // STRIDE + 1
    pooled = positions if pool is None else (positions - pool) // pool + 1
    return normal(
        nn.Sequential(
            *(nn.Conv2d(3, filters, PATCH, STRIDE), nn.ReLU(), nn.Identity() if pool is None else nn.MaxPool2d(pool)),
            *(nn.Flatten(), nn.Linear(filters * pooled * pooled, CLASSES)),
        )
    )


def fully_connected(hidden: int, side: int = SIDE) -> nn.Module:
    """Builds the network of section 3.1.2: every neuron sees the whole image at once.

    Args:
        hidden: neurons of the hidden layer (N_h).
        side: side of the images, in pixels.
    """
    return normal(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
    )


def limit(images: Tensor) -> Tensor:
    """Returns the limit of guided backprop for many filters: every patch scaled to unit length, added up."""
    patches = functional.unfold(images, PATCH, stride=STRIDE)
    return functional.fold(functional.normalize(patches, dim=1), images.shape[2:], PATCH, stride=STRIDE)


def _small(data: Data, count: int) -> Tensor:
    """Returns the pictures of 64 x 64, without mean; smooth noise where there are none."""
    from pyfast_xai.images import Preprocess

    generator = torch.Generator().manual_seed(data.seed)
    if not (data.root / "imagenet").is_dir():
        coarse = torch.randn(count, 3, 12, 12, generator=generator)
        return functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)
    plain = Preprocess(size=SIDE, crop="squash", mean=(0.485, 0.456, 0.406), std=(1, 1, 1))
    return data.inputs(data.at_most(count).imagenet(), plain)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(metrics.cosine_similarity(a, b).mean())


def filters(data: Data) -> Outcome:
    """Measures section 3.1: how near the three methods come to the image in random networks, as these grow wider."""
    images = _small(data, 8)
    known: dict[str, tuple[nn.Module, str]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        for count in FILTERS:
            known[f"convolution, {count} filters"] = three_layers(count), "limit"
        known["convolution, 1024 filters, max-pool 3"] = three_layers(1024, pool=3), "limit"
        for hidden in (64, 4096):
            known[f"fully connected, {hidden} neurons"] = fully_connected(hidden), "image"
    rows = []
    pictures: list[list[Tensor]] = [list(render.stretch(images[:4]))]
    labels = ["image"]
    for name, (model, expectation) in known.items():
        model = model.to(images.device)
        cells = [name, expectation]
        for method, kind in METHODS.items():
            explanation = kind(model)(images, 0)
            assert explanation.attribution is not None
            target = limit(images) if expectation == "limit" else images
            cells += [
                f"{_cosine(explanation.attribution, target):.3f}",
                f"{_cosine(explanation.attribution, images):.3f}",
            ]
            if "1024" in name or "4096" in name:
                pictures.append(list(explanation.rgb()[:4]))
                labels.append(f"{method}: {name}")
        rows.append(cells)
        data.advance("random networks", len(images))
    heads = ["random network", "limit"]
    for method in METHODS:
        heads += [f"{method}, to the limit", f"{method}, to the image"]
    deviations = [
        "The paper shows pictures (Figs. 2, 4, 5) and bounds; these are cosines. The limit is the sum of the image's "
        "patches, each of unit length, which the proof of Theorem 1 gives for Gaussian filters."
    ]
    sheet = render.montage(pictures, labels=labels)
    return Outcome(
        "Backprop, sections 3.1 and 3.2: cosine to the image in random networks",
        heads,
        rows,
        deviations,
        {"maps": sheet},
    )


def figure_7(data: Data) -> Outcome:
    """Measures Fig. 7: the distance between the maps of two classes."""
    pictures = data.imagenet()
    rows = []
    for loaded in data.networks(("vgg16",)):
        drawn = copy.deepcopy(loaded.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.seed)
            _forget(drawn)
        for state, model in (("trained", loaded.model), ("random", drawn)):
            distance: dict[str, list[Tensor]] = {method: [] for method in METHODS}
            generator = torch.Generator().manual_seed(data.seed)
            for start in range(0, len(pictures), data.batch_size):
                images = data.inputs(pictures[start : start + data.batch_size], loaded.preprocess)
                with torch.no_grad():
                    classes = model(images[:1]).shape[1]
                pairs = torch.rand(len(images), classes, generator=generator).topk(2, 1).indices.to(images.device)
                for method, kind in METHODS.items():
                    distance[method].append(metrics.class_sensitivity(kind(model), images, pairs))
                data.advance(f"{loaded.name}, {state}, Fig. 7", len(images))
            rows.append(
                [loaded.name, state, *(f"{float(torch.cat(values).mean()):.3f}" for values in distance.values())]
            )
    deviations = [
        f"{len(pictures)} pictures instead of 10,000, maps scaled to unit length (the paper does not say), so 1.41 is "
        "nothing in common. The paper gives an order: saliency far above DeconvNet, DeconvNet above guided backprop or "
        "equal to it, in trained and random VGG-16."
    ]
    heads = ["network", "weights", *METHODS]
    return Outcome("Backprop, Fig. 7: distance between the maps of two random classes", heads, rows, deviations)


def _forget(model: nn.Module) -> None:
    """Draws weights that keep the size of the signal; biases are zero."""
    with torch.no_grad():
        for weight in model.parameters():
            nn.init.kaiming_normal_(weight) if weight.dim() > 1 else nn.init.zeros_(weight)


def partial_training(data: Data) -> Outcome:
    """Draws Figs. 6 and 9: maps of networks of which some layers are trained."""
    pictures = data.at_most(8).imagenet()
    rows: list[list[str]] = []
    shown: dict[str, Any] = {}
    for loaded in data.networks(("vgg16",)):
        images = data.inputs(pictures, loaded.preprocess)
        layers = [name for name, module in loaded.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        quarters = {
            "all trained": [],
            "last quarter random": layers[3 * len(layers) // 4 :],
            "last half random": layers[len(layers) // 2 :],
            "first quarter random": layers[: len(layers) // 4],
            "all random": layers,
        }
        with torch.no_grad():
            target = loaded.model(images).argmax(1)
        before: dict[str, Tensor] = {}
        sheet: list[list[Tensor]] = [list(data.shown(pictures[:4], loaded.preprocess))]
        labels = ["image"]
        for state, names in quarters.items():
            model = _with_random(loaded.model, names, data.seed)
            cells = [loaded.name, state]
            for method, kind in METHODS.items():
                explanation = kind(model)(images, target)
                assert explanation.attribution is not None
                trained = before.setdefault(method, explanation.attribution)
                cells.append(f"{_cosine(explanation.attribution, trained):.3f}")
                sheet.append(list(explanation.rgb()[:4]))
                labels.append(f"{method}, {state}")
            rows.append(cells)
            data.advance(f"{loaded.name}, {state}", len(images))
        shown[loaded.name] = render.montage(sheet, labels=labels)
    deviations = ["The paper shows pictures of VGG-16; these are cosines to the map of the trained network."]
    heads = ["network", "weights", *METHODS]
    return Outcome("Backprop, Figs. 6 and 9: which trained layers make the picture", heads, rows, deviations, shown)


def _with_random(model: nn.Module, names: Sequence[str], seed: int) -> nn.Module:
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            _forget(modules[name])
    return changed


def adversarial(data: Data) -> Outcome:
    """Measures Fig. 8: the similarity of maps of images and of their adversarial examples."""
    pictures = data.at_most(40).imagenet()
    rows, shown = [], {}
    for loaded in data.networks(("vgg16",)):
        images = data.inputs(pictures, loaded.preprocess)
        epsilon = 0.02 * float(images.amax() - images.amin())
        moved = metrics.fgsm(loaded.model, images, epsilon=epsilon)
        with torch.no_grad():
            changed = loaded.model(images).argmax(1) != loaded.model(moved).argmax(1)
        data.advance(f"{loaded.name}, attacked", len(pictures))
        if not bool(changed.any()):
            rows.append([loaded.name, f"0 of {len(pictures)}", *("-" for _ in METHODS)])
            continue
        images, moved = images[changed], moved[changed]
        cells, sheet, labels = [loaded.name, f"{len(images)} of {len(pictures)}"], [], []
        for method, kind in METHODS.items():
            before, after = kind(loaded.model)(images), kind(loaded.model)(moved)
            assert before.attribution is not None
            assert after.attribution is not None
            cells.append(f"{_cosine(before.attribution, after.attribution):.3f}")
            sheet += [list(before.rgb()[:4]), list(after.rgb()[:4])]
            labels += [method, f"{method}, attacked"]
        rows.append(cells)
        shown[loaded.name] = render.montage(sheet, labels=labels)
    deviations = ["The paper shows one picture on VGG-16; these are cosines, noise of 2 % of the range, in one step."]
    heads = ["network", "class changed", *METHODS]
    return Outcome("Backprop, Fig. 8: likeness to the map before the attack", heads, rows, deviations, shown)


def figure_3(data: Data) -> Outcome:
    """Measures Fig. 3: the distribution of the weights of the layers after the convolutions."""
    rows = []
    for loaded in data.networks(("vgg16",)):
        layers = [(name, m) for name, m in loaded.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for name, module in (layers[0], layers[len(layers) // 2], layers[-1]):
            weight = module.weight.detach().double().flatten()
            weight = (weight - weight.mean()) / weight.std()
            kurtosis = float(weight.pow(4).mean() - 3)
            mean = float(module.weight.detach().mean() / module.weight.detach().std())
            rows.append([loaded.name, name, f"{mean:.3f}", f"{float(weight.pow(3).mean()):.2f}", f"{kurtosis:.2f}"])
            data.advance(f"{loaded.name}, weights", 1)
    heads = ["network", "layer", "mean, in deviations", "skewness", "excess kurtosis"]
    deviations = [
        "The paper shows the histogram of VGG-16's first fully connected layer; a Gaussian has 0 in every column."
    ]
    return Outcome("Backprop, Fig. 3: how Gaussian are trained weights?", heads, rows, deviations)


EXPERIMENTS: dict[str, Experiment] = {
    "filters": filters,
    "figure-3": figure_3,
    "figure-7": figure_7,
    "partial-training": partial_training,
    "adversarial": adversarial,
}
