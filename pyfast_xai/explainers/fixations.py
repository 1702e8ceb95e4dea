"""CNN-Fixations (Mopuri, Garg and Babu, 2018): the pixels that excited an answer, traced back neuron by neuron."""

import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyfast_xai import localize, ops
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.checks import SHAPES
from pyfast_xai.explainers.common.explainer import Explainer, Settings, one_of
from pyfast_xai.explainers.common.gradient_pass import Start, run_step
from pyfast_xai.explainers.common.model_cache import ModelCache, one_of_batch
from pyfast_xai.explainers.common.outputs import OutputKinds, is_probability, kinds_of
from pyfast_xai.explainers.common.targets import (
    Target,
    Targets,
    check_labels,
    class_columns,
    logits_of,
    resolve_target,
)
from pyfast_xai.explainers.common.tensors import outside_inference_mode, take_rows
from pyfast_xai.explanation import Explanation
from pyfast_xai.localize import Hull, Mass
from pyfast_xai.ops import Location
from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence import Options, Points
from pyfast_xai.rules.evidence.points import ravel, union, unravel
from pyfast_xai.tape import Tape, Value

logger = logging.getLogger("pyfast_xai")

Neuron = tuple[str | nn.Module, int | Sequence[int] | Literal["max"]]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {
        "location": "center",
        "first_fc": "argmax",
        "signed": True,
        "duplicates": False,
        "radius_share": 0.15,
        "min_neighbour_share": 0.10,
        "sigma_share": 0.08,
        "box_rule": Mass(),
    },
    "paper": {
        "location": "product",
        "first_fc": "all",
        "signed": False,
        "duplicates": False,
        "radius_share": 0.10,
        "min_neighbour_share": 0.05,
        "sigma_share": 0.04,
        "box_rule": Hull(),
    },
    "authors": {
        "location": "same",
        "first_fc": "argmax",
        "signed": False,
        "duplicates": True,
        "radius_share": 0.10,
        "min_neighbour_share": 0.05,
        "sigma_share": 0.04,
        "box_rule": Hull(),
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
        neuron: explain any neuron instead of a class: `(layer, index)` with the path of a module (or the module, or
            the name of an operation) and the index of the neuron in its output without the batch; a shorter index
            takes the most active neuron below it, "max" the most active of all. Of a module that runs several times
            the last call is taken, and with the path "head@0" the first. The forward stops there.
        stop_layer: stop at this layer instead of the image; its points are scaled to the image (Fig. 5).
        crops: side of the five crops (corners and centre) that are traced instead of the image, as the authors do;
            the class is that of the mean softmax over them and their mirror images, and crops that see another class
            are left out.
        radius_share: radius of the neighbourhood in outlier removal, as a share of the image diagonal; 0 keeps every
            point.
        min_neighbour_share: a point needs more than this share of all points within that radius; where none has it, all
            of them stay.
        sigma_share: standard deviation of the Gaussian, as a share of the image diagonal.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist.

    Example:
        >>> import torch
        >>> from pyfast_xai import CNNFixations, demo
        >>> explanation = CNNFixations(demo.load())(torch.rand(2, 3, 96, 96), target=3)
        >>> len(explanation.points), explanation.boxes().shape
        (2, torch.Size([2, 4]))
    """

    method = "fixations"
    ranks = (3, 4, 5)
    takes_functions = takes_gradients = False
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
        neuron: Neuron | None = None,
        stop_layer: str | None = None,
        crops: int | None = None,
        radius_share: float | None = None,
        min_neighbour_share: float | None = None,
        sigma_share: float | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        preset = VARIANTS[one_of("variant", variant, VARIANTS)]
        if settings.get("box_rule") is None:
            settings["box_rule"] = preset["box_rule"]
        super().__init__(model, **settings)
        changes: dict[str, Any] = {
            "location": location,
            "first_fc": first_fc,
            "signed": signed,
            "duplicates": duplicates,
            "radius_share": radius_share,
            "min_neighbour_share": min_neighbour_share,
            "sigma_share": sigma_share,
        }
        chosen = {name: preset[name] if value is None else value for name, value in changes.items()}
        places = {place.name.lower(): place for place in Location}
        self.options = Options(
            location=places[one_of("location", chosen["location"], places)],
            first_fc=one_of("first_fc", chosen["first_fc"], ("argmax", "all")),
            signed=chosen["signed"],
        )
        self.duplicates = chosen["duplicates"]
        self.neuron = neuron
        self._calls: ModelCache[dict[str, str]] = ModelCache(self, dict)
        self.stop_layer = stop_layer
        self.crops = crops
        self.radius_share, self.min_neighbour_share = chosen["radius_share"], chosen["min_neighbour_share"]
        self.sigma_share = chosen["sigma_share"]
        for name in ("radius_share", "min_neighbour_share", "sigma_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be a share of 0 to 1, got {getattr(self, name)}")
        if neuron is not None and crops is not None:
            raise InputError("crops must be None where neuron names one, got both")

    def _explain(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        if self.crops is not None:
            return self._explain_crops(images, target, args, kwargs)
        targets: Targets
        if self.neuron is None:
            key = (CNNFixations._step, self.options, self.duplicates, self.stop_layer)
            _, targets, traced = run_step(self, self._step, images, target, args, kwargs, key=key)
        else:
            tape, value, targets = self._at_neuron(self.neuron, images, target, args, kwargs)
            traced = self.traced(tape, value, targets, images)
        return self.explanation(traced, images, targets)

    def _step(self, start: Start, images: Tensor, args: Any, kwargs: Any) -> tuple[Tape, list[Tensor]]:
        """Returns the tape, and the pixels of each target, see `traced`."""
        tape = self.record(images, *args, policy=evidence.policy, **kwargs)
        return tape, self.traced(tape, logits_of(tape)[0], start(tape), images)

    def traced(self, tape: Tape, value: Value, targets: Targets, images: Tensor) -> list[Tensor]:
        """Returns the pixels of each target of an image, see `_pixels`."""
        assert targets.target is not None
        first = torch.arange(len(images), device=images.device) * (value.numel // len(images))
        return [self._pixels(tape, {value: Points(first + chosen)}, images.shape) for chosen in targets.target.T]

    def explanation(
        self, traced: Sequence[Tensor], images: Tensor, targets: Targets, shift: tuple[int, int] = (0, 0)
    ) -> Explanation:
        """Builds the explanation of the targets.

        Args:
            traced: pixels of each target of an image, as `traced` returns them.
            images: `[N, C, H, W]`.
            targets: K an image.
            shift: moves the heat map against the points, (y, x) in pixels.
        """
        pixels = _by_image(traced, images.shape)
        # Image by image, not target by target.
        points = [pixels[k][n] for n in range(len(images)) for k in range(targets.each)]
        return self._explanation(points, images, targets, shift)

    def _at_neuron(
        self, neuron: Neuron, images: Tensor, target: Target, args: Any, kwargs: Any
    ) -> tuple[Tape, Value, Targets]:
        """Returns the tape, the value to start on, and the neurons of it for each image with their scores."""
        if target is not None:
            raise InputError(f"target must be None where neuron names one, got {target!r}")
        layer, index = neuron
        with self._calls.entry(images, args, kwargs) as calls:
            name = self._last_call(self._path(layer), calls, images, args, kwargs)
            tape = self.record(images, *args, policy=evidence.policy, until=name, **kwargs)
        assert tape.reached is not None
        if len(tape.reached) != len(images):
            raise InputError(f"neuron must name an output with one entry an image, got {list(tape.reached.shape)}")
        chosen = _neuron(tape.reached, index)
        score = outside_inference_mode(tape.reached.flatten(1).gather(1, chosen).float())
        return tape, tape.find(name), Targets(target=outside_inference_mode(chosen), score=score)

    def _last_call(self, name: str, calls: dict[str, str], images: Tensor, args: Any, kwargs: Any) -> str:
        """Returns the last call of a module that may run several times, known after a whole forward of one image."""
        if name not in calls:
            tape = self.record_unaccelerated(one_of_batch(images, args, kwargs), *args, **kwargs)
            count = len(tape.modules.get(name, ()))
            calls[name] = f"{name}@{count - 1}" if count > 1 else name
        return calls[name]

    def _path(self, layer: str | nn.Module) -> str:
        if isinstance(layer, str):
            return layer
        for name, module in self.model.named_modules():
            if module is layer:
                return name
        raise InputError(f"neuron must name a module of the model, got a {type(layer).__name__} that is not part of it")

    def _pixels(self, tape: Tape, starts: dict[Value, Points], shape: torch.Size) -> Tensor:
        """Returns traced points as flat indices into `[N, *size]`, int64 `[P]`, sorted; absent points come last.

        Nothing here waits for a device.
        """
        to = tape.inputs[0] if self.stop_layer is None else tape.find(self.stop_layer, "stop_layer")
        if len(to.shape) != len(shape):
            raise InputError(
                f"stop_layer must name a layer with a spatial map {SHAPES[len(shape)]}, got {list(to.shape)}"
            )
        points = evidence.walk(tape, starts, to, self.options)
        if points.negative is not None:
            # A position that is evidence both by being high and by being low is one point.
            points = Points(points.index, origins=points.origins)
            points = union([points], to.numel)
        image, _, *cells = unravel(points.index, to.shape)
        # A cell of a coarser layer stands for its middle.
        places = [
            torch.div((2 * cell + 1) * side, 2 * count, rounding_mode="floor")
            for cell, side, count in zip(cells, shape[2:], to.shape[2:], strict=True)
        ]
        pixels = points.to(ravel([image, *places], (to.shape[0], *shape[2:])))
        size = to.shape[0] * math.prod(shape[2:])
        if not self.duplicates:
            pixels = union([pixels], size)
        index = pixels.index.masked_fill(pixels.index < 0, size)
        return index.sort().values if self.duplicates else index

    def _explanation(
        self, points: list[Tensor], images: Tensor, targets: Targets, shift: tuple[int, int] = (0, 0)
    ) -> Explanation:
        size = tuple(images.shape[2:])
        lost = [n for n, points_of_row in enumerate(points) if len(points_of_row) == 0]
        if lost:
            another = "another class or a neuron nearer to the image" if self.neuron is None else "another neuron"
            logger.warning(
                "fixations: no evidence of %d of %d rows reached the image (the first is row %d); the trace ended in "
                "constants of the model: explain %s, or take a method that reads gradients, as integrated-gradients",
                len(lost),
                len(points),
                lost[0],
                another,
            )
        if self.radius_share:
            dense = localize.remove_outliers(points, size, self.radius_share, self.min_neighbour_share)
            # Evenly spread points are no outliers of each other.
            points = [merged if len(merged) else every for merged, every in zip(dense, points, strict=True)]
        if any(shift):
            last = torch.tensor(size, device=images.device) - 1
            moved = torch.tensor(shift, device=images.device)
            placed = [(p + moved).clamp_min(0).minimum(last) for p in points]
        else:
            placed = points
        index = [ravel([torch.full_like(p[:, 0], n), *p.unbind(1)], (len(points), *size)) for n, p in enumerate(placed)]
        sigma = max(self.sigma_share * localize.diagonal(size), 1e-3)
        heatmap = _density(torch.cat(index), len(points), size, sigma)
        return Explanation(
            **self._fields(images, targets),
            heatmap=outside_inference_mode(heatmap),
            points=[outside_inference_mode(points_of_row) for points_of_row in points],
            kind="class" if self.neuron is None else "neuron",
        )

    def _explain_crops(self, images: Tensor, target: Target, args: Any, kwargs: Any) -> Explanation:
        """Returns the fixations of five crops; ten crops decide the class (the protocol of the authors' code)."""
        if images.dim() != 4:
            raise InputError(f"crops must be None for volumes and signals, got {self.crops}")
        side, (height, width) = self.crops, images.shape[2:]
        if side is None or not 0 < side <= min(height, width):
            raise InputError(f"crops must lie in 1 to the shorter image side, {min(height, width)}, got {side}")
        corners = [(0, 0), (0, width - side), (height - side, 0), (height - side, width - side)]
        corners.append(((height - side) // 2, (width - side) // 2))
        crops = torch.cat([images[:, :, y : y + side, x : x + side] for y, x in corners])
        args, kwargs = take_rows((args, kwargs), len(images), torch.arange(len(images)).repeat(len(corners)))
        tape = self.record(crops, *args, policy=evidence.policy, **kwargs)
        value, logits = logits_of(tape)
        logits = class_columns(logits)
        check_labels(self.labels, logits)
        mirrored = class_columns(logits_of(self.record(crops.flip(3), *args, **kwargs))[1])
        both = torch.cat([logits, mirrored])
        kinds = kinds_of(both, is_probability(tape, value), self.outputs)
        mean = kinds.scores(both).view(10, len(images), -1).mean(0)
        predicted = logits.argmax(1).view(5, len(images))
        chosen = resolve_target(mean, target)
        if chosen.dim() != 1:
            raise InputError(f"target must be one class an image with crops, got shape {list(chosen.shape)}")
        if target is None:
            # Where no crop sees the class of the mean, that of the centre crop takes its place.
            chosen = torch.where((predicted == chosen).any(0), chosen, predicted[4])
            traced = predicted == chosen
        else:
            traced = torch.ones_like(predicted, dtype=torch.bool)
        rows = torch.arange(len(crops), device=images.device) * logits.shape[1]
        starts = Points(rows).to(rows + chosen.repeat(5), traced.flatten())
        (pixels,) = _by_image([self._pixels(tape, {value: starts}, crops.shape)], crops.shape)
        points = []
        for n in range(len(images)):
            coordinates = [pixels[i * len(images) + n].unbind(1) for i in range(len(corners))]
            moved = [
                torch.stack([y + top, x + left], 1) for (y, x), (top, left) in zip(coordinates, corners, strict=True)
            ]
            points.append(torch.cat(moved) if self.duplicates else torch.unique(torch.cat(moved), dim=0))
        if kinds.distributions is not None:
            kinds = OutputKinds(kinds.kind, kinds.distributions.view(10, -1).all(0))
        chosen = outside_inference_mode(chosen[:, None])
        score = outside_inference_mode(mean.gather(1, chosen).float())
        return self._explanation(points, images, Targets(None, chosen, score, kinds))


def _by_image(traced: Sequence[Tensor], shape: torch.Size) -> list[list[Tensor]]:
    """Lists of sorted flat indices into `[N, *size]` as points of each image, int64 `[P, 2]` as (y, x) pixels.

    This is where a device is waited for, once: for how many points each image has.
    """
    images, area = shape[0], math.prod(shape[2:])
    ends = torch.arange(images + 1, device=traced[0].device) * area
    bounds = torch.stack([torch.searchsorted(index, ends) for index in traced]).tolist()
    rows = []
    for index, bound in zip(traced, bounds, strict=True):
        points = torch.stack(unravel(index, (images, *shape[2:]))[1:], 1)
        rows.append([points[first:last] for first, last in itertools.pairwise(bound)])
    return rows


def _density(index: Tensor, rows: int, size: tuple[int, ...], sigma: float) -> Tensor:
    """Returns the sum of Gaussians of height 1 at flat indices into `[rows, *size]`, float32 of that shape."""
    if len(size) < 3:
        height, width = (1, *size)[-2:]
        return ops.point_density(index, rows, height, width, sigma).view(rows, *size)
    slices = ops.point_density(index, rows * size[0], size[1], size[2], sigma).view(rows, *size)
    place = torch.arange(size[0], dtype=torch.float64, device=index.device)
    across = torch.exp(-(((place[:, None] - place) / sigma) ** 2) / 2).float()
    return (across @ slices.flatten(2)).view(slices.shape)


def _neuron(output: Tensor, index: int | Sequence[int] | str) -> Tensor:
    """Returns the flat position `[N, 1]` in each image's output of the neuron an index names."""
    position: list[int] = [] if isinstance(index, str) else [index] if isinstance(index, int) else list(index)
    shape = output.shape[1:]
    inside = all(0 <= i < size for i, size in zip(position, shape, strict=False))
    if len(position) > len(shape) or not inside or (isinstance(index, str) and index != "max"):
        raise InputError(f"neuron must have an index within {list(shape)}, got {index!r}")
    cells = output.flatten(1)
    first = sum(i * math.prod(shape[d + 1 :]) for d, i in enumerate(position))
    below = math.prod(shape[len(position) :])
    return first + cells[:, first : first + below].argmax(1, keepdim=True)
