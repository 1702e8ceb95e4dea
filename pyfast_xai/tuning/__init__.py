"""Contests that choose the fastest of several kernels for the same job on this machine.

kernel = tuning.choose(Site.of("conv2d", images, weight), candidates, (images, weight), tolerance=1e-5)

Nobody knows beforehand which kernel is the fastest on a user's processor or device. Those that give what the reference
gives are timed on the data at hand, and the verdict is kept for the process and on disk.
"""

from pyfast_xai.tuning.contest import (
    Candidate,
    Contest,
    Stopwatch,
    choose,
    enabled,
    keep_verdict,
    known_verdict,
    known_verdicts,
    stopwatch,
)
from pyfast_xai.tuning.isolation import prove
from pyfast_xai.tuning.verdicts import Site, Verdict, Verdicts, environment

__all__ = [
    "Candidate",
    "Contest",
    "Site",
    "Stopwatch",
    "Verdict",
    "Verdicts",
    "choose",
    "enabled",
    "environment",
    "keep_verdict",
    "known_verdict",
    "known_verdicts",
    "prove",
    "stopwatch",
]
