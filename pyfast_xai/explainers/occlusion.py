"""Occlusion (Zeiler and Fergus, 2014): how far the score drops where a window hides the image."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.answers import Answers, Score, wide
from pyfast_xai.explainers.baseline import baseline_for, check_baseline
from pyfast_xai.explainers.perturbation import Perturbation, at_least, positive, together
from pyfast_xai.explainers.progress import Progress, Told

# Where a window lies: slices of the channels, rows and columns.
Box = tuple[slice, slice, slice]


class Occlusion(Perturbation):
    """Drop of the score where a sliding window hides the image (Zeiler and Fergus, 2014, section 4.2).

    Every pixel gets the mean drop over the windows that cover it, as in Captum. The first window lies at the top left
    corner; the last of a row or column is clipped at the edge.

    Args:
        model: in evaluation mode.
        window: side in pixels, `(height, width)`, or `(channels, height, width)` to hide some channels at a time.
            None takes a seventh of the shorter side (32 of 224).
        stride: how far the window moves, likewise; at most its size. None takes a quarter of the window, which makes
            about 625 forwards for a square image. Where it is given without channels, windows do not overlap in these.
        baseline: what hidden pixels become: a number (0 is the mean colour of normalised images, the grey of the
            paper), "mean", the mean colour of each image, "blur", or a tensor that broadcasts to the images.
        blur: standard deviation of the blurred baseline, in pixels.
        score: what drops: the "probability" of the class, or its "logit".
        batch: images that go through the model at once; results do not depend on it but for rounding.
        progress: True shows a bar on stderr, None does on a terminal; or a function called with (done, total).
        labels: names of the classes.

    An explanation has `attribution`, the mean drops `[N, C, H, W]`, signed; `map`, over the windows of all channels,
    `[N, H, W]`; and `heatmap`, its positive part.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "occlusion"
    paper = "Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014)"

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        baseline: Literal["blur", "mean"] | float | Tensor = 0.0,
        blur: float = 10.0,
        score: Score = "probability",
        batch: int = 32,
        progress: Told = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, score=score, batch=batch, progress=progress, labels=labels)
        self.window, self.stride = _sizes("window", window), _sizes("stride", stride)
        self.baseline = check_baseline(baseline)
        self.blur = positive("blur", blur)

    def _explain(self, images: Tensor, answers: Answers, args: Any, kwargs: Any) -> dict[str, Any]:
        boxes = self._boxes(tuple(images.shape[1:]))
        baseline = baseline_for(self.baseline, images, self.blur)
        # Windows over all channels need one sum for all of them.
        depth = 1 if boxes[0][0] == slice(None) else images.shape[1]
        sums = wide(images).new_zeros(len(images), answers.each, depth, *images.shape[2:])
        covers = sums.new_zeros(depth, *images.shape[2:])
        with Progress(self.progress, self.method, len(boxes) * len(images)) as progress:
            for start in range(0, len(boxes), self.batch):
                part = boxes[start : start + self.batch]
                for box in part:
                    covers[box] += 1
                for rows in together(images, self.batch, len(part)):
                    drops = self._drops(part, rows, images, baseline, answers)
                    own = sums[rows[0] : rows[-1] + 1]
                    for i, box in enumerate(part):
                        at = (slice(None), slice(None), *box)
                        own[at] += drops[:, i, :, None, None, None]
                    progress.advance(len(rows) * len(part))
        sums = sums.flatten(0, 1)
        signed = sums.sum(1) / covers.sum(0)
        return {
            "heatmap": signed.clamp_min(0).float(),
            "attribution": (sums / covers).expand(-1, images.shape[1], -1, -1),
            "map": signed,
        }

    def _drops(self, boxes: list[Box], rows: Tensor, images: Tensor, baseline: Tensor, answers: Answers) -> Tensor:
        """How far the scores fall behind each window, `[n, windows, K]`."""
        hidden = images[rows][:, None].repeat(1, len(boxes), 1, 1, 1)
        gone = baseline[rows]
        for i, box in enumerate(boxes):
            to, of = (slice(None), i, *box), (slice(None), *box)
            hidden[to] = gone[of]
        after = answers(hidden.flatten(0, 1), rows.repeat_interleave(len(boxes)))
        return answers.before[rows][:, None] - after.view(len(rows), len(boxes), -1)

    def _boxes(self, shape: tuple[int, ...]) -> list[Box]:
        """Every window of an image `[C, H, W]`, the channels moving fastest."""
        side = max(1, round(min(shape[1:]) / 7))
        window = (shape[0], *self.window)[-3:] if self.window else (shape[0], side, side)
        if any(size > whole for size, whole in zip(window, shape, strict=True)):
            raise InputError(f"window must fit in the images, {list(shape)}, got {list(window)}")
        stride = (window[0], *self.stride)[-3:] if self.stride else (window[0], *(max(1, n // 4) for n in window[1:]))
        if any(step > size for step, size in zip(stride, window, strict=True)):
            raise InputError(f"stride must be at most the window, {list(window)}, got {list(stride)}")
        along = [
            [slice(step * i, step * i + size) for i in range(math.ceil((whole - size) / step) + 1)]
            for whole, size, step in zip(shape, window, stride, strict=True)
        ]
        if window[0] == shape[0]:
            along[0] = [slice(None)]
        return [(channels, rows, columns) for rows, columns, channels in itertools.product(*along[1:], along[0])]


def _sizes(argument: str, given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Height and width, with channels in front where they were given."""
    if given is None:
        return None
    sizes = (given, given) if isinstance(given, int) else tuple(given)
    if len(sizes) not in (2, 3):
        raise InputError(f"{argument} must be one, two or three sizes in pixels, got {len(sizes)}")
    return tuple(at_least(1, argument, size) for size in sizes)
