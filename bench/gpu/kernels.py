"""Each op at shapes of real networks: time, the bytes it must move or the operations it must do, and who is faster."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.steps import Rows
from gpu.timing import Clock
from pyfast_xai.ops.registry import OPS

BATCH = 64
BUDGET = 0.6  # seconds for the rounds of one kernel
SVD_SAMPLE = 8  # matrices of a full decomposition that is too slow for all of them ...
SVD_LONGEST = 8.0  # ... in seconds


@dataclass
class Call:
    """An op with arguments of one shape.

    Attributes:
        op: its name.
        shape: in words, for people.
        dtype: of its floating-point arguments.
        make: the arguments, anew.
        traffic: bytes read and written at least, each once.
        operations: at least, in float32.
        same: whether a result is right, given that of the reference.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], tuple[Any, ...]]
    traffic: int
    operations: int
    same: Callable[[Any, Any], bool]

    def arguments(self) -> tuple[Any, ...]:
        torch.manual_seed(0)
        return self.make()

    def backends(self, kind: str) -> list[str]:
        """Those that serve the op on a device, the reference last; on a CPU the interpreter stands for Triton."""
        if kind == "cuda":
            return [name for name in ("cuda", "triton", "reference") if OPS[self.op].missing(name, kind) is None]
        interpreted = OPS[self.op].missing("triton", "cuda") is None
        return [*(["triton"] if interpreted else []), "reference"]

    def kernel(self, backend: str) -> Callable[..., Any]:
        if backend == "cuda":
            return OPS[self.op].overload
        return getattr(importlib.import_module(f"pyfast_xai.kernels.{backend}.{self.op}"), self.op)


def _tensors(result: Any, arguments: tuple[Any, ...], written: tuple[int, ...]) -> list[Tensor]:
    returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return returned + [arguments[i] for i in written]


WRITTEN = {
    "relu_forward": (4,),
    "relu_backward": (4,),
    "max_pool_forward": (5, 6),
    "max_pool_backward": (6,),
    "response_argmax": (2, 3),
}


def outcome(call: Call, backend: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a backend makes of the arguments: returned, or written into copies of them."""
    own = tuple(a.clone() if i in WRITTEN.get(call.op, ()) else a for i, a in enumerate(arguments))
    return _tensors(call.kernel(backend)(*own), own, WRITTEN.get(call.op, ()))


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _close(tolerance: float) -> Callable[[list[Tensor], list[Tensor]], bool]:
    def same(found: list[Tensor], expected: list[Tensor]) -> bool:
        pairs = zip(found, expected, strict=True)
        return all(float((a.float() - b.float()).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)

    return same


def _mostly(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Sums in another order turn a near tie now and then."""
    return all(float((a == b).float().mean()) > 0.99 for a, b in zip(found, expected, strict=True))


def _values(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Singular values; the residual says the rest. The reference may have done some matrices only."""
    own, other = found[1][: len(expected[1])], expected[1]
    return bool(((own - other).abs() <= 1e-3 * other).all()) and bool((found[3] <= 1e-2).all())


def calls(kind: str, dtype: torch.dtype, small: bool) -> Iterator[Call]:
    """The ops at the shapes that are measured, or at tiny ones.

    Args:
        kind: of device, "cuda" or "cpu".
        dtype: of activations and gradients.
        small: odd sizes that a program or two hold.
    """
    size = dtype.itemsize
    n = 2 if small else BATCH
    last = torch.channels_last

    def image(c: int, h: int, w: int, k: int = 1) -> Tensor:
        return torch.randn(k * n, c, h, w, device=kind).to(dtype).contiguous(memory_format=last)

    for c, h, bounded in ((5, 7, True),) if small else ((64, 224, False), (64, 112, False), (256, 56, True)):
        count = n * c * h * h

        def make(c: int = c, h: int = h, bounded: bool = bounded) -> tuple[Any, ...]:
            x = image(c, h, h)
            return x, math.inf, image(c, h, h) if bounded else None, False, torch.empty_like(x)

        shape = f"{n}x{c}x{h}x{h}" + (", bound" if bounded else "")
        traffic = count * size * (3 if bounded else 2) + count // 8
        yield Call("relu_forward", shape, dtype, make, traffic, count, _equal)

    for k, c, h in ((2, 5, 7),) if small else ((1, 64, 224), (1, 64, 112), (8, 256, 28)):
        count = n * c * h * h

        def make(k: int = k, c: int = c, h: int = h, count: int = count) -> tuple[Any, ...]:
            grad = torch.randn(k, count, device=kind).to(dtype)
            bits = torch.randint(0, 256, ((count + 7) // 8,), dtype=torch.uint8, device=kind)
            return grad, bits, 2, 0.0, torch.empty_like(grad)

        traffic = 2 * k * count * size + count // 8
        yield Call("relu_backward", f"{k} targets, {n}x{c}x{h}x{h}", dtype, make, traffic, k * count, _equal)

    pools = ((5, 7, 3, 2, 1),) if small else ((64, 112, 3, 2, 1), (64, 224, 2, 2, 0))
    for c, h, kernel, stride, padding in pools:
        out = (h + 2 * padding - kernel) // stride + 1
        geometry = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1])
        read, wrote = n * c * h * h, n * c * out * out

        def make(c: int = c, h: int = h, out: int = out, geometry: Any = geometry) -> tuple[Any, ...]:
            output = image(c, out, out)
            return image(c, h, h), *geometry, output, torch.empty_like(output, dtype=torch.uint8)

        shape = f"{n}x{c}x{h}x{h}, {kernel}x{kernel} / {stride}"
        yield Call("max_pool_forward", shape, dtype, make, (read + wrote) * size + wrote, read, _equal)

        def make_back(c: int = c, h: int = h, out: int = out, geometry: Any = geometry) -> tuple[Any, ...]:
            forward = importlib.import_module("pyfast_xai.kernels.reference.max_pool_forward").max_pool_forward
            x, output = image(c, h, h), image(c, out, out)
            offsets = torch.empty_like(output, dtype=torch.uint8)
            forward(x, *geometry, output, offsets)
            return image(c, out, out), offsets, *geometry, x

        # Sums of gradients are rounded at every step by the reference, once by a kernel.
        same = _close(0.05 if size == 2 else 1e-5)
        yield Call("max_pool_backward", shape, dtype, make_back, (read + wrote) * size + wrote, wrote, same)

    k, side = (3, 7) if small else (8, 224)

    def make_responses() -> tuple[Any, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        best = torch.full((n, side, side), -math.inf, dtype=wide, device=kind)
        classes = torch.randint(0, 1000, (k, n), device=kind)
        responses = torch.randn(k, n, 3, side, side, device=kind).to(dtype)
        return responses, classes, best, torch.full(best.shape, -1, device=kind)

    traffic = k * n * 3 * side * side * size + 2 * n * side * side * 12
    shape = f"{k} classes, {n}x3x{side}x{side}"
    yield Call("response_argmax", shape, dtype, make_responses, traffic, k * n * 3 * side * side, _equal)

    traced = (
        ((5, 6, 9, 3, 3),) if small else ((64, 64, 224, 3, 4000), (256, 256, 14, 3, 1500), (1024, 256, 14, 1, 1500))
    )
    for c, filters, h, kernel, each in ((5, 6, 9, 3, 3),) if small else traced:
        points = n * each

        def make(
            c: int = c, o: int = filters, h: int = h, kernel: int = kernel, points: int = points
        ) -> tuple[Any, ...]:
            weight = torch.randn(o, c, kernel, kernel, device=kind).to(dtype).contiguous(memory_format=last)
            at = torch.randint(0, n * o * h * h, (points,), device=kind).sort().values
            geometry = ([h, h], [1, 1], [side // 2] * 2, [1, 1], 1, 2)
            return image(c, h, h).relu(), weight, at, None, *geometry

        taps = kernel * kernel * c
        # A field is read once, or the whole map is where points are many; the filters once.
        traffic = min(points * taps, n * c * h * h) * size + min(points, filters) * taps * size + 16 * points
        shape = f"{n}x{c}x{h}x{h}, {kernel}x{kernel}, {points} points"
        yield Call("conv_trace", shape, dtype, make, traffic, 2 * points * taps, _mostly)

    features, outputs, each = (130, 5, 6) if small else (25088, 4096, 400)

    def make_linear() -> tuple[Any, ...]:
        signs = importlib.import_module("pyfast_xai.kernels.reference.sign_bits").sign_bits
        bits = signs(torch.randn(outputs, features, device=kind))
        at = torch.randint(0, n * outputs, (n * each,), device=kind).unique()
        return torch.randn(n, features, device=kind).relu().to(dtype), *bits, at, None

    traffic = n * features * size + 2 * outputs * math.ceil(features / 64) * 8 + n * each * 8
    shape = f"{n}x{features}, {outputs} neurons, {each} points a row"
    yield Call("linear_trace", shape, dtype, make_linear, traffic, n * features, _equal)

    if dtype is not torch.bfloat16:
        return

    # The rest knows one dtype.
    count, places = (40, 300) if small else (1_000_000, BATCH * 64 * 224 * 224)
    yield Call(
        *("points_union", f"{count} points of {places}", torch.int64),
        lambda: (torch.randint(0, places, (count,), device=kind), places),
        *(16 * count + places // 8, count, _equal),
    )
    count, side, sigma = (40, 7, 1.5) if small else (BATCH * 2000, 224, 12.7)
    yield Call(
        *("point_density", f"{count} points, {n}x{side}x{side}", torch.float32),
        lambda: (torch.randint(0, n * side * side, (count,), device=kind), n, side, side, sigma),
        *(8 * count + 4 * n * side * side, count, _close(1e-4)),
    )
    rows, columns = (5, 70) if small else (4096, 25088)
    yield Call(
        *("sign_bits", f"{rows}x{columns}", torch.float32),
        lambda: (torch.randn(rows, columns, device=kind),),
        *(rows * columns * 4 + rows * columns // 4, rows * columns, _equal),
    )
    for matrices, height, width in ((1, 9, 20),) if small else ((256, 49, 2048), (256, 3136, 256)):

        def make_maps(b: int = matrices, h: int = height, w: int = width) -> tuple[Any, ...]:
            # As activations are: rectified, with a direction that stands out.
            own = torch.rand(b, h, 1, device=kind) * torch.rand(b, 1, w, device=kind)
            return torch.randn(b, h, w, device=kind).relu() + own, 1, 0, 4, 0

        small_side = min(height, width)
        yield Call(
            *("leading_singular", f"{matrices} of {height}x{width}", torch.float32, make_maps),
            *(matrices * height * width * 4, 2 * matrices * height * width * small_side, _values),
        )


def share(traffic: int, operations: int, seconds: float, ceilings: dict[str, float]) -> tuple[float | None, str]:
    """How near a time is to what the device can do: the longer of moving the bytes and doing the operations."""
    if not {"copy", "float32"} <= ceilings.keys():
        return None, ""
    moving, doing = traffic / ceilings["copy"], operations / ceilings["float32"]
    return max(moving, doing) / seconds, "copy" if moving >= doing else "float32"


def measure(rows: Rows, kind: str, small: bool, ceilings: dict[str, float], only: str = "") -> None:
    """A row for each op, shape and backend.

    Args:
        rows: where they go.
        kind: of device.
        small: tiny shapes, for a rehearsal.
        ceilings: measured bytes and operations a second.
        only: name of an op; empty for all.
    """
    clock = Clock(kind)
    for dtype in (torch.bfloat16,) if small else (torch.bfloat16, torch.float32):
        for call in calls(kind, dtype, small):
            if only in ("", call.op):
                _measure(rows, clock, call, kind, ceilings)


def _measure(rows: Rows, clock: Clock, call: Call, kind: str, ceilings: dict[str, float]) -> None:
    arguments = call.arguments()
    common = {"kind": "op", "name": call.op, "shape": call.shape, "dtype": str(call.dtype).removeprefix("torch.")}
    common |= {"bytes": call.traffic, "operations": call.operations}
    # A full decomposition of each matrix takes its time: of some of them, and so much longer for all.
    sampled = call.op == "leading_singular" and len(arguments[0]) > SVD_SAMPLE
    given = (arguments[0][:SVD_SAMPLE], *arguments[1:]) if sampled else arguments
    times = len(arguments[0]) / SVD_SAMPLE if sampled else 1.0
    expected: list[Tensor] | None = None
    slowest: float | None = None
    for backend in reversed(call.backends(kind)):
        try:
            reference = backend == "reference"
            own = given if reference else arguments
            result = outcome(call, backend, own)
            if reference:
                expected = result
            right = None if reference or expected is None else call.same(result, expected)
            kernel = call.kernel(backend)
            time = clock.median(lambda kernel=kernel, own=own: kernel(*own), budget=BUDGET)
            factor = times if reference else 1.0
            slowest = factor * time.median if reference else slowest
            reached, of = share(call.traffic, call.operations, factor * time.median, ceilings)
            row = common | {"backend": backend, **time.as_dict(), "share": reached, "of": of, "right": right}
            row |= {"median_ms": 1e3 * factor * time.median}
            if sampled and reference:
                row["note"] = f"{SVD_SAMPLE} matrices timed, the others reckoned"
            rows.add(**row, ratio=None if slowest is None else slowest / (factor * time.median))
        except Exception as error:
            rows.add(**common, backend=backend, error=f"{type(error).__name__}: {str(error)[:300]}", right=False)
    if call.op == "leading_singular":
        _svd(rows, clock, common, arguments[0])


def _svd(rows: Rows, clock: Clock, common: dict[str, Any], matrices: Tensor) -> None:
    """What others would call: a batched `torch.linalg.svd` in the same precision."""

    def seconds(count: int) -> float:
        return clock.wall(lambda: torch.linalg.svd(matrices[:count], full_matrices=False))

    count = min(SVD_SAMPLE, len(matrices))
    seconds(count)
    time = seconds(count) * len(matrices) / count
    note = f"{count} matrices timed, the others reckoned"
    if time < SVD_LONGEST:
        time, note = seconds(len(matrices)), ""
    rows.add(**common, backend="torch.linalg.svd", median_ms=1e3 * time, rounds=1, note=note)
