"""The examination of kernels that this device has never run, in a separate process."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pyfast_xai import ops
from pyfast_xai.errors import PyFastXaiError
from pyfast_xai.proof import corners
from pyfast_xai.proof.ceilings import ceilings
from pyfast_xai.proof.clock import Clock, summary
from pyfast_xai.proof.networks import SMALL, Call, Sizes, calls, outcome, share, single_dtype_calls

# Sizes of real networks; the first that fits in memory is measured.
SIZES = (Sizes(images=64, matrices=256), Sizes(images=8, matrices=32))
SAMPLE = 8  # matrices that the reference decomposes; its time is scaled to all of them
CPU_MEMORY = 4e9  # bytes that a corner case may take on a CPU, in tests
REFERENCE = "reference"

Message = dict[str, Any]


class DeviceLostError(PyFastXaiError):
    """Raised if a kernel left the device in a state in which it runs nothing more."""


class Examination:
    """Checks whether kernels are correct, and times them.

    Args:
        device: the device that runs them.
        rounds: rounds of timing at each shape.
        emit: receives each message, whose "kind" is "ceiling" (a rate that nothing exceeds), "stage" (a kernel starts),
            "skipped" (a corner case that needs more memory than there is), "failed" (the reason why a kernel is not
            correct), "row" (a time at a shape), "proven" (the seconds of each round, summed over the shapes, of all
            correct kernels of an op) or "impossible" (the reason why an op could not be examined).
        small: tiny shapes, for tests.
    """

    def __init__(self, device: torch.device, rounds: int, emit: Callable[[Message], None], small: bool = False) -> None:
        self._device, self._rounds, self._emit, self._small = device, rounds, emit, small
        self._sizes = (SMALL,) if small else SIZES
        self._clock = Clock(device.type)
        self._rates: dict[str, float] = {}

    def run(self, kernels: dict[str, list[str]]) -> None:
        """Examines kernels.

        Args:
            kernels: names of backends by the name of an op, the simplest first.

        Raises:
            DeviceLostError: a kernel, which was reported as failed, left the device unusable.
        """
        for name, (rate, time) in ceilings(self._clock, self._device, self._small).items():
            self._rates[name] = rate
            unit = "B/s" if name == "copy" else "op/s"
            self._emit({"kind": "ceiling", "name": name, "value": rate, "unit": unit, **time.as_dict()})
        for op, names in kernels.items():
            try:
                self._time(op, [REFERENCE, *(name for name in names if self._agrees(op, name))])
            except torch.OutOfMemoryError as error:
                self._emit({"kind": "impossible", "op": op, "reason": _sentence(error)})

    def _agrees(self, op: str, name: str) -> bool:
        self._emit({"kind": "stage", "op": op, "backend": name, "stage": "agree"})
        torch.manual_seed(0)
        for corner in getattr(corners, op)(corners.Draw(self._device)):
            if corner.memory > self._free_memory():
                self._emit({"kind": "skipped", "op": op, "backend": name, "reason": corner.description})
                continue
            try:
                with ops.backend(name):
                    results = corners.results(corner.run())
                with ops.backend(REFERENCE):
                    expected = corners.results((corner.expected or corner.run)())
                reason = None if corner.agree(results, expected) else "it gives other numbers"
            except torch.OutOfMemoryError:
                self._emit({"kind": "skipped", "op": op, "backend": name, "reason": corner.description})
                continue
            except Exception as error:  # a kernel, or its compiler, may raise anything
                reason = _sentence(error)
            if reason is not None:
                self._fail(op, name, f"{reason} for {corner.description}")
                return False
        self._synchronize()
        return True

    def _time(self, op: str, names: list[str]) -> None:
        """Times kernels at the largest sizes that fit in memory."""
        *larger, least = self._sizes
        for sizes in larger:
            try:
                return self._time_sizes(op, names, sizes)
            except torch.OutOfMemoryError:
                continue
        return self._time_sizes(op, names, least)

    def _time_sizes(self, op: str, names: list[str], sizes: Sizes) -> None:
        totals = {name: [0.0] * self._rounds for name in names}
        for call in network_calls(op, self._device.type, sizes):
            seconds, scale = self._time_in_turns(call, call.arguments(), names)
            names = list(seconds)
            for name, rounds in seconds.items():
                totals[name] = [
                    total + seconds_in_round for total, seconds_in_round in zip(totals[name], rounds, strict=True)
                ]
                fraction = share(call.traffic, call.operations, summary(rounds).median, self._rates)
                row: Message = {
                    "kind": "row",
                    "op": op,
                    "shape": call.shape,
                    "dtype": str(call.dtype).removeprefix("torch."),
                }
                row |= {"backend": name, "bytes": call.traffic, "operations": call.operations}
                row |= {"share": fraction[0], "of": fraction[1], "ratio": min(seconds[REFERENCE]) / min(rounds)}
                row |= summary(rounds).as_dict()
                if name == REFERENCE and scale != 1:
                    row["note"] = f"{SAMPLE} matrices timed, the others reckoned"
                self._emit(row)
        self._emit({"kind": "proven", "op": op, "seconds": {name: totals[name] for name in names}})

    def _time_in_turns(
        self, call: Call, arguments: tuple[Any, ...], names: Sequence[str]
    ) -> tuple[dict[str, list[float]], float]:
        """Returns the seconds of each round of each correct kernel at a shape, and the scale of the reference's."""
        inputs, scale = dict.fromkeys(names, arguments), 1.0
        if call.op == "leading_singular" and len(arguments[0]) > SAMPLE:
            inputs[REFERENCE] = (arguments[0][:SAMPLE], *arguments[1:])
            scale = len(arguments[0]) / SAMPLE
        stage = {"kind": "stage", "op": call.op, "stage": "time"}
        self._emit(stage | {"backend": REFERENCE})
        expected = outcome(call, REFERENCE, inputs[REFERENCE])
        seconds: dict[str, list[float]] = {REFERENCE: []}
        for name in names[1:]:
            self._emit(stage | {"backend": name})
            try:
                reason = None if call.agree(outcome(call, name, arguments), expected) else "it gives other numbers"
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = _sentence(error)
            if reason is None:
                seconds[name] = []
            else:
                self._fail(call.op, name, f"{reason} for {call.shape}")
        del expected
        for _ in range(self._rounds):
            for name, rounds in seconds.items():
                self._emit(stage | {"backend": name})
                if call.reset is not None:
                    call.reset(*inputs[name])
                time = self._clock.round(functools.partial(call.kernel(name), *inputs[name]))
                rounds.append(time * (scale if name == REFERENCE else 1))
        return seconds, scale

    def _fail(self, op: str, name: str, reason: str) -> None:
        self._emit({"kind": "failed", "op": op, "backend": name, "reason": reason})
        self._synchronize()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except Exception as error:
                raise DeviceLostError(_sentence(error)) from error

    def _free_memory(self) -> float:
        if self._device.type != "cuda":
            return CPU_MEMORY
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(self._device)[0]


def network_calls(op: str, kind: str, sizes: Sizes) -> Iterator[Call]:
    """Yields calls of an op at shapes of real networks, in every dtype that is measured.

    Args:
        op: name of the op.
        kind: device type, "cuda" or "cpu".
        sizes: sizes of the batches.
    """
    for dtype in (torch.bfloat16, torch.float32):
        yield from (call for call in calls(kind, dtype, sizes) if call.op == op)
    yield from (call for call in single_dtype_calls(kind, sizes) if call.op == op)


def _sentence(error: BaseException) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}".removesuffix(": ")
