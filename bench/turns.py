"""Calls that take turns in one process, so that what disturbs the machine disturbs all of them."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spread:
    """Of some numbers the median, and what a fifth of them is below and above."""

    median: float
    low: float
    high: float


def spread(numbers: Sequence[float]) -> Spread:
    ordered = sorted(numbers)
    fifth = len(ordered) // 5
    return Spread(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth])


def quotients(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of what was measured in the same rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def rest() -> None:
    """Wait until threads that keep spinning after a call, such as NumPy's, have left the cores to others."""
    time.sleep(0.2)


def take_turns(
    benchmark: Any,
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    settled: int = 2,
    before: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Time calls, all of them in each round.

    Args:
        benchmark: fixture of pytest-benchmark, which reports the last call.
        calls: by name.
        rounds: that count.
        settled: rounds that do not: first calls pack weights, fill caches and compile.
        before: done before each call, outside its time.

    Returns:
        Seconds of each call, a number a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    *others, last = calls

    def timed(name: str) -> None:
        start = time.perf_counter()
        calls[name]()
        seconds[name].append(time.perf_counter() - start)

    def turn() -> None:
        for name in others:
            if before is not None:
                before()
            timed(name)
        if before is not None:
            before()

    for _ in range(settled):
        turn()
        timed(last)
    for item in seconds.values():
        item.clear()
    benchmark.pedantic(functools.partial(timed, last), setup=turn, rounds=rounds, warmup_rounds=0)
    return seconds


def beside_forward(
    benchmark: Any,
    model: nn.Module,
    images: Tensor,
    explain: Callable[[Tensor], Any],
    rounds: int,
    shares: int = 1,
    before: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """What an explanation costs, as a multiple of the model's own forward on the same images.

    Args:
        benchmark: fixture of pytest-benchmark.
        model: whose forward is the unit.
        images: for both.
        explain: called with the images.
        rounds: that count.
        shares: how many equal parts the explanation is made of, one of which is the figure.
        before: done before each call, outside its time.

    Returns:
        The columns of a row.
    """

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    seconds = take_turns(benchmark, {"forward": forward, "explain": lambda: explain(images)}, rounds, before=before)
    parts = [item / shares for item in seconds["explain"]]
    cost = quotients(parts, seconds["forward"])
    return {
        "forward_ms": 1e3 * statistics.median(seconds["forward"]),
        "explain_ms": 1e3 * statistics.median(parts),
        "forwards": cost.median,
        "low": cost.low,
        "high": cost.high,
        "rounds": rounds,
    }
