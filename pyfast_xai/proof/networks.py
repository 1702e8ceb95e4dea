"""Calls of each op at shapes of real networks, with the bytes it must move and the operations it must do."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.ops import winograd_weight
from pyfast_xai.ops.registry import OPS
from pyfast_xai.proof.agreement import Agreement, close, equal, first_triplets, mostly_equal


@dataclass(frozen=True)
class Sizes:
    """The sizes of batches.

    Attributes:
        images: images of a batch.
        matrices: matrices that are decomposed together.
        small: odd sizes for one or two programs of a grid, instead of those of networks.
    """

    images: int
    matrices: int
    small: bool = False


SMALL = Sizes(images=2, matrices=1, small=True)


@dataclass
class Call:
    """An op with arguments of one shape.

    Attributes:
        op: name of the op.
        shape: readable description of the shapes.
        dtype: dtype of the floating-point arguments.
        make_arguments: returns new arguments.
        traffic: least number of bytes read and written, each counted once.
        operations: least number of operations, in float32.
        agree: returns whether results are correct, given those of the reference.
        reset: restores the arguments that a call changes, so that the next call does the same work.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make_arguments: Callable[[], tuple[Any, ...]]
    traffic: int
    operations: int
    agree: Agreement
    reset: Callable[..., Any] | None = None

    def arguments(self) -> tuple[Any, ...]:
        """Returns the arguments of the op's schema, with the same numbers in every call."""
        torch.manual_seed(0)
        return self.make_arguments()

    def kernel(self, backend: str) -> Callable[..., Any]:
        """Returns the kernel of a backend for the op."""
        return OPS[self.op].kernel(backend)


def _tensors(result: Any, arguments: tuple[Any, ...], written: tuple[int, ...]) -> list[Tensor]:
    outputs = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return outputs + [arguments[i] for i in written]


WRITTEN = {
    "relu_forward": (4,),
    "relu_backward": (4,),
    "max_pool_forward": (5, 6),
    "max_pool_backward": (6,),
    "response_argmax": (2, 3),
}


def outcome(call: Call, backend: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Returns the results of a backend: those it returns, and those it writes into copies of the arguments."""
    copies = tuple(a.clone() if i in WRITTEN.get(call.op, ()) else a for i, a in enumerate(arguments))
    return _tensors(call.kernel(backend)(*copies), copies, WRITTEN.get(call.op, ()))


def calls(kind: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[Call]:
    """Yields calls of the ops that take every dtype.

    Args:
        kind: device type, "cuda" or "cpu".
        dtype: dtype of activations and gradients.
        sizes: sizes of the batch.
    """
    size, n, small = dtype.itemsize, sizes.images, sizes.small
    last = torch.channels_last

    def image(c: int, h: int, w: int, k: int = 1) -> Tensor:
        return torch.randn(k * n, c, h, w, device=kind).to(dtype).contiguous(memory_format=last)

    for c, h, bounded in ((5, 7, True),) if small else ((64, 224, False), (64, 112, False), (256, 56, True)):
        count = n * c * h * h

        def make_relu_forward(c: int = c, h: int = h, bounded: bool = bounded) -> tuple[Any, ...]:
            x = image(c, h, h)
            return x, math.inf, image(c, h, h) if bounded else None, False, torch.empty_like(x)

        shape = f"{n}x{c}x{h}x{h}" + (", bound" if bounded else "")
        traffic = count * size * (3 if bounded else 2) + count // 8
        yield Call("relu_forward", shape, dtype, make_relu_forward, traffic, count, equal)

    for k, c, h in ((2, 5, 7),) if small else ((1, 64, 224), (1, 64, 112), (8, 256, 28)):
        count = n * c * h * h

        def make_relu_backward(k: int = k, c: int = c, h: int = h, count: int = count) -> tuple[Any, ...]:
            grad = torch.randn(k, count, device=kind).to(dtype)
            bits = torch.randint(0, 256, ((count + 7) // 8,), dtype=torch.uint8, device=kind)
            return grad, bits, 2, 0.0, torch.empty_like(grad)

        traffic = 2 * k * count * size + count // 8
        shape = f"{k} targets, {n}x{c}x{h}x{h}"
        yield Call("relu_backward", shape, dtype, make_relu_backward, traffic, k * count, equal)

    pools = ((5, 7, 3, 2, 1),) if small else ((64, 112, 3, 2, 1), (64, 224, 2, 2, 0))
    for c, h, kernel, stride, padding in pools:
        out = (h + 2 * padding - kernel) // stride + 1
        geometry = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1])
        bytes_read, bytes_written = n * c * h * h, n * c * out * out

        def make_pool(c: int = c, h: int = h, out: int = out, geometry: Any = geometry) -> tuple[Any, ...]:
            output = image(c, out, out)
            return image(c, h, h), *geometry, output, torch.empty_like(output, dtype=torch.uint8)

        shape = f"{n}x{c}x{h}x{h}, {kernel}x{kernel} / {stride}"
        yield Call(
            "max_pool_forward",
            shape,
            dtype,
            make_pool,
            (bytes_read + bytes_written) * size + bytes_written,
            bytes_read,
            equal,
        )

        def make_pool_backward(c: int = c, h: int = h, out: int = out, geometry: Any = geometry) -> tuple[Any, ...]:
            forward = importlib.import_module("pyfast_xai.kernels.reference.max_pool_forward").max_pool_forward
            x, output = image(c, h, h), image(c, out, out)
            offsets = torch.empty_like(output, dtype=torch.uint8)
            forward(x, *geometry, output, offsets)
            return image(c, out, out), offsets, *geometry, x

        # Sums of gradients are rounded at every step by the reference, once by a kernel.
        agree = close(0.05 if size == 2 else 1e-5)
        yield Call(
            "max_pool_backward",
            shape,
            dtype,
            make_pool_backward,
            (bytes_read + bytes_written) * size + bytes_written,
            bytes_written,
            agree,
        )

    k, extent = (3, 7) if small else (8, 224)

    def make_responses() -> tuple[Any, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        best = torch.full((n, extent, extent), -math.inf, dtype=wide, device=kind)
        classes = torch.randint(0, 1000, (k, n), device=kind)
        responses = torch.randn(k, n, 3, extent, extent, device=kind).to(dtype)
        return responses, classes, best, torch.full(best.shape, -1, device=kind)

    traffic = k * n * 3 * extent * extent * size + 2 * n * extent * extent * 12
    shape = f"{k} classes, {n}x3x{extent}x{extent}"
    yield Call(
        *("response_argmax", shape, dtype, make_responses, traffic, k * n * 3 * extent * extent, equal),
        reset=lambda responses, classes, best, winner: best.fill_(-math.inf),
    )

    traced = (
        ((5, 6, 9, 3, 3),) if small else ((64, 64, 224, 3, 4000), (256, 256, 14, 3, 1500), (1024, 256, 14, 1, 1500))
    )
    for c, filters, h, kernel, points_each in ((5, 6, 9, 3, 3),) if small else traced:
        points = n * points_each

        def make_trace(
            c: int = c, o: int = filters, h: int = h, kernel: int = kernel, points: int = points
        ) -> tuple[Any, ...]:
            weight = torch.randn(o, c, kernel, kernel, device=kind).to(dtype).contiguous(memory_format=last)
            positions = torch.randint(0, n * o * h * h, (points,), device=kind).sort().values
            geometry = ([h, h], [1, 1], [kernel // 2] * 2, [1, 1], 1, 2)
            return image(c, h, h).relu(), weight, positions, None, *geometry

        taps = kernel * kernel * c
        # The part of the maps that the fields of so many random points cover is read once, and so are the filters.
        covered = 1 - math.exp(-points_each * kernel * kernel / (h * h))
        traffic = round(covered * n * c * h * h) * size + min(points, filters) * taps * size + 16 * points
        shape = f"{n}x{c}x{h}x{h}, {kernel}x{kernel}, {points} points"
        yield Call("conv_trace", shape, dtype, make_trace, traffic, 2 * points * taps, mostly_equal)

    features, outputs, points_each = (130, 5, 6) if small else (25088, 4096, 400)

    def make_linear() -> tuple[Any, ...]:
        signs = importlib.import_module("pyfast_xai.kernels.reference.sign_bits").sign_bits
        bits = signs(torch.randn(outputs, features, device=kind))
        points = torch.randint(0, n * outputs, (n * points_each,), device=kind).unique()
        return torch.randn(n, features, device=kind).relu().to(dtype), *bits, points, None, capacity

    # On a device the result has an entry for every input, as in a trace, so that nothing synchronises.
    capacity = n * features if kind == "cuda" else None
    # The positive half of the inputs is reached; depending on the signs, that takes one neuron or more.
    words = math.ceil(features / 64)
    traffic = n * (features * size + words * 8 + points_each * 8) + (capacity or n * features // 2) * 8
    shape = f"{n}x{features}, {outputs} neurons, {points_each} points a row"
    yield Call("linear_trace", shape, dtype, make_linear, traffic, n * words, equal)


def single_dtype_calls(kind: str, sizes: Sizes) -> Iterator[Call]:
    """Yields calls of the ops that take a single dtype.

    Args:
        kind: device type, "cuda" or "cpu".
        sizes: sizes of the batch.
    """
    n, small = sizes.images, sizes.small
    count, universe = (40, 300) if small else (15_625 * n, n * 64 * 224 * 224)
    # On a device the result has as many entries as there are points, as in a trace.
    capacity = count if kind == "cuda" else None
    yield Call(
        *("points_union", f"{count} points of {universe}", torch.int64),
        lambda: (torch.randint(0, universe, (count,), device=kind), universe, capacity),
        *(16 * count + universe // 8, count, equal),
    )
    fixations, side, sigma = (40, 7, 1.5) if small else (2000 * n, 224, 12.7)
    pixels = n * side * side
    # Along rows for each point, along columns for each pixel; farther weights are below rounding in float32.
    taps = min(side, 2 * math.ceil(5.8 * sigma) + 1)
    yield Call(
        *("point_density", f"{fixations} points, {n}x{side}x{side}", torch.float32),
        lambda: (torch.randint(0, pixels, (fixations,), device=kind), n, side, side, sigma),
        *(8 * fixations + 4 * pixels, 2 * taps * (fixations + pixels), close(1e-4)),
    )
    rows, columns = (5, 70) if small else (4096, 25088)
    yield Call(
        *("sign_bits", f"{rows}x{columns}", torch.float32),
        lambda: (torch.randn(rows, columns, device=kind),),
        *(rows * columns * 4 + rows * columns // 4, rows * columns, equal),
    )
    matrices = sizes.matrices
    for height, width in ((9, 20),) if small else ((49, 2048), (3136, 256)):

        def make_maps(b: int = matrices, h: int = height, w: int = width) -> tuple[Any, ...]:
            # Like activations: rectified, with one dominant direction.
            dominant = torch.rand(b, h, 1, device=kind) * torch.rand(b, 1, w, device=kind)
            return torch.randn(b, h, w, device=kind).relu() + dominant, 1, 0, 4, 0

        # One product with the matrix and its transpose. How many it takes depends on the numbers, ten or so.
        operations = 4 * matrices * height * width
        yield Call(
            *("leading_singular", f"{matrices} of {height}x{width}", torch.float32, make_maps),
            *(matrices * height * width * 4, operations, first_triplets),
        )
    shapes = ((16, 32, 7),) if small else ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))
    for channels, filters, extent in shapes if kind == "cpu" else ():

        def make_convolution(c: int = channels, o: int = filters, h: int = extent) -> tuple[Any, ...]:
            maps = torch.randn(n, c, h, h).contiguous(memory_format=torch.channels_last)
            weight = winograd_weight(torch.randn(o, c, 3, 3) / (3 * math.sqrt(c)))
            return maps, weight, torch.randn(o), [1, 1], 0.0, math.inf

        # Products only; the transforms are additions, a few for each number.
        operations = 2 * 36 * n * math.ceil(extent / 4) ** 2 * channels * filters
        traffic = 4 * (n * (channels + filters) * extent * extent + 36 * channels * filters)
        shape = f"{n}x{channels}x{extent}x{extent}, {filters} filters"
        yield Call(
            *("winograd_conv2d", shape, torch.float32, make_convolution, traffic, operations, close(1e-5)),
        )


def share(traffic: int, operations: int, seconds: float, ceilings: dict[str, float]) -> tuple[float | None, str]:
    """Returns the share of the device's peak that a time reaches, and which rate limits it: "copy" or "float32"."""
    if not {"copy", "float32"} <= ceilings.keys():
        return None, ""
    copy_seconds, compute_seconds = traffic / ceilings["copy"], operations / ceilings["float32"]
    return max(copy_seconds, compute_seconds) / seconds, "copy" if copy_seconds >= compute_seconds else "float32"
