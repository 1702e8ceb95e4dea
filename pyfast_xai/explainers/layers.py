"""Where an explainer looks: which layer, how its activation is laid out, and how a map there becomes a heat map."""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.base import Explainer, logits_of, rows_of
from pyfast_xai.explainers.seeds import Goal, Seeds
from pyfast_xai.explainers.walking import Start, walked
from pyfast_xai.explanation import Explanation
from pyfast_xai.rules.response import Response, Table, walk
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.record import Keep

# Operations that pool or re-arrange a map without a layer of their own.
_AFTER_FEATURES = ("max_pool", "avg_pool", "adaptive", "dropout", "mean", "flatten", "view", "reshape", "permute")


class LayerExplainer(Explainer):
    """Base of explainers whose map belongs to a layer.

    Args:
        model: in evaluation mode.
        layer: path of a module or name of an operation; several give the mean of their maps; "auto" takes what
            `automatic` finds.
        tokens: grid `(h, w)` of token activations `[N, T, C]`; None for a square one. Leading extra tokens (class
            token, registers) are dropped.
        channels: "first", "last", or "auto" to tell by the shape of the input.
        threshold: share of its range at which `Explanation.boxes` cuts the map.
        labels: names of the classes.

    Raises:
        InputError: a setting that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | Sequence[str] = "auto",
        tokens: tuple[int, int] | None = None,
        channels: Literal["auto", "first", "last"] = "auto",
        threshold: float = 0.15,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, labels=labels)
        self.layers = [layer] if isinstance(layer, str) else list(layer)
        if not self.layers:
            raise InputError("layer must name at least one layer, got none")
        if channels not in ("auto", "first", "last"):
            raise InputError(f"channels must be 'auto', 'first' or 'last', got {channels!r}")
        self.tokens, self.channels, self.threshold = tokens, channels, threshold

    def automatic(self, tape: Tape) -> str:
        """The name that "auto" stands for."""
        return last_features(tape)

    def grid(self, activation: Tensor, size: Sequence[int], name: str) -> Tensor:
        """An activation, or its gradient, with a cell for each position.

        Args:
            activation: `[N, C, h, w]`, `[N, h, w, C]` or `[N, T, C]`.
            size: (H, W) of the images, to tell the layouts apart.
            name: of the layer, for messages.

        Returns:
            `[N, h, w, C]`.

        Raises:
            InputError: neither a spatial map nor tokens on a grid.
        """
        shape = list(activation.shape)
        if activation.dim() == 4:
            last = self.channels == "last" or (self.channels == "auto" and is_channels_last(shape, size))
            return activation if last else activation.permute(0, 2, 3, 1)
        if activation.dim() == 3:
            height, width = self.tokens or (math.isqrt(shape[1]),) * 2
            extra = shape[1] - height * width
            # Without a grid from the user, a square number of patches and a few extra tokens.
            if extra < 0 or (self.tokens is None and extra > 8):
                raise InputError(
                    f"tokens must give the grid of layer {name!r} with {shape[1]} tokens, got {self.tokens}"
                )
            return activation[:, extra:].unflatten(1, (height, width))
        raise InputError(f"layer must have a spatial map [N, C, h, w] or tokens [N, T, C], got {shape} from {name!r}")

    def names(self, tape: Tape) -> list[str]:
        """The names of the layers.

        Args:
            tape: of a whole forward pass.
        """
        return [self.automatic(tape) if name == "auto" else name for name in self.layers]

    def values(self, tape: Tape) -> list[Value]:
        """The layers on a tape."""
        return [tape.find(name) for name in self.names(tape)]

    def heat(self, maps: Sequence[Tensor], size: Sequence[int], mode: str = "bilinear") -> Tensor:
        """What is positive of the maps of each layer, at the resolution of the images.

        Args:
            maps: signed, `[R, h, w]`, one a layer.
            size: (H, W) of the images.
            mode: of the interpolation, "bilinear" or "nearest".

        Returns:
            `[R, H, W]`; of several layers the mean, each brought to a maximum of one.
        """
        corners = False if mode == "bilinear" else None
        rectified = [own.clamp_min(0)[:, None] for own in maps]
        return mean_of_scaled(
            [functional.interpolate(own, size=size, mode=mode, align_corners=corners)[:, 0] for own in rectified]
        )

    def explanation(self, images: Tensor, seeds: Seeds, maps: Sequence[Tensor], heatmap: Tensor) -> Explanation:
        """What was found for the targets.

        Args:
            images: `[N, C, H, W]`.
            seeds: K targets an image.
            maps: signed, `[N * K, h, w]`, one a layer; of several layers the explanation holds none.
            heatmap: `[N * K, H, W]`.
        """
        return Explanation(
            method=self.method,
            heatmap=heatmap,
            target=None if seeds.target is None else seeds.target.flatten(),
            score=None if seeds.score is None else seeds.score.flatten(),
            map=maps[0] if len(maps) == 1 else None,
            images=rows_of(images, seeds.each),
            threshold=self.threshold,
            labels=self.labels,
        )


def mean_of_scaled(heatmaps: Sequence[Tensor]) -> Tensor:
    """One of the heat maps `[R, H, W]` of several layers, which differ in scale: each is brought to a maximum of 1."""
    if len(heatmaps) == 1:
        return heatmaps[0]
    scaled = [own / own.amax((1, 2), keepdim=True).clamp_min(torch.finfo(own.dtype).tiny) for own in heatmaps]
    return torch.stack(scaled).mean(0)


def one_of_batch(images: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The first image, for a forward that only looks at the model; all where other arguments may go with them."""
    return images if args or kwargs else images[:1]


def rows(by_target: Tensor) -> Tensor:
    """`[K, N, ...]` as rows of an explanation, image by image: `[N * K, ...]`."""
    return by_target.transpose(0, 1).flatten(0, 1).contiguous()


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Finding layers on a tape


def is_channels_last(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether `[N, a, b, c]` is `[N, h, w, C]`: only that reading has the shape of the image."""

    def fits(height: int, width: int) -> bool:
        return abs(height * size[1] - width * size[0]) <= max(size)

    return fits(*shape[1:3]) and not fits(*shape[2:4])


def last_features(tape: Tape) -> str:
    """The name of the last spatial map before pooling and flattening that is not a map of classes.

    Args:
        tape: of a whole forward pass.

    Raises:
        InputError: the model has no spatial map.
    """
    outputs = [leaf for leaf in pytree.tree_leaves(tape.outputs) if isinstance(leaf, Value) and len(leaf.shape) == 2]
    classes = outputs[0].shape[1] if outputs else None
    for node in reversed(tape.nodes):
        value = node.outputs[0]
        pools = any(part in node.name.rsplit(".", 1)[-1] for part in _AFTER_FEATURES)
        if value is None or pools or not isinstance(value, Value):
            continue
        spatial = len(value.shape) == 4 and min(value.shape[2:]) > 1
        patches = len(value.shape) == 3 and value.shape[1] > 4
        if (spatial and value.shape[1] != classes) or (patches and value.shape[2] != classes):
            return node.name
    raise InputError("layer must be named for a model without a spatial map, got 'auto'")


_ATTENDS = {"aten::scaled_dot_product_attention", "aten::softmax", "aten::_softmax"}


def last_sensitive(tape: Tape) -> str:
    """As `last_features`, but a layer on which the scores depend at every position.

    Where one token is read in the end, the others of the last layer have no influence any more: the tokens that go into
    the last block with attention are taken.

    Args:
        tape: of a whole forward pass.

    Raises:
        InputError: the model has no spatial map.
    """
    name = last_features(tape)
    value = tape.find(name)
    if len(value.shape) == 3 and _one_token_is_read(tape, value):
        attention = max((node.index for node in tape if key(node.op) in _ATTENDS), default=0)
        before = [
            node.name
            for node in bottlenecks(tape)
            if node.index < attention and node.outputs[0] is not None and node.outputs[0].shape == value.shape
        ]
        return before[-1] if before else name
    return name


def _one_token_is_read(tape: Tape, tokens: Value) -> bool:
    readers = [node for node in tape if tokens in node.inputs]
    read = [node.outputs[0] for node in readers]
    if not readers or any(key(node.op) not in ("aten::select", "aten::slice") for node in readers):
        return False
    if len(read) == 1 and read[0] is not None and read[0].shape == tokens.shape:  # `x[:]`
        return _one_token_is_read(tape, read[0])
    return all(value is not None and value.numel * tokens.shape[1] == tokens.numel for value in read)


def bottlenecks(tape: Tape) -> list[Node]:
    """The nodes through whose first result all must pass that leads from the inputs to the scores, in order.

    Args:
        tape: of a whole forward pass.
    """
    answer, _ = logits_of(tape)
    last: dict[Value, int] = {value: node.index for node in tape for value in node.inputs}
    last[answer] = len(tape.nodes)
    still_used = {value for value in tape.inputs if last.get(value, -1) >= 0}
    found = []
    for node in tape:
        still_used.update(value for value in node.outputs if value is not None and last.get(value, -1) > node.index)
        still_used = {value for value in still_used if last[value] > node.index}
        if still_used == {node.outputs[0]}:
            found.append(node)
    return found


# Recording from a layer on


class Above(Response):
    """A dense reading of what lies above some layers: of the operations below nothing is kept.

    It keeps the layers' own activations, too. As it knows what has run, each is for one recording.

    Args:
        overlay: rules that replace those of the gradient.
        layers: names of the operations that make the layers; it begins to save once the first of them has run, and
            with `INPUT` among them at once.
    """

    def __init__(self, overlay: Table, layers: Collection[str]) -> None:
        super().__init__(overlay)
        self._layers = layers
        self._begun = INPUT in layers

    def save(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._begun:
            super().save(node, keep, args, kwargs)

    def run(self, node: Node, keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().run(node, keep, args, kwargs) if self._begun else node(*args, **kwargs)
        if node.name in self._layers:
            self._begun = True
            for i, tensor in enumerate(result if isinstance(result, (list, tuple)) else (result,)):
                if isinstance(tensor, Tensor):
                    keep(_activation(i), tensor)
        return result


INPUT = ""  # among names of operations: what no operation made


def _activation(output: int) -> str:
    return f"activation.{output}"


@dataclass
class Recorded:
    """A forward pass, recorded from some layers on.

    Attributes:
        tape: of the whole forward.
        reading: the one it was recorded with.
        layers: the values of the layers.
        activations: their numbers.
    """

    tape: Tape
    reading: Response
    layers: list[Value]
    activations: list[Tensor]

    def gradients(self, seeds: Mapping[Value, Tensor], reading: Response | None = None) -> list[Tensor]:
        """What arrives at each layer, `[K, *shape]`; the tape can be walked again.

        Args:
            seeds: what starts, by the value it belongs to.
            reading: to walk with instead of the one it was recorded with; must need no more.

        Raises:
            InputError: a layer that does not lead to where it starts.
        """
        for layer in self.layers:
            if not _leads(self.tape, layer, seeds):
                maker = self.tape.producer(layer)
                raise InputError(f"layer must lead to what is explained, got {maker.name if maker else 'the images'!r}")
        return walk(reading or self.reading, self.tape, seeds, self.layers, retain=True)


class LayerRecorder:
    """Records a model with what lies above some layers, and remembers where that begins.

    Which operation makes a layer is known only after a forward: the first time one image is sent ahead.

    Args:
        explainer: whose model is recorded.
        overlay: rules that replace those of the gradient.
        layers: finds the layers on a tape.
        everything: keep what lies below, too.
    """

    def __init__(
        self,
        explainer: Explainer,
        overlay: Table,
        layers: Callable[[Tape], Sequence[Value]],
        *,
        everything: bool = False,
    ) -> None:
        self._explainer, self._overlay, self._layers = explainer, overlay, layers
        self._always = {INPUT} if everything else set()
        self._begins: dict[tuple[int, ...], frozenset[str]] = {}

    def __call__(self, images: Tensor, args: Any, kwargs: Any) -> Recorded:
        """Record a forward pass.

        Args:
            images: `[N, C, H, W]`.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.

        Raises:
            InputError: a layer that is not there.
        """
        shape = tuple(images.shape[1:])
        if shape not in self._begins:
            _, ahead = self._record(one_of_batch(images, args, kwargs), frozenset(), args, kwargs)
            self._begins[shape] = self._begin(ahead, self._layers(ahead))
        reading, tape = self._record(images, self._begins[shape], args, kwargs)
        layers = list(self._layers(tape))
        begin = self._begin(tape, layers)
        if begin != self._begins[shape]:  # the model ran otherwise than on one image
            self._begins[shape] = begin
            reading, tape = self._record(images, begin, args, kwargs)
            layers = list(self._layers(tape))
        return Recorded(tape, reading, layers, [self._activation(tape, layer, images) for layer in layers])

    def gradients(
        self,
        images: Tensor,
        target: Goal,
        args: Any,
        kwargs: Any,
        *,
        reading: Callable[[Tape, Seeds], Response | None],
        key: Hashable,
    ) -> tuple[Recorded, Seeds, list[Tensor]]:
        """Record a forward pass, and walk back to the layers.

        Args:
            images: `[N, C, H, W]`.
            target: of the explainer.
            args: further arguments of the model.
            kwargs: further keyword arguments of the model.
            reading: to walk with instead of the one it was recorded with, see `Recorded.gradients`.
            key: what the layers and `reading` depend on besides the tape.

        Returns:
            The recording, which is not to be walked again; what was started from; and what `Recorded.gradients` gives.

        Raises:
            InputError: a layer that is not there or does not lead to the target, or a target that does not fit.
        """

        def step(start: Start, images: Tensor, args: Any, kwargs: Any) -> tuple[Tape, Any]:
            recorded = self(images, args, kwargs)
            seeds = start(recorded.tape)
            arrived = recorded.gradients(seeds.grads, reading(recorded.tape, seeds))
            return recorded.tape, (recorded.reading, recorded.activations, arrived)

        key = (LayerRecorder.gradients, key)
        tape, seeds, found = walked(self._explainer, step, images, target, args, kwargs, key=key)
        own, activations, arrived = found
        return Recorded(tape, own, list(self._layers(tape)), activations), seeds, arrived

    def _record(self, images: Tensor, begin: Collection[str], args: Any, kwargs: Any) -> tuple[Response, Tape]:
        reading = Above(self._overlay, begin)
        return reading, self._explainer.record(images, *args, reading=reading, **kwargs)

    def _begin(self, tape: Tape, layers: Sequence[Value]) -> frozenset[str]:
        """Names of the operations that made the layers."""
        makers = [tape.producer(layer) for layer in layers]
        return frozenset({INPUT if maker is None else maker.name for maker in makers} | self._always)

    def _activation(self, tape: Tape, layer: Value, images: Tensor) -> Tensor:
        if layer is tape.inputs[0]:
            return images
        maker = tape.producer(layer)
        saved = None if maker is None else maker.saved.get(_activation(maker.outputs.index(layer)))
        if saved is None:
            raise InputError("layer must return what an operation made, got what was written to through a view")
        return saved.tensor


def _leads(tape: Tape, layer: Value, ends: Collection[Value]) -> bool:
    """Whether any of some values depends on a layer."""
    found = {layer}
    for node in tape:
        if not found.isdisjoint(node.inputs):
            found.update(value for value in node.outputs if value is not None)
    return not found.isdisjoint(ends)
