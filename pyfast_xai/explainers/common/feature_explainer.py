"""The base of explainers that hide and show features of the image: pixels that belong together."""

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.baselines import baseline_for, check_baseline
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.feature_masks import FeatureMask, Features, check_feature_mask
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, PerturbationSettings, positive
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.progress_bar import ProgressBar
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.explanation import Explanation


@dataclass(eq=False, repr=False)
class FeatureExplanation(Explanation):
    """The explanation by one value for each feature.

    Attributes:
        feature_mask: the feature of every pixel, int64 `[N, 1 or C, H, W]`, numbered from 0 in each image.
        values: values of the features of each row, `[N, F]`, signed; NaN where an image has fewer features than
            another.
        fit: how well the linear model of LIME fits the scores, weighted R squared, float32 `[N]`, where 1 is perfect;
            None for other methods.
    """

    feature_mask: Tensor | None = None
    values: Tensor | None = None
    fit: Tensor | None = None


class Coalitions(NamedTuple):
    """The features that are present in each sample of an image.

    Attributes:
        samples: number of samples.
        rows: returns bool `[m, F]`, or shares of presence from 0 to 1, of the samples with numbers int64 `[m]`.
    """

    samples: int
    rows: Callable[[Tensor], Tensor]


class Values(NamedTuple):
    """The values of features.

    Attributes:
        values: float64 `[K, F]` on the CPU.
        fit: fit of a linear model, `[K]`; None without one.
    """

    values: Tensor
    fit: Tensor | None = None


class FeatureSettings(PerturbationSettings, total=False):
    """The keyword arguments of explainers that hide features, see `FeaturePerturbation`."""

    feature_mask: FeatureMask | None
    n_superpixels: int
    baseline: Literal["mean", "blur"] | float | Tensor | None
    blur: float
    seed: int


class FeaturePerturbation(Perturbation):
    """Base of explainers that say what each feature is worth by the scores of images that lack some.

    A method is two functions: one draws the features of its samples, one computes values from their scores.

    Args:
        model: in evaluation mode.
        feature_mask: which pixels belong together: an int, the cells along each side of a grid; "quickshift" (kernel 4,
            distance 200, ratio 0.2) or "slic", superpixels of scikit-image (the extra `lime`); integers `[H, W]`,
            `[N, H, W]` or, to tell channels apart, `[1 or N, C, H, W]`; or a function that gives `[H, W]` or
            `[C, H, W]` for an image `[C, H, W]`. None for the method's usual one.
        n_superpixels: about how many SLIC makes; quickshift finds out by itself.
        baseline: what absent features become: a number (0 is the mean colour of normalised images); "mean", their
            own mean colour; "blur"; or a tensor that broadcasts to the images. None for the method's usual one.
        blur: standard deviation of the blurred baseline, in pixels.
        seed: seed of the samples and of quickshift; the process's own random numbers are not touched.
        **settings: those of `Perturbation`.
    """

    ranks = (3, 4, 5)
    default_feature_mask: ClassVar[Literal["quickshift", "slic"] | int] = 7
    default_baseline: ClassVar[Literal["mean", "blur"] | float] = 0.0

    def __init__(
        self,
        model: nn.Module,
        *,
        feature_mask: FeatureMask | None = None,
        n_superpixels: int = 50,
        baseline: Literal["mean", "blur"] | float | Tensor | None = None,
        blur: float = 10.0,
        seed: int = 0,
        **settings: Unpack[PerturbationSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.feature_mask = check_feature_mask(self.default_feature_mask if feature_mask is None else feature_mask)
        self.n_superpixels = at_least(1, "n_superpixels", n_superpixels)
        self.baseline = check_baseline(self.default_baseline if baseline is None else baseline)
        self.blur, self.seed = positive("blur", blur), seed

    @abc.abstractmethod
    def _coalitions(self, features: int) -> Coalitions:
        """Returns the samples of an image with so many features."""

    @abc.abstractmethod
    def _values(self, coalitions: Coalitions, after: Tensor, before: Tensor) -> Values:
        """Returns the values of the features of an image.

        Args:
            coalitions: the samples.
            after: their scores, float64 `[S, K]`, on the CPU.
            before: the scores of the image itself, float64 `[K]`, on the CPU.
        """

    def _hidden(self, images: Tensor, features: Features) -> Callable[[int, Tensor], Tensor]:
        """Returns the values of absent features in some samples of an image, `[C, H, W]` or `[m, C, H, W]`."""
        mean = isinstance(self.baseline, str) and self.baseline == "mean"
        baseline = features.means(images) if mean else baseline_for(self.baseline, images, self.blur)
        return lambda n, samples: baseline[n]

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> FeatureExplanation:
        features = Features(self.feature_mask, images, self.n_superpixels, self.seed)
        # Images with as many features share their samples, whatever stands before them in the batch.
        samples = {count: self._coalitions(count) for count in sorted(set(features.counts))}
        plans = [samples[count] for count in features.counts]
        hidden = self._hidden(images, features)
        after: list[list[Tensor]] = [[] for _ in plans]
        with ProgressBar(self.progress, self.method, sum(plan.samples for plan in plans)) as progress:
            for parts in _batches(plans, self.batch_size):
                changed = [
                    features.shown(n, plans[n].rows(numbers), images[n], hidden(n, numbers)) for n, numbers in parts
                ]
                sizes = [len(numbers) for _, numbers in parts]
                rows = torch.tensor([n for n, _ in parts]).repeat_interleave(torch.tensor(sizes)).to(images.device)
                for (n, _), part in zip(parts, scores(torch.cat(changed), rows).split(sizes), strict=True):
                    after[n].append(part.double().cpu())
                progress.advance(sum(sizes))
        before = scores.before.double().cpu()
        results = [self._values(plan, torch.cat(after[n]), before[n]) for n, plan in enumerate(plans)]
        dtype = at_least_float32(images).dtype
        values = [part.values.to(images.device, dtype) for part in results]
        attribution = torch.cat([each[:, mask] for each, mask in zip(values, features.mask, strict=True)])
        fits = [part.fit for part in results if part.fit is not None]
        signed = attribution.mean(1)
        return FeatureExplanation(
            **self._fields(images, scores.targets),
            heatmap=signed.clamp_min(0).float(),
            attribution=attribution.expand(-1, images.shape[1], *images.shape[2:]),
            signed_map=signed,
            feature_mask=features.mask.repeat_interleave(scores.each, 0),
            values=torch.nn.utils.rnn.pad_sequence([row for each in values for row in each], True, float("nan")),
            fit=torch.cat(fits).float().to(images.device) if fits else None,
        )


def _batches(plans: list[Coalitions], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Yields batches of samples: of which image, and their numbers among the image's own, int64 `[m]`."""
    batch: list[tuple[int, Tensor]] = []
    room = size
    for n, plan in enumerate(plans):
        start = 0
        while start < plan.samples:
            stop = min(plan.samples, start + room)
            batch.append((n, torch.arange(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch
