"""The engine of the metrics that perturb images: features are removed in groups, and the model gives scores."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import Score
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.checks import check_attributions
from pyfast_xai.metrics.scorer import Scorer

Baseline = Literal["zero", "mean", "blur"] | Tensor | Callable[[Tensor], Tensor]

STEPS = 28  # RISE: 224 * 8 of 224 * 224 pixels at a time


class Removal:
    """The scores of images from which features are removed, group by group.

    A feature is a pixel, with all of its channels, where attributions are maps; it is one number of the image where
    they have channels. R is N images times K targets, image by image, as in an `Explanation`.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        baseline: the values that features get, see `baseline_for`.
        score: "probability" of the class, or its "logit".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, see `Explainer`.
        groups: groups of pixels that are removed together, int64 `[H, W]` or `[N, H, W]`, numbered from 0; None for
            every feature by itself.
        name: name of the attributions, for errors.

    Attributes:
        images: `[N, C, H, W]`.
        baseline: the values that features get, `[N, C, H, W]`.
        values: sums of the attributions over each of G groups, `[R, G]`.
        sizes: features of each group, `[R, G]`; 0 for a number that an image does not use.
        before: scores of the images as they are, `[R]`.

    Raises:
        InputError: attributions of another shape or with NaN, or images, a target or a baseline that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        attributions: Tensor,
        target: Target,
        baseline: Baseline,
        score: Score,
        batch_size: int,
        outputs: Outputs,
        groups: Tensor | None = None,
        name: str = "attributions",
    ) -> None:
        self.scorer = Scorer(model, images, target, batch_size, outputs, score=score, several=True)
        self.images, self.baseline = images.detach(), baseline_for(images, baseline)
        self._batch_size = batch_size
        self.each = self.scorer.each
        features = check_attributions(attributions, images, self.each, name)
        self._shape = (features.shape[1] if features.dim() == 4 else 1, *images.shape[2:])
        features = features.flatten(1)
        self.before = self.scorer.before.flatten()
        self._groups: Tensor | None = None
        self.values, self.sizes = features, torch.ones_like(features)
        if groups is not None:
            self._group(features, groups.to(images.device))

    def _group(self, features: Tensor, groups: Tensor) -> None:
        groups = groups.expand(len(self.images), *groups.shape[-2:])[:, None]
        self._groups = groups.expand(-1, *self._shape).flatten(1)
        index = self._groups.repeat_interleave(self.each, 0)
        empty = features.new_zeros(len(features), int(groups.max()) + 1)
        self.values = empty.scatter_add(1, index, features)
        self.sizes = empty.scatter_add(1, index, torch.ones_like(features))

    def ranks(self, values: Tensor | None = None) -> Tensor:
        """Returns the rank of each group by its attribution (or other values), the largest first, int64 `[R, G]`."""
        return ranks_of(self.values if values is None else values)

    def by_row(self, removed: Callable[[Tensor, Tensor], Tensor], versions: int) -> Tensor:
        """Returns scores of S versions of each image, made for each of its targets, `[R, S]`.

        Args:
            removed: returns the groups that are removed, bool `[M, G]`, for rows and versions, both int64 `[M]`.
            versions: S.
        """
        parts = []
        for row, version in versions_of(len(self.values), versions, self._batch_size, self.images.device):
            image = torch.div(row, self.each, rounding_mode="floor")
            scores = self.scorer.scores_of(self._without(image, removed(row, version)), image)
            parts.append(scores.gather(1, (row % self.each)[:, None])[:, 0])
        return torch.cat(parts).view(-1, versions)

    def shared(self, removed: Tensor) -> Tensor:
        """Returns scores of S versions of each image, which all of its targets share, `[R, S]`.

        Args:
            removed: the groups that are removed in each version, bool `[S, G]`.
        """
        parts = []
        for image, version in versions_of(len(self.images), len(removed), self._batch_size, self.images.device):
            parts.append(self.scorer.scores_of(self._without(image, removed[version]), image))
        return torch.cat(parts).view(len(self.images), len(removed), self.each).mT.flatten(0, 1)

    def _without(self, image: Tensor, removed: Tensor) -> Tensor:
        """Returns images, int64 `[M]`, without groups `[M, G]`."""
        if self._groups is not None:
            removed = removed.gather(1, self._groups[image])
        return torch.where(removed.view(-1, *self._shape), self.baseline[image], self.images[image])


def ranks_of(values: Tensor) -> Tensor:
    """Returns the rank of each value in its row `[R, G]`, the largest first; of equal ones the first in the row."""
    order = values.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter_(1, order, ranks)


def versions_of(count: int, versions: int, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every row with each of its versions, in batches."""
    for part in torch.arange(count * versions, device=device).split(batch_size):
        yield torch.div(part, versions, rounding_mode="floor"), part % versions


def random_subsets(count: int, groups: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Returns random subsets of `size` groups each, bool `[count, groups]`, drawn on the CPU one after the other."""
    chosen = torch.zeros(count, groups, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(groups, generator=generator)[:size]] = True
    return chosen.to(device)


def patches(images: Tensor, size: int) -> Tensor:
    """Returns the square patch that each pixel belongs to, int64 `[H, W]`; those at the edges may be smaller.

    As in Quantus, the grid lies in the middle of the image.

    Raises:
        InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"patch must be at least 1 pixel, got {size}")
    counts = [math.ceil(side / size) for side in images.shape[2:]]
    rows, columns = (
        (torch.arange(side) + (count * size - side) // 2) // size
        for side, count in zip(images.shape[2:], counts, strict=True)
    )
    return (rows[:, None] * counts[1] + columns).to(images.device)


def check_step(step: int | None, features: int) -> int:
    """Returns the number of features that change at a time; None is a 28th of them.

    Raises:
        InputError: fewer than one.
    """
    step = math.ceil(features / STEPS) if step is None else step
    if step < 1:
        raise InputError(f"step must be at least 1 pixel, got {step}")
    return step


def baseline_for(images: Tensor, baseline: Baseline, name: str = "baseline") -> Tensor:
    """Returns the values of removed features, of the shape of the images `[N, C, H, W]`.

    Args:
        images: as the model takes them.
        baseline: "zero"; "mean", that of each channel of the image; "blur", see there; a tensor that broadcasts to the
            images; or a function of them.
        name: name of the argument, for errors.

    Raises:
        InputError: another name, or a tensor that does not fit.
    """
    images = images.detach()
    if isinstance(baseline, str):
        if baseline not in ("zero", "mean", "blur"):
            raise InputError(f"{name} must be 'zero', 'mean', 'blur', a tensor or a function, got {baseline!r}")
        if baseline == "blur":
            return blur(images)
        return torch.zeros_like(images) if baseline == "zero" else images.mean((2, 3), keepdim=True).expand_as(images)
    result = baseline if isinstance(baseline, Tensor) else baseline(images)
    try:
        return result.detach().to(images).expand(images.shape)
    except RuntimeError:
        raise InputError(f"{name} must broadcast to {list(images.shape)}, got {list(result.shape)}") from None


def blur(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Returns the images `[N, C, H, W]` as RISE's insertion game starts from them.

    RISE makes its kernel by filtering a dot on a grid of `size` pixels whose edges reflect: what would fall outside
    folds back in, so the kernel is flatter than a Gaussian. Beyond the image all is zero.
    """
    if size < 1 or size % 2 == 0:
        raise InputError(f"size must be odd, got {size}")
    reach = int(4 * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    folded = (taps.long() + size // 2) % (2 * size)
    folded = torch.minimum(folded, 2 * size - 1 - folded)
    kernel = torch.zeros(size, dtype=torch.float64).index_add_(0, folded, weights / weights.sum()).to(images)
    flat = images.detach().flatten(0, 1)[:, None]
    flat = functional.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(size // 2, 0))
    return functional.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, size // 2)).view(images.shape)
