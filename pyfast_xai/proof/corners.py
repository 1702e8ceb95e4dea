"""Corner cases of every op.

They cover each dtype, odd sizes, both memory formats, non-finite numbers, empty tensors, and more elements than 32-bit
indices reach.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfast_xai import ops
from pyfast_xai.ops import Location, Rectify, Solver
from pyfast_xai.proof.agreement import Agreement, close, equal, first_triplets

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
BEYOND = 2**31  # the first index that does not fit 32 bits


@dataclass
class Corner:
    """A call of an op and its expected results.

    Attributes:
        description: the special property of the case.
        run: calls the op on the backend of the context and returns its results.
        agree: returns whether results are correct, given the expected ones.
        expected: returns the expected results; None calls `run` on the reference.
        memory: bytes that the case takes; 0 for few.
    """

    description: str
    run: Callable[[], Any]
    agree: Agreement = equal
    expected: Callable[[], list[Tensor]] | None = None
    memory: int = 0


def with_each_dtype(cases: Iterable[Any]) -> Iterator[tuple[torch.dtype, Any]]:
    """Yields every dtype with the first case, and float32 with the other cases."""
    first, *remaining = cases
    yield from ((dtype, first) for dtype in DTYPES)
    yield from ((torch.float32, case) for case in remaining)


def results(result: Any) -> list[Tensor]:
    """Returns the results of an op as a list of tensors."""
    return [result] if isinstance(result, Tensor) else list(result)


class Draw:
    """Draws tensors on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def integers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns small integers, whose sums are exact and whose ties are common."""
        return torch.randint(-2, 3, shape, device=self.device).to(dtype)

    def special(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns random numbers, with infinities of both signs, NaN and negative zero among them."""
        values = torch.randn(shape, device=self.device).mul(4).to(dtype)
        specials = torch.tensor([math.inf, -math.inf, math.nan, -0.0], device=self.device).to(dtype)
        return torch.where(torch.rand(shape, device=self.device) < 0.9, values, specials[self.indices(4, *shape)])

    def indices(self, size: int, *shape: int) -> Tensor:
        """Returns random indices in `[0, size)`."""
        return torch.randint(0, size, shape, device=self.device)

    def points(self, size: int, count: int) -> Tensor:
        """Returns points in `[0, size)`, a third of them absent (-1)."""
        return self.indices(size, count).masked_fill(torch.rand(count, device=self.device) < 0.3, -1)

    def third(self, count: int) -> Tensor:
        """Returns a mask that is True for a third of the entries."""
        return torch.rand(count, device=self.device) < 0.3

    def bytes(self, count: int) -> Tensor:
        """Returns random bytes."""
        return self.indices(256, count).to(torch.uint8)


def relu_forward(draw: Draw) -> Iterator[Corner]:
    for dtype in DTYPES:
        for layout in FORMATS:
            for shape in ((3, 17, 45, 31), (1, 1, 1, 1), (0, 3, 4, 4)):
                x, bound = (draw.special(*shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
                for upper, clamp, bound_tensor in ((math.inf, False, None), (6.0, False, None), (2.0, True, bound)):
                    yield Corner(
                        f"{_dtype_name(dtype)} {list(shape)}, {layout}",
                        partial(ops.relu_forward, x, upper=upper, bound=bound_tensor, clamp=clamp),
                    )
    size = BEYOND + 24

    def tail() -> list[Tensor]:
        return results(ops.relu_forward(_huge(24, draw.device)))

    def huge() -> list[Tensor]:
        output, bits = ops.relu_forward(_huge(size, draw.device))
        return [output[-24:], bits[-3:]]

    yield Corner("more than 2**31 elements", huge, expected=tail, memory=6 * size)


def relu_backward(draw: Draw) -> Iterator[Corner]:
    for dtype in DTYPES:
        for shape in ((3, 5, 7, 61, 33), (1, 1), (2, 0, 5)):
            grad = draw.special(*shape, dtype=dtype)
            bits = draw.bytes(math.ceil(math.prod(shape[1:]) / 8))
            for rule in Rectify:
                for slope in (0.0, 0.25) if rule is Rectify.GRADIENT else (0.0,):
                    signs = None if rule is Rectify.DECONVNET else bits
                    yield Corner(
                        f"{_dtype_name(dtype)} {list(shape)}, {rule.name}",
                        partial(ops.relu_backward, grad, signs, rule, negative_slope=slope),
                    )
    size = BEYOND + 24

    def huge() -> list[Tensor]:
        bits = torch.full((size // 8,), 0xA5, dtype=torch.uint8, device=draw.device)
        return [ops.relu_backward(_huge(size, draw.device)[None], bits, Rectify.GUIDED)[0, -24:]]

    def tail() -> list[Tensor]:
        bits = torch.full((3,), 0xA5, dtype=torch.uint8, device=draw.device)
        return [ops.relu_backward(_huge(24, draw.device)[None], bits, Rectify.GUIDED)[0]]

    yield Corner("more than 2**31 elements", huge, expected=tail, memory=6 * size)


POOLS: dict[str, Any] = {
    "3x3 / 2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "2x2 / 2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "3x3 / 1": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "3x3 / 2, ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "3x2, dilated": ((3, 2), (1, 2), (1, 0), (2, 1), False),
}


def max_pool_forward(draw: Draw) -> Iterator[Corner]:
    for dtype, case in with_each_dtype(POOLS):
        for layout in FORMATS:
            for shape in ((3, 70, 37, 29), (1, 1, 5, 5), (0, 3, 8, 8)):
                x = draw.special(*shape, dtype=dtype).contiguous(memory_format=layout)
                yield Corner(
                    f"{_dtype_name(dtype)} {list(shape)}, {case}, {layout}",
                    partial(ops.max_pool_forward, x, *POOLS[case]),
                )
    pool, images = POOLS["2x2 / 2"], BEYOND // (64 * 64 * 64) + 1

    def huge() -> list[Tensor]:
        x = torch.zeros(images, 64, 64, 64, dtype=torch.bfloat16, device=draw.device)
        x[-1] = _pattern(64 * 64 * 64, draw.device).view(64, 64, 64)
        return [part[-1:] for part in ops.max_pool_forward(x, *pool)]

    def tail() -> list[Tensor]:
        return results(ops.max_pool_forward(_pattern(64 * 64 * 64, draw.device).view(1, 64, 64, 64), *pool))

    yield Corner("more than 2**31 elements", huge, expected=tail, memory=3 * images * 64**3)


def max_pool_backward(draw: Draw) -> Iterator[Corner]:
    for dtype, case in with_each_dtype(POOLS):
        for layout in FORMATS:
            for shape in ((3, 70, 37, 29), (1, 1, 5, 5), (0, 3, 8, 8)):
                x, pool = draw.integers(*shape, dtype=dtype).contiguous(memory_format=layout), POOLS[case]
                with ops.backend("reference"):
                    output, offsets = ops.max_pool_forward(x, *pool)
                grad = draw.integers(2, *output.shape, dtype=dtype)
                yield Corner(
                    f"{_dtype_name(dtype)} {list(shape)}, {case}, {layout}",
                    partial(ops.max_pool_backward, grad, offsets, shape[2:], *pool[:4]),
                )
    pool, images = POOLS["2x2 / 2"], BEYOND // (64 * 64 * 64) + 1

    def last_gradient(images: int) -> list[Tensor]:
        grad = torch.zeros(1, images, 64, 32, 32, dtype=torch.bfloat16, device=draw.device)
        grad[0, -1] = _pattern(64 * 32 * 32, draw.device).view(64, 32, 32)
        offsets = torch.full((images, 64, 32, 32), 3, dtype=torch.uint8, device=draw.device)
        return [ops.max_pool_backward(grad, offsets, (64, 64), *pool[:4])[0, -1]]

    yield Corner(
        *("more than 2**31 elements", lambda: last_gradient(images)),
        expected=lambda: last_gradient(1),
        memory=4 * images * 64**3,
    )


def response_argmax(draw: Draw) -> Iterator[Corner]:
    for dtype in DTYPES:
        for count, images, height, width in ((9, 3, 61, 53), (1, 1, 1, 1), (2, 0, 5, 5), (0, 2, 5, 5)):
            responses = draw.integers(count, images, 3, height, width, dtype=dtype)
            classes = draw.indices(50, count, images) - 1

            def run(responses: Tensor, classes: Tensor) -> list[Tensor]:
                map_shape = responses.shape[1], *responses.shape[3:]
                wide = torch.promote_types(responses.dtype, torch.float32)
                best = torch.full(map_shape, -math.inf, dtype=wide, device=draw.device)
                winner = torch.full(map_shape, -1, device=draw.device)
                for part, names in zip(responses.split(4), classes.split(4), strict=True):
                    ops.response_argmax(part, names, best, winner)
                return [best, winner]

            yield Corner(f"{_dtype_name(dtype)} {list(responses.shape)}", partial(run, responses, classes))
            innermost = responses.contiguous(memory_format=torch.channels_last_3d)
            yield Corner(
                f"{_dtype_name(dtype)} {list(responses.shape)}, channels innermost",
                partial(run, innermost, classes),
            )


CONVOLUTIONS: dict[str, Any] = {
    "3x3": ((4, 64, 28, 28), (96, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1, stride 2": ((4, 256, 15, 13), (64, 256, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "7x7, stride 2": ((2, 3, 65, 63), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "3x3, dilation 2": ((2, 5, 17, 19), (7, 5, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    "depthwise": ((4, 96, 14, 14), (96, 1, 3, 3), (1, 1), (1, 1), (1, 1), 96),
    "2 groups": ((2, 6, 9, 11), (8, 3, 3, 3), (1, 1), (1, 1), (1, 1), 2),
}


def conv_trace(draw: Draw) -> Iterator[Corner]:
    for dtype, case in with_each_dtype(CONVOLUTIONS):
        shape, filters, stride, padding, dilation, groups = CONVOLUTIONS[case]
        weight = draw.integers(*filters, dtype=dtype)
        size = [
            (shape[2 + d] + 2 * padding[d] - dilation[d] * (filters[2 + d] - 1) - 1) // stride[d] + 1 for d in range(2)
        ]
        locations = (Location.PRODUCT, Location.CENTER, Location.ACTIVATION)
        for layout in FORMATS:
            x = draw.integers(*shape, dtype=dtype).contiguous(memory_format=layout)
            for count in (3000, 0):
                points = draw.points(shape[0] * filters[0] * math.prod(size), count)
                negative = draw.third(count)
                for location in locations if case == "3x3" else locations[:1]:
                    yield Corner(
                        f"{_dtype_name(dtype)}, {case}, {count} points, {layout}",
                        partial(
                            ops.conv_trace,
                            x,
                            weight,
                            points,
                            negative,
                            size,
                            stride,
                            padding,
                            dilation,
                            groups,
                            location,
                        ),
                    )
    height, width = 50_000, 45_000
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device=draw.device)
    points = height * width - 1 - torch.arange(0, 100, 3, device=draw.device)
    geometry = ((height, width), (1, 1), (0, 0), (1, 1), 1)

    def huge() -> list[Tensor]:
        x = torch.zeros(1, 1, height, width, dtype=torch.bfloat16, device=draw.device)
        return results(ops.conv_trace(x, weight, points, None, *geometry))

    yield Corner("more than 2**31 elements", huge, expected=lambda: [points], memory=2 * height * width)


def linear_trace(draw: Draw) -> Iterator[Corner]:
    for dtype in DTYPES:
        for rows, features, outputs, count in ((6, 3000, 500, 200), (2, 1, 1, 1), (3, 65, 7, 0)):
            x = draw.integers(rows, features, dtype=dtype)
            with ops.backend("reference"):
                bits = ops.sign_bits(draw.integers(outputs, features))
            points = draw.points(rows * outputs, count)
            for negative in (None, draw.third(count)):
                for capacity in (None, rows * features):
                    yield Corner(
                        f"{_dtype_name(dtype)} {[rows, features]}, {count} points, capacity {capacity}",
                        partial(ops.linear_trace, x, bits[0], bits[1], points, negative, capacity),
                    )
    rows, outputs = 2048, BEYOND // 2048 + 1
    points = rows * outputs - 1 - torch.arange(0, 5, device=draw.device)
    positive_bits = torch.zeros(outputs, 2, dtype=torch.int64, device=draw.device)
    positive_bits[-5:] = 0b11

    def huge() -> list[Tensor]:
        x = torch.ones(rows, 70, device=draw.device)
        return results(ops.linear_trace(x, positive_bits, torch.zeros_like(positive_bits), points, None, 4))

    def tail() -> list[Tensor]:
        first = (rows - 1) * 70
        return [torch.tensor([first, first + 1, first + 64, first + 65], device=draw.device)]

    yield Corner("points beyond 2**31", huge, expected=tail, memory=64 * outputs)


def points_union(draw: Draw) -> Iterator[Corner]:
    for count, size in ((1, 1), (0, 7), (100_000, 3_000), (50_000, 12_345_678), (10, 1 << 33)):
        points = draw.points(size, count)
        for capacity in (None, count, count + 999):
            yield Corner(
                f"{count} points of {size}, capacity {capacity}",
                partial(ops.points_union, points, size, capacity),
            )


def point_density(draw: Draw) -> Iterator[Corner]:
    for images, height, width, count in ((3, 100, 120, 5000), (1, 1, 1, 3), (2, 7, 300, 1), (2, 9, 9, 0)):
        repeated = torch.full((count,), images * height * width // 2, device=draw.device)
        points = torch.cat([draw.indices(images * height * width, count), repeated])
        for sigma in (0.5, 12.7):
            yield Corner(
                f"{2 * count} points, {images}x{height}x{width}, sigma {sigma}",
                partial(ops.point_density, points, images, height, width, sigma),
                close(1e-4),
            )
    images = BEYOND // 256**2 + 1
    points = torch.tensor([images * 256**2 - 1 - 300], device=draw.device)

    def huge() -> list[Tensor]:
        return [ops.point_density(points, images, 256, 256, 2.0)[-1]]

    def tail() -> list[Tensor]:
        return [ops.point_density(points - (images - 1) * 256**2, 1, 256, 256, 2.0)[0]]

    yield Corner("more than 2**31 pixels", huge, close(1e-4), expected=tail, memory=14 * images * 256**2)


def sign_bits(draw: Draw) -> Iterator[Corner]:
    for dtype in DTYPES:
        for rows, columns in ((33, 1000), (1, 1), (0, 5), (3, 64)):
            weight = draw.special(rows, columns, dtype=dtype)
            yield Corner(f"{_dtype_name(dtype)} {[rows, columns]}", partial(ops.sign_bits, weight))


def leading_singular(draw: Draw) -> Iterator[Corner]:
    for dtype, shape in with_each_dtype(((40, 49, 512), (8, 196, 256), (4, 700, 130), (1, 1, 1), (3, 5, 9), (0, 5, 5))):
        images, rows, columns = shape
        # Like maps after a rectifier, with one dominant direction.
        shared = torch.rand(images, rows, 1, device=draw.device) * torch.rand(images, 1, columns, device=draw.device)
        maps = (torch.randn(shape, device=draw.device).relu() + 0.5 * shared).to(dtype)
        for k, solver in ((min(rows, columns, 2), Solver.AUTO), (1, Solver.SUBSPACE)):
            for matrices in (maps, maps.mT.contiguous().mT):
                yield Corner(
                    f"{_dtype_name(dtype)} {list(shape)}, k = {k}, strides {matrices.stride()}",
                    partial(ops.leading_singular, matrices, k, solver),
                    first_triplets,
                )
    width = 256
    images = BEYOND // width**2 + 1

    def last_triplets(images: int) -> list[Tensor]:
        matrices = torch.zeros(images, width, width, dtype=torch.bfloat16, device=draw.device)
        matrices[-1] = _pattern(width**2, draw.device).view(width, width)
        return [part[-1:] for part in ops.leading_singular(matrices, 1, Solver.SUBSPACE)]

    yield Corner(
        *("more than 2**31 elements", lambda: last_triplets(images), first_triplets),
        expected=lambda: last_triplets(1),
        memory=8 * images * width**2,
    )


def winograd_conv2d(draw: Draw) -> Iterator[Corner]:
    for shape, filters, padding in (((2, 16, 9, 7), 32, (1, 1)), ((1, 32, 3, 3), 16, (0, 0))):
        x, weight = draw.integers(*shape), ops.winograd_weight(draw.integers(filters, shape[1], 3, 3))
        yield Corner(
            f"{list(shape)}, {filters} filters",
            partial(ops.winograd_conv2d, x, weight, None, padding, 0.0),
            close(1e-4),
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pattern(size: int, device: torch.device) -> Tensor:
    return ((torch.arange(size, device=device) * 7) % 11 - 5).to(torch.bfloat16)


def _huge(size: int, device: torch.device) -> Tensor:
    """Returns zeros, with numbers of both signs at the end."""
    values = torch.zeros(size, dtype=torch.bfloat16, device=device)
    values[-24:] = _pattern(24, device)
    return values
