"""Base of explainers whose map belongs to a layer: how an activation is laid out, and how a map becomes a heat map."""

import itertools
from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.axes import Layout, axes_of
from pyfast_xai.explainers.common.checks import SHAPES
from pyfast_xai.explainers.common.explainer import Explainer, Settings, one_of
from pyfast_xai.explainers.common.layer_search import (
    Place,
    feature_levels,
    is_channels_last,
    place_of,
    token_grid,
)
from pyfast_xai.explainers.common.targets import Targets
from pyfast_xai.explanation import Explanation
from pyfast_xai.tape import Tape, Value
from pyfast_xai.tape.module_hooks import modules_of, unwrap

LayerName = str | nn.Module
Fuse = Literal["mean", "max", "product"]
FUSES = ("mean", "max", "product")
LAYOUTS = ("auto", "channels_first", "channels_last")
Self = TypeVar("Self", bound="LayerExplainer")


class LayerSettings(Settings, total=False):
    """The keyword arguments of explainers whose map belongs to a layer, but for `layer`, see `LayerExplainer`."""

    tokens: tuple[int, int] | None
    layout: Literal["auto", "channels_first", "channels_last"]


class LayerExplainer(Explainer):
    """Base of explainers whose map belongs to a layer.

    Args:
        model: in evaluation mode.
        layer: a module, its path or the name of an operation; several give the mean of their maps; "auto" takes what
            `automatic` finds. Of a module that runs several times the last call is taken; "path@0" is the first.
        tokens: grid `(h, w)` of tokens; None for what the network made them of. Extra tokens (class token, registers)
            are dropped, the leading ones where a grid is given.
        layout: "channels_first", "channels_last", or "auto" for what the network made of the images.
        **settings: those of `Explainer`.

    Raises:
        InputError: a setting that does not exist, or a module that is no part of the model.
    """

    fuse: Fuse = "mean"  # how heat maps of several layers become one
    gamma: float | None = None  # how far they are lifted before

    def __new__(cls: type[Self], *args: Any, **settings: Any) -> Self:
        for name in ("target_layers", "target_layer", "layers"):
            if name in settings:
                raise InputError(f"layer must name the layers of {cls.__name__}, got {name}: did you mean layer?")
        return super().__new__(cls, *args, **settings)

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerName | Sequence[LayerName] = "auto",
        tokens: tuple[int, int] | None = None,
        layout: Literal["auto", "channels_first", "channels_last"] = "auto",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, **settings)
        layers = [layer] if isinstance(layer, str) or not isinstance(layer, Sequence) else list(layer)
        paths = modules_of(self.model)
        self.layers = [one if isinstance(one, str) else _path(paths, one) for one in layers]
        if not self.layers:
            raise InputError("layer must name at least one layer, got none")
        self.tokens, self.layout = tokens, one_of("layout", layout, LAYOUTS)

    def automatic(self, tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
        """Returns the names that "auto" stands for.

        Args:
            tape: tape of a whole forward pass.
            ends: the outputs that are explained; None for all of them.

        Raises:
            InputError: no layer is there.
        """
        return feature_levels(tape)

    def grid(self, activation: Tensor, size: Sequence[int], name: str, layout: Layout | None = None) -> Tensor:
        """Returns an activation, or its gradient, with a cell for each position, `[N, h, w, C]`.

        Args:
            activation: `[N, C, h, w]`, `[N, h, w, C]`, `[N, T, C]` or, where the layout says so, `[N, C, T]`.
            size: (H, W) of the images, to tell the layouts apart.
            name: name of the layer, for messages.
            layout: how the activation holds its map; None to tell by its shape.

        Raises:
            InputError: neither a spatial map nor tokens on a grid.
        """
        shape = list(activation.shape)
        if layout is not None and self.tokens is None and self.layout == "auto":
            return layout.cells(activation)
        if activation.dim() not in (3, len(size) + 2):
            raise InputError(
                f"layer must have a spatial map [N, C, h, w] or tokens [N, T, C], got {shape} from {name!r}"
            )
        cells = activation.movedim(self.channel_dim(shape, size, layout), -1)
        if activation.dim() == len(size) + 2:
            return cells
        if len(size) != 2:
            raise InputError(f"layer must have a spatial map {SHAPES[len(size) + 2]}, got {shape} from {name!r}")
        count = cells.shape[1]
        height, width = self.tokens or token_grid(count, size, name=name)[:2]
        if count < height * width:
            raise InputError(f"tokens must fit layer {name!r} with {count} tokens, got {self.tokens}")
        return cells[:, count - height * width :].unflatten(1, (height, width))

    def channel_dim(self, shape: Sequence[int], size: Sequence[int], layout: Layout | None = None) -> int:
        """Returns which dimension of an activation holds the channels.

        Args:
            shape: shape of the activation, of three or four dimensions.
            size: (H, W) of the images, to tell the layouts apart.
            layout: how the activation holds its map; None to tell by its shape.
        """
        if self.layout != "auto":
            return 1 if self.layout == "channels_first" else len(shape) - 1
        if layout is not None:
            return layout.channels
        if len(size) != 2:
            return 1 if len(shape) == len(size) + 2 else len(shape) - 1
        return 1 if len(shape) == 4 and not is_channels_last(shape, size) else len(shape) - 1

    def names(self, tape: Tape) -> list[str]:
        """Returns the names of the layers.

        Args:
            tape: tape of a whole forward pass.
        """
        return [place.name for place in self.places(tape)]

    def places(self, tape: Tape, ends: Collection[Value] | None = None) -> list[Place]:
        """Returns the places of the layers.

        Args:
            tape: tape of a whole forward pass.
            ends: the outputs that are explained; None for all of them.

        Raises:
            InputError: no layer is there.
        """
        names = [self.automatic(tape, ends) if name == "auto" else [name] for name in self.layers]
        axes = axes_of(tape)
        return [place_of(tape, axes, name) for name in itertools.chain(*names)]

    def heat(self, maps: Sequence[Tensor], size: Sequence[int], mode: str = "bilinear") -> Tensor:
        """Returns the positive part of the maps of each layer, at the resolution of the images; logs which has none.

        Args:
            maps: signed, `[R, h, w]`, one a layer.
            size: (H, W) of the images.
            mode: mode of the interpolation, "bilinear" or "nearest".

        Returns:
            `[R, H, W]`; those of several layers are fused.
        """
        heatmaps = [resized(layer_map.clamp_min(0)[:, None], size, mode)[:, 0] for layer_map in maps]
        heatmap = fused(heatmaps, self.fuse, self.gamma)
        if heatmap.device.type == "cpu":
            filled = torch.stack([layer_map.flatten(1).any(1) for layer_map in maps]).any(0)
            negative = filled & heatmap.flatten(1).any(1).logical_not()
            if bool(negative.any()):
                self.warn(
                    "the map of row %d is nowhere positive, so that its heat map is zero; `signed_map` has the rest"
                    if len(maps) == 1
                    else "the fused maps of row %d are nowhere positive, so that their heat map is zero; one layer "
                    "alone has a `signed_map`",
                    int(negative.nonzero()[0]),
                )
        return heatmap

    def explanation(self, images: Tensor, targets: Targets, maps: Sequence[Tensor], heatmap: Tensor) -> Explanation:
        """Builds the explanation of the targets.

        Args:
            images: `[N, C, H, W]`.
            targets: K an image.
            maps: signed, `[N * K, h, w]`, one a layer; of several layers the explanation holds none.
            heatmap: `[N * K, H, W]`.
        """
        if heatmap.device.type == "cpu":
            filled = torch.stack([layer_map.flatten(1).any(1) for layer_map in maps]).any(0)
            zero = filled.logical_not().nonzero().flatten().tolist()
            for row in zero:
                if row in targets.zero_reasons:
                    self.warn(f"the map of row %d is zero: {targets.zero_reasons[row]}", row)
            unknown = [row for row in zero if row not in targets.zero_reasons]
            if unknown and bool(filled.any()):
                self.warn(
                    "the map of row %d is zero, for nothing of its target arrives at the layer, where others arrive",
                    unknown[0],
                )
        return Explanation(
            **self._fields(images, targets),
            heatmap=heatmap,
            signed_map=maps[0] if len(maps) == 1 else None,
        )


def _path(paths: dict[nn.Module, str], module: Any) -> str:
    if not isinstance(module, nn.Module) or unwrap(module) not in paths:
        kind = type(module).__name__
        received = f"a {kind} of another model" if isinstance(module, nn.Module) else kind
        raise InputError(f"layer must be a module of the model, its path or 'auto', got {received}")
    return paths[unwrap(module)]


def fused(heatmaps: Sequence[Tensor], fuse: Fuse = "mean", gamma: float | None = None) -> Tensor:
    """Returns one heat map `[R, H, W]` of those of several layers, each scaled to a maximum of 1 before.

    Args:
        heatmaps: `[R, H, W]` each; one alone is returned as it is.
        fuse: their "mean", the largest at every pixel ("max"), or their "product".
        gamma: lifts each by `tanh(gamma M)` after it was scaled; None leaves it alone.
    """
    if len(heatmaps) == 1:
        return heatmaps[0]
    scaled = []
    for heatmap in heatmaps:
        top = heatmap.flatten(1).amax(1).clamp_min(torch.finfo(heatmap.dtype).tiny)
        scaled.append(heatmap / top.view(-1, *[1] * (heatmap.dim() - 1)))
    stacked = torch.stack(scaled if gamma is None else [(gamma * heatmap).tanh() for heatmap in scaled])
    if fuse == "max":
        return stacked.amax(0)
    return stacked.mean(0) if fuse == "mean" else stacked.prod(0)


_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resized(maps: Tensor, size: Sequence[int], mode: str = "bilinear", *, align_corners: bool = False) -> Tensor:
    """Returns maps `[N, K, *grid]` at the resolution of the images.

    Args:
        maps: maps of images, volumes or signals.
        size: (H, W) of the images, (D, H, W) of volumes, (L,) of signals.
        mode: "bilinear", which is linear along every axis, or "nearest".
        align_corners: the corners of both are the centres of their outermost cells, where it is linear.
    """
    if mode == "nearest":
        return functional.interpolate(maps, size=size, mode=mode)
    return functional.interpolate(maps, size=size, mode=_LINEAR[len(size)], align_corners=align_corners)
