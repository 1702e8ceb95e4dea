"""Contests between kernels that compute the same result."""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfast_xai.errors import InputError
from pyfast_xai.tuning.isolation import prove
from pyfast_xai.tuning.verdicts import Site, Verdict, Verdicts, cache_folder, environment

logger = logging.getLogger("pyfast_xai")

# Rounds of a contest, and the default of the seconds after which no further round starts.
_ROUNDS, _SECONDS = 3, 0.3

# Candidates that are slower than the fastest by this factor drop out: after the first round, which may have been
# disturbed, and after later ones.
_FAR_BEHIND, _BEHIND = 2, 1.3


@dataclass(frozen=True)
class Candidate:
    """A kernel that takes part in a contest.

    Attributes:
        name: unique among the candidates.
        run: the kernel. It returns a tensor or a sequence of tensors and does not change its arguments.
        isolate: whether `run` is tried in a separate process before this process runs it for the first time on a
            machine, because a fault or an endless loop in it would end the process. It must then be a function at the
            top level of a module.
        depends_on_data: whether its errors depend on the numbers, so that agreement with the reference is checked in
            every call of `choose`, and not only in the contest.
        prepares: whether the first run prepares later ones, such as by compiling or packing weights, so that its time
            is not representative.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> candidate = tuning.Candidate("transposed", lambda a, b: (b.T @ a.T).T)
        >>> candidate.run(torch.ones(2, 3), torch.ones(3, 2)).shape
        torch.Size([2, 2])
    """

    name: str
    run: Callable[..., Any]
    isolate: bool = False
    depends_on_data: bool = True
    prepares: bool = True


Stopwatch = Callable[[], float]


def stopwatch(device: str, threads: int) -> Stopwatch:
    """Returns a function that returns the seconds since now, for work on a device by a number of threads.

    On a CPU these are seconds of processor time, not of wall-clock time, so that other processes do not count: the time
    of this thread, or that of all threads divided by their number, whichever is more.

    Example:
        >>> from pyfast_xai import tuning
        >>> seconds = tuning.stopwatch("cpu", threads=1)
        >>> seconds() >= 0
        True
    """
    if device != "cpu":
        start = time.perf_counter()
        return lambda: time.perf_counter() - start
    thread, process = time.thread_time(), time.process_time()
    return lambda: max(time.thread_time() - thread, (time.process_time() - process) / threads)


def enabled() -> bool:
    """Returns whether contests are held; `PYFAST_XAI_TUNING=off` disables them.

    Raises:
        InputError: the variable is neither "on" nor "off".

    Example:
        >>> from pyfast_xai import tuning
        >>> isinstance(tuning.enabled(), bool)
        True
    """
    value = os.environ.get("PYFAST_XAI_TUNING") or "on"
    if value not in ("on", "off"):
        raise InputError(f"PYFAST_XAI_TUNING must be on or off, got {value!r}")
    return value == "on"


class Contest:
    """Holds contests, one at a time, and stores their verdicts.

    Args:
        verdicts: the store of verdicts.
        clock: returns the current time in seconds; None for `stopwatch`.
        time_limit: seconds for a candidate in a separate process.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> contest = tuning.Contest(tuning.Verdicts(None, {}))
        >>> a, b = torch.rand(64, 64), torch.rand(64, 64)
        >>> kernels = [tuning.Candidate("plain", torch.matmul), tuning.Candidate("wrong", torch.add)]
        >>> contest.choose(tuning.Site.of("matmul", a, b), kernels, (a, b), tolerance=1e-5).name
        'plain'
    """

    def __init__(self, verdicts: Verdicts, clock: Callable[[], float] | None = None, time_limit: float = 120) -> None:
        self.verdicts = verdicts
        self._clock = clock
        self._time_limit = time_limit
        self._lock = threading.RLock()

    def choose(
        self,
        site: Site,
        candidates: Sequence[Candidate],
        arguments: Sequence[Any],
        *,
        tolerance: float,
        untuned: str | None = None,
        seconds: float = _SECONDS,
    ) -> Candidate:
        """Returns the fastest candidate of those that agree with the first; within noise the simplest.

        The first call for a site runs each candidate a few times. Later calls, also in other processes, read the stored
        times; they run the winner once beside the first candidate if its agreement depends on the data. A contest pays
        only for work that is repeated many times.

        Args:
            site: identifies the work that the verdict is about.
            candidates: the simplest first; it is the reference and always admitted.
            arguments: arguments of `run`.
            tolerance: the largest difference from the results of the first candidate, relative to their largest number.
            untuned: name of the candidate that is returned if contests are off; None for the first.
            seconds: time after which a contest starts no further round.
        """
        reference, by_name = candidates[0], {candidate.name: candidate for candidate in candidates}
        if not enabled():
            return by_name.get(untuned or reference.name, reference)
        if len(candidates) == 1:
            return reference
        with self._lock:
            reasons: dict[str, str | None] = {}  # why a candidate does not agree with the reference on these arguments
            expected: Any = None
            verdict = self.verdicts.get(site)
            if verdict is None or not _complete(verdict, candidates):
                verdict, expected, reasons = self._run_contest(site, candidates, arguments, tolerance, seconds)
                self.verdicts.put(site, verdict)
            runners = [candidate.name for candidate in candidates if candidate.name in verdict.seconds]
            while (winner := by_name[verdict.fastest(runners)]) is not reference:
                if winner.name not in reasons and winner.depends_on_data:
                    expected = reference.run(*arguments) if expected is None else expected
                    reasons[winner.name] = _disagreement(winner, arguments, expected, tolerance)
                reason = reasons.get(winner.name)
                if reason is None:
                    break
                logger.info("%s: %s is not used on %s: %s", site.op, winner.name, site.arguments, reason)
                runners.remove(winner.name)
            return winner

    def _run_contest(
        self, site: Site, candidates: Sequence[Candidate], arguments: Sequence[Any], tolerance: float, limit: float
    ) -> tuple[Verdict, Any, dict[str, str | None]]:
        """Returns the verdict, the results of the reference, and the reasons why candidates disagree with it."""
        reference = candidates[0]
        expected, seconds = self._timed(site, reference, arguments)
        first = {reference.name: seconds}
        running, failed = [reference], {}
        reasons: dict[str, str | None] = {}
        for candidate in candidates[1:]:
            failure = prove(candidate.run, arguments, self._time_limit) if candidate.isolate else None
            if failure is None:
                try:
                    results, first[candidate.name] = self._timed(site, candidate, arguments)
                    difference = reasons[candidate.name] = _difference(results, expected, tolerance)
                    failure = None if candidate.depends_on_data else difference
                except Exception as error:  # a kernel may raise anything on arguments that it does not support
                    failure = reasons[candidate.name] = _describe_error(error)
            if failure is None:
                running.append(candidate)
            else:
                failed[candidate.name] = failure
        runs: dict[str, list[float]] = {candidate.name: [] for candidate in running}
        elapsed = self._start(site)
        for count in range(1, _ROUNDS + 1):
            for candidate in running:
                counted = count == 1 and not candidate.prepares
                runs[candidate.name].append(
                    first[candidate.name] if counted else self._timed(site, candidate, arguments)[1]
                )
            fastest = min(min(runs[candidate.name]) for candidate in running)
            limit_seconds = fastest * (_FAR_BEHIND if count == 1 else _BEHIND)
            running = [candidate for candidate in running if min(runs[candidate.name]) <= limit_seconds]
            if len(running) == 1 or elapsed() >= limit:
                break
        return Verdict(runs, failed), expected, reasons

    def _start(self, site: Site) -> Stopwatch:
        if self._clock is None:
            return stopwatch(site.device, site.threads)
        clock, start = self._clock, self._clock()
        return lambda: clock() - start

    def _timed(self, site: Site, candidate: Candidate, arguments: Sequence[Any]) -> tuple[Any, float]:
        """Returns the results of a candidate and the seconds it takes."""
        _wait_for(arguments)
        elapsed = self._start(site)
        results = candidate.run(*arguments)
        _wait_for(arguments)
        return results, max(elapsed(), 1e-9)


def _complete(verdict: Verdict, candidates: Sequence[Candidate]) -> bool:
    judged = verdict.seconds.keys() | verdict.failed.keys()
    return candidates[0].name in verdict.seconds and all(candidate.name in judged for candidate in candidates)


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _disagreement(candidate: Candidate, arguments: Sequence[Any], expected: Any, tolerance: float) -> str | None:
    """Returns the reason why a candidate disagrees with the expected results; None if it agrees."""
    try:
        return _difference(candidate.run(*arguments), expected, tolerance)
    except Exception as error:  # a kernel may raise anything on arguments that it does not support
        return _describe_error(error)


def _difference(results: Any, expected: Any, tolerance: float) -> str | None:
    pairs = [(results, expected)] if isinstance(expected, Tensor) else list(zip(results, expected, strict=True))
    for result, reference in pairs:
        if result.shape != reference.shape or result.dtype != reference.dtype:
            return f"it returns {result.dtype} {list(result.shape)}, not {reference.dtype} {list(reference.shape)}"
        if not reference.is_floating_point():
            if not torch.equal(result, reference):
                return "it gives other numbers"
        elif reference.numel():
            finite = reference.isfinite()
            if not torch.equal(result.isfinite(), finite):
                return "it is not finite at the same places"
            difference = float(torch.where(finite, result - reference, 0).abs().max())
            largest = float(torch.where(finite, reference, 0).abs().max())
            if difference > tolerance * largest:
                return f"it differs by {difference:.1e} where the largest number is {largest:.1e}"
    return None


def _wait_for(arguments: Sequence[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device.type == "cuda":
            torch.cuda.synchronize(argument.device)
            return


@functools.cache
def _process_contest() -> Contest:
    return Contest(Verdicts(cache_folder(), environment()))


def known_verdicts() -> dict[Site, Verdict]:
    """Returns the verdicts of all contests on this machine, of this process and of others of this user.

    Example:
        >>> from pyfast_xai import tuning
        >>> isinstance(tuning.known_verdicts(), dict)
        True
    """
    return _process_contest().verdicts.all()


def known_verdict(site: Site) -> Verdict | None:
    """Returns the verdict on a site on this machine; None where there is none.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> tuning.known_verdict(tuning.Site.of("something else", torch.rand(2, 2))) is None
        True
    """
    return _process_contest().verdicts.get(site)


def store_verdict(site: Site, verdict: Verdict) -> None:
    """Stores a verdict for this process and, on disk, for others of this user on this machine.

    Example:
        >>> from pyfast_xai import tuning
        >>> site = tuning.Site("something", "of no size", "cpu", threads=1)
        >>> tuning.store_verdict(site, tuning.Verdict({"plain": [1.0]}))  # doctest: +SKIP
    """
    _process_contest().verdicts.put(site, verdict)


def choose(
    site: Site,
    candidates: Sequence[Candidate],
    arguments: Sequence[Any],
    *,
    tolerance: float,
    untuned: str | None = None,
    seconds: float = _SECONDS,
) -> Candidate:
    """Returns the winner of `Contest.choose`, with the verdicts of this machine and user.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> a, b = torch.rand(64, 64), torch.rand(64, 64)
        >>> kernels = [tuning.Candidate("plain", torch.matmul), tuning.Candidate("wrong", torch.add)]
        >>> tuning.choose(tuning.Site.of("matmul", a, b), kernels, (a, b), tolerance=1e-5).name
        'plain'
    """
    contest = _process_contest()
    return contest.choose(site, candidates, arguments, tolerance=tolerance, untuned=untuned, seconds=seconds)
