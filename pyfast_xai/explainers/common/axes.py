"""The meaning of each dimension of a value on a tape: images, channels, or rows and columns of the image.

The images are `[n, c, y, x]`, volumes `[n, c, z, y, x]` and signals `[n, c, x]`. Each operation says what becomes of
these axes: a convolution makes new channels and coarser rows and columns, a view splits and merges axes, a transpose
moves them, a concatenation puts entries beside them that are no positions. So transposed tokens, windows and heads that
are folded into the batch, and the grid of tokens are known from what made a value, not from its shape.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyfast_xai.tape import Node, Tape, Value, key
from pyfast_xai.tape.graph import argument, parameters


@dataclass(frozen=True)
class Axis:
    """A part of one axis of the images, or of channels.

    Attributes:
        kind: "n" for images, "c" for channels, "z", "y" and "x" for slices, rows and columns, "?" for what is not
            known.
        size: number of entries.
        step: distance of two neighbours, counted along the axis this is a part of.
        whole: size of that axis.
    """

    kind: str
    size: int
    step: int = 1
    whole: int = 0

    @property
    def divides(self) -> bool:
        """Returns whether it is a slice, a row or a column."""
        return self.kind in "zyx"


@dataclass(frozen=True)
class Dim:
    """One dimension: the product of some axes, the last of which runs fastest, and entries that belong to none.

    Attributes:
        size: number of entries.
        axes: outermost first; none for entries that belong to no axis.
        before: entries in front of the product, such as a class token.
        after: entries behind the product.
    """

    size: int
    axes: tuple[Axis, ...] = ()
    before: int = 0
    after: int = 0

    @property
    def positions(self) -> bool:
        """Returns whether rows or columns are among its axes."""
        return any(axis.divides for axis in self.axes)

    @property
    def unknown(self) -> bool:
        """Returns whether nothing is known of it but its size."""
        return all(axis.kind == "?" for axis in self.axes)

    @property
    def plain(self) -> bool:
        """Returns whether all its entries belong to the axes."""
        return not (self.before or self.after)


Dims = tuple[Dim, ...]


def fresh(kind: str, size: int) -> Dim:
    """Returns a dimension that is the whole of a new axis."""
    if size == 1 and kind != "n":
        return Dim(1)
    return Dim(size, (Axis(kind, size, 1, size),))


def unknown(size: int) -> Dim:
    """Returns a dimension of unknown axes."""
    return fresh("?", size)


def space_of(images: Value) -> str:
    """Returns the kinds of the axes of space: "x" of signals, "yx" of images, "zyx" of volumes and clips."""
    return "zyx"[max(0, 5 - len(images.shape)) :]


def axes_of(tape: Tape) -> dict[Value, Dims]:
    """Returns the dimensions of every value that depends on the images, which are the first input of the tape.

    Args:
        tape: tape of a forward pass or its beginning.
    """
    images = tape.inputs[0]
    dims_of: dict[Value, Dims] = {images: tuple(map(fresh, "nc" + space_of(images), images.shape))}
    for node in tape:
        if any(value in dims_of for value in node.inputs):
            rule = _RULES.get(key(node.op).split("::")[1], _element_by_element)
            made = rule(_Step(node, dims_of, images.shape))
            for place, value in enumerate(node.outputs):
                if value is not None:
                    dims = made[place] if place < len(made) else None
                    fits = dims is not None and tuple(dim.size for dim in dims) == value.shape
                    dims_of[value] = dims if dims is not None and fits else tuple(map(unknown, value.shape))
    return dims_of


@dataclass
class _Step:
    """An operation and the dimensions of its arguments."""

    node: Node
    dims_of: dict[Value, Dims]
    images: tuple[int, ...]

    def __getitem__(self, name: str) -> Any:
        return argument(self.node, name)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [() if value is None else value.shape for value in self.node.outputs]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def source(self) -> Dims:
        """Returns the dimensions of the first argument."""
        return self.dims(self.node.args[0])

    def dims(self, argument: Any) -> Dims:
        """Returns the dimensions of an argument; unknown ones if it does not depend on the images."""
        if isinstance(argument, Value) and argument in self.dims_of:
            return self.dims_of[argument]
        return tuple(map(unknown, argument.shape)) if isinstance(argument, (Value, Tensor)) else ()

    def known(self) -> list[Dims]:
        """Returns the dimensions of the arguments that depend on the images."""
        return [self.dims_of[value] for value in self.node.inputs if value in self.dims_of]


OutputDims = Sequence[Dims]
_RULES: dict[str, Callable[[_Step], OutputDims]] = {}


def _rule(*names: str) -> Callable[[Callable[[_Step], OutputDims]], Callable[[_Step], OutputDims]]:
    def register(function: Callable[[_Step], OutputDims]) -> Callable[[_Step], OutputDims]:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


# Elementwise operations, and operations without a rule


def _element_by_element(step: _Step) -> OutputDims:
    """Returns results of the shape that the arguments broadcast to; of others, what kept its place and size."""
    return [_broadcast(step.known(), shape) for shape in step.shapes]


def _broadcast(many: Iterable[Dims], shape: tuple[int, ...]) -> Dims:
    merged = tuple(map(unknown, shape))
    for dims in many:
        if len(dims) > len(shape):
            continue
        aligned = (*(Dim(1) for _ in range(len(shape) - len(dims))), *dims)
        merged = tuple(map(_merged, merged, aligned))
    return merged


def _merged(one: Dim, other: Dim) -> Dim:
    """Returns the knowledge of a dimension from either of two; rows and columns say more than channels."""
    if one.size != other.size or other.unknown:
        return one
    return other if one.unknown or (other.positions and not one.positions) else one


def _reduced(step: _Step) -> OutputDims:
    """Returns the sums, means and maxima over some dimensions."""
    source, names = step.source, parameters(step.node.op)
    dims = step["dim"] if "dim" in names else None
    dims = [dims] if isinstance(dims, int) else dims
    reduced = {dim % len(source) for dim in dims} if dims else set(range(len(source)))
    keep = "keepdim" in names and step["keepdim"]
    left = tuple(Dim(1) if i in reduced else dim for i, dim in enumerate(source) if keep or i not in reduced)
    return [left for _ in step.node.outputs]


_REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "var_mean", "std_mean", "norm", "prod", "any", "all"),
    *("logsumexp", "median", "argmax", "argmin", "linalg_vector_norm", "nansum", "nanmean", "aminmax", "mode"),
)
_RULES.update(dict.fromkeys(_REDUCTIONS, _reduced))


# Convolutions, pools and interpolation


def _moved(dim: Dim, size: int) -> Dim:
    """Returns a dimension after a window has run along it."""
    if size == dim.size:
        return dim
    axis = dim.axes[0] if len(dim.axes) == 1 and dim.plain else None
    if axis is not None and axis.divides and _cover([axis]):
        return fresh(axis.kind, size)
    return Dim(1) if size == 1 else unknown(size)


def _resampled(step: _Step) -> OutputDims:
    """Pools, padding and interpolation: the last dimensions have another size."""
    source = _to_map(step.source, step.images)
    if len(source) != len(step.shape):
        return []
    return [tuple(map(_moved, source, step.shape)) for _ in step.node.outputs]


def _convolved(step: _Step) -> OutputDims:
    source = step.source
    if len(source) != len(step.shape):
        return []
    if len(source) == 4:
        source = _to_map(source, step.images)
    # Where tokens are the channels of a convolution, as many come out as tokens again.
    mixes = source[1].positions and source[1].size == step.shape[1]
    channels = source[1] if mixes else _channels(source[1], step.shape[1])
    return [(source[0], channels, *map(_moved, source[2:], step.shape[2:]))]


def _channels(dim: Dim, size: int) -> Dim:
    """Returns the dimension that a layer over a dimension makes of it."""
    if dim.positions and not any(axis.kind == "c" for axis in dim.axes) and _cover(dim.axes):
        return dim if dim.size == size else unknown(size)
    return fresh("c", size)


def _to_map(dims: Dims, images: tuple[int, ...]) -> Dims:
    """Returns the dimensions of a map; lost ones are known again if it is shaped like the image."""
    if len(dims) != 4 or len(images) != 4 or any(dim.positions for dim in dims):
        return dims
    batch = dims[0] if not dims[0].unknown else fresh("n", dims[0].size)
    height, width = dims[2].size, dims[3].size
    lost = dims[2].unknown and dims[3].unknown and [axis.kind for axis in batch.axes] == ["n"]
    if not lost or batch.size != images[0] or min(height, width) < 2 or not in_proportion(height, width, images[2:]):
        return dims
    return (batch, dims[1], fresh("y", height), fresh("x", width))


def in_proportion(height: int, width: int, size: Sequence[int]) -> bool:
    """Returns whether a grid has the proportions of the images, up to one cell."""
    return abs(height * size[1] - width * size[0]) <= max(size[0] * max(1, width / 16), size[1] * max(1, height / 16))


_CONVOLUTIONS = (
    *("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_depthwise3d", "_conv_depthwise2d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "thnn_conv2d", "mkldnn_convolution"),
)
_RULES.update(dict.fromkeys(_CONVOLUTIONS, _convolved))

_EACH_RANK = ("1d", "2d", "3d")
POOLS = tuple(
    name.format(rank)
    for rank in _EACH_RANK
    for name in (
        *("max_pool{}", "max_pool{}_with_indices", "fractional_max_pool{}", "avg_pool{}", "adaptive_avg_pool{}"),
        *("_adaptive_avg_pool{}", "adaptive_max_pool{}"),
    )
)
INTERPOLATIONS = (
    *("upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d"),
    *("upsample_bicubic2d", "_upsample_bicubic2d_aa"),
    *(f"{name}{rank}" for rank in _EACH_RANK for name in ("upsample_nearest", "_upsample_nearest_exact")),
)
_PADS = (
    *("constant_pad_nd", "pad"),
    *(f"{name}_pad{rank}" for rank in _EACH_RANK for name in ("reflection", "replication")),
)
_RULES.update(dict.fromkeys((*POOLS, *INTERPOLATIONS, *_PADS), _resampled))


@_rule("pixel_shuffle", "pixel_unshuffle", "col2im", "grid_sampler", "grid_sampler_2d", "grid_sample")
def _new_map(step: _Step) -> OutputDims:
    if len(step.shape) != 4:
        return []
    _, channels, height, width = step.shape
    return [(step.source[0], fresh("c", channels), fresh("y", height), fresh("x", width))]


@_rule("im2col")
def _patches(step: _Step) -> OutputDims:
    grid = []
    for i, dim in enumerate(step.source[-2:]):
        kernel, dilation, padding, stride = (step[name][i % len(step[name])] for name in _WINDOW)
        grid.append((dim.size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    rows, columns = fresh("y", grid[0]), fresh("x", grid[1])
    batch, channels, count = step.shape if len(step.shape) == 3 else (0, 0, 0)
    return [(step.source[0], fresh("c", channels), Dim(count, (*rows.axes, *columns.axes)))] if batch else []


_WINDOW = ("kernel_size", "dilation", "padding", "stride")


@_rule("unfold")
def _windows(step: _Step) -> OutputDims:
    source = list(step.source)
    place = step["dimension"] % len(source)
    source[place] = _moved(source[place], step.shape[place])
    return [(*source, fresh("c", step.shape[-1]))]


# Matrix products


@_rule("linear")
def _linear(step: _Step) -> OutputDims:
    source = step.source
    if step.node.args[0] not in step.dims_of:
        return []
    return [(*source[:-1], _channels(source[-1], step.shape[-1]))]


def _product(step: _Step, left: Any, right: Any) -> OutputDims:
    one, other = step.dims(left), step.dims(right)
    if len(one) < 2 or len(other) < 2:
        return []
    shape, depends = step.shape, [isinstance(part, Value) and part in step.dims_of for part in (left, right)]
    batch = _broadcast([one[:-2], other[:-2]], shape[:-2])
    if all(depends):
        return [(*batch, one[-2], other[-1])]
    # A constant mixes what lies along the inner dimension.
    if depends[0]:
        return [(*batch, one[-2], _channels(one[-1], shape[-1]))]
    rows = other[-2] if other[-2].positions and other[-2].size == shape[-2] else unknown(shape[-2])
    return [(*batch, rows, other[-1])]


@_rule("mm", "bmm", "matmul")
def _plain_product(step: _Step) -> OutputDims:
    return _product(step, *step.node.args[:2])


@_rule("addmm", "baddbmm")
def _added_product(step: _Step) -> OutputDims:
    return _product(step, *step.node.args[1:3])


@_rule(
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    "_scaled_dot_product_attention_math",
)
def _attention(step: _Step) -> OutputDims:
    query, value = step.dims(step.node.args[0]), step.dims(step.node.args[2])
    return [(*_broadcast([query[:-2], value[:-2]], step.shape[:-2]), query[-2], value[-1])]


@_rule("einsum")
def _einsum(step: _Step) -> OutputDims:
    inputs, _, output = step.node.args[0].replace(" ", "").partition("->")
    if "." in inputs or not output:
        return []
    letters: dict[str, Dim] = {}
    for term, part in zip(inputs.split(","), step.node.args[1], strict=True):
        for letter, dim in zip(term, step.dims(part), strict=True):
            letters[letter] = _merged(letters.get(letter, unknown(dim.size)), dim)
    return [tuple(letters[letter] for letter in output)]


# Views


@_rule("permute")
def _permuted(step: _Step) -> OutputDims:
    return [tuple(step.source[dim] for dim in step["dims"])]


@_rule("transpose", "swapaxes", "swapdims")
def _transposed(step: _Step) -> OutputDims:
    dims, (one, other) = list(step.source), step.node.args[1:3]
    dims[one], dims[other] = dims[other], dims[one]
    return [tuple(dims)]


@_rule("t", "mT", "adjoint", "numpy_T", "matrix_H", "mH")
def _flipped(step: _Step) -> OutputDims:
    return [(*step.source[:-2], *step.source[:-3:-1])]


@_rule("movedim", "moveaxis")
def _dims_moved(step: _Step) -> OutputDims:
    rank = len(step.source)
    sources, places = ([pair] if isinstance(pair, int) else pair for pair in step.node.args[1:3])
    sources, places = [i % rank for i in sources], [i % rank for i in places]
    rest = iter(i for i in range(rank) if i not in sources)
    order = [sources[places.index(i)] if i in places else next(rest) for i in range(rank)]
    return [tuple(step.source[i] for i in order)]


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as", "ravel",
       "squeeze", "alias")  # fmt: skip
def _viewed(step: _Step) -> OutputDims:
    return [_regrouped(step.source, step.shape)]


@_rule("unsqueeze")
def _unsqueezed(step: _Step) -> OutputDims:
    dims = list(step.source)
    dims.insert(step["dim"] % (len(dims) + 1), Dim(1))
    return [tuple(dims)]


def _regrouped(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Returns the dimensions of a view: those of the source, merged and split."""
    made: list[Dim] = []
    old, new = list(dims), list(shape)
    if 0 in new or math.prod(new) != math.prod(dim.size for dim in old):
        return tuple(map(unknown, shape))
    while new:
        sizes, sources = [new.pop(0)], [old.pop(0)] if old else []
        while math.prod(sizes) != (product := math.prod(dim.size for dim in sources)):
            if math.prod(sizes) < product:
                sizes.append(new.pop(0))
            else:
                sources.append(old.pop(0))
        made += _split(sources, sizes)
    return tuple(made)


def _split(sources: list[Dim], sizes: list[int]) -> list[Dim]:
    large = [dim for dim in sources if dim.size > 1 or dim.axes]
    whole = len(large) == 1 and all(axis.size > 1 for axis in large[0].axes)
    if whole and sizes.count(1) == len(sizes) - 1:
        return [large[0] if size > 1 else Dim(1) for size in sizes]
    axes = [axis for dim in sources for axis in (dim.axes or ([Axis("?", dim.size)] if dim.size > 1 else []))]
    if not all(dim.plain for dim in sources):
        return list(map(unknown, sizes))
    made = []
    for size in sizes:
        parts: list[Axis] = []
        left = size
        while axes and (left > 1 or (axes[0].size == 1 and not parts)):
            axis = axes.pop(0)
            if left % axis.size == 0:
                parts.append(axis)
                left //= axis.size
            elif axis.size % left == 0:
                inner = axis.size // left
                parts.append(replace(axis, size=left, step=axis.step * inner))
                axes.insert(0, replace(axis, size=inner))
                left = 1
            else:
                return list(map(unknown, sizes))
        made.append(Dim(size, _joined(parts)))
    return made


def _joined(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Returns the axes with neighbours that were one axis made one again."""
    joined: list[Axis] = []
    for axis in axes:
        last = joined[-1] if joined else None
        if last is not None and (last.kind, last.step, last.whole) == (axis.kind, axis.step * axis.size, axis.whole):
            joined[-1] = replace(axis, size=last.size * axis.size)
        else:
            joined.append(axis)
    return tuple(joined)


@_rule("expand", "expand_as", "repeat", "tile", "broadcast_to")
def _expanded(step: _Step) -> OutputDims:
    shape = step.shape
    return [_broadcast([step.source], shape)]


# Parts and concatenations


def _cut(dim: Dim, start: int, size: int, every: int = 1) -> Dim:
    """Returns some neighbouring entries of a dimension, or every second, third."""
    if size == dim.size:
        return dim
    if not dim.positions:
        return Dim(1) if size == 1 else unknown(size) if any(a.kind in "n?" for a in dim.axes) else fresh("c", size)
    count = dim.size - dim.before - dim.after
    if every == 1 and start <= dim.before and start + size >= dim.before + count:
        return replace(dim, size=size, before=dim.before - start, after=start + size - dim.before - count)
    if every == 1 and (start + size <= dim.before or start >= dim.before + count):
        return Dim(size) if size == 1 else unknown(size)  # class tokens alone
    mostly = size * every * 2 > dim.size
    return _moved(dim, size) if mostly and size > 1 else unknown(size)


def _parts(step: _Step, dim: int, starts: Iterable[int]) -> OutputDims:
    source = step.source
    dim %= len(source)
    made = []
    for shape, start in zip(step.shapes, starts, strict=False):
        made.append(tuple(_cut(part, start, shape[dim]) if i == dim else part for i, part in enumerate(source)))
    return made


@_rule("slice", "narrow")
def _sliced(step: _Step) -> OutputDims:
    source = list(step.source)
    dim = (step["dim"] or 0) % len(source)
    start, every = step["start"] or 0, 1
    if key(step.node.op) == "aten::slice":
        every = step["step"]
    start = start + source[dim].size if start < 0 else start
    source[dim] = _cut(source[dim], start, step.shape[dim], every)
    return [tuple(source)]


@_rule("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit", "vsplit")
def _divided(step: _Step) -> OutputDims:
    dim = step["dim"] % len(step.source)
    sizes = [shape[dim] if shape else 0 for shape in step.shapes]
    return _parts(step, dim, [sum(sizes[:i]) for i in range(len(sizes))])


@_rule("select", "unbind")
def _selected(step: _Step) -> OutputDims:
    dim = step["dim"] % len(step.source)
    return [tuple(dims for i, dims in enumerate(step.source) if i != dim) for _ in step.node.outputs]


@_rule("index_select", "gather", "take_along_dim", "sort", "topk", "scatter", "scatter_add")
def _picked(step: _Step) -> OutputDims:
    if step["dim"] is None:
        return []
    dim = step["dim"] % len(step.source)
    source = tuple(unknown(dim_.size) if i == dim else dim_ for i, dim_ in enumerate(step.source))
    return [_moved_dims(source, shape) for shape in step.shapes]


def _moved_dims(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Returns the dimensions that have kept their place and size."""
    if len(dims) != len(shape):
        return tuple(map(unknown, shape))
    return tuple(dim if dim.size == size else unknown(size) for dim, size in zip(dims, shape, strict=True))


@_rule("index")
def _indexed(step: _Step) -> OutputDims:
    indexed = [i for i, index in enumerate(step["indices"]) if index is not None]
    source = tuple(unknown(dims.size) if i in indexed else dims for i, dims in enumerate(step.source))
    return [_moved_dims(source, step.shape)]


@_rule("cat", "concat", "concatenate")
def _concatenated(step: _Step) -> OutputDims:
    many = [step.dims(part) for part in step.node.args[0]]
    many = [dims for dims in many if len(dims) == len(step.shape)]
    place = step["dim"] % len(step.shape)
    merged = list(_broadcast(many, step.shape))
    merged[place] = _chained([dims[place] for dims in many], step.shape[place])
    return [tuple(merged)]


def _chained(dims: Sequence[Dim], size: int) -> Dim:
    gridded = [i for i, dim in enumerate(dims) if dim.positions]
    if not gridded:
        channels = all(axis.kind == "c" for dim in dims for axis in dim.axes)
        return fresh("c", size) if channels else unknown(size)
    if len(gridded) == 1:
        grid = dims[gridded[0]]
        before = sum(dim.size for dim in dims[: gridded[0]]) + grid.before
        return Dim(size, grid.axes, before, size - before - (grid.size - grid.before - grid.after))
    if any(axis.kind == "c" for dim in dims for axis in dim.axes):
        return fresh("c", size)  # parts of positions among channels
    return unknown(size)


@_rule("stack")
def _stacked(step: _Step) -> OutputDims:
    shape, place = list(step.shape), step["dim"] % len(step.shape)
    shape.pop(place)
    dims = list(_broadcast([step.dims(part) for part in step.node.args[0]], tuple(shape)))
    dims.insert(place, unknown(step.shape[place]))
    return [tuple(dims)]


# Maps


@dataclass(frozen=True)
class Layout:
    """The way in which a value holds a map.

    Attributes:
        channels: dimension of the channels.
        grid: (h, w); (d, h, w) of volumes, (l,) of signals.
        axes: axes of tokens, sizes and places of the rows and columns in the order they lie; empty for a spatial map.
        order: order of `axes`, those of the slices, of the rows, then those of the columns, outermost first.
        before: tokens in front of the positions that are none.
        after: tokens behind them.
    """

    channels: int
    grid: tuple[int, ...]
    axes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    before: int = 0
    after: int = 0

    def cells(self, activation: Tensor) -> Tensor:
        """Returns `[N, *grid, C]` of an activation, or its gradient, of this layout."""
        moved = activation.movedim(self.channels, -1)
        if not self.axes:
            return moved
        end = moved.shape[1] - self.after
        tokens = moved[:, self.before : end]
        if len(self.axes) == len(self.grid) and self.order == tuple(range(len(self.grid))):
            return tokens.unflatten(1, self.axes)
        split = tokens.unflatten(1, self.axes).movedim([1 + i for i in self.order], list(range(1, 1 + len(self.order))))
        return split.reshape(len(tokens), *self.grid, tokens.shape[-1])


def layout_of(dims: Dims, space: str = "yx") -> Layout | None:
    """Returns the layout of the map of the image in a value with these dimensions; None without a map.

    It does where it has one row an image, one dimension of channels, and all axes of space: as so many dimensions, or
    as one with entries beside that are no positions.

    Args:
        dims: dimensions of the value.
        space: space of the images, see `space_of`.
    """
    rank = len(dims)
    if rank not in (3, len(space) + 2) or [axis.kind for axis in dims[0].axes] != ["n"] or not dims[0].plain:
        return None
    placed = [i for i in range(1, rank) if dims[i].positions and _cover(dims[i].axes)]
    if rank == len(space) + 2:
        for spread in (range(2, rank), range(1, rank - 1)):
            kinds = [[axis.kind for axis in dims[i].axes] or [kind] for i, kind in zip(spread, space, strict=True)]
            spatial = kinds == [[kind] for kind in space] and set(spread) >= set(placed) and placed
            if spatial and all(dims[i].plain and (i in placed or dims[i].size == 1) for i in spread):
                return Layout(1 if spread[0] == 2 else rank - 1, tuple(dims[i].size for i in spread))
    if rank != 3 or len(placed) != 1:
        return None
    tokens = dims[placed[0]]
    orders = [_order(tokens.axes, kind) for kind in space]
    if sum(map(len, orders)) != len(tokens.axes):
        return None
    grid = tuple(math.prod(tokens.axes[i].size for i in order) for order in orders)
    axes = tuple(axis.size for axis in tokens.axes)
    if not all(orders):  # a grid of one row or one column
        axes, orders = grid, [[i] for i in range(len(grid))]
    order = tuple(i for order in orders for i in order)
    return Layout(3 - placed[0], grid, axes, order, tokens.before, tokens.after)


def _order(axes: Sequence[Axis], kind: str) -> list[int]:
    return sorted((i for i, axis in enumerate(axes) if axis.kind == kind), key=lambda i: -axes[i].step)


def _cover(axes: Sequence[Axis]) -> bool:
    """Returns whether the slices, rows and columns among some axes are all there are: nested, up to parts of a cell."""
    for kind in "zyx":
        parts = [axes[i] for i in _order(axes, kind)]
        ends = [axis.whole for axis in parts[:1]] + [axis.step for axis in parts[:-1]]
        if any(axis.step * axis.size != end for axis, end in zip(parts, ends, strict=True)):
            return False
    return any(axis.divides for axis in axes)
