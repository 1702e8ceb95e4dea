"""Medians of many rounds: device time for a kernel, wall-clock time for an explanation."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSHED = 1 << 28  # bytes written between rounds, so that a round does not find its inputs in the cache
HEAD_START = 1_000_000  # cycles that the device waits before a round, so that the host can enqueue the whole round
WARM_UPS = 3  # rounds that are not counted, because they compile, load and choose kernels


@dataclass
class Time:
    """Seconds of one round, over many rounds.

    Attributes:
        median: median of the rounds.
        low: a fifth of the rounds took less.
        high: a fifth of the rounds took more.
        rounds: number of rounds that were counted.
    """

    median: float
    low: float
    high: float
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "median_ms": 1e3 * self.median,
            "low_ms": 1e3 * self.low,
            "high_ms": 1e3 * self.high,
            "rounds": self.rounds,
        }


def summary(seconds: list[float]) -> Time:
    ordered = sorted(seconds)
    fifth = len(ordered) // 5
    return Time(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth], len(ordered))


class Clock:
    """Times calls on a kind of device, "cuda" or "cpu"."""

    def __init__(self, kind: str) -> None:
        self._on_device = kind == "cuda"
        self._flush = torch.empty(FLUSHED if self._on_device else 0, dtype=torch.int8, device=kind)

    def synchronize(self) -> None:
        if self._on_device:
            torch.cuda.synchronize()

    def median(self, call: Callable[[], Any], rounds: int = 20, budget: float = 2.0) -> Time:
        """Returns the time between two events around the call, with a cold cache; stops after `budget` seconds."""
        started = time.perf_counter()
        for _ in range(WARM_UPS if self._on_device else 0):
            call()
            self.synchronize()
            if time.perf_counter() - started > budget:
                break
        seconds: list[float] = []
        while len(seconds) < rounds and (not seconds or time.perf_counter() - started < budget):
            seconds.append(self.round(call))
        return summary(seconds)

    def round(self, call: Callable[[], Any]) -> float:
        """Returns the seconds of one call with a cold cache."""
        if not self._on_device:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def wall(self, call: Callable[[], Any]) -> float:
        """Returns the wall-clock seconds of one call, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start
