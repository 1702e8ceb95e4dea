"""Score-CAM and what averages it: channels weighed by the score that is left behind them as masks."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.explainers.common.activation_reader import ActivationReader
from pyfast_xai.explainers.common.cam_rules import weighted_sum
from pyfast_xai.explainers.common.channel_masks import Masks, scores_behind, stretched
from pyfast_xai.explainers.common.explainer import Explainer, at_least, one_of
from pyfast_xai.explainers.common.layer_explainer import LayerExplainer, LayerName, LayerSettings, resized
from pyfast_xai.explainers.common.layer_search import sensitive_levels
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, PerturbationSettings, positive
from pyfast_xai.explainers.common.perturbation_scores import SCORES, PerturbationScores, Score
from pyfast_xai.explainers.common.progress_bar import ProgressBar, ShowProgress
from pyfast_xai.explainers.common.tensors import at_least_float32, targets_to_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Mass
from pyfast_xai.tape import Tape, Value

ChannelWeights = Literal["softmax", "score"]


class ScoreSettings(LayerSettings, PerturbationSettings, total=False):
    """The keyword arguments of `ScoreCAM`, but for `layer`."""

    channel_weights: ChannelWeights


class ScoreCAM(LayerExplainer, Perturbation):
    """Score-CAM: channels weighed by the score of the image behind them as a mask (Wang et al., 2020).

    The mask of channel k is `H_k = s(up(A_k))`, the activation at the size of the image and stretched to [0, 1]. With
    `y_k` the score of the image times H_k the map is `sum_k w_k A_k` with

        w_k = exp(y_k) / sum_i exp(y_i)  (Algorithm 1)

    from which the score of a baseline cancels. One forward for each channel serves all targets of an image. Masks are
    made as they are needed, `batch_size` at a time. A channel that is the same everywhere masks nothing: it takes no
    forward and weighs nothing, as in the authors' code.

    Args:
        model: in evaluation mode.
        layer: a module, its path or the name of an operation; several give the mean of their heat maps; "auto" takes
            the last map of features on which the target depends at every position, of a detector all levels of its
            pyramid.
        channel_weights: "softmax" of the scores as in Algorithm 1, or the "score" itself. The authors' code is "score"
            with `score="probability"`: behind a softmax of logits one or two channels take nearly all the weight.
        score: the "logit" of the class, or its "probability".
        progress: True shows a bar on stderr, None shows one on a terminal; or a function called with a `Progress`.
        **settings: those of `LayerExplainer`; masked images go through the model `batch_size` at a time, 32 by default.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import ScoreCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> ScoreCAM(net, layer="1")(torch.randn(2, 3, 8, 8), [[0, 1], [2, 3]]).signed_map.shape
        torch.Size([4, 6, 6])
    """

    method = "score-cam"
    ranks = (3, 4, 5)
    paper = "Score-CAM: score-weighted visual explanations for convolutional neural networks (Wang et al., 2020)"
    default_box_rule = Mass()

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        channel_weights: ChannelWeights = "softmax",
        score: Score = "logit",
        progress: ShowProgress = None,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.channel_weights = one_of("channel_weights", channel_weights, ("softmax", "score"))
        self.score, self.progress = one_of("score", score, SCORES), progress
        self._read = ActivationReader(self)

    _in_batches = Explainer._in_batches

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        return sensitive_levels(tape, ends)

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> Explanation:
        args, kwargs = scores.arguments(torch.arange(len(images), device=images.device))
        maps = []
        for place, activation in self._read(images, args, kwargs).layers:
            cells = at_least_float32(self.grid(activation, images.shape[2:], place.name, place.layout))
            maps.append(targets_to_rows(weighted_sum(self._weights(images, scores, cells), cells)))
        return self.explanation(images, scores.targets, maps, self.heat(maps, images.shape[2:]))

    def _weights(self, images: Tensor, scores: PerturbationScores, cells: Tensor) -> Tensor:
        """Returns the weight of each channel of a layer `[N, h, w, C]` for K targets, `[K, N, C]`."""
        count, channels = len(cells), cells.shape[-1]
        maps = cells.movedim(-1, 1).flatten(0, 1)[:, None]  # [N * C, 1, *grid]
        flat = maps.flatten(1)
        varies = (flat.amax(1) > flat.amin(1)).view(count, channels)
        # Channel by channel, so that what is drawn for a channel serves all images.
        channel, row = varies.T.nonzero(as_tuple=True)
        places = row * channels + channel
        increases = cells.new_full((count * channels, scores.each), -torch.inf)
        with ProgressBar(self.progress, self.method, len(places) * self.n_rounds) as progress:

            def score(changed: Tensor, rows: Tensor) -> Tensor:
                progress.advance(len(rows))
                return scores(changed, rows).to(cells.dtype)

            if len(places):
                samples = self._samples(maps, channels, images.shape[2:])
                increases[places] = scores_behind(samples, images, places, channels, self.batch_size, score)
        increases = increases.view(count, channels, -1)
        weights = increases.softmax(1) if self.channel_weights == "softmax" else increases
        return torch.where(varies[..., None], weights, 0).permute(2, 0, 1)

    n_rounds = 1  # how often each channel masks the image

    def _samples(self, maps: Tensor, channels: int, size: Sequence[int]) -> Iterator[Masks]:
        """Yields what makes masks of channels `[N * C, 1, h, w]`, once for each sample of the mean."""
        yield lambda part: stretched(resized(maps[part], size))


class SSCAM(ScoreCAM):
    """SS-CAM: Score-CAM with scores averaged over noisy masks (Wang et al., 2020).

    The scores are means over `H_k + N(0, std^2)` in place of H_k. Every image gets the same noise, so that a row does
    not depend on the others.

    Args:
        model: in evaluation mode.
        layer: see `ScoreCAM`.
        n_samples: noisy masks of each channel.
        std: standard deviation of the noise, where masks reach from 0 to 1.
        seed: seed of the noise; the process's own random numbers are not touched.
        **settings: those of `ScoreCAM`.

    Raises:
        InputError: a setting that does not exist or is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import SSCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> SSCAM(net, layer="1", n_samples=3)(torch.randn(2, 3, 8, 8)).signed_map.shape
        torch.Size([2, 6, 6])
    """

    method = "ss-cam"
    paper = "SS-CAM: smoothed Score-CAM for sharper visual feature localization (Wang et al., 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        n_samples: int = 35,
        std: float = 2.0,
        seed: int = 0,
        **settings: Unpack[ScoreSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.n_samples = self.n_rounds = at_least(1, "n_samples", n_samples)
        self.std, self.seed = positive("std", std), seed

    def _samples(self, maps: Tensor, channels: int, size: Sequence[int]) -> Iterator[Masks]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.n_samples):
            noise = _Noise(generator, channels, size)
            yield functools.partial(self._noisy, maps, size, noise)
            noise.finish()

    def _noisy(self, maps: Tensor, size: Sequence[int], noise: "_Noise", part: Tensor) -> Tensor:
        masks = stretched(resized(maps[part], size))
        return masks + self.std * noise(part).to(masks)


class _Noise:
    """The noise of each channel in turn; it does not depend on how many channels one call takes.

    Args:
        generator: generator of the random numbers.
        channels: number of channels.
        size: (H, W) of the noise of one.
    """

    def __init__(self, generator: torch.Generator, channels: int, size: Sequence[int]) -> None:
        self._generator, self._channels, self._size = generator, channels, tuple(size)
        self._drawn: dict[int, Tensor] = {}
        self._next = 0

    def __call__(self, places: Tensor) -> Tensor:
        """Returns the noise `[M, 1, H, W]` of channels `places % channels`, which do not fall from call to call."""
        channels = (places % self._channels).tolist()
        self._draw(max(channels) + 1)
        self._drawn = {channel: self._drawn[channel] for channel in set(channels)}
        return torch.stack([self._drawn[channel] for channel in channels])[:, None]

    def finish(self) -> None:
        """Draws the remaining channels, so that the next sample does not depend on which ones were requested."""
        self._draw(self._channels)

    def _draw(self, end: int) -> None:
        for channel in range(self._next, end):
            self._drawn[channel] = torch.randn(self._size, generator=self._generator)
        self._next = max(self._next, end)


class ISCAM(ScoreCAM):
    """IS-CAM: Score-CAM with scores averaged on the way from no mask to the whole one (Naidu et al., 2020).

    The scores are means over the masks `(i / n) H_k` for i from 1 to n.

    Args:
        model: in evaluation mode.
        layer: see `ScoreCAM`.
        n_steps: n, masks of each channel.
        **settings: those of `ScoreCAM`.

    Raises:
        InputError: a setting that does not exist or is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyfast_xai import ISCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        >>> ISCAM(net, layer="1", n_steps=3)(torch.randn(2, 3, 8, 8)).signed_map.shape
        torch.Size([2, 6, 6])
    """

    method = "is-cam"
    paper = "IS-CAM: integrated Score-CAM for axiomatic-based explanations (Naidu et al., 2020)"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        n_steps: int = 10,
        **settings: Unpack[ScoreSettings],
    ) -> None:
        super().__init__(model, layer=layer, **settings)
        self.n_steps = self.n_rounds = at_least(1, "n_steps", n_steps)

    def _samples(self, maps: Tensor, channels: int, size: Sequence[int]) -> Iterator[Masks]:
        for step in range(1, self.n_steps + 1):
            yield functools.partial(self._part, maps, size, step / self.n_steps)

    def _part(self, maps: Tensor, size: Sequence[int], share: float, part: Tensor) -> Tensor:
        return share * stretched(resized(maps[part], size))
