"""Medians of many rounds, on the device's own clock for a kernel and on the wall for an explanation."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSHED = 1 << 28  # bytes written between rounds, so that none finds its inputs in the cache of the one before
AHEAD = 1_000_000  # cycles the device waits before a round, so that the host has put the whole round in its queue
SETTLED = 3  # rounds that are not counted: they compile, load and choose


@dataclass
class Time:
    """Seconds of a round.

    Attributes:
        median: of the rounds.
        low: a fifth of the rounds took less.
        high: a fifth of the rounds took more.
        rounds: that were counted.
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
        self._real = kind == "cuda"
        self._flush = torch.empty(FLUSHED if self._real else 0, dtype=torch.int8, device=kind)

    def synchronize(self) -> None:
        if self._real:
            torch.cuda.synchronize()

    def median(self, call: Callable[[], Any], rounds: int = 20, budget: float = 2.0) -> Time:
        """Returns the time between two events around the call, on a cold cache; stops after `budget` seconds."""
        began = time.perf_counter()
        for _ in range(SETTLED if self._real else 0):
            call()
            self.synchronize()
            if time.perf_counter() - began > budget:
                break
        seconds: list[float] = []
        while len(seconds) < rounds and (not seconds or time.perf_counter() - began < budget):
            seconds.append(self.round(call))
        return summary(seconds)

    def round(self, call: Callable[[], Any]) -> float:
        """Returns the seconds of one call on a cold cache."""
        if not self._real:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        self._flush.zero_()
        torch.cuda._sleep(AHEAD)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall(self, call: Callable[[], Any]) -> float:
        """Returns the seconds on the wall of one call, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start
