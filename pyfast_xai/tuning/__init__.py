"""Contests that choose the fastest of several kernels for the same job on this machine.

kernel = tuning.choose(Site.of("conv2d", images, weight), candidates, (images, weight), tolerance=1e-5)

The fastest kernel depends on the user's processor or device. Kernels that agree with the reference are timed on the
actual data, and the verdict is stored for the process and on disk.
"""

from pyfast_xai.tuning.contest import (
    Candidate,
    Contest,
    Stopwatch,
    choose,
    enabled,
    known_verdict,
    known_verdicts,
    stopwatch,
    store_verdict,
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
    "known_verdict",
    "known_verdicts",
    "prove",
    "stopwatch",
    "store_verdict",
]
