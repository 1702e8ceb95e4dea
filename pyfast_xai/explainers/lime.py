"""LIME (Ribeiro, Singh and Guestrin, 2016): a linear model of what superpixels do to the score."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import baseline_for, check_baseline
from pyfast_xai.explainers.common.explainer import at_least, one_of
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, PerturbationSettings, positive
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.progress_bar import ProgressBar
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.explanation import Explanation

Segments = Literal["quickshift", "slic"] | Tensor | Callable[[Tensor], Any]


@dataclass(eq=False, repr=False)
class SuperpixelExplanation(Explanation):
    """The explanation by a linear model of superpixels.

    Attributes:
        segments: the superpixel of every pixel, int64 `[N, H, W]`, numbered from 0 in each image.
        fit: how well the linear model fits the scores, weighted R squared, float32 `[N]`; 1 is perfect.
    """

    segments: Tensor | None = None
    fit: Tensor | None = None


class LIME(Perturbation):
    """Weights of superpixels in a linear model of the score around the image (Ribeiro et al., 2016).

    Superpixels are left out at random, each with probability one half. A ridge regression of the scores on what was
    left, in which a sample counts the more the nearer it is to the whole image, gives a weight to each superpixel.
    Settings are those of the authors' `lime_image`.

    Args:
        model: in evaluation mode.
        n_samples: how many, the first of which is the image itself.
        segments: "quickshift" as the authors' (kernel 4, distance 200, ratio 0.2), or "slic", both of scikit-image
            (the extra `lime`); integers `[H, W]` or `[N, H, W]`; or a function that gives `[H, W]` for an image
            `[C, H, W]`.
        n_superpixels: about how many SLIC makes; quickshift finds out by itself.
        baseline: what superpixels that are left out become: "mean", their own mean colour; a number (0 is the mean
            colour of normalised images); "blur"; or a tensor that broadcasts to the images.
        blur: standard deviation of the blurred baseline, in pixels.
        kernel_width: of the exponential kernel on the cosine distance to the image.
        alpha: penalty on the squares of the weights; the intercept has none.
        seed: of the samples and of quickshift; the process's own random numbers are not touched.
        **settings: those of `Perturbation`.

    An explanation has `signed_map`, the weight of every pixel's superpixel `[N, H, W]`, signed; `heatmap`, its positive
    part; `segments` and `fit`.

    Raises:
        InputError: a setting that does not exist, or scikit-image is needed and not installed.

    Example:
        >>> import torch
        >>> from pyfast_xai import LIME, demo
        >>> squares = torch.arange(16).view(4, 4).repeat_interleave(24, 0).repeat_interleave(24, 1)
        >>> explanation = LIME(demo.load(), segments=squares, n_samples=50)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([1, 96, 96])
    """

    method = "lime"
    paper = '"Why should I trust you?": explaining the predictions of any classifier (Ribeiro et al., 2016)'

    def __init__(
        self,
        model: nn.Module,
        *,
        n_samples: int = 1000,
        segments: Segments = "quickshift",
        n_superpixels: int = 50,
        baseline: Literal["mean", "blur"] | float | Tensor = "mean",
        blur: float = 10.0,
        kernel_width: float = 0.25,
        alpha: float = 1.0,
        seed: int = 0,
        **settings: Unpack[PerturbationSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.n_samples = at_least(2, "n_samples", n_samples)
        self.n_superpixels = at_least(1, "n_superpixels", n_superpixels)
        ready = isinstance(segments, Tensor) or callable(segments)
        self.segments: Segments = segments if ready else one_of("segments", segments, ("quickshift", "slic"))
        self.baseline = check_baseline(baseline)
        self.blur, self.kernel_width = positive("blur", blur), positive("kernel_width", kernel_width)
        self.alpha, self.seed = positive("alpha", alpha), seed

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> SuperpixelExplanation:
        segments = torch.stack([self._segment(images, n) for n in range(len(images))])
        baseline = None if _is_mean(self.baseline) else baseline_for(self.baseline, images, self.blur)
        maps, fits = [], []
        with ProgressBar(self.progress, self.method, self.n_samples * len(images)) as progress:
            for n, image in enumerate(images):
                hidden = _means(image, segments[n]) if baseline is None else baseline[n]
                fit = self._fit(image, hidden, segments[n], n, scores, progress)
                weights, quality = fit.solve(self.alpha)
                maps.append(weights.to(at_least_float32(images).dtype).to(images.device)[:, segments[n]])
                fits.append(quality.float().to(images.device))
        signed = torch.cat(maps)
        return SuperpixelExplanation(
            **self._fields(images, scores.targets),
            heatmap=signed.clamp_min(0).float(),
            signed_map=signed,
            segments=segments.repeat_interleave(scores.each, 0),
            fit=torch.cat(fits),
        )

    def _fit(
        self, image: Tensor, hidden: Tensor, segments: Tensor, n: int, scores: PerturbationScores, progress: ProgressBar
    ) -> "_Ridge":
        """Returns the regression for one image `[C, H, W]`, sample after sample."""
        count = int(segments.max()) + 1
        ridge = _Ridge(count, scores.each)
        # The same draws for each image, whatever stands before it in the batch.
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.n_samples, self.batch_size):
            size = min(self.batch_size, self.n_samples - start)
            left = torch.stack([torch.randint(2, (count,), generator=generator) for _ in range(size)])
            if start == 0:
                left[0] = 1
            visible = left.bool().to(image.device)[:, segments]
            rows = torch.full((size,), n, device=image.device)
            after = scores(torch.where(visible[:, None], image, hidden), rows)
            ridge.add(left.double(), after.cpu().double(), self._nearness(left.double()))
            progress.advance(size)
        return ridge

    def _nearness(self, left: Tensor) -> Tensor:
        """Returns the weights `[m]` of samples `[m, superpixels]` by their cosine distance to the whole image."""
        # The cosine of m ones among n with n ones is the root of m / n.
        distance = 1 - left.mean(1).sqrt()
        return (-0.5 * (distance / self.kernel_width) ** 2).exp()

    def _segment(self, images: Tensor, n: int) -> Tensor:
        """Returns the superpixels of one of the images, numbered from 0, int64 `[H, W]`."""
        if isinstance(self.segments, Tensor):
            shapes = (images.shape[2:], (len(images), *images.shape[2:]))
            if self.segments.shape not in shapes:
                raise InputError(
                    f"segments must have shape {list(shapes[0])} or {list(shapes[1])}, got {list(self.segments.shape)}"
                )
            made = self.segments if self.segments.dim() == 2 else self.segments[n]
        elif callable(self.segments):
            made = torch.as_tensor(self.segments(images[n]))
            if made.shape != images.shape[2:]:
                raise InputError(f"segments must return {list(images.shape[2:])}, got {list(made.shape)}")
        else:
            made = self._superpixels(images[n])
        if made.is_floating_point() or made.is_complex():
            raise InputError(f"segments must hold integers, got {made.dtype}")
        return made.to(images.device).unique(return_inverse=True)[1]

    def _superpixels(self, image: Tensor) -> Tensor:
        try:
            from skimage import segmentation
        except ImportError as error:
            raise InputError(
                f"segments {self.segments!r} need scikit-image (pip install pyfast-xai[lime]), or must be a tensor"
            ) from error
        # What people see, since the distances between colours are those that people see.
        shown = render.for_display(image[None])[0].permute(1, 2, 0).double().cpu().numpy()
        if self.segments == "slic":
            return torch.from_numpy(segmentation.slic(shown, n_segments=self.n_superpixels, start_label=0))
        made = segmentation.quickshift(shown, kernel_size=4, max_dist=200, ratio=0.2, rng=self.seed)
        return torch.from_numpy(made)


class _Ridge:
    """Weighted ridge regression in float64 whose samples need not be kept.

    Args:
        features: F of them; an intercept is added, which has no penalty.
        answers: K, each with a regression of its own.
    """

    def __init__(self, features: int, answers: int) -> None:
        self._gram = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self._product = torch.zeros(features + 1, answers, dtype=torch.float64)
        self._squares = torch.zeros(answers, dtype=torch.float64)

    def add(self, features: Tensor, answers: Tensor, weights: Tensor) -> None:
        """Adds samples: `[m, F]`, `[m, K]` and `[m]`."""
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        weighted = features * weights[:, None]
        self._gram += weighted.T @ features
        self._product += weighted.T @ answers
        self._squares += weights @ answers.square()

    def solve(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Returns the weights `[K, F]` and the weighted R squared `[K]`."""
        penalty = torch.full((len(self._gram),), alpha, dtype=torch.float64)
        penalty[-1] = 0
        solution = torch.linalg.solve(self._gram + penalty.diag(), self._product)
        residual = self._squares - 2 * (solution * self._product).sum(0) + (solution * (self._gram @ solution)).sum(0)
        spread = self._squares - self._product[-1].square() / self._gram[-1, -1]
        # Scores that do not change at all are fitted by the intercept.
        tiny = 1e-14 * self._squares
        return solution[:-1].T, torch.where(spread > tiny, 1 - residual / spread, 1.0)


def _is_mean(baseline: Any) -> bool:
    return isinstance(baseline, str) and baseline == "mean"


def _means(image: Tensor, segments: Tensor) -> Tensor:
    """Returns an image `[C, H, W]` in which every superpixel has its mean colour."""
    flat, indices = at_least_float32(image).flatten(1), segments.flatten()
    sums = flat.new_zeros(len(image), int(indices.max()) + 1).index_add_(1, indices, flat)
    return (sums / indices.bincount())[:, segments].to(image.dtype)
