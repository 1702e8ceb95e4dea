"""FGVis (Wagner et al., 2019): the smallest part of an image that keeps, or destroys, a class.

A mask for each pixel and colour, found by gradient descent that may not excite what the image itself did not.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, Target, choose, is_distribution, logits_of, one_of, rows_of
from pyfast_xai.explainers.baseline import blurred
from pyfast_xai.explainers.progress import Progress
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.response import Response, walk
from pyfast_xai.rules.response.bounds import Bounding, Clipped, bounds_of

logger = logging.getLogger("pyfast_xai")


class Game(NamedTuple):
    """One of the four games: where the mask starts, and what it is played for."""

    start: float
    keeps: bool

    @property
    def sign(self) -> int:
        """1 where the similarity and the mask are made small, -1 where they are made large (Eq. 2 and 3)."""
        return 1 if self.keeps else -1


GAMES = {
    "preservation": Game(start=1, keeps=True),
    "deletion": Game(start=1, keeps=False),
    "generation": Game(start=0, keeps=True),
    "repression": Game(start=0, keeps=False),
}
REFERENCES = ("zero", "blur", "noise")
DEFENCES = ("gradient", "forward", "none")


@dataclass(eq=False)
class MaskExplanation(Explanation):
    """What a game found.

    Attributes:
        mask: as it was optimised, `[N, C, H, W]` in 0..1: 1 keeps a pixel's colour, 0 replaces it by the reference.
        perturbed: the image under the mask, a valid input of the model, `[N, C, H, W]`.
        complement: the image under the complementary mask, likewise.
        after: the model's probability for the target on `perturbed`, float32 `[N]`.
        reached: whether the score that was asked for was reached, bool `[N]`.
        iterations: forward and backward passes it took, int64 `[N]`.
        sparsity: the last weight of the mask's size, float32 `[N]`.
        game: that was played.
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
        """The mask of what matters, `[N, C, H, W]`: the mask of preservation and generation, else its complement."""
        assert self.mask is not None
        return self.mask if GAMES[self.game].keeps else 1 - self.mask

    def rgb(self) -> Tensor:
        """The evidence in the image's own colours on the reference, `[N, 3, H, W]` in 0..1 (Fig. 2 c2 and e1)."""
        assert self.images is not None
        shown = self.perturbed if GAMES[self.game].keeps else self.complement
        assert shown is not None
        return render.for_display(torch.cat([self.images, shown], 3))[..., self.images.shape[3] :]


class FGVis(Explainer):
    """Fine-grained masks of evidence, one value for each pixel and colour (Wagner et al., 2019).

    Of `e = m x + (1 - m) r` (Eq. 1) the mask m is found by projected gradient descent. Deletion and preservation
    start at the image (m = 1), generation and repression at the reference (m = 0). Gradients that would excite an
    activation further than the image does are not passed (Eq. 6), at every call of every nonlinearity, so that the
    mask shows what is in the image and is no adversarial noise.

    Of what the paper leaves open each has an argument:

    Args:
        model: in evaluation mode.
        game: "deletion", the paper's choice for pictures, "preservation", "generation" or "repression".
        iterations: at most; a game that is won stops earlier.
        similarity: "softmax", minus the class's probability, or "cross-entropy" with the class as hard target. The
            paper names both. Cross-entropy is the default: its gradient does not vanish where the class is unlikely.
        reference: r: "zero" (the mean colour of normalised images, the paper's), "blur", "noise", or a tensor that
            broadcasts to the images.
        defence: "gradient" (Eq. 6), "forward" (the clipping layers of Eq. 5, which change the model) or "none".
        sparsity: weight of the mask's size (the paper's lambda), a number, or None to search it: it grows while the
            score is reached and falls while it is not, so the mask settles where the score is just reached.
        growth: factor of that search in an iteration.
        score: what reaching means: a softmax score comparable to the image's, `p(e) >= score p(x)`, in the games that
            keep, and `p(e) <= (1 - score) p(x)` in those that destroy.
        until: "score", or "class": the class is the predicted one (or no longer is).
        rate: step of the descent.
        normalize: divide each image's gradient of the similarity by its largest magnitude, as the only public code
            does; `rate` and `sparsity` are then in units of the mask. Without, they are the paper's own.
        patience: stop an image whose best mask has not become one percent better for as many iterations.
        blur: standard deviation of the blurred reference, in pixels.
        seed: of the noise reference, which is the same for every image.
        progress: True shows a bar on stderr with the mean score, None does on a terminal; or a function called with
            (iteration, iterations, mean score, images left).
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "fgvis"
    paper = "Interpretable and fine-grained visual explanations for convolutional neural networks (Wagner et al., 2019)"
    slow = True

    def __init__(
        self,
        model: nn.Module,
        *,
        game: Literal["deletion", "preservation", "generation", "repression"] = "deletion",
        iterations: int = 300,
        similarity: Literal["cross-entropy", "softmax"] = "cross-entropy",
        reference: Literal["zero", "blur", "noise"] | Tensor = "zero",
        defence: Literal["gradient", "forward", "none"] = "gradient",
        sparsity: float | None = None,
        growth: float = 1.1,
        score: float = 0.95,
        until: Literal["score", "class"] = "score",
        rate: float = 0.1,
        normalize: bool = True,
        patience: int = 50,
        blur: float = 10.0,
        seed: int = 0,
        progress: bool | Callable[[int, int, float, int], None] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, labels=labels)
        self._told = False
        self.game: str = one_of("game", game, GAMES)
        self.similarity: str = one_of("similarity", similarity, ("cross-entropy", "softmax"))
        self.reference = reference if isinstance(reference, Tensor) else one_of("reference", reference, REFERENCES)
        self.defence: Any = one_of("defence", defence, DEFENCES)
        self.until: str = one_of("until", until, ("score", "class"))
        for name, value, low in (("iterations", iterations, 1), ("patience", patience, 0)):
            if value < low:
                raise InputError(f"{name} must be at least {low}, got {value}")
        for name, number in (("rate", rate), ("blur", blur)):
            if number <= 0:
                raise InputError(f"{name} must be positive, got {number}")
        if sparsity is not None and sparsity < 0:
            raise InputError(f"sparsity must not be negative, got {sparsity}")
        if growth <= 1:
            raise InputError(f"growth must be larger than 1, got {growth}")
        if not 0 < score < 1:
            raise InputError(f"score must lie between 0 and 1, got {score}")
        self.iterations, self.sparsity, self.growth, self.score = iterations, sparsity, growth, score
        self.rate, self.normalize, self.patience = rate, normalize, patience
        self.blur, self.seed, self.progress = blur, seed, progress

    def __call__(self, images: Tensor, target: Target = None, *args: Any, **kwargs: Any) -> MaskExplanation:
        """Play the game on a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the predicted class, an int, N ints, or `[N, K]` ints (a row for each).
            *args: further arguments of the model, the same for all images.
            **kwargs: further keyword arguments of the model, likewise.

        Raises:
            InputError: images or a target that do not fit.
            UnsupportedOpError: the model has an op that cannot be differentiated.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self._explain(images, target, args, kwargs)

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> MaskExplanation:
        self.check(images)
        images = images.detach()
        _, logits = logits_of(self.record(images, *args, **kwargs))
        chosen = choose(logits, target).view(len(images), -1)
        each = chosen.shape[1]
        rows, chosen = rows_of(images, each), chosen.flatten()
        before = _log_probability(rows_of(logits, each), chosen).exp().float()
        match = _Match(self, rows, self._reference(rows), chosen, before)
        with Progress(self.progress, "FGVis", self.iterations, "score {:.3f}, {} images left") as progress:
            self._play(match, args, kwargs, progress)
        lost = int((~match.reached).sum())
        if lost and not self._told:
            self._told = True
            logger.warning(
                "fgvis: %d of %d games were not won in %d iterations; their masks are those that came nearest "
                "(said once; `reached` tells them apart)",
                *(lost, len(rows), self.iterations),
            )
        mask = match.best
        game = GAMES[self.game]
        shown = mask if game.keeps else 1 - mask
        return MaskExplanation(
            method=self.method,
            heatmap=shown.float().mean(1),
            attribution=shown,
            target=chosen,
            score=before,
            images=rows,
            labels=self.labels,
            mask=mask,
            perturbed=_mixed(mask, rows, match.reference),
            complement=_mixed(1 - mask, rows, match.reference),
            after=match.after,
            reached=match.reached,
            iterations=match.iterations,
            sparsity=match.sparsity,
            game=self.game,
        )

    def _play(self, match: "_Match", args: Any, kwargs: Any, progress: Progress) -> None:
        active = torch.arange(len(match.images), device=match.images.device)
        reading: Response | None = None
        held = 0
        for iteration in range(1, self.iterations + 1):
            if reading is None or 2 * len(active) <= held:
                # Half of the images are done: the others go on alone. Their bounds are taken anew, by the very
                # kernels that will meet them: at m = 1 an activation lies on its bound to the last bit.
                rows, held = active, len(active)
                reading = self._reading(match.images[rows], args, kwargs)
            gradient, probability, predicted = self._evaluate(reading, match, rows, args, kwargs)
            match.judge(rows, probability, predicted, iteration)
            active = rows[~match.done[rows]]
            progress.advance(1, float(match.after[rows].mean()), len(active))
            if not len(active):
                return
            match.step(rows, gradient)

    def _reading(self, images: Tensor, args: Any, kwargs: Any) -> Response:
        if self.defence == "none":
            return Response()
        tape = self.record(images, *args, reading=Bounding(), **kwargs)
        return Clipped(bounds_of(tape), self.defence)

    def _evaluate(
        self, reading: Response, match: "_Match", rows: Tensor, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the similarity with respect to the mask, probability of the class and predicted class."""
        perturbed = _mixed(match.mask[rows], match.images[rows], match.reference[rows])
        tape = self.record(perturbed, *args, reading=reading, **kwargs)
        value, logits = logits_of(tape)
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            log_probability = _log_probability(leaf, match.target[rows])
            similarity = log_probability if self.similarity == "cross-entropy" else log_probability.exp()
            (seed,) = torch.autograd.grad(-similarity.sum(), leaf)
        (gradient,) = walk(reading, tape, {value: seed[None]}, [tape.inputs[0]])
        slope = match.images[rows] - match.reference[rows]
        return gradient[0] * slope, log_probability.detach().exp().float(), logits.argmax(1)

    def _reference(self, images: Tensor) -> Tensor:
        if isinstance(self.reference, Tensor):
            try:
                return self.reference.to(images).expand(images.shape)
            except RuntimeError:
                shapes = f"{list(images.shape)}, got {list(self.reference.shape)}"
                raise InputError(f"reference must broadcast to the images, {shapes}") from None
        if self.reference == "blur":
            return blurred(images, self.blur)
        if self.reference == "noise":
            noise = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(self.seed))
            return noise.to(images).expand(images.shape)
        return torch.zeros_like(images)


class _Match:
    """The state of a game, one row an image and target."""

    def __init__(self, rules: FGVis, images: Tensor, reference: Tensor, target: Tensor, before: Tensor) -> None:
        self._rules = rules
        self._game = GAMES[rules.game]
        self.images, self.reference, self.target = images, reference, target
        self._before = before
        count, device = len(images), images.device
        self.mask = torch.full_like(images, self._game.start, memory_format=torch.contiguous_format)
        self.best = self.mask.clone()
        self.after = before.clone()
        self.reached = torch.zeros(count, dtype=torch.bool, device=device)
        self.iterations = torch.zeros(count, dtype=torch.int64, device=device)
        self.sparsity = torch.full((count,), 0.1 if rules.sparsity is None else rules.sparsity, device=device)
        self.done = torch.zeros_like(self.reached)
        self._size = torch.full((count,), math.inf, device=device)
        self._waited = torch.zeros(count, dtype=torch.int64, device=device)

    def judge(self, rows: Tensor, probability: Tensor, predicted: Tensor, iteration: int) -> None:
        """Keep the best masks, adapt the sparsity, and see which rows are done."""
        rules, keeps = self._rules, self._game.keeps
        # Rows that are done may still be in the batch; nothing of theirs changes.
        playing = ~self.done[rows]
        rows, probability, predicted = rows[playing], probability[playing], predicted[playing]
        if rules.until == "class":
            won = (predicted == self.target[rows]) == keeps
        elif keeps:
            won = probability >= rules.score * self._before[rows]
        else:
            won = probability <= (1 - rules.score) * self._before[rows]
        mask = self.mask[rows]
        size = (mask if keeps else 1 - mask).float().mean((1, 2, 3))
        # A mask that wins is better than any that does not; of those that win the smallest is best, of the others
        # the one that comes nearest.
        nearer = (probability > self.after[rows]) if keeps else (probability < self.after[rows])
        reached, best = self.reached[rows], self._size[rows]
        better = torch.where(won, ~reached | (size < best), ~reached & (nearer | (iteration == 1)))
        notably = won & (~reached | (size < 0.99 * best))
        self.best[rows[better]] = mask[better]
        self.after[rows[better]] = probability[better]
        self._size[rows[better & won]] = size[better & won]
        self.reached[rows] = reached | won
        self.iterations[rows] = iteration
        waited = torch.where(notably, 0, self._waited[rows] + 1)
        self._waited[rows] = waited
        if rules.sparsity is None:
            self.sparsity[rows] *= torch.where(won, rules.growth, 1 / rules.growth)
        self.done[rows] = self.reached[rows] & (waited >= rules.patience)

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """Descend, and stay within 0..1."""
        if self._rules.normalize:
            largest = gradient.abs().amax((1, 2, 3), keepdim=True)
            gradient = gradient / torch.where(largest > 0, largest, 1)
        # Both terms change their sign with the game; that of the size is never filtered.
        step = gradient.add_(self.sparsity[rows].view(-1, 1, 1, 1).to(gradient.dtype)).mul_(self._rules.rate)
        self.mask[rows] = (self.mask[rows] - self._game.sign * step).clamp_(0, 1)


def _mixed(mask: Tensor, images: Tensor, reference: Tensor) -> Tensor:
    """`e = m x + (1 - m) r` (Eq. 1); x itself, to the last bit, where m is 1."""
    return mask * images + (1 - mask) * reference


def _log_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Of the class of each row, `[N]`; outputs that are a distribution already are taken as they are."""
    if is_distribution(logits):
        return logits.gather(1, target[:, None])[:, 0].clamp_min(torch.finfo(logits.dtype).tiny).log()
    return logits.log_softmax(1).gather(1, target[:, None])[:, 0]
