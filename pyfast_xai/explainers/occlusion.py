"""Occlusion (Zeiler and Fergus, 2014): how far the score drops where a window hides the image."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.baselines import baseline_for, check_baseline
from pyfast_xai.explainers.common.explainer import at_least
from pyfast_xai.explainers.common.perturbation_explainer import Perturbation, PerturbationSettings, positive, together
from pyfast_xai.explainers.common.perturbation_scores import PerturbationScores
from pyfast_xai.explainers.common.progress_bar import ProgressBar
from pyfast_xai.explainers.common.tensors import at_least_float32
from pyfast_xai.explanation import Explanation

# Where a window lies: slices of the channels, rows and columns, of a volume also of the slices.
Box = tuple[slice, ...]


class Occlusion(Perturbation):
    """Drop of the score where a sliding window hides the image (Zeiler and Fergus, 2014, section 4.2).

    Every pixel gets the mean drop over the windows that cover it, as in Captum. The first window lies at the top left
    corner; the last of a row or column is clipped at the edge.

    Args:
        model: in evaluation mode.
        window: side in pixels, `(height, width)`, or `(channels, height, width)` to hide some channels at a time; of
            volumes `(depth, height, width)`, of signals `(length,)`, with channels in front likewise. None takes a
            seventh of the shorter side (32 of 224) along every axis, of a volume that is thinner its whole depth.
        stride: how far the window moves, likewise; at most its size. None takes a quarter of the window, which makes
            about 625 forwards for a square image. Where it is given without channels, windows do not overlap in these.
        baseline: what hidden pixels become: a number (0 is the mean colour of normalised images, the grey of the
            paper), "mean", the mean colour of each image, "blur", or a tensor that broadcasts to the images.
        blur: standard deviation of the blurred baseline, in pixels.
        **settings: those of `Perturbation`.

    An explanation has `attribution`, the mean drops `[N, C, H, W]`, signed; `signed_map`, over the windows of all
    channels, `[N, H, W]`; and `heatmap`, its positive part.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import Occlusion, demo
        >>> explanation = Occlusion(demo.load(), window=32, stride=32)(torch.rand(1, 3, 96, 96), target=3)
        >>> explanation.heatmap.shape
        torch.Size([1, 96, 96])
    """

    method = "occlusion"
    ranks = (3, 4, 5)
    paper = "Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014)"

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        baseline: Literal["blur", "mean"] | float | Tensor = 0.0,
        blur: float = 10.0,
        **settings: Unpack[PerturbationSettings],
    ) -> None:
        super().__init__(model, **settings)
        self.window, self.stride = _sizes("window", window), _sizes("stride", stride)
        self.baseline = check_baseline(baseline)
        self.blur = positive("blur", blur)

    def _perturb(self, images: Tensor, scores: PerturbationScores) -> Explanation:
        boxes = self._boxes(tuple(images.shape[1:]))
        baseline = baseline_for(self.baseline, images, self.blur)
        # Windows over all channels need one sum for all of them.
        depth = 1 if boxes[0][0] == slice(None) else images.shape[1]
        sums = at_least_float32(images).new_zeros(len(images), scores.each, depth, *images.shape[2:])
        covers = sums.new_zeros(depth, *images.shape[2:])
        with ProgressBar(self.progress, self.method, len(boxes) * len(images)) as progress:
            for start in range(0, len(boxes), self.batch_size):
                part = boxes[start : start + self.batch_size]
                for box in part:
                    covers[box] += 1
                for rows in together(images, self.batch_size, len(part)):
                    drops = self._drops(part, rows, images, baseline, scores)
                    total = sums[rows[0] : rows[-1] + 1]
                    for i, box in enumerate(part):
                        at = (slice(None), slice(None), *box)
                        total[at] += drops[:, i].view(*drops[:, i].shape, *[1] * (images.dim() - 1))
                    progress.advance(len(rows) * len(part))
        sums = sums.flatten(0, 1)
        signed = sums.sum(1) / covers.sum(0)
        return Explanation(
            **self._fields(images, scores.targets),
            heatmap=signed.clamp_min(0).float(),
            attribution=(sums / covers).expand(-1, images.shape[1], *images.shape[2:]),
            signed_map=signed,
        )

    def _drops(
        self, boxes: list[Box], rows: Tensor, images: Tensor, baseline: Tensor, scores: PerturbationScores
    ) -> Tensor:
        """Returns the drops of the scores behind each window, `[n, windows, K]`."""
        hidden = images[rows][:, None].repeat(1, len(boxes), *[1] * (images.dim() - 1))
        blank = baseline[rows]
        for i, box in enumerate(boxes):
            to: tuple[Any, ...] = (slice(None), i, *box)
            of: tuple[Any, ...] = (slice(None), *box)
            hidden[to] = blank[of]
        after = scores(hidden.flatten(0, 1), rows.repeat_interleave(len(boxes)))
        return scores.before[rows][:, None] - after.view(len(rows), len(boxes), -1)

    def _boxes(self, shape: tuple[int, ...]) -> list[Box]:
        """Returns every window of an image `[C, H, W]`, the channels moving fastest."""
        side = max(1, round(min(sorted(shape[1:])[-2:]) / 7))
        usual = (shape[0], *(min(side, whole) for whole in shape[1:]))
        window = _of_shape("window", self.window, shape) or usual
        if isinstance(self.window, int) and len(shape) == 4:  # a volume may be thinner than a window
            window = (window[0], min(window[1], shape[1]), *window[2:])
        if any(size > whole for size, whole in zip(window, shape, strict=True)):
            raise InputError(f"window must fit in the images, {list(shape)}, got {list(window)}")
        stride = _of_shape("stride", self.stride, window) or (window[0], *(max(1, n // 4) for n in window[1:]))
        if isinstance(self.stride, int) and len(shape) == 4:
            stride = (stride[0], min(stride[1], window[1]), *stride[2:])
        if any(step > size for step, size in zip(stride, window, strict=True)):
            raise InputError(f"stride must be at most the window, {list(window)}, got {list(stride)}")
        along = [
            [slice(step * i, step * i + size) for i in range(math.ceil((whole - size) / step) + 1)]
            for whole, size, step in zip(shape, window, stride, strict=True)
        ]
        if window[0] == shape[0]:
            along[0] = [slice(None)]
        return [(place[-1], *place[:-1]) for place in itertools.product(*along[1:], along[0])]


def _sizes(argument: str, size: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """Returns the side of a window, or its sizes along some axes."""
    if size is None or isinstance(size, int):
        return None if size is None else at_least(1, argument, size)
    if not 1 <= len(size) <= 4:
        raise InputError(f"{argument} must be one, two or three sizes in pixels, got {len(size)}")
    return tuple(at_least(1, argument, side) for side in size)


def _of_shape(argument: str, sizes: int | tuple[int, ...] | None, whole: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns sizes along the channels and all axes of `[C, H, W]`; the whole of the channels where they have none.

    Raises:
        InputError: more or fewer sizes than the images have axes.
    """
    if sizes is None:
        return None
    listed = (sizes,) * (len(whole) - 1) if isinstance(sizes, int) else sizes
    if len(listed) not in (len(whole) - 1, len(whole)):
        raise InputError(
            f"{argument} must have {len(whole) - 1} sizes in pixels for images with as many axes, got {len(listed)}"
        )
    return (whole[0], *listed)[-len(whole) :]
