"""Outputs of a model on images that differ in a box from others, on which it was recorded.

Up to some depth of a network only the cells around the box change. They are computed from the changed cells and, around
these, from the maps of the unchanged images; from there on the operations run on whole maps.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast_xai.acceleration.packed_convolutions import unpadded
from pyfast_xai.acceleration.packed_replay import NotReplayedError, PackedReplay
from pyfast_xai.acceleration.row_independence import POINTWISE
from pyfast_xai.tape.graph import Node, Tape, Value, argument, key, substitute

_OF_TWO = {"aten::add", "aten::sub", "aten::mul", "aten::div"}
# Reading and writing a number takes about as long as so many products.
_TRAFFIC = 30
_MOST_BYTES = 1 << 30
# Setting up takes about two passes of the model.
_SET_UP = 2.0


class Box(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right` of a map, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Returns the number of cells."""
        return max(0, self.bottom - self.top) * max(0, self.right - self.left)

    def contains(self, other: "Box") -> bool:
        """Returns whether another box lies in this one."""
        rows = self.top <= other.top and other.bottom <= self.bottom
        return rows and self.left <= other.left and other.right <= self.right

    def joined(self, other: "Box") -> "Box":
        """Returns the smallest box around both."""
        return Box(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )

    def common(self, other: "Box") -> "Box":
        """Returns what lies in both; its area is 0 where nothing does."""
        return Box(
            max(self.top, other.top),
            min(self.bottom, other.bottom),
            max(self.left, other.left),
            min(self.right, other.right),
        )

    def of(self, tensor: Tensor, inside: "Box | None" = None) -> Tensor:
        """Returns these cells of a map `[..., h, w]`, whose own cells are those of `inside` where it is given."""
        top, left = (0, 0) if inside is None else (inside.top, inside.left)
        return tensor[..., self.top - top : self.bottom - top, self.left - left : self.right - left]


@dataclass(frozen=True)
class _Plan:
    """The operations that run on a part of the maps for a box, and those that run on whole maps.

    Attributes:
        cut: the first operation that runs on whole maps.
        boxes: the part of each value before it that changes; of those that are missing nothing does.
        saved: the share of the work that is spared.
    """

    cut: int
    boxes: dict[Value, Box]
    saved: float


class LocalReplay(PackedReplay):
    """Computes what a model returns for images of which a box was changed; see `PackedReplay`.

    Args:
        tape: a recording of the model on the images; its results are kept.
        images: `[N, C, H, W]`, the only input of the tape.
        boxes: the boxes that will be changed.

    Raises:
        NotReplayedError: the tape cannot be replayed in this way, or it does not pay.
    """

    def __init__(self, tape: Tape, images: Tensor, boxes: Collection[Box]) -> None:
        self._fold_and_pack(tape, images)
        self._regions = _regions_of(self._tape)
        self._crossings: dict[int, list[Value]] = {}
        self._unpadded: dict[int, Callable[..., Tensor] | None] = {}
        plans = {box: self._plan(box) for box in dict.fromkeys(boxes)}
        if not plans or sum(plan.saved for plan in plans.values()) / len(plans) * len(boxes) < _SET_UP:
            raise NotReplayedError("too few cells remain unchanged")
        self._plans = plans
        self._bases = self._run_unchanged(images)

    def __call__(self, box: Box, images: Tensor) -> Any:  # type: ignore[override]
        """Returns what the model returns for images that differ from those of the recording in a box.

        Args:
            box: one of those of the beginning.
            images: `[N, C, H, W]`, of the dtype of the others.
        """
        plan = self._plans[box]
        parts = {self._input: box.of(images)}
        for node in self._tape.nodes[: plan.cut]:
            value = node.outputs[0]
            if value is None or value not in plan.boxes:
                continue
            parts[value] = self._part(node, plan, parts)
            for source in node.inputs:
                if self._last[source] <= node.index:
                    parts.pop(source, None)
        environment = {value: self._whole(value, plan, parts) for value in self._crossing(plan.cut)}
        parts.clear()
        return self._finish(plan.cut, environment)

    # Plans

    def _plan(self, box: Box) -> _Plan:
        """Returns the plan that spares most for a box."""
        boxes, costs = {self._input: box}, [_cost(node) for node in self._tape.nodes]
        best, spared, saved = 0, 0.0, 0.0
        for node, region, cost in zip(self._tape.nodes, self._regions, costs, strict=True):
            if region is None:
                break
            reached = region(boxes)
            value = node.outputs[0]
            assert value is not None
            if reached is not None and reached.area:
                boxes[value] = reached
            share = boxes[value].area / math.prod(value.shape[-2:]) if value in boxes else 0.0
            saved += cost * (1 - share)
            pasted = sum(_TRAFFIC * crossing.numel for crossing in self._crossing(node.index + 1))
            if saved - pasted > spared:
                best, spared = node.index + 1, saved - pasted
        return _Plan(best, boxes, spared / sum(costs))

    def _crossing(self, cut: int) -> list[Value]:
        """Returns the values from before an operation that it or a later one needs."""
        known = self._crossings.get(cut)
        if known is None:
            made = [self._input, *(node.outputs[0] for node in self._tape.nodes[:cut])]
            known = [value for value in made if value is not None and self._last.get(value, -1) >= cut]
            self._crossings[cut] = known
        return known

    def _bases_for(self, plan: _Plan) -> set[Value]:
        """Returns the values of which cells around the changed ones are needed."""
        needed = set(self._crossing(plan.cut))
        for node in self._tape.nodes[: plan.cut]:
            value = node.outputs[0]
            if value in plan.boxes:
                for source in node.inputs:
                    box = plan.boxes.get(source)
                    if box is None or not box.contains(_read(node, source, plan.boxes[value])):
                        needed.add(source)
        return needed

    def _run_unchanged(self, images: Tensor) -> dict[Value, Tensor]:
        """Returns the maps of the unchanged images that are needed; compares the outputs with the recorded ones."""
        needed = set().union(*(self._bases_for(plan) for plan in self._plans.values()))
        if sum(value.numel for value in needed) * images.element_size() > _MOST_BYTES:
            raise NotReplayedError("the maps of the unchanged images take too much memory")
        end = max(plan.cut for plan in self._plans.values())
        first: dict[Value, Tensor] = {self._input: images}
        bases: dict[Value, Tensor] = {}
        for node in self._tape.nodes[:end]:
            value = node.outputs[0]
            assert value is not None
            args, kwargs = substitute(Value, first.__getitem__, node.args, node.kwargs)
            first[value] = _without_writes(node)(*args, **kwargs)
            for source in node.inputs:
                if self._last[source] <= node.index and source in first:
                    del first[source]
            if value in needed:
                bases[value] = first[value]
        if self._input in needed:
            bases[self._input] = images
        self._compare(end, {value: first[value].clone() for value in self._crossing(end)})
        return bases

    # Parts of maps

    def _part(self, node: Node, plan: _Plan, parts: dict[Value, Tensor]) -> Tensor:
        """Returns the changed part of the result of an operation."""
        value = node.outputs[0]
        assert value is not None
        region = plan.boxes[value]
        window = _Window.of(node)
        if window is None:

            def cells(source: Value) -> Tensor:
                return self._cells(source, _read(node, source, region), plan, parts)

            args, kwargs = substitute(Value, cells, node.args, node.kwargs)
            args = tuple(_cut_constant(part, value, region) for part in args)
            return _without_writes(node)(*args, **kwargs)
        (source,) = node.inputs
        read = window.read(region)
        inside = read.common(_whole_box(source))
        maps = self._cells(source, inside, plan, parts)
        around = (
            inside.left - read.left,
            read.right - inside.right,
            inside.top - read.top,
            read.bottom - inside.bottom,
        )
        if any(around):
            maps = F.pad(maps, around, value=window.filling)
        return self._unpadded_window(node, window)(maps)

    def _unpadded_window(self, node: Node, window: "_Window") -> Callable[..., Tensor]:
        known = self._unpadded.get(node.index)
        if known is None:
            known = (unpadded(node.kernel) if node.kernel is not None else None) or window.unpadded(node)
            self._unpadded[node.index] = known
        return known

    def _cells(self, value: Value, region: Box, plan: _Plan, parts: dict[Value, Tensor]) -> Tensor:
        """Returns some cells of a value for the changed images."""
        box = plan.boxes.get(value)
        if box is None:
            return region.of(self._bases[value])
        if box.contains(region):
            return region.of(parts[value], box)
        cells = region.of(self._bases[value]).clone()
        common = box.common(region)
        if common.area:
            common.of(cells, region).copy_(common.of(parts[value], box))
        return cells

    def _whole(self, value: Value, plan: _Plan, parts: dict[Value, Tensor]) -> Tensor:
        """Returns a whole value for the changed images, to which operations may write."""
        whole = self._bases[value].clone()
        if value in plan.boxes:
            plan.boxes[value].of(whole).copy_(parts[value])
        return whole


class _Window(NamedTuple):
    """A sliding window of two dimensions: kernel, stride, padding and dilation, `(rows, columns)` each.

    Attributes:
        filling: what stands around the map.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    filling: float

    @classmethod
    def of(cls, node: Node) -> "_Window | None":
        """Returns the window of a convolution or a max-pool; None for other operations."""
        name = key(node.op)
        if name == "aten::conv2d":
            padding, weight = argument(node, "padding"), argument(node, "weight")
            if isinstance(padding, str) or not isinstance(weight, Tensor):
                return None
            stride, dilation = argument(node, "stride"), argument(node, "dilation")
            return cls(_pair(weight.shape[2:]), _pair(stride), _pair(padding), _pair(dilation), filling=0.0)
        if name == "aten::max_pool2d" and not argument(node, "ceil_mode"):
            kernel = argument(node, "kernel_size")
            stride = argument(node, "stride") or kernel
            padding, dilation = argument(node, "padding"), argument(node, "dilation")
            return cls(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), filling=-math.inf)
        return None

    def reached(self, box: Box, size: tuple[int, ...]) -> Box:
        """Returns which results depend on some cells, of a map of results `[..., h, w]` of a size."""
        ends = []
        for axis, (low, high) in enumerate(((box.top, box.bottom), (box.left, box.right))):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            start = -(-(low + self.padding[axis] - reach) // self.stride[axis])
            stop = (high - 1 + self.padding[axis]) // self.stride[axis] + 1
            ends += [max(0, start), min(size[axis], stop)]
        return Box(*ends)

    def read(self, region: Box) -> Box:
        """Returns the cells that some results are computed from, with those that lie beyond the edge."""
        ends = []
        for axis, (low, high) in enumerate(((region.top, region.bottom), (region.left, region.right))):
            start = low * self.stride[axis] - self.padding[axis]
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            ends += [start, (high - 1) * self.stride[axis] - self.padding[axis] + reach + 1]
        return Box(*ends)

    def unpadded(self, node: Node) -> Callable[..., Tensor]:
        """Returns the operation without padding, as a function of the map."""
        if key(node.op) == "aten::max_pool2d":
            return lambda maps: F.max_pool2d(maps, self.kernel, self.stride, 0, self.dilation)
        weight, bias, groups = (argument(node, name) for name in ("weight", "bias", "groups"))
        return lambda maps: F.conv2d(maps, weight, bias, self.stride, 0, self.dilation, groups)


def _pair(sizes: Any) -> tuple[int, int]:
    rows, *columns = sizes
    return (rows, columns[0] if columns else rows)


_Region = Callable[[dict[Value, Box]], Box | None]


def _regions_of(tape: Tape) -> list[_Region | None]:
    """Returns for each operation a function that says which part of its result changes; None for whole maps."""
    return [_region_of(node) for node in tape]


def _region_of(node: Node) -> _Region | None:
    value = node.outputs[0] if len(node.outputs) == 1 else None
    if value is None or len(value.shape) != 4 or not node.inputs:
        return None
    size = value.shape[-2:]
    window = _Window.of(node)
    if window is not None:
        (source,) = node.inputs
        if len(source.shape) != 4:
            return None
        return lambda boxes: window.reached(boxes[source], size) if source in boxes else None
    if not _is_local(node, value):
        return None

    def joined(boxes: dict[Value, Box]) -> Box | None:
        box: Box | None = None
        for source in node.inputs:
            other = boxes.get(source)
            if other is not None:
                box = other if box is None else box.joined(other)
        return box

    return joined


def _is_local(node: Node, value: Value) -> bool:
    """Returns whether each cell of a result depends on the same cell of maps of the same size alone."""
    name = key(node.op)
    alike = all(len(source.shape) == 4 and source.shape[-2:] == value.shape[-2:] for source in node.inputs)
    if name == "aten::batch_norm":
        return alike and not argument(node, "training") and len(node.inputs) == 1
    if name == "aten::cat":
        return (
            alike
            and argument(node, "dim") in (1, -3)
            and not any(isinstance(part, Tensor) for part in argument(node, "tensors"))
        )
    if name in _OF_TWO:
        sizes = [tuple(part.shape[-2:]) for part in node.args if isinstance(part, Tensor) and part.numel() > 1]
        return alike and all(size in ((1, 1), value.shape[-2:]) for size in sizes)
    constant = any(isinstance(part, Tensor) for part in (*node.args, *node.kwargs.values()))
    return name in POINTWISE and alike and not constant


def _read(node: Node, source: Value, region: Box) -> Box:
    """Returns the cells of a map from which some results are computed."""
    window = _Window.of(node)
    return region if window is None else window.read(region).common(_whole_box(source))


def _whole_box(value: Value) -> Box:
    return Box(0, value.shape[-2], 0, value.shape[-1])


def _cut_constant(part: Any, value: Value, region: Box) -> Any:
    """Returns the cells of a constant that has one for each cell of a result; any other argument as it is."""
    if not isinstance(part, Tensor) or part.dim() < 2 or tuple(part.shape[-2:]) != value.shape[-2:]:
        return part
    return region.of(part)


def _without_writes(node: Node) -> Any:
    """Returns the operation as a function that writes to none of its arguments."""
    if node.kernel is not None:
        return node.kernel
    name, overload = node.op._schema.name.removeprefix("aten::"), node.op._overloadname
    if not name.endswith("_"):
        return node.op
    return getattr(getattr(torch.ops.aten, name.rstrip("_")), overload)


def _cost(node: Node) -> float:
    """Returns what an operation costs, in products."""
    made = sum(value.numel for value in node.outputs if value is not None)
    name = key(node.op)
    if name in ("aten::conv2d", "aten::linear"):
        weight = argument(node, "weight")
        if isinstance(weight, Tensor):
            return made * (_TRAFFIC + weight.numel() / len(weight))
    return float(_TRAFFIC * made)
