"""CNN-Fixations (Mopuri, Garg and Babu, 2018): the pixels that excited an answer, traced back neuron by neuron."""

import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyfast_xai import localize, ops
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, Target, choose, logits_of, one_of, ordinary, probability, rows_of
from pyfast_xai.explanation import Explanation
from pyfast_xai.ops import Location
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence import Options, Points
from pyfast_xai.rules.evidence.points import ravel, union, unravel
from pyfast_xai.tape import Tape, Value

logger = logging.getLogger("pyfast_xai")

Start = tuple[str | nn.Module, int | Sequence[int] | Literal["max"]]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {
        "location": "activation",
        "first_fc": "argmax",
        "signed": True,
        "duplicates": False,
        "radius": 0.15,
        "share": 0.10,
    },
    "paper": {
        "location": "product",
        "first_fc": "all",
        "signed": False,
        "duplicates": False,
        "radius": 0.10,
        "share": 0.05,
    },
    "authors": {
        "location": "same",
        "first_fc": "argmax",
        "signed": False,
        "duplicates": True,
        "radius": 0.10,
        "share": 0.05,
    },
}


class CNNFixations(Explainer):
    """CNN-Fixations: the image locations that guided the prediction, as points, their density and a box.

    One forward pass is recorded; from the chosen neuron the evidence is traced back through every layer to pixels
    (Algorithms 1 and 2), for all images of the batch together. Points without support around them are dropped and
    the rest blurred to a heat map (section IV-A).

    Args:
        model: in evaluation mode.
        variant: "default", chosen by measurement; "paper", the text to the letter; "authors", their released code. It
            sets every setting below that is None. `docs/fixations.md` says what differs and what it costs.
        location: where in a receptive field a point lands: "product", "center", "activation" or "same"; see
            `ops.Location`.
        first_fc: at the fully connected layer on a flattened map, one position a neuron ("argmax") or all positive
            contributions ("all").
        signed: let a point on a negative activation look for what made it low (linear bottlenecks, GELU); the paper
            knows rectified activations only, on which this changes nothing.
        duplicates: keep pixels that are reached through several channels as several points.
        start: explain any neuron instead of a class: `(layer, index)` with the path of a module (or the module, or
            the name of an operation) and the index of the neuron in its output without the batch; a shorter index
            takes the most active neuron below it, "max" the most active of all. The forward stops there.
        at: stop at this layer instead of the image; its points are scaled to the image (Fig. 5).
        crops: side of the five crops (corners and centre) that are traced instead of the image, as the authors do;
            the class is that of the mean softmax over them and their mirror images, and crops that see another class
            are left out.
        radius: of the neighbourhood in outlier removal, as a share of the image diagonal; 0 keeps every point.
        share: a point needs more than this share of all points within `radius`.
        sigma: of the Gaussian, as a share of the image diagonal.
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    method = "fixations"
    paper = "CNN Fixations: an unraveling approach to visualize the discriminative image regions (Mopuri et al., 2018)"

    def __init__(
        self,
        model: nn.Module,
        *,
        variant: Literal["default", "paper", "authors"] = "default",
        location: Literal["product", "center", "activation", "same"] | None = None,
        first_fc: Literal["argmax", "all"] | None = None,
        signed: bool | None = None,
        duplicates: bool | None = None,
        start: Start | None = None,
        at: str | None = None,
        crops: int | None = None,
        radius: float | None = None,
        share: float | None = None,
        sigma: float = 0.04,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, labels=labels)
        given: dict[str, Any] = {
            "location": location,
            "first_fc": first_fc,
            "signed": signed,
            "duplicates": duplicates,
            "radius": radius,
            "share": share,
        }
        preset = VARIANTS[one_of("variant", variant, VARIANTS)]
        chosen = {name: preset[name] if value is None else value for name, value in given.items()}
        places = {place.name.lower(): place for place in Location}
        self.options = Options(
            location=places[one_of("location", chosen["location"], places)],
            first_fc=one_of("first_fc", chosen["first_fc"], ("argmax", "all")),
            signed=chosen["signed"],
        )
        self.duplicates = chosen["duplicates"]
        self.start = start
        self.at = at
        self.crops = crops
        self.radius, self.share, self.sigma = chosen["radius"], chosen["share"], sigma
        for name in ("radius", "share", "sigma"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be a share of 0 to 1, got {getattr(self, name)}")
        if start is not None and crops is not None:
            raise InputError("crops must be None where start names a neuron, got both")

    def __call__(self, images: Tensor, target: Target = None, *args: Any, **kwargs: Any) -> Explanation:
        """Trace a batch of images.

        Args:
            images: `[N, C, H, W]`, as the model takes them.
            target: None for the predicted class, an int, N ints, or `[N, K]` ints (a row for each).
            *args: further arguments of the model.
            **kwargs: further keyword arguments of the model.

        Raises:
            InputError: images, a target or a layer that does not fit.
            UnsupportedOpError: the model has an op that no rule traces.
        """
        self.check(images)
        if self.crops is not None:
            return self._explain_crops(images, target, args, kwargs)
        tape, value, chosen, score = self._starts(images, target, args, kwargs)
        each = chosen.shape[1]
        traced = []
        for k in range(each):
            first = torch.arange(len(images), device=images.device) * (value.numel // len(images))
            starts = Points(first + chosen[:, k])
            traced.append(self._pixels(tape, {value: starts}, images.shape))
        pixels = _by_image(traced, images.shape)
        # Image by image, not target by target.
        points = [pixels[k][n] for n in range(len(images)) for k in range(each)]
        return self._explanation(points, chosen.flatten(), score.flatten(), rows_of(images, each))

    def _starts(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> tuple[Tape, Value, Tensor, Tensor]:
        """The tape, the value to start on, and for each image the neurons `[N, K]` of it and their score."""
        if self.start is None:
            tape = self.record(images, *args, reading=evidence.reading, **kwargs)
            value, logits = logits_of(tape)
            chosen = choose(logits, target)
            score = probability(logits, chosen)
            return tape, value, chosen.view(len(images), -1), score.view(len(images), -1)
        if target is not None:
            raise InputError(f"target must be None where start names a neuron, got {target!r}")
        layer, index = self.start
        name = self._path(layer)
        tape = self.record(images, *args, reading=evidence.reading, until=name, **kwargs)
        assert tape.reached is not None
        if len(tape.reached) != len(images):
            raise InputError(f"start must name an output with one entry an image, got {list(tape.reached.shape)}")
        chosen = _neuron(tape.reached, index)
        score = ordinary(tape.reached.flatten(1).gather(1, chosen).float())
        return tape, tape.find(name), ordinary(chosen), score

    def _path(self, layer: str | nn.Module) -> str:
        if isinstance(layer, str):
            return layer
        for name, module in self.model.named_modules():
            if module is layer:
                return name
        raise InputError(f"start must name a module of the model, got a {type(layer).__name__} that is not part of it")

    def _pixels(self, tape: Tape, starts: dict[Value, Points], shape: torch.Size) -> Tensor:
        """Traced points as sorted flat indices into `[N, H, W]`, int64 `[P]`, those that are none behind them.

        Nothing here waits for a device.
        """
        to = tape.inputs[0] if self.at is None else tape.find(self.at, "at")
        if len(to.shape) != 4:
            raise InputError(f"at must name a layer with a spatial map [N, C, h, w], got {list(to.shape)}")
        points = evidence.walk(tape, starts, to, self.options)
        if points.negative is not None:
            # A position that is evidence both by being high and by being low is one point.
            points = Points(points.index, origins=points.origins)
            points = union([points], to.numel)
        image, _, y, x = unravel(points.index, to.shape)
        # A cell of a coarser layer stands for its middle.
        y = torch.div((2 * y + 1) * shape[2], 2 * to.shape[2], rounding_mode="floor")
        x = torch.div((2 * x + 1) * shape[3], 2 * to.shape[3], rounding_mode="floor")
        pixels = points.to(ravel([image, y, x], (to.shape[0], *shape[2:])))
        size = to.shape[0] * shape[2] * shape[3]
        if not self.duplicates:
            pixels = union([pixels], size)
        index = pixels.index.masked_fill(pixels.index < 0, size)
        return index.sort().values if self.duplicates else index

    def _explanation(self, points: list[Tensor], target: Tensor, score: Tensor, images: Tensor) -> Explanation:
        height, width = images.shape[2:]
        lost = [n for n, own in enumerate(points) if len(own) == 0]
        if lost:
            logger.warning(
                "fixations: no evidence of %d of %d rows reached the image (the first is row %d); the trace ended in "
                "constants of the model",
                len(lost),
                len(points),
                lost[0],
            )
        if self.radius:
            points = localize.remove_outliers(points, (height, width), self.radius, self.share)
        offset = [n * height * width + p[:, 0] * width + p[:, 1] for n, p in enumerate(points)]
        sigma = max(self.sigma * math.hypot(height, width), 1e-3)
        heatmap = ops.point_density(torch.cat(offset), len(points), height, width, sigma)
        return Explanation(
            method=self.method,
            heatmap=ordinary(heatmap),
            target=ordinary(target),
            score=ordinary(score),
            points=[ordinary(own) for own in points],
            images=images,
            labels=self.labels,
        )

    def _explain_crops(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        """Five crops traced, ten asked for the class: the protocol of the authors' code."""
        side, (height, width) = self.crops, images.shape[2:]
        if side is None or not 0 < side <= min(height, width):
            raise InputError(f"crops must lie in 1 to the shorter image side, {min(height, width)}, got {side}")
        corners = [(0, 0), (0, width - side), (height - side, 0), (height - side, width - side)]
        corners.append(((height - side) // 2, (width - side) // 2))
        crops = torch.cat([images[:, :, y : y + side, x : x + side] for y, x in corners])
        tape = self.record(crops, *args, reading=evidence.reading, **kwargs)
        value, logits = logits_of(tape)
        mirrored = self.record(crops.flip(3), *args, **kwargs)
        both = torch.cat([logits, logits_of(mirrored)[1]]).softmax(1).view(10, len(images), -1)
        mean = both.mean(0)
        seen = logits.argmax(1).view(5, len(images))
        chosen = choose(mean, target)
        if chosen.dim() != 1:
            raise InputError(f"target must be one class an image with crops, got shape {list(chosen.shape)}")
        if target is None:
            # Where no crop sees the class of the mean, that of the centre crop takes its place.
            chosen = torch.where((seen == chosen).any(0), chosen, seen[4])
            traced = seen == chosen
        else:
            traced = torch.ones_like(seen, dtype=torch.bool)
        rows = torch.arange(len(crops), device=images.device) * logits.shape[1]
        starts = Points(rows).to(rows + chosen.repeat(5), traced.flatten())
        (pixels,) = _by_image([self._pixels(tape, {value: starts}, crops.shape)], crops.shape)
        points = []
        for n in range(len(images)):
            found = [pixels[i * len(images) + n].unbind(1) for i in range(len(corners))]
            moved = [torch.stack([y + top, x + left], 1) for (y, x), (top, left) in zip(found, corners, strict=True)]
            points.append(torch.cat(moved) if self.duplicates else torch.unique(torch.cat(moved), dim=0))
        return self._explanation(points, chosen, mean.gather(1, chosen[:, None]).squeeze(1), images)


def _by_image(traced: Sequence[Tensor], shape: torch.Size) -> list[list[Tensor]]:
    """Lists of sorted flat indices into `[N, H, W]` as points of each image, int64 `[P, 2]` as (y, x) pixels.

    This is where a device is waited for, once: for how many points each image has.
    """
    images, area = shape[0], shape[2] * shape[3]
    ends = torch.arange(images + 1, device=traced[0].device) * area
    bounds = torch.stack([torch.searchsorted(index, ends) for index in traced]).tolist()
    found = []
    for index, bound in zip(traced, bounds, strict=True):
        _, y, x = unravel(index, (images, *shape[2:]))
        points = torch.stack([y, x], 1)
        found.append([points[first:last] for first, last in itertools.pairwise(bound)])
    return found


def _neuron(output: Tensor, index: int | Sequence[int] | str) -> Tensor:
    """Flat position `[N, 1]` in each image's output of the neuron an index names."""
    given: list[int] = [] if isinstance(index, str) else [index] if isinstance(index, int) else list(index)
    shape = output.shape[1:]
    inside = all(0 <= i < size for i, size in zip(given, shape, strict=False))
    if len(given) > len(shape) or not inside or (isinstance(index, str) and index != "max"):
        raise InputError(f"start must have an index within {list(shape)}, got {index!r}")
    cells = output.flatten(1)
    first = sum(i * math.prod(shape[d + 1 :]) for d, i in enumerate(given))
    below = math.prod(shape[len(given) :])
    return first + cells[:, first : first + below].argmax(1, keepdim=True)
