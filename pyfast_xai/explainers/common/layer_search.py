"""The search for the layer to explain at: one predicate over a tape for every explainer.

A value is a layer where it depends on the images, has one row an image and holds a map of it (`axes.layout_of`), leads
to what is explained, and is no score: a layer with weights lies between it and the end. What is moved, cropped or
pooled is the layer below it in another form.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common.axes import POOLS, Dims, Layout, axes_of, layout_of, space_of
from pyfast_xai.explainers.common.targets import UNRELATED, logits_of
from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument, call_of

Box = tuple[tuple[int, int], ...]

_MOVES = {
    *("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "permute"),
    *("transpose", "t", "mT", "movedim", "contiguous", "clone", "alias", "detach", "_to_copy", "to", "dropout"),
    *("feature_dropout", "slice", "narrow", "select", "constant_pad_nd", "pad", "expand"),
}
_RECTIFIERS = {
    *("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu_with_noise", "elu", "celu", "selu", "gelu", "silu"),
    *("mish", "softplus", "hardswish", "clamp_min"),
}
_NORMS = {
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_batch_norm", "native_layer_norm"),
    *("native_group_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
}
_LAYERS = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "convolution", "_convolution"}
_LAYERS |= {f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)}


@dataclass(frozen=True)
class Layer:
    """A value that holds a map.

    Attributes:
        value: on the tape.
        name: name of the operation that made it.
        layout: how it holds the map.
    """

    value: Value
    name: str
    layout: Layout


class LayerSearch:
    """The layers on a tape.

    Args:
        tape: tape of a whole forward pass.
        ends: the outputs that are explained; None for all of them.
    """

    def __init__(self, tape: Tape, ends: Collection[Value] | None = None) -> None:
        self._tape = tape
        outputs = [leaf for leaf in pytree.tree_leaves(tape.outputs) if isinstance(leaf, Value)]
        self._ends = list(outputs if ends is None else ends)
        self._axes, self._space = axes_of(tape), space_of(tape.inputs[0])
        self._live = _live(tape, self._ends)
        self._scores = self._find_scores()
        self._layers: dict[Value, Layer] = {}
        for node in tape:
            value = node.outputs[0] if node.outputs else None
            if value is None or value not in self._axes or value not in self._live or value in self._scores:
                continue
            layout = layout_of(self._axes[value], self._space)
            if layout is None or not _is_map(layout):
                continue
            channels = self._axes[value][layout.channels]
            if channels.size == 1 or not channels.unknown:  # not the masks of queries
                self._layers[value] = Layer(value, node.name, layout)

    def layers(self) -> list[Layer]:
        """Returns all layers in the order in which they ran."""
        return list(self._layers.values())

    def scores(self) -> list[Value]:
        """Returns the values between the last layers with weights and the ends."""
        return [value for value in self._scores if value.dtype.is_floating_point]

    def last(self, *, read: bool = False, among: Collection[Value] | None = None) -> Layer:
        """Returns the last layer, in the form in which an operation computed it.

        Where it is one or two weighted layers behind one that everything passes, tokens or of the same grid, that is
        taken: what goes into the last attention, not the keys and values that are made of it.

        Args:
            read: the explained outputs must depend on the layer at every position.
            among: the values that may be taken; None for all.

        Raises:
            InputError: there is none.
        """
        layers = [
            layer
            for layer in self.layers()
            if (not read or self._is_read(layer)) and (among is None or layer.value in among)
        ]
        if not layers:
            if not any(isinstance(leaf, Value) for leaf in pytree.tree_leaves(self._tape.outputs)):
                raise InputError(UNRELATED)
            raise InputError(
                "layer must be named for a model in which no map of the image leads to what is explained, got 'auto'"
            )
        last = layers[-1]
        passed = set(self.passed())
        for layer in reversed(layers):
            if layer.value in passed:
                alike = len(last.value.shape) == 3 or layer.layout.grid == last.layout.grid
                last = layer if alike and self._weighted_between(layer.value, last.value) <= 2 else last
                break
        return self._computed(last, layers)

    def ends_in_vectors(self) -> bool:
        """Returns whether all ends are one vector an image, such as scores of classes."""
        dims = [self._axes[end] for end in self._ends if end in self._axes]
        return all(len(end) == 2 and [axis.kind for axis in end[0].axes] == ["n"] for end in dims)

    def ends_in_maps(self) -> bool:
        """Returns whether an end is a map of the image."""
        layouts = [layout_of(self._axes[end], self._space) for end in self._ends if end in self._axes]
        return any(layout is not None and _is_map(layout) for layout in layouts)

    def levels(self) -> list[Layer]:
        """Returns the maps of several resolutions that the ends are computed from, as a detector's pyramid; or none.

        Behind its maps a detector has one list of detections of all levels. The last maps in front of that list are
        those of heads, several a level; a level is the last map through which all of one resolution must pass.
        """
        visited, last_maps = set(), dict[tuple[int, ...], list[Value]]()
        stack = [end for end in self._ends if end in self._axes]
        while stack:
            value = stack.pop()
            if value in visited:
                continue
            visited.add(value)
            layout = layout_of(self._axes[value], self._space)
            if layout is not None and _is_map(layout):
                last_maps.setdefault(layout.grid, []).append(value)
            elif (node := self._tape.producer(value)) is not None:
                stack += [source for source in node.inputs if source in self._axes]
        levels: dict[Value, Layer] = {}
        for grid, values in sorted(last_maps.items(), reverse=True) if len(last_maps) > 1 else ():
            passed = [
                self._layers[value] for value in LayerSearch(self._tape, values).passed() if value in self._layers
            ]
            passed = [layer for layer in passed if layer.layout.grid == grid] or passed
            if passed:
                level = self._computed(passed[-1], passed)
                levels[level.value] = level
        return list(levels.values()) if len(levels) > 1 else []

    def _weighted_between(self, below: Value, above: Value) -> float:
        """Returns the most layers with weights on a way from one value to another that keeps positions apart."""
        depth: dict[Value, float] = {below: 0}
        for node in self._tape:
            passed = max((depth[value] for value in node.inputs if value in depth), default=None)
            if passed is not None:
                for value in node.outputs:
                    if value is not None and any(dim.positions for dim in self._axes[value]):
                        depth.setdefault(value, passed + _has_weights(node))
        return depth.get(above, math.inf)

    def passed(self) -> list[Value]:
        """Returns the values through which all must pass that leads from the images to the ends, in order."""
        last = {value: node.index for node in self._tape if self._leads(node) for value in node.inputs}
        last |= dict.fromkeys(self._ends, len(self._tape.nodes))
        images = self._tape.inputs[0]
        still_used, passed = {images} & set(last), []
        expires: dict[int, list[Value]] = {}
        for value, index in last.items():
            expires.setdefault(index, []).append(value)
        for node in self._tape:
            if self._leads(node) and any(value in self._axes for value in node.inputs):
                still_used.update(value for value in node.outputs if value in last and value in self._axes)
            still_used.difference_update(expires.get(node.index, ()))
            if len(still_used) == 1 and node.outputs and node.outputs[0] in still_used:
                passed.append(node.outputs[0])
        return [value for value in passed if value is not None]

    def layer(self, value: Value) -> Layer | None:
        """Returns a value as a layer; None where it is none."""
        return self._layers.get(value)

    def _leads(self, node: Node) -> bool:
        return any(value in self._live for value in node.outputs)

    def _is_read(self, layer: Layer) -> bool:
        """Returns whether the ends depend on a layer at every position."""
        dim = 3 - layer.layout.channels if len(layer.value.shape) == 3 else None
        if dim is None:
            return True
        start, stop = self._live[layer.value][dim]
        return start <= layer.layout.before and stop >= layer.value.shape[dim] - layer.layout.after

    def read_range(self, layer: Layer) -> tuple[int, int]:
        """Returns the first token of a layer of tokens that the ends depend on, and that after the last."""
        return self._live[layer.value][3 - layer.layout.channels]

    def _computed(self, layer: Layer, layers: Sequence[Layer]) -> Layer:
        """Returns the layer below views, crops and pools, if it is one of some layers."""
        while True:
            node = self._tape.producer(layer.value)
            name = _operation(node) if node is not None else ""
            below = self._layers.get(node.inputs[0]) if node is not None and node.inputs else None
            if below is None or (name not in _MOVES and name not in POOLS) or below not in layers:
                return layer
            layer = below

    def _find_scores(self) -> set[Value]:
        """Returns the values between the last layers with weights and the ends."""
        size = self._tape.inputs[0].shape[2:]
        layouts = {end: layout_of(self._axes.get(end, ()), self._space) for end in self._ends}
        # A map that is coarser than the images may be one of features, as a backbone returns it.
        maps = {end for end, layout in layouts.items() if layout is not None and layout.grid < size}
        scored = {False: self._scored(rectified=False), True: self._scored(rectified=True)}
        scores: set[Value] = set()
        stack = [end for end in self._ends if end in scored[end not in maps]]
        while stack:
            value = stack.pop()
            if value in scores:
                continue
            scores.add(value)
            node = self._tape.producer(value)
            if node is not None and not _has_weights(node):
                stack += [source for source in node.inputs if source in self._axes]
        return scores | {end for end in self._ends if end not in maps}

    def _scored(self, *, rectified: bool) -> set[Value]:
        """Returns the results of layers with weights, and values computed from these alone without another layer.

        Normalised values and sums with their own source are features; so are rectified values if `rectified` is set.
        """
        scored: set[Value] = set()
        for node in self._tape:
            sources = [source for source in node.inputs if source in self._axes]
            made = _has_weights(node) or (bool(sources) and all(source in scored for source in sources))
            if made and not _has_weights(node):
                if _operation(node) in _NORMS:
                    producer = self._tape.producer(sources[0])
                    made = rectified and producer is not None and _has_weights(producer)
                elif len(sources) == 1:
                    made = rectified or _operation(node) not in _RECTIFIERS
                elif _operation(node) == "add":
                    made = not self._is_residual(sources)
            if made:
                scored.update(value for value in node.outputs if value is not None)
        return scored

    def _is_residual(self, terms: Sequence[Value]) -> bool:
        """Returns whether one term of a sum is made of another."""
        earliest = min(-1 if term.producer is None else term.producer for term in terms)
        visited, queue = set(), [term for term in terms if term.producer is not None and term.producer > earliest]
        while queue:
            node = self._tape.producer(queue.pop())
            for source in node.inputs if node is not None else ():
                if source in terms:
                    return True
                if source not in visited and (source.producer or -1) > earliest:
                    visited.add(source)
                    queue.append(source)
        return False


def _is_map(layout: Layout) -> bool:
    """Returns whether a grid has positions along two axes or more, of signals along the one that there is."""
    return sum(side > 1 for side in layout.grid) >= min(2, len(layout.grid))


def _operation(node: Node) -> str:
    return key(node.op).split("::")[1]


def _has_weights(node: Node) -> bool:
    """Returns whether a node is a layer whose weights are no activations."""
    if any(isinstance(part, torch.ScriptObject) for part in node.args):  # weights that a backend packed
        return True
    name = _operation(node)
    if name not in _LAYERS:
        return False
    if name == "einsum":
        return any(isinstance(part, Tensor) for part in node.args[1])
    return any(isinstance(part, Tensor) and part.dim() > 1 for part in node.args[:3])


_NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"}


@dataclass(frozen=True)
class Place:
    """The place of a layer on every tape of the same kind of images.

    Attributes:
        name: name of an operation, or of one call of a module, "path@1".
        layout: how its value holds a map; None to tell by the shape.
    """

    name: str
    layout: Layout | None = None


def place_of(tape: Tape, axes: dict[Value, Dims], name: str) -> Place:
    """Returns the place of a named layer.

    Args:
        tape: tape of a whole forward pass.
        axes: axes of its values.
        name: name of a module or an operation.

    Raises:
        InputError: no such layer, or one with parts of the images among its rows or channels.
    """
    value = tape.find(name)
    path, call = call_of(name)
    calls = len(tape.modules.get(path, ()))
    name = f"{path}@{call % calls}" if calls > 1 else name
    dims = axes.get(value, ())
    layout = layout_of(dims, space_of(tape.inputs[0]))
    folded = len(dims) == len(tape.inputs[0].shape) or (dims and dims[0].positions)
    if layout is None and folded and any(dim.positions for dim in dims):
        raise InputError(
            f"layer must hold one map an image, got {list(value.shape)} from {name!r}, "
            "whose rows or channels are parts of the image"
        )
    return Place(name, layout)


def pooled_place(tape: Tape, pooled: Value) -> Place:
    """Returns the place of the map that an operation averages: its input, or the map of which that is a view.

    Args:
        tape: tape of a whole forward pass.
        pooled: what the operation reads.
    """
    axes, space = axes_of(tape), space_of(tape.inputs[0])
    value, node = pooled, tape.producer(pooled)
    while node is not None and layout_of(axes.get(value, ()), space) is None and _operation(node) in _MOVES:
        value = node.inputs[0]
        node = tape.producer(value)
    layout = layout_of(axes.get(value, ()), space)
    node = node if layout is not None else tape.producer(pooled)
    return Place(node.name if node is not None else "", layout)


def last_features(tape: Tape) -> str:
    """Returns the name of the last layer.

    Args:
        tape: tape of a whole forward pass.

    Raises:
        InputError: the model has none.
    """
    return LayerSearch(tape, class_scores(tape)).last().name


def feature_levels(tape: Tape) -> list[str]:
    """Returns the names of the levels of a detector's pyramid, or that of the last layer where there are none.

    A classifier has none, nor has a model that returns its maps, as a backbone and a segmenter do.

    Args:
        tape: tape of a whole forward pass.

    Raises:
        InputError: the model has no layer.
    """
    search = LayerSearch(tape, class_scores(tape))
    levels = [] if search.ends_in_vectors() or search.ends_in_maps() else search.levels()
    return [layer.name for layer in levels] or [search.last().name]


def class_scores(tape: Tape) -> list[Value] | None:
    """Returns the scores of classes among several outputs; None where the model returns something else.

    Features that a model returns beside its scores are no layer in front of which a layer has to lie.
    """
    try:
        value, _ = logits_of(tape)
    except InputError:
        return None
    return [value] if len(value.shape) == 2 and value.shape[0] == tape.inputs[0].shape[0] else None


def sensitive_levels(tape: Tape, ends: Collection[Value] | None = None) -> list[str]:
    """Returns the names of the levels of a pyramid that the explained outputs are computed from.

    Where there are none, and where scores of classes are explained, it is the last layer that they depend on.

    Args:
        tape: tape of a whole forward pass.
        ends: the outputs that are explained; None for all of them.

    Raises:
        InputError: the model has none.
    """
    search = LayerSearch(tape, ends)
    levels = [] if search.ends_in_vectors() else search.levels()
    return [layer.name for layer in levels] or [search.last(read=True).name]


def behind_norm(tape: Tape, name: str) -> str:
    """Returns the layer norm that reads a layer; the layer itself where none does.

    The gradient that comes through a layer norm is orthogonal to what it reads: at every position their products add up
    to zero.

    Args:
        tape: of a whole forward pass.
        name: of the layer.
    """
    value = tape.find(name)
    norms = (node for node in tape if value in node.inputs and _operation(node) in _NORMS)
    return next((node.name for node in norms if node.outputs[0] is not None), name)


def bottlenecks(tape: Tape) -> list[Node]:
    """Returns the nodes through whose first result all must pass that leads from the images to the scores, in order.

    Args:
        tape: tape of a whole forward pass.
    """
    passed = LayerSearch(tape, [logits_of(tape)[0]]).passed()
    return [node for node in map(tape.producer, passed) if node is not None]


# Which entries are read


def _live(tape: Tape, ends: Collection[Value]) -> dict[Value, Box]:
    """Returns for each value that leads to the ends, along each dimension, the range of what they may depend on."""
    boxes: dict[Value, Box] = {end: tuple((0, size) for size in end.shape) for end in ends}
    for node in reversed(tape.nodes):
        for place, value in enumerate(node.outputs):
            if value is None or value not in boxes:
                continue
            for source, box in _read(node, place, value, boxes[value]):
                before = boxes.get(source)
                if before is not None:
                    box = tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(before, box, strict=True))
                boxes[source] = box
    return boxes


def _read(node: Node, place: int, value: Value, box: Box) -> list[tuple[Value, Box]]:
    """Returns the ranges of its inputs that a range of a result depends on; all where the operation is not known."""
    name, source = _operation(node), node.inputs[0] if node.inputs else None
    if source is None:
        return []
    all_inputs = [(input, tuple((0, size) for size in input.shape)) for input in node.inputs]
    if name in ("cat", "concat", "concatenate"):
        return _read_of_parts(node, box)
    if torch.Tag.pointwise in getattr(node.op, "tags", ()):
        return [(input, _aligned(input, value, box)) for input in node.inputs]
    single = len(node.inputs) == 1 and node.args and node.args[0] is source
    if not single:
        return all_inputs
    ranges = list(box)
    if name in _KEEPS and source.shape == value.shape:
        return [(source, box)]
    if name in ("linear", "layer_norm", "native_layer_norm", "rms_norm", "softmax", "_softmax"):
        count = 1
        if "norm" in name:
            count = len(argument(node, "normalized_shape"))
        elif "softmax" in name:
            dim = argument(node, "dim") % len(ranges)
            ranges[dim] = (0, source.shape[dim])
            return [(source, tuple(ranges))]
        leading = ranges[: len(ranges) - count] if len(source.shape) == len(ranges) else []
        return [(source, (*leading, *((0, size) for size in source.shape[len(leading) :])))]
    if name in ("select", "unbind"):
        dim = argument(node, "dim") % len(source.shape)
        index = argument(node, "index") if name == "select" else place
        index %= source.shape[dim]
        return [(source, (*ranges[:dim], (index, index + 1), *ranges[dim:]))]
    if name in ("slice", "narrow", "split", "chunk", "split_with_sizes"):
        dim = (argument(node, "dim") or 0) % len(source.shape)
        start, every = _start(node, name, place, dim, source), 1
        if name == "slice":
            every = argument(node, "step")
        low, high = ranges[dim]
        ranges[dim] = (start + low * every, start + (high - 1) * every + 1)
        return [(source, tuple(ranges))]
    if name in ("transpose", "swapaxes", "swapdims"):
        one, other = node.args[1:3]
        ranges[one], ranges[other] = ranges[other], ranges[one]
        return [(source, tuple(ranges))]
    if name == "permute":
        dims = [dim % len(ranges) for dim in argument(node, "dims")]
        return [(source, tuple(ranges[dims.index(i)] for i in range(len(dims))))]
    return all_inputs


_KEEPS = {"dropout", "feature_dropout", "clone", "contiguous", "_to_copy", "to", "alias", "detach", "view", "reshape"}


def _start(node: Node, name: str, place: int, dim: int, source: Value) -> int:
    if name in ("slice", "narrow"):
        start = int(argument(node, "start") or 0)
        return max(start + source.shape[dim] if start < 0 else start, 0)
    return sum(output.shape[dim] for output in node.outputs[:place] if output is not None)


def _aligned(source: Value, value: Value, box: Box) -> Box:
    """Returns the range of an argument that was broadcast to a result."""
    ranges = box[len(box) - len(source.shape) :] if len(source.shape) <= len(box) else ()
    if len(ranges) != len(source.shape):
        return tuple((0, size) for size in source.shape)
    return tuple(range_ if size > 1 else (0, size) for range_, size in zip(ranges, source.shape, strict=True))


def _read_of_parts(node: Node, box: Box) -> list[tuple[Value, Box]]:
    """Returns the parts of a concatenation that a range of it lies in."""
    read, start = [], 0
    dim = argument(node, "dim") % len(box)
    for part in node.args[0]:
        if len(part.shape) != len(box):
            continue
        low, high = (min(max(end - start, 0), part.shape[dim]) for end in box[dim])
        if isinstance(part, Value) and low < high:
            read.append((part, (*box[:dim], (low, high), *box[dim + 1 :])))
        start += part.shape[dim]
    return read


# Layouts by shape, where nothing is known of what made a value


def is_channels_last(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Returns whether `[N, a, b, c]` is `[N, h, w, C]`: only that reading has the shape of the image."""

    def fits(height: int, width: int) -> bool:
        return abs(height * size[1] - width * size[0]) <= max(size)

    return fits(*shape[1:3]) and not fits(*shape[2:4])


def token_grid(count: int, size: Sequence[int], *, name: str) -> tuple[int, int, int]:
    """Returns rows, columns and how many of some tokens are no positions, by the proportions of the images.

    Of the grids whose cells are squares of whole pixels the one is taken that leaves the fewest tokens over, at most
    8; where there is none, of those that miss the proportions by less than a cell.

    Args:
        count: number of tokens.
        size: (H, W) of the images.
        name: name of the layer, for messages.

    Raises:
        InputError: no grid fits, or two do.
    """
    height, width = size
    exact, near = [], []
    for rows in range(1, count + 1):
        for columns in range(max(1, (count - 8) // rows), count // rows + 1):
            extra = count - rows * columns
            if not 0 <= extra <= 8:
                continue
            if rows * width == columns * height:
                exact.append((extra, rows, columns))
            elif any(
                rows in (height // cell, -(-height // cell)) and columns in (width // cell, -(-width // cell))
                for cell in _cells(height, rows)
            ):
                near.append((extra, rows, columns))
    fits = sorted(exact) or sorted(near)
    if not fits or (len(fits) > 1 and fits[0][0] == fits[1][0]):
        grids = " or ".join(f"{rows} x {columns}" for extra, rows, columns in fits[:2] if extra == fits[0][0])
        raise InputError(
            f"tokens must give the grid (h, w) of layer {name!r}, whose {count} tokens "
            f"{'may be ' + grids if fits else 'are no grid'} for images of {height} x {width}, got None"
        )
    extra, rows, columns = fits[0]
    return rows, columns, extra


def _cells(length: int, count: int) -> range:
    """Returns the sizes of cells of which `count` may cover a length, the last one in part or not at all."""
    return range(max(1, length // (count + 1)), length // max(1, count - 1) + 1)
