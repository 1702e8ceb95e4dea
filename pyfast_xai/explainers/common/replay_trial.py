"""Trials of replays: a model is replayed where that was seen to be faster than recording it.

The first calls of a signature are recorded. Then a replay is prepared as far as the budget allows, and once nothing is
left to prepare it is timed beside the recorded call; the faster serves from then on, within noise the recorded one, and
is looked at again rarely.
"""

import functools
import hashlib
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyfast_xai import tuning
from pyfast_xai.acceleration.replayed_model import MEMORY_LIMIT, ReplayedModel
from pyfast_xai.explainers.common.preparation_budget import FIRST_STEP, FIRST_STEP_OF_KNOWN, SHARE, PreparationBudget
from pyfast_xai.forks import ForkSafeLock
from pyfast_xai.tape import module_hooks
from pyfast_xai.tuning import Site, Stopwatch, Verdict

logger = logging.getLogger("pyfast_xai")

T = TypeVar("T")

_FIRST = 3  # the first call of a signature that may be replayed
_MOST_WARM = 16  # replayed calls, after which they are timed although they prepare something in every call
_ROUNDS = 3
_CLEAR = 0.8  # one round is enough where one takes at most so much of the other's time
_MOST_DISTURBED = 24  # calls whose time could not be measured, after which calls are recorded
# Calls until the next trial, doubled each time. A replay that lost is rebuilt for it, which
# costs some ten calls; the other way it is two.
_RETRY_AFTER = {"replayed": 256, "recorded": 2048}
_MOST_SIGNATURES = 64


class _State(Enum):
    RECORDED = 1
    WARMING = 2
    TIMED = 3
    REPLAYED = 4


@dataclass
class _Signature:
    """Calls that are alike.

    Attributes:
        budget: decides which calls prepare a replay.
        calls: how many there were.
        next_trial: the call at which the next trial begins.
        state: what the next call is.
        preparing: the process in which a call prepares the replay, None where none does; other calls are recorded.
        warm: replayed calls of this trial.
        disturbed: calls of this trial whose time did not count.
        compared: whether the result of a replay was compared with that of the recording.
        seconds: seconds of the recorded and the replayed calls of this trial.
        verdicts: trials that ended.
        verdict: verdict of the last one; None where it ended without times.
    """

    budget: PreparationBudget
    calls: int = 0
    next_trial: float = _FIRST
    state: _State = _State.RECORDED
    preparing: int | None = None
    warm: int = 0
    disturbed: int = 0
    compared: bool = False
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"recorded": [], "replayed": []})
    verdicts: int = 0
    verdict: Verdict | None = None

    def begin(self, state: _State) -> None:
        """Begins a trial."""
        self.state, self.warm, self.disturbed = state, 0, 0
        self.seconds = {"recorded": [], "replayed": []}

    @property
    def due(self) -> bool:
        """Returns whether the trial needs a replayed call next."""
        if self.state is _State.TIMED:
            return len(self.seconds["replayed"]) < len(self.seconds["recorded"])
        return self.state is _State.WARMING


class ReplayTrial:
    """Calls functions that record a model, and has the model replayed in them where that is faster.

    A replay serves under the conditions of `ReplayedModel`: what cannot be proven to be as it was is recorded. Beyond
    that, a model with forward hooks is recorded, so that they run; so is one after it has changed, until there were as
    many calls as before a first trial, and twice as many after every further change. Under
    `torch.use_deterministic_algorithms(True)` every call is recorded: its numbers never change within a process.

    Args:
        model: the model that is recorded.
        fold: fold batch norm into convolutions.
        memory_limit: bytes that the replay of this model may take. The trials of a process together keep as many at
            most, and let go what was used longest ago.
        job: names the work, for verdicts on disk; None to keep none.
        stopwatch: takes the times, as `tuning.stopwatch` does.
        share: what preparing replays may cost, as a share of recorded calls (`PreparationBudget`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fold: bool = True,
        memory_limit: int = MEMORY_LIMIT,
        job: str | None = None,
        stopwatch: Callable[[str, int], Stopwatch] = tuning.stopwatch,
        share: float = SHARE,
    ) -> None:
        self.model = module_hooks.unwrap(model)
        self._settings: dict[str, Any] = {"fold": fold, "memory_limit": memory_limit, "job": job}
        self._stopwatch = stopwatch
        self._share = share
        self._replayed = ReplayedModel(self.model, fold=fold, memory_limit=memory_limit, tentative=True)
        self._lock = ForkSafeLock()
        self._thread = threading.local()
        self._signatures: OrderedDict[Hashable, _Signature] = OrderedDict()
        self._first = _FIRST
        self._keeps = False  # whether there may be a replay that takes memory

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to another model, whose calls are counted from zero.
        settings = self._settings | {"stopwatch": self._stopwatch, "share": self._share}
        return functools.partial(ReplayTrial, **settings), (self.model,)

    @property
    def current(self) -> ReplayedModel | None:
        """Returns the model to record with in a call of this thread that is replayed; None in one that is recorded."""
        return getattr(self._thread, "replayed", None)

    @property
    def nbytes(self) -> int:
        """Returns the memory that the replay takes."""
        return self._replayed.nbytes if self._keeps else 0

    def verdicts(self) -> dict[Hashable, tuple[str, Verdict | None]]:
        """Returns whether calls are "recorded" or "replayed", by their signature; those of open trials are missing.

        The second of each pair is the verdict that says so, None where none was needed: the model cannot be replayed.
        """
        names = {_State.RECORDED: "recorded", _State.REPLAYED: "replayed"}
        with self._lock:
            ended = {
                key: signature
                for key, signature in self._signatures.items()
                if signature.verdicts and signature.state in names
            }
            return {key: (names[signature.state], signature.verdict) for key, signature in ended.items()}

    def forget(self) -> None:
        """Lets the replay go; calls are recorded until the next trial."""
        with self._lock:
            if self._keeps:
                self._keeps = False
                self._replayed.forget()
            for signature in self._signatures.values():
                if signature.state is not _State.RECORDED:
                    signature.state, signature.next_trial = _State.RECORDED, signature.calls + _RETRY_AFTER["recorded"]

    def __call__(
        self,
        run: Callable[[], T],
        *,
        signature: Hashable | None,
        described: str = "",
        device: torch.device | None = None,
        agree: Callable[[T, T], bool] | None = None,
    ) -> T:
        """Returns `run()`, within which `current` is the model to record with.

        Args:
            run: does the job. It may be called twice.
            signature: key of the calls with the same costs and replays (`acceleration.cache_key`); None for
                a call that is recorded.
            described: the same in words, for the verdicts on disk.
            device: that the work is done on, None for the CPU.
            agree: returns whether a replay and the recording gave the same, up to rounding. It decides once a
                signature, before the result of a replay is returned; None where a call must not be made twice.
        """
        if signature is None or self.current is not None or torch.are_deterministic_algorithms_enabled():
            return run()
        if self._replayed.has_forward_hooks:
            return run()
        with _calls:
            return self._call(run, signature, described, device, agree)

    def _call(
        self,
        run: Callable[[], T],
        signature: Hashable,
        described: str,
        device: torch.device | None,
        agree: Callable[[T, T], bool] | None,
    ) -> T:
        place = device or torch.device("cpu")
        site = Site(*self._words(described), *_hardware(place))
        with self._lock:
            entry = self._next((signature, site.threads), site)
            state = entry.state
            prepares = self._may_prepare(entry)
        if state is _State.REPLAYED:
            try:
                return self._replay(entry, run)[0]
            finally:
                _make_room_for(self)
        if not prepares:
            return self._record(entry, run, site, place)
        try:
            return self._prepare(entry, run, site, place, agree)
        finally:
            entry.preparing = None
            _make_room_for(self)

    def _may_prepare(self, entry: _Signature) -> bool:
        """Returns whether this call prepares a replay, or takes the time of one; others are recorded meanwhile."""
        if entry.state is _State.REPLAYED:
            entry.budget.count_served()
        elif entry.due and entry.preparing != os.getpid() and entry.budget.allows():
            entry.preparing = os.getpid()
            return True
        return False

    def _next(self, key: Hashable, site: Site) -> _Signature:
        """Returns the signature of a call, which is counted."""
        entry = self._signatures.get(key)
        if entry is None:
            if len(self._signatures) >= _MOST_SIGNATURES:
                self._signatures.popitem(last=False)
            verdict = tuning.known_verdict(site) if self._remembers else None
            budget = PreparationBudget(self._share, FIRST_STEP if verdict is None else FIRST_STEP_OF_KNOWN)
            entry = self._signatures[key] = _Signature(budget, next_trial=self._first)
            if verdict is not None and verdict.fastest() == "recorded":
                entry.verdicts, entry.next_trial, entry.verdict = 1, _RETRY_AFTER["recorded"], verdict
        self._signatures.move_to_end(key)
        entry.calls += 1
        if entry.calls >= entry.next_trial and entry.state in (_State.RECORDED, _State.REPLAYED):
            if self._replayed.outdated:
                self._replayed.forget()
            # A replay that served is prepared.
            entry.begin(_State.WARMING if entry.state is _State.RECORDED else _State.TIMED)
            self._keeps = True
        return entry

    def _decide(self, entry: _Signature, winner: str, calls: float | None = None) -> None:
        """Has the winner serve, for so many calls."""
        entry.verdicts += 1
        entry.state = _State.REPLAYED if winner == "replayed" else _State.RECORDED
        entry.next_trial = entry.calls + (
            _RETRY_AFTER[winner] * 2 ** min(entry.verdicts - 1, 10) if calls is None else calls
        )
        if all(other.state is _State.RECORDED for other in self._signatures.values()):
            self._keeps = False
            self._replayed.forget()

    def _refuse(self, entry: _Signature) -> None:
        """Has calls recorded for good: they cannot be replayed."""
        entry.verdict = None
        self._decide(entry, "recorded", float("inf"))

    def _replay(self, entry: _Signature, run: Callable[[], T]) -> tuple[T, bool]:
        """Returns the result of a replayed call, and whether nothing had to be prepared in it."""
        before, replays = self._replayed.preparations, self._replayed.replays
        random_state = torch.get_rng_state()
        self._thread.replayed = self._replayed
        try:
            result = run()
        except Exception as error:
            self._thread.replayed = None
            torch.set_rng_state(random_state)
            result = run()  # raises what the model, or a wrong argument, raises
            logger.info("a replay failed (%s): such calls are recorded", error)
            with self._lock:
                self._refuse(entry)
            return result, False
        finally:
            self._thread.replayed = None
        settled = self._replayed.preparations == before
        with self._lock:
            if self._replayed.outdated or self._replayed.disabled:
                self._stop()
            elif entry.state is _State.WARMING:
                entry.warm += 1
                if settled and self._replayed.replays == replays:
                    self._refuse(entry)
                elif settled or entry.warm >= _MOST_WARM:
                    entry.state = _State.TIMED
        return result, settled

    def _stop(self) -> None:
        """Records the model: for good, or after a change for twice as many calls as before."""
        self._first *= 2
        self._keeps = False
        for other in self._signatures.values():
            other.verdicts, other.verdict = other.verdicts + 1, None
            other.state, other.next_trial = _State.RECORDED, float("inf")
        if self._replayed.outdated:
            self._signatures.clear()

    def _record(self, entry: _Signature, run: Callable[[], T], site: Site, device: torch.device) -> T:
        """Returns the result of a recorded call, whose time counts."""
        timed = entry.state is _State.TIMED
        result, seconds, alone = self._timed(run, device, waits=timed)
        with self._lock:
            entry.budget.count_recorded(seconds)
            if timed and not entry.due:
                self._keep(entry, site, recorded=seconds if alone else None)
        return result

    def _prepare(
        self,
        entry: _Signature,
        run: Callable[[], T],
        site: Site,
        device: torch.device,
        agree: Callable[[T, T], bool] | None,
    ) -> T:
        """Returns the result of a call that is replayed as a trial; that of the recording if they are compared."""
        timed, replays, random_state = entry.state is _State.TIMED, self._replayed.replays, torch.get_rng_state()
        (result, settled), seconds, alone = self._timed(lambda: self._replay(entry, run), device)
        counted = seconds if settled and alone else None
        if agree is not None and not entry.compared and device.type == "cpu" and self._replayed.replays > replays:
            entry.compared = True
            replayed = result
            torch.set_rng_state(random_state)
            result, more, _ = self._timed(run, device)
            seconds += more
            if not agree(replayed, result):
                logger.info("a replay gives other results: such calls are recorded")
                with self._lock:
                    self._refuse(entry)
        with self._lock:
            entry.budget.count_preparing(seconds)
            if timed:
                self._keep(entry, site, replayed=counted)
        return result

    def _timed(self, run: Callable[[], T], device: torch.device, *, waits: bool = True) -> tuple[T, float, bool]:
        """Returns the result of a function, its seconds, and whether no other call ran at the same time.

        Args:
            run: the function.
            device: that it uses.
            waits: wait for a device, so that its time counts.
        """
        if waits and device.type == "cuda":
            torch.cuda.synchronize(device)
        before = _calls.alone()
        past = self._stopwatch(device.type, torch.get_num_threads())
        result = run()
        if waits and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = max(past(), 1e-9)
        return result, seconds, before is not None and before == _calls.alone()

    def _keep(self, entry: _Signature, site: Site, **seconds: float | None) -> None:
        """Keeps a time, and gives the verdict if there are enough."""
        if entry.state is not _State.TIMED:
            return
        if None in seconds.values():
            entry.disturbed += 1
            if entry.disturbed >= _MOST_DISTURBED:
                self._decide(entry, "recorded")
            return
        for name, value in seconds.items():
            entry.seconds[name].append(value or 0.0)
        recorded, replayed = entry.seconds["recorded"], entry.seconds["replayed"]
        if not recorded or len(recorded) != len(replayed):
            return
        shorter, longer = sorted((min(recorded), min(replayed)))
        if len(recorded) < _ROUNDS and shorter > _CLEAR * longer:
            return
        entry.verdict = Verdict(entry.seconds)
        self._decide(entry, entry.verdict.fastest())
        if self._remembers:
            tuning.store_verdict(site, entry.verdict)

    @property
    def _remembers(self) -> bool:
        return self._settings["job"] is not None and tuning.enabled()

    def _words(self, described: str) -> tuple[str, str]:
        return self._settings["job"] or "", f"{self._model_in_words}, {described}"

    @functools.cached_property
    def _model_in_words(self) -> str:
        parts = [f"{name} {type(module).__name__}" for name, module in self.model.named_modules()]
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        parts += [f"{name} {'' if is_lazy(tensor) else list(tensor.shape)}" for name, tensor in tensors]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
        return f"{type(self.model).__name__} {digest}"


_SAME = 0.1  # of the norm; rounding turns rectifiers and maxima here and there, a wrong kernel does more


def nearly_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns whether results are the same but for rounding and the decisions that it may change."""
    if len(actual) != len(expected):
        return False
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.is_floating_point():
            finite = torch.isfinite(other)
            size = torch.where(finite, other, 0).norm()
            if not (torch.where(finite, one - other, 0).norm() <= _SAME * size):
                return False
    return True


def _hardware(device: torch.device) -> tuple[str, int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, torch.get_num_threads()


class _Calls:
    """The calls of all trials, so that times are taken of those that ran alone."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._running = self._started = 0

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1
            self._started += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._running -= 1

    def alone(self) -> int | None:
        """Returns a number that stays for as long as one call runs; None where there are several."""
        with self._lock:
            return self._started if self._running == 1 else None


_calls = _Calls()


# The memory of all trials together.

_room = ForkSafeLock()
_keeping: "OrderedDict[int, weakref.ref[ReplayTrial]]" = OrderedDict()


def _make_room_for(trial: ReplayTrial) -> None:
    """Lets go replays of other trials, those used longest ago first, until all take no more than the limit of one."""
    with _room:
        _keeping[id(trial)] = weakref.ref(trial)
        _keeping.move_to_end(id(trial))
        trials = {place: reference() for place, reference in _keeping.items()}
        for place in [place for place, other in trials.items() if other is None or not other.nbytes]:
            del _keeping[place]
        others = [other for other in trials.values() if other is not None]
    total = sum(other.nbytes for other in others)
    for other in others[:-1]:
        if total <= trial._settings["memory_limit"]:
            break
        total -= other.nbytes
        other.forget()
