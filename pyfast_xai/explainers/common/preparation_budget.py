"""The budget of preparing replays: a share of the time that recorded calls of the same kind have taken."""

import math

SHARE = 0.25

# Expected cost of the first preparing call beyond a recorded one, in recorded calls.
FIRST_STEP = 1.5
FIRST_STEP_OF_KNOWN = 0.5  # verdicts of an earlier process spare the contests


class PreparationBudget:
    """Decides when a call may prepare a replay, so that the preparation never costs much more than it may save.

    Whether a replay pays depends on how many calls will come, which nobody knows: the problem of ski rental. Every call
    that is recorded or served earns a share of the time of a recorded one, and a preparing call spends what it takes
    beyond that time. It may begin once the earnings cover what the last one took. So any number of calls costs at most
    `1 + share` times what recording them all does, up to the amount by which one preparing call exceeds the last.

    Args:
        share: what a call earns, in recorded calls.
        first_step: expected cost of the first preparing call beyond a recorded one, in recorded calls.

    Attributes:
        spent: seconds that preparing calls took beyond recorded ones.
    """

    def __init__(self, share: float = SHARE, first_step: float = FIRST_STEP) -> None:
        self._share, self._first_step = share, first_step
        self._calls = 0
        self._recorded = math.inf  # seconds of a recorded call, the least of them
        self._last = 0.0
        self.spent = 0.0

    @property
    def earned(self) -> float:
        """Returns the seconds that preparing calls may take together."""
        return self._share * self._calls * self._recorded if self._calls else 0.0

    def allows(self) -> bool:
        """Returns whether the next call may prepare something."""
        return self.spent + max(self._last, self._first_step * self._recorded) <= self.earned

    def count_recorded(self, seconds: float) -> None:
        """Counts a recorded call."""
        self._calls += 1
        self._recorded = min(self._recorded, seconds)

    def count_served(self) -> None:
        """Counts a call that was replayed because the replay is faster."""
        self._calls += 1

    def count_preparing(self, seconds: float) -> None:
        """Counts a call that prepared something."""
        self._calls += 1
        self._last = seconds - self._recorded
        self.spent += self._last
