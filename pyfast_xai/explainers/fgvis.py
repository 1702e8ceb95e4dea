"""FGVis (Wagner et al., 2019): the smallest part of an image that keeps, or destroys, a class.

A mask for each pixel and colour, found by gradient descent that may not excite what the image itself did not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import blurred, broadcast
from pyfast_xai.explainers.common.explainer import Explainer, Settings, one_of
from pyfast_xai.explainers.common.outputs import OutputKind, OutputKinds
from pyfast_xai.explainers.common.progress_bar import ProgressBar, ShowProgress
from pyfast_xai.explainers.common.targets import Target, class_columns, logits_of, targets_of
from pyfast_xai.explainers.common.tensors import repeat_rows, take_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.rules.gradient.bounds import Bounding, Bounds, Clipped, bounds_of


class Game(NamedTuple):
    """One of the four games: the start of the mask, and its goal."""

    start: float
    keeps: bool

    @property
    def sign(self) -> int:
        """Returns 1 where the similarity and the mask are made small, -1 where they are made large (Eq. 2 and 3)."""
        return 1 if self.keeps else -1


GAMES = {
    "preservation": Game(start=1, keeps=True),
    "deletion": Game(start=1, keeps=False),
    "generation": Game(start=0, keeps=True),
    "repression": Game(start=0, keeps=False),
}
BASELINES = ("zero", "blur", "noise")
DEFENCES = ("gradient", "forward", "none")

# Iterations between two looks at how the games stand, where a look is more than reading memory. Nothing but the time of
# looking depends on it: a game that is over changes no more.
LOOKS = {"cuda": 10}


@dataclass(eq=False, repr=False)
class MaskExplanation(Explanation):
    """The explanation by a game.

    Attributes:
        mask: as it was optimised, `[N, C, H, W]` in 0..1: 1 keeps a pixel's colour, 0 replaces it by the baseline.
        perturbed: the image under the mask, a valid input of the model, `[N, C, H, W]`.
        complement: the image under the complementary mask, likewise.
        after: the model's probability for the target on `perturbed`, float32 `[N]`.
        reached: whether the requested score was reached, bool `[N]`.
        iterations: forward and backward passes it took, int64 `[N]`.
        sparsity: the last weight of the mask's size, float32 `[N]`.
        game: the game that was played.
    """

    mask: Tensor | None = None
    perturbed: Tensor | None = None
    complement: Tensor | None = None
    after: Tensor | None = None
    reached: Tensor | None = None
    iterations: Tensor | None = None
    sparsity: Tensor | None = None
    game: str = "deletion"

    @property
    def evidence(self) -> Tensor:
        """Returns the evidence mask, `[N, C, H, W]`: the mask of preservation and generation, or its complement."""
        assert self.mask is not None
        return self.mask if GAMES[self.game].keeps else 1 - self.mask

    def rgb(self) -> Tensor:
        """Returns the evidence in the image's own colours on the reference, `[N, 3, H, W]` in 0..1 (Fig. 2 c2, e1).

        Raises:
            InputError: the explanation is one of volumes.
        """
        self._check_flat()
        assert self.images is not None
        shown = self.perturbed if GAMES[self.game].keeps else self.complement
        assert shown is not None
        return render.for_display(torch.cat([self.images, shown], 3))[..., self.images.shape[3] :]


class FGVis(Explainer):
    """Fine-grained masks of evidence, one value for each pixel and colour (Wagner et al., 2019).

    Of `e = m x + (1 - m) r` (Eq. 1) the mask m is found by projected gradient descent. Deletion and preservation
    start at the image (m = 1), generation and repression at the baseline (m = 0). Gradients that would excite an
    activation further than the image does are not passed (Eq. 6), at every call of every nonlinearity, so that the
    mask shows what is in the image and is no adversarial noise.

    Of what the paper leaves open each has an argument:

    Args:
        model: in evaluation mode.
        game: "deletion", the paper's choice for pictures, "preservation", "generation" or "repression".
        n_iterations: at most; a game that is won stops earlier.
        similarity: "softmax", minus the class's probability, or "cross-entropy" with the class as hard target. The
            paper names both. Cross-entropy is the default: its gradient does not vanish where the class is unlikely.
        baseline: r: "zero" (the mean colour of normalised images, the paper's), "blur", "noise", or a tensor that
            broadcasts to the images.
        defence: "gradient" (Eq. 6), "forward" (the clipping layers of Eq. 5, which change the model) or "none".
        sparsity: weight of the mask's size (the paper's lambda), a number, or None to search it: it grows while the
            score is reached and falls while it is not, so the mask settles where the score is just reached.
        sparsity_growth: factor of that search in an iteration.
        score_ratio: what reaching the score means: `p(e) >= score_ratio p(x)` in the games that keep, and
            `p(e) <= (1 - score_ratio) p(x)` in those that destroy.
        stop_at: "score", or "class": the class is the predicted one (or no longer is).
        lr: step of the descent.
        normalize: divide each image's gradient of the similarity by its largest magnitude, as the only public code
            does; `lr` and `sparsity` are then in units of the mask. Without, they are the paper's own.
        patience: stop an image whose best mask has not become one percent better for as many iterations.
        blur: standard deviation of the blurred baseline, in pixels.
        seed: seed of the noise baseline, which is the same for every image.
        progress: True shows a bar on stderr with the mean score, None shows one on a terminal; or a function called
            with a `Progress`, whose details are the mean "score" and the number of "images" that are still played; on
            a CUDA device every tenth iteration.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import FGVis, demo
        >>> explanation = FGVis(demo.load(), n_iterations=3)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.mask.shape
        torch.Size([1, 3, 96, 96])
    """

    method = "fgvis"
    paper = "Interpretable and fine-grained visual explanations for convolutional neural networks (Wagner et al., 2019)"
    ranks = (3, 4, 5)
    slow = True
    takes_functions = takes_gradients = False

    def __init__(
        self,
        model: nn.Module,
        *,
        game: Literal["deletion", "preservation", "generation", "repression"] = "deletion",
        n_iterations: int = 300,
        similarity: Literal["cross-entropy", "softmax"] = "cross-entropy",
        baseline: Literal["zero", "blur", "noise"] | Tensor = "zero",
        defence: Literal["gradient", "forward", "none"] = "gradient",
        sparsity: float | None = None,
        sparsity_growth: float = 1.1,
        score_ratio: float = 0.95,
        stop_at: Literal["score", "class"] = "score",
        lr: float = 0.1,
        normalize: bool = True,
        patience: int = 50,
        blur: float = 10.0,
        seed: int = 0,
        progress: ShowProgress = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, **settings)
        self.game: str = one_of("game", game, GAMES)
        self.similarity: str = one_of("similarity", similarity, ("cross-entropy", "softmax"))
        self.baseline = baseline if isinstance(baseline, Tensor) else one_of("baseline", baseline, BASELINES)
        self.defence: Any = one_of("defence", defence, DEFENCES)
        self.stop_at: str = one_of("stop_at", stop_at, ("score", "class"))
        for name, value, low in (("n_iterations", n_iterations, 1), ("patience", patience, 0)):
            if value < low:
                raise InputError(f"{name} must be at least {low}, got {value}")
        for name, number in (("lr", lr), ("blur", blur)):
            if number <= 0:
                raise InputError(f"{name} must be positive, got {number}")
        if sparsity is not None and sparsity < 0:
            raise InputError(f"sparsity must not be negative, got {sparsity}")
        if sparsity_growth <= 1:
            raise InputError(f"sparsity_growth must be larger than 1, got {sparsity_growth}")
        if not 0 < score_ratio < 1:
            raise InputError(f"score_ratio must lie between 0 and 1, got {score_ratio}")
        self.n_iterations, self.sparsity = n_iterations, sparsity
        self.sparsity_growth, self.score_ratio = sparsity_growth, score_ratio
        self.lr, self.normalize, self.patience = lr, normalize, patience
        self.blur, self.seed, self.progress = blur, seed, progress

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> MaskExplanation:
        # The kinds of the outputs are those for the images as they are: a changed image must not change them.
        targets = targets_of(self.record(images, *args, **kwargs), target, self.outputs, self.labels)
        assert targets.target is not None
        assert targets.score is not None
        assert targets.kinds is not None
        if targets.kinds.kind == "values":
            raise InputError(
                "outputs must say how the model's outputs become probabilities, 'independent logits' or "
                "'probabilities', for the games of fgvis, got 'values' (those of a single output)"
            )
        each, kind = targets.each, targets.kinds.kind
        source = repeat_rows(torch.arange(len(images), device=images.device), each)
        rows, chosen, before = repeat_rows(images, each), targets.target.flatten(), targets.score.flatten()
        distribution = targets.kinds.distributions
        distribution = torch.zeros_like(source, dtype=torch.bool) if distribution is None else distribution[source]
        match = _Match.initial(
            GAMES[self.game], rows, self._baseline(rows), chosen, before, distribution, sparsity=self.sparsity
        )

        def arguments(rows: Tensor) -> Any:
            return take_rows((args, kwargs), len(images), source[rows])

        with ProgressBar(
            self.progress, "FGVis", self.n_iterations, "score {score:.3f}, {images:.0f} images left"
        ) as progress:
            self._play(match, kind, arguments, progress)
        lost = int((~match.reached).sum())
        if lost:
            self.warn(
                "%d of %d games were not won in %d iterations; their masks are those that came nearest "
                "(said once; `reached` tells them apart)",
                *(lost, len(rows), self.n_iterations),
            )
        mask = match.best
        game = GAMES[self.game]
        shown = mask if game.keeps else 1 - mask
        return MaskExplanation(
            **self._fields(images, targets),
            heatmap=shown.float().mean(1),
            attribution=shown,
            mask=mask,
            perturbed=_mixed(mask, rows, match.baseline),
            complement=_mixed(1 - mask, rows, match.baseline),
            after=match.after,
            reached=match.reached,
            iterations=match.iterations,
            sparsity=match.sparsity,
            game=self.game,
        )

    def _play(
        self, match: "_Match", kind: OutputKind, arguments: Callable[[Tensor], Any], progress: ProgressBar
    ) -> None:
        every = LOOKS.get(match.mask.device.type, 1)
        rows = torch.arange(len(match.images), device=match.images.device)
        current, iteration, left = match, 0, len(rows)
        while left and iteration < self.n_iterations:
            # Bounds are taken by the very kernels that will meet them: at m = 1 an activation lies on its bound to the
            # last bit.
            args, kwargs = arguments(rows)
            size_before, bounds = len(rows), self._bounds(current, args, kwargs)
            with self.repeating(self._iterate, current, bounds, kind, args, kwargs, key=self._settings()) as iterate:
                del bounds
                # Until half of the images are done: the others then go on alone.
                while left and 2 * left > size_before and iteration < self.n_iterations:
                    ran = min(every, self.n_iterations - iteration)
                    for _ in range(ran):
                        look = iterate()
                    iteration += ran
                    playing, score = look.tolist()  # the one number read
                    left = int(playing)
                    progress.advance(ran, score=score, images=left)
                current = iterate.arguments[0]
                if current is not match:
                    match.put(rows, current)
            if left and iteration < self.n_iterations:
                rows = (~match.done).nonzero().flatten()
                current = match.take(rows)

    def _bounds(self, match: "_Match", args: Any, kwargs: Any) -> Bounds | None:
        if self.defence == "none":
            return None
        # Through the mask that changes nothing, so that they come in the memory format of all that follow.
        images = _mixed(torch.ones_like(match.mask), match.images, match.baseline)
        return bounds_of(self.record(images, *args, policy=Bounding(), **kwargs))

    def _iterate(self, match: "_Match", bounds: Bounds | None, kind: OutputKind, args: Any, kwargs: Any) -> Tensor:
        """Runs an iteration in place, without reading numbers; returns the number of images left and the mean score."""
        policy = GradientRules(warned=self.warned) if bounds is None else Clipped(bounds, self.defence, self.warned)
        gradient, probability, predicted = self._evaluate(policy, match, kind, args, kwargs)
        match.judge(self, probability, predicted)
        match.step(self, gradient)
        return torch.stack([(~match.done).sum().to(match.after.dtype), match.after.mean()])

    def _settings(self) -> tuple[Any, ...]:
        """Returns all that an iteration depends on besides tensors."""
        named = (self.game, self.similarity, self.defence, self.stop_at, self.normalize, self.sparsity is None)
        return (*named, self.sparsity_growth, self.score_ratio, self.lr, self.patience)

    def _evaluate(
        self, policy: GradientRules, match: "_Match", kind: OutputKind, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradient of the similarity by the mask, the class probability and the predicted class."""
        perturbed = _mixed(match.mask, match.images, match.baseline)
        tape = self.record(perturbed, *args, policy=policy, **kwargs)
        value, logits = logits_of(tape)
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            scores = OutputKinds(kind, match.distribution).log_scores(class_columns(leaf))
            log_probability = scores.gather(1, match.target[:, None])[:, 0]
            similarity = log_probability if self.similarity == "cross-entropy" else log_probability.exp()
            (seed,) = torch.autograd.grad(-similarity.sum(), leaf)
        (gradient,) = backward_pass(policy, tape, {value: seed[None]}, [tape.inputs[0]])
        slope = match.images - match.baseline
        return gradient[0] * slope, log_probability.detach().exp().float(), class_columns(logits).argmax(1)

    def _baseline(self, images: Tensor) -> Tensor:
        if isinstance(self.baseline, Tensor):
            return broadcast(self.baseline, images)
        if self.baseline == "blur":
            return blurred(images, self.blur)
        if self.baseline == "noise":
            noise = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(self.seed))
            return noise.to(images).expand(images.shape)
        return torch.zeros_like(images)


class _Match(NamedTuple):
    """The state of a game, one row an image and target; played on in place.

    Attributes:
        images: `[N, C, H, W]`.
        baseline: likewise.
        target: int64 `[N]`.
        before: probability of the target on the image, `[N]`.
        distribution: whether the model returns probabilities for the image, bool `[N]`.
        mask: the mask that is being optimised, `[N, C, H, W]`.
        best: the best mask so far, which is returned.
        after: the probability under it, `[N]`.
        reached: whether the score was reached, `[N]`.
        iterations: played so far, `[N]`.
        sparsity: weight of the mask's size, `[N]`.
        done: whether the game is over, `[N]`; of such a row nothing changes any more.
        size: size of the smallest mask that won, `[N]`.
        stalled: iterations since the mask became clearly smaller, `[N]`.
    """

    images: Tensor
    baseline: Tensor
    target: Tensor
    before: Tensor
    distribution: Tensor
    mask: Tensor
    best: Tensor
    after: Tensor
    reached: Tensor
    iterations: Tensor
    sparsity: Tensor
    done: Tensor
    size: Tensor
    stalled: Tensor

    @classmethod
    def initial(
        cls,
        game: Game,
        images: Tensor,
        baseline: Tensor,
        target: Tensor,
        before: Tensor,
        distribution: Tensor,
        *,
        sparsity: float | None,
    ) -> "_Match":
        def each(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((len(images),), value, dtype=dtype, device=images.device)

        mask = torch.full_like(images, game.start, memory_format=torch.contiguous_format)
        return cls(
            images,
            baseline,
            target,
            before,
            distribution,
            mask=mask,
            best=mask.clone(),
            after=before.clone(),
            reached=each(False, torch.bool),
            iterations=each(0, torch.int64),
            sparsity=each(0.1 if sparsity is None else sparsity),
            done=each(False, torch.bool),
            size=each(math.inf),
            stalled=each(0, torch.int64),
        )

    def take(self, rows: Tensor) -> "_Match":
        """Returns a game of some rows alone."""
        return _Match(*(tensor[rows] for tensor in self))

    def put(self, rows: Tensor, other: "_Match") -> None:
        """Stores the state of the game of some rows."""
        for target, source in zip(self[_FIRST_STATE:], other[_FIRST_STATE:], strict=True):
            target[rows] = source

    def judge(self, rules: FGVis, probability: Tensor, predicted: Tensor) -> None:
        """Keeps the best masks, adapts the sparsity, and marks the rows that are done."""
        keeps = GAMES[rules.game].keeps
        playing = ~self.done
        self.iterations.add_(playing)
        if rules.stop_at == "class":
            won = (predicted == self.target) == keeps
        elif keeps:
            won = probability >= rules.score_ratio * self.before
        else:
            won = probability <= (1 - rules.score_ratio) * self.before
        size = (self.mask if keeps else 1 - self.mask).float().flatten(1).mean(1)
        # A mask that wins is better than any that does not; of those that win the smallest is best, of the others
        # the one that comes nearest.
        nearer = (probability > self.after) if keeps else (probability < self.after)
        first = self.iterations == 1
        better = playing & torch.where(won, ~self.reached | (size < self.size), ~self.reached & (nearer | first))
        improved = won & (~self.reached | (size < 0.99 * self.size))
        _update(self.best, better, self.mask)
        _update(self.after, better, probability)
        _update(self.size, better & won, size)
        self.reached.logical_or_(won & playing)
        _update(self.stalled, playing, torch.where(improved, 0, self.stalled + 1))
        if rules.sparsity is None:
            _update(
                self.sparsity,
                playing,
                self.sparsity * torch.where(won, rules.sparsity_growth, 1 / rules.sparsity_growth),
            )
        self.done.logical_or_(self.reached & (self.stalled >= rules.patience))

    def step(self, rules: FGVis, gradient: Tensor) -> None:
        """Takes a step of gradient descent, within 0..1."""
        if rules.normalize:
            largest = _each_row(gradient.abs().flatten(1).amax(1), gradient)
            gradient = gradient / torch.where(largest > 0, largest, 1)
        # Both terms change their sign with the game; that of the size is never filtered.
        step = gradient.add_(_each_row(self.sparsity, gradient).to(gradient.dtype)).mul_(rules.lr)
        moved = torch.sub(self.mask, step, alpha=GAMES[rules.game].sign).clamp_(0, 1)
        _update(self.mask, ~self.done, moved)


_FIRST_STATE = _Match._fields.index("mask")  # what comes before does not change


def _each_row(numbers: Tensor, like: Tensor) -> Tensor:
    """Returns numbers `[N]` with as many dimensions as a tensor `[N, ...]`."""
    return numbers.view(-1, *[1] * (like.dim() - 1))


def _update(tensor: Tensor, rows: Tensor, new: Tensor) -> None:
    """Overwrites the selected rows, bool `[N]`, without a synchronisation with the device."""
    torch.where(_each_row(rows, tensor), new, tensor, out=tensor)


def _mixed(mask: Tensor, images: Tensor, baseline: Tensor) -> Tensor:
    """Returns `e = m x + (1 - m) r` (Eq. 1); x itself, to the last bit, where m is 1."""
    return mask * images + (1 - mask) * baseline
