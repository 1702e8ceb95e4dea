"""Each op at shapes of real networks: time, the bytes it must move or the operations it must do, and who is faster."""

from collections.abc import Iterator
from typing import Any

import torch
from op_calls import SMALL, Call, Sizes, calls, calls_of_one_dtype, outcome, share
from torch import Tensor

from gpu.steps import Rows
from gpu.timing import Clock
from pyfast_xai.ops.registry import OPS

SIZES = Sizes(images=64, matrices=256)
BUDGET = 0.6  # seconds for the rounds of one kernel
SVD_SAMPLE = 8  # matrices of a full decomposition that is too slow for all of them ...
SVD_LONGEST = 8.0  # ... in seconds


def all_calls(kind: str, small: bool) -> Iterator[Call]:
    """The ops in every dtype that is measured.

    Args:
        kind: of device.
        small: one dtype and tiny shapes, for a rehearsal.
    """
    sizes = SMALL if small else SIZES
    for dtype in (torch.bfloat16,) if small and kind != "cuda" else (torch.bfloat16, torch.float32):
        yield from calls(kind, dtype, sizes)
    yield from calls_of_one_dtype(kind, sizes)


def backends(call: Call, kind: str) -> list[str]:
    """Those that serve the op on a device, the reference last; on a CPU the interpreter stands for Triton."""
    if kind == "cuda":
        return [name for name in ("cuda", "triton", "reference") if OPS[call.op].missing(name, kind) is None]
    interpreted = OPS[call.op].missing("triton", "cuda") is None
    return [*(["triton"] if interpreted else []), "reference"]


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
    for call in all_calls(kind, small):
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
    for backend in reversed(backends(call, kind)):
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
