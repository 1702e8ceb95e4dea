"""Every op, proven and then timed at shapes of real networks."""

from collections.abc import Iterator
from typing import Any

import torch

from gpu.steps import Rows
from pyfast_xai.ops.registry import OPS
from pyfast_xai.proof.clock import Clock
from pyfast_xai.proof.examine import SIZES, network_calls
from pyfast_xai.proof.networks import SMALL, Call, calls, single_dtype_calls
from pyfast_xai.tuning import Verdicts, environment
from pyfast_xai.tuning.proofs import Proofs
from pyfast_xai.tuning.verdicts import cache_folder

SVD_SAMPLE = 8  # matrices of a full decomposition that is too slow for all of them ...
SVD_LONGEST = 8.0  # ... in seconds


def small_calls(kind: str) -> Iterator[Call]:
    """The ops on tiny shapes, in one dtype for a rehearsal."""
    for dtype in (torch.bfloat16, torch.float32) if kind == "cuda" else (torch.bfloat16,):
        yield from calls(kind, dtype, SMALL)
    yield from single_dtype_calls(kind, SMALL)


def backends(call: Call, kind: str) -> list[str]:
    """Those that serve the op on a device, the reference last; on a CPU the interpreter stands for Triton."""
    if kind == "cuda":
        return [*reversed(OPS[call.op].to_prove(kind)), "reference"]
    interpreted = OPS[call.op].missing("triton", "cuda") is None
    return [*(["triton"] if interpreted else []), "reference"]


def measure(rows: Rows, kind: str, small: bool) -> None:
    """Rows of the rates of the device, and of each op, shape and backend; the verdicts are kept for what follows.

    Args:
        rows: where they go.
        kind: of device.
        small: tiny shapes, for a rehearsal.
    """

    def listen(message: dict[str, Any]) -> None:
        what, row = message["kind"], {key: value for key, value in message.items() if key not in ("kind", "op")}
        if what == "ceiling":
            rows.add(kind="ceiling", **row)
        elif what == "row":
            rows.add(kind="op", name=message["op"], right=True if row["backend"] != "reference" else None, **row)
        elif what in ("failed", "impossible"):
            actual = {"backend": message.get("backend", "reference"), "error": message["reason"]}
            rows.add(kind="op", name=message["op"], shape="", dtype="", right=False, **actual)
        elif what == "skipped":
            print(f"{message['op']} on {message['backend']}: no memory for {message['reason']}", flush=True)

    kernels = {name: op.to_prove(kind) for name, op in OPS.items()}
    Proofs(Verdicts(cache_folder(), environment()), small=small).prove_all(kernels, torch.device(kind), listen)
    for call in network_calls("leading_singular", kind, SMALL if small else SIZES[0]):
        _svd(rows, Clock(kind), call)


def _svd(rows: Rows, clock: Clock, call: Call) -> None:
    """What others would call: a batched `torch.linalg.svd` in the same precision."""
    matrices = call.arguments()[0]

    def seconds(count: int) -> float:
        return clock.wall(lambda: torch.linalg.svd(matrices[:count], full_matrices=False))

    count = min(SVD_SAMPLE, len(matrices))
    seconds(count)
    time = seconds(count) * len(matrices) / count
    note = f"{count} matrices timed, the others reckoned"
    if time < SVD_LONGEST:
        time, note = seconds(len(matrices)), ""
    common = {"kind": "op", "name": call.op, "shape": call.shape, "dtype": str(call.dtype).removeprefix("torch.")}
    rows.add(**common, backend="torch.linalg.svd", median_ms=1e3 * time, rounds=1, note=note)
