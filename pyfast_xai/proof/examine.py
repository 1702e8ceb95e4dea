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
from pyfast_xai.proof.networks import SMALL, Call, Sizes, calls, calls_of_one_dtype, outcome, share

# Of real networks: the first that fits is measured.
SIZES = (Sizes(images=64, matrices=256), Sizes(images=8, matrices=32))
SAMPLE = 8  # matrices that the reference decomposes; it takes so much longer for all of them
CPU_MEMORY = 4e9  # bytes that a corner may take on a CPU, where this is rehearsed
REFERENCE = "reference"

Message = dict[str, Any]


class DeviceLostError(PyFastXaiError):
    """A kernel left the device in a state in which it runs nothing more."""


class Examination:
    """Finds out of kernels whether they are right, and how long they take.

    Args:
        device: where they run.
        rounds: of timing at each shape.
        say: is called with each message, whose "kind" is "ceiling" (a rate that nothing exceeds), "stage" (a kernel
            begins to run), "skipped" (a corner that needs more memory than there is), "failed" (why a kernel is not
            right), "row" (a time at a shape), "proven" (the seconds of each round, summed over the shapes, of all
            kernels of an op that are right) or "impossible" (why an op could not be examined).
        small: tiny shapes, for a rehearsal.
    """

    def __init__(self, device: torch.device, rounds: int, say: Callable[[Message], None], small: bool = False) -> None:
        self._device, self._rounds, self._say, self._small = device, rounds, say, small
        self._sizes = (SMALL,) if small else SIZES
        self._clock = Clock(device.type)
        self._rates: dict[str, float] = {}

    def run(self, kernels: dict[str, list[str]]) -> None:
        """Examine kernels.

        Args:
            kernels: names of backends by the name of an op, the simplest first.

        Raises:
            DeviceLostError: a kernel, which was said to have failed, left nothing to go on with.
        """
        for name, (rate, time) in ceilings(self._clock, self._device, self._small).items():
            self._rates[name] = rate
            unit = "B/s" if name == "copy" else "op/s"
            self._say({"kind": "ceiling", "name": name, "value": rate, "unit": unit, **time.as_dict()})
        for op, names in kernels.items():
            try:
                self._time(op, [REFERENCE, *(name for name in names if self._agrees(op, name))])
            except torch.OutOfMemoryError as error:
                self._say({"kind": "impossible", "op": op, "why": _sentence(error)})

    def _agrees(self, op: str, name: str) -> bool:
        self._say({"kind": "stage", "op": op, "backend": name, "stage": "agree"})
        torch.manual_seed(0)
        for corner in getattr(corners, op)(corners.Draw(self._device)):
            if corner.memory > self._free_memory():
                self._say({"kind": "skipped", "op": op, "backend": name, "why": corner.words})
                continue
            try:
                with ops.backend(name):
                    results = corners.results(corner.run())
                with ops.backend(REFERENCE):
                    expected = corners.results((corner.expected or corner.run)())
                why = None if corner.agree(results, expected) else "it gives other numbers"
            except torch.OutOfMemoryError:
                self._say({"kind": "skipped", "op": op, "backend": name, "why": corner.words})
                continue
            except Exception as error:  # whatever a kernel says, or the compiler of it
                why = _sentence(error)
            if why is not None:
                self._fail(op, name, f"{why} for {corner.words}")
                return False
        self._synchronize()
        return True

    def _time(self, op: str, names: list[str]) -> None:
        """Time kernels at the largest sizes for which there is memory."""
        *larger, least = self._sizes
        for sizes in larger:
            try:
                return self._time_at(op, names, sizes)
            except torch.OutOfMemoryError:
                continue
        return self._time_at(op, names, least)

    def _time_at(self, op: str, names: list[str], sizes: Sizes) -> None:
        totals = {name: [0.0] * self._rounds for name in names}
        for call in network_calls(op, self._device.type, sizes):
            seconds, times_as_many = self._take_turns(call, call.arguments(), names)
            names = list(seconds)
            for name, rounds in seconds.items():
                totals[name] = [
                    total + seconds_of_round for total, seconds_of_round in zip(totals[name], rounds, strict=True)
                ]
                reached = share(call.traffic, call.operations, summary(rounds).median, self._rates)
                row: Message = {
                    "kind": "row",
                    "op": op,
                    "shape": call.shape,
                    "dtype": str(call.dtype).removeprefix("torch."),
                }
                row |= {"backend": name, "bytes": call.traffic, "operations": call.operations}
                row |= {"share": reached[0], "of": reached[1], "ratio": min(seconds[REFERENCE]) / min(rounds)}
                row |= summary(rounds).as_dict()
                if name == REFERENCE and times_as_many != 1:
                    row["note"] = f"{SAMPLE} matrices timed, the others reckoned"
                self._say(row)
        self._say({"kind": "proven", "op": op, "seconds": {name: totals[name] for name in names}})

    def _take_turns(
        self, call: Call, arguments: tuple[Any, ...], names: Sequence[str]
    ) -> tuple[dict[str, list[float]], float]:
        """Returns the seconds of the rounds of each right kernel at a shape, and the factor over the reference."""
        inputs, times_as_many = dict.fromkeys(names, arguments), 1.0
        if call.op == "leading_singular" and len(arguments[0]) > SAMPLE:
            inputs[REFERENCE] = (arguments[0][:SAMPLE], *arguments[1:])
            times_as_many = len(arguments[0]) / SAMPLE
        stage = {"kind": "stage", "op": call.op, "stage": "time"}
        self._say(stage | {"backend": REFERENCE})
        expected = outcome(call, REFERENCE, inputs[REFERENCE])
        seconds: dict[str, list[float]] = {REFERENCE: []}
        for name in names[1:]:
            self._say(stage | {"backend": name})
            try:
                why = None if call.same(outcome(call, name, arguments), expected) else "it gives other numbers"
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                why = _sentence(error)
            if why is None:
                seconds[name] = []
            else:
                self._fail(call.op, name, f"{why} for {call.shape}")
        del expected
        for _ in range(self._rounds):
            for name, rounds in seconds.items():
                self._say(stage | {"backend": name})
                if call.reset is not None:
                    call.reset(*inputs[name])
                time = self._clock.round(functools.partial(call.kernel(name), *inputs[name]))
                rounds.append(time * (times_as_many if name == REFERENCE else 1))
        return seconds, times_as_many

    def _fail(self, op: str, name: str, why: str) -> None:
        self._say({"kind": "failed", "op": op, "backend": name, "why": why})
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
    """Yields an op at shapes of real networks, in every dtype that is measured.

    Args:
        op: its name.
        kind: of device, "cuda" or "cpu".
        sizes: of the batches.
    """
    for dtype in (torch.bfloat16, torch.float32):
        yield from (call for call in calls(kind, dtype, sizes) if call.op == op)
    yield from (call for call in calls_of_one_dtype(kind, sizes) if call.op == op)


def _sentence(error: BaseException) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}".removesuffix(": ")
