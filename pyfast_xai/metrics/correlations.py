"""Correlations: do attributions rise with what the model loses when features are removed?

Features are pixels, where attributions are maps `[R, H, W]`, and numbers of the image, where they are `[R, C, H, W]`;
R is N images times K targets, image by image. What is removed at random is the same for all images and targets, which
share the forwards.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.outputs import Outputs
from pyfast_xai.explainers.common.perturbation_scores import Score
from pyfast_xai.explainers.common.targets import Target
from pyfast_xai.metrics.checks import check_share
from pyfast_xai.metrics.perturbation import Baseline, Removal, check_step, random_subsets
from pyfast_xai.metrics.similarity import Similarity, correlation, rank_correlation

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Shares of the features that `sensitivity_n` removes; the paper goes up to 0.8, evenly in the logarithm."""


def faithfulness_correlation(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    subset: int = 224,
    runs: int = 100,
    baseline: Baseline = "zero",
    score: Score = "logit",
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures how sums of attributions go with the drop of the score when random features are removed.

    The measure is Pearson's correlation over random subsets of one size (Bhatt et al., 2020); 1 is best. It costs
    `runs` forwards an image. Quantus draws other subsets for each image.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: signed, `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        subset: features that are removed at a time.
        runs: subsets.
        baseline: the values that features get, see `deletion`.
        score: "logit" of the class, or its "probability".
        seed: seed of the subsets.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`; 0 where the score or the attributions do not change.

    Raises:
        InputError: attributions of another size or with NaN, settings, images or a target that do not fit.

    Example:
        >>> import torch
        >>> from pyfast_xai import InputXGradient, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> attributions = InputXGradient(model)(images).attribution
        >>> metrics.faithfulness_correlation(model, images, attributions, runs=8).shape
        torch.Size([2])
    """
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs)
    return _of_subsets(removal, subset, runs, torch.Generator().manual_seed(seed))


def sensitivity_n(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    sizes: Sequence[int | float] = SIZES,
    runs: int = 100,
    baseline: Baseline = "zero",
    score: Score = "logit",
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures `faithfulness_correlation` at several sizes of the subsets (sensitivity-n, Ancona et al., 2018).

    A method whose sums are the drops for all subsets of n features is "sensitive-n": 1 at that size. The paper averages
    over images. Quantus instead removes features in the order of their attributions, and correlates over images.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: signed, `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        sizes: S of them: numbers of features, or, below 1, shares of all.
        runs: subsets of each size.
        baseline: the values that features get, see `deletion`.
        score: "logit" of the class, or its "probability".
        seed: seed of the subsets.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R, S]`.

    Raises:
        InputError: see `faithfulness_correlation`.

    Example:
        >>> import torch
        >>> from pyfast_xai import InputXGradient, demo, metrics
        >>> model, images = demo.load(), torch.rand(1, 3, 96, 96)
        >>> attributions = InputXGradient(model)(images).attribution
        >>> metrics.sensitivity_n(model, images, attributions, sizes=(0.1, 0.5), runs=8).shape
        torch.Size([1, 2])
    """
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs)
    features, generator = removal.values.shape[1], torch.Generator().manual_seed(seed)
    if not len(sizes):
        raise InputError("sizes must hold at least one, got none")
    counts = [max(1, round(size * features)) if size < 1 else int(size) for size in sizes]
    return torch.stack([_of_subsets(removal, count, runs, generator) for count in counts], 1)


def mu_fidelity(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    grid: int = 9,
    share: float = 0.2,
    samples: int = 200,
    baseline: Baseline = "zero",
    score: Score = "logit",
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures `faithfulness_correlation` for cells of a grid, by Spearman's correlation (MuFidelity of Xplique).

    Single pixels are a noise to which a network hardly answers; cells are parts of things. It costs `samples` forwards
    an image. Xplique removes one cell more than the share says.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: signed, `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        grid: cells along each side; the nearest cell is that of a pixel.
        share: share of the cells that are removed at a time.
        samples: subsets of cells.
        baseline: the values that pixels get, see `deletion`.
        score: "logit" of the class, or its "probability".
        seed: seed of the subsets.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`, in -1..1; 1 is best.

    Raises:
        InputError: see `faithfulness_correlation`.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.mu_fidelity(model, images, GradCAM(model)(images).heatmap, samples=8).shape
        torch.Size([2])
    """
    check_share(share, "share")
    if not 2 <= grid <= min(images.shape[2:]):
        raise InputError(f"grid must lie in [2, {min(images.shape[2:])}], the shorter side of the images, got {grid}")
    rows, columns = (torch.arange(side) * grid // side for side in images.shape[2:])
    removal = Removal(
        *(model, images, attributions, target, baseline, score, batch_size, outputs),
        groups=rows[:, None] * grid + columns,
    )
    size = max(1, round(share * grid * grid))
    return _of_subsets(removal, size, samples, torch.Generator().manual_seed(seed), rank_correlation)


def _of_subsets(
    removal: Removal, size: int, runs: int, generator: torch.Generator, similarity: Similarity = correlation
) -> Tensor:
    """Returns the correlation of sums and drops over random subsets of the groups, `[R]`."""
    groups = removal.values.shape[1]
    if not 1 <= size <= groups:
        raise InputError(f"subset must lie in [1, {groups}], the features, got {size}")
    if runs < 2:
        raise InputError(f"runs must be at least 2, got {runs}")
    removed = random_subsets(runs, groups, size, generator, removal.values.device)
    drops = removal.before[:, None] - removal.shared(removed)
    sums = removal.values @ removed.to(removal.values.dtype).T
    return similarity(sums, drops.to(sums.dtype)).float()


def faithfulness_estimate(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    step: int | None = None,
    baseline: Baseline = "zero",
    score: Score = "logit",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures how attributions go with the drop of the score when features are removed one by one.

    The measure is Pearson's correlation (Alvarez-Melis and Jaakkola, 2018); 1 is best. Features are taken in the order
    of their attributions, `step` together, and each group is removed by itself.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: signed, `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        step: features that are removed together; None for a 28th of all, so that it costs 28 forwards.
        baseline: the values that features get, see `deletion`.
        score: "logit" of the class, or its "probability".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`.

    Raises:
        InputError: see `faithfulness_correlation`.

    Example:
        >>> import torch
        >>> from pyfast_xai import InputXGradient, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> attributions = InputXGradient(model)(images).attribution
        >>> metrics.faithfulness_estimate(model, images, attributions).shape
        torch.Size([2])
    """
    removal = Removal(model, images, attributions, target, baseline, score, batch_size, outputs)
    steps = _Steps(removal, step)
    drops = removal.before[:, None] - removal.by_row(steps.alone, steps.count)
    return correlation(steps.sums, drops.to(steps.sums.dtype)).float()


def monotonicity(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    step: int | None = None,
    baseline: Baseline = "zero",
    score: Score = "probability",
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures how often the score does not fall while features come back, the least important first.

    The measure is the share of the steps (Arya et al., 2019): at 1 the attributions are monotonic, which is what AIX360
    asks and answers with yes or no. Quantus puts the baseline into the baseline, so that nothing ever changes.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: importances, of which the magnitude counts, `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        step: features that come back together; None for a 28th of all, so that it costs 29 forwards.
        baseline: what the image starts as, see `deletion`.
        score: "probability" of the class, or its "logit".
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`, in 0..1.

    Raises:
        InputError: see `faithfulness_correlation`.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.monotonicity(model, images, GradCAM(model)(images).heatmap).shape
        torch.Size([2])
    """
    removal = Removal(model, images, attributions.abs(), target, baseline, score, batch_size, outputs)
    steps = _Steps(removal, step, ascending=True)
    scores = removal.by_row(steps.after, steps.count + 1)
    return (scores.diff(dim=1) >= 0).float().mean(1)


def monotonicity_correlation(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    target: Target = None,
    *,
    step: int | None = None,
    samples: int = 10,
    score: Score = "probability",
    seed: int = 0,
    batch_size: int = 64,
    outputs: Outputs = "auto",
) -> Tensor:
    """Measures how magnitudes go with the doubt about the score when features are unknown (Nguyen and Martinez, 2020).

    The measure is Spearman's correlation of the attributions of features and the mean square of the change of the score
    when these are drawn at random, evenly between the least and the largest value of the image; 1 is best. Ranks do not
    ask for the paper's division by the score.

    Args:
        model: in evaluation mode.
        images: `[N, C, H, W]`, as the model takes them.
        attributions: importances, of which the magnitude counts, `[R, H, W]` or `[R, C, H, W]`.
        target: None for the class with the largest output, an int for all, N ints or `[N, K]` ints.
        step: features that are drawn together, in the order of their attributions; None for a 28th of all.
        samples: draws of each feature; they cost `28 * samples` forwards.
        score: "probability" of the class, or its "logit".
        seed: seed of the draws, which are the same for each image.
        batch_size: images the model is given at once.
        outputs: the kind of the model's outputs, on which probabilities depend, see `Explainer`.

    Returns:
        float32 `[R]`.

    Raises:
        InputError: see `faithfulness_correlation`.

    Example:
        >>> import torch
        >>> from pyfast_xai import GradCAM, demo, metrics
        >>> model, images = demo.load(), torch.rand(2, 3, 96, 96)
        >>> metrics.monotonicity_correlation(model, images, GradCAM(model)(images).heatmap, samples=2).shape
        torch.Size([2])
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    removal = Removal(model, images, attributions.abs(), target, "zero", score, batch_size, outputs)
    steps, generator = _Steps(removal, step), torch.Generator().manual_seed(seed)
    low, high = (bound.view(-1, 1, 1, 1) for bound in removal.images.flatten(1).aminmax(dim=1))
    squares = torch.zeros_like(steps.sums)
    for _ in range(samples):
        drawn = torch.rand(1, *images.shape[1:], generator=generator).to(removal.images)
        removal.baseline = low + (high - low) * drawn
        squares += (removal.by_row(steps.alone, steps.count) - removal.before[:, None]).square()
    return rank_correlation(steps.sums, squares).float()


class _Steps:
    """Features that are taken together, in the order of their attributions.

    Args:
        removal: removal of the features.
        step: features of a group.
        ascending: whether the least attribution comes first.

    Attributes:
        count: S, the groups of a row.
        sums: sums of the attributions of each group, `[R, S]`.
    """

    def __init__(self, removal: Removal, step: int | None, *, ascending: bool = False) -> None:
        features = removal.values.shape[1]
        step = check_step(step, features)
        self.count = math.ceil(features / step)
        self._place = torch.div(removal.ranks(-removal.values if ascending else None), step, rounding_mode="floor")
        self.sums = removal.values.new_zeros(len(self._place), self.count).scatter_add(1, self._place, removal.values)

    def alone(self, rows: Tensor, at: Tensor) -> Tensor:
        """Returns the features of one group of each row, bool `[M, P]`."""
        return self._place[rows] == at[:, None]

    def after(self, rows: Tensor, at: Tensor) -> Tensor:
        """Returns the features of all groups of each row from one on, bool `[M, P]`."""
        return self._place[rows] >= at[:, None]
