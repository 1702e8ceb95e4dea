"""Verdicts of contests, in memory and on disk."""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A candidate replaces a simpler one if it takes less than this share of its time.
_FASTER = 0.95


@dataclass(frozen=True)
class Site:
    """The key of a verdict: an op with its arguments, on a device.

    Attributes:
        op: name of the operation.
        arguments: shapes, strides and dtypes of tensors, and values of all other arguments.
        device: "cpu", or the name of the GPU.
        threads: number of threads of the CPU.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> site = tuning.Site.of("matmul", torch.rand(2, 3), torch.rand(3, 2))
        >>> site.op, site.device
        ('matmul', 'cpu')
    """

    op: str
    arguments: str
    device: str
    threads: int

    @classmethod
    def of(cls, op: str, *arguments: Any) -> "Site":
        """Returns the site of an op with these arguments, on the device of the first tensor among them."""
        device = next((value.device for value in arguments if isinstance(value, Tensor)), torch.device("cpu"))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(op, ", ".join(map(_describe, arguments)), name, torch.get_num_threads())


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{list(value.stride())}"
    return repr(value)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a contest.

    Attributes:
        seconds: by the name of a candidate, its runs in the order of the rounds. The runs of one round were timed next
            to each other; a candidate that dropped out has fewer.
        failed: by the name of a candidate, the reason why it was not admitted.
        date: time of the contest, in UTC.

    Example:
        >>> from pyfast_xai import tuning
        >>> tuning.Verdict({"plain": [1.0, 1.1], "fast": [0.5, 0.6]}).fastest()
        'fast'
    """

    seconds: Mapping[str, list[float]]
    failed: Mapping[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))

    def fastest(self, names: Sequence[str] | None = None) -> str:
        """Returns the name of the fastest candidate; within noise the one that is listed first.

        Args:
            names: candidates that ran, the simplest first; None for all of them.
        """
        best, *remaining = list(self.seconds) if names is None else names
        for name in remaining:
            if _faster(self.seconds[name], self.seconds[best]):
                best = name
        return best

    @classmethod
    def read(cls, value: Any) -> "Verdict":
        """Returns the verdict from the content of a file.

        Raises:
            ValueError, TypeError, KeyError: the content is no verdict.
        """
        seconds = {str(name): [float(run) for run in runs] for name, runs in value["seconds"].items()}
        if not seconds or not all(
            runs and all(math.isfinite(run) and run > 0 for run in runs) for runs in seconds.values()
        ):
            raise ValueError("the times of a verdict must be positive numbers")
        return cls(seconds, {str(name): str(reason) for name, reason in value["failed"].items()}, str(value["date"]))


def _faster(runs: Sequence[float], baseline_runs: Sequence[float]) -> bool:
    """Returns whether runs are faster beyond noise: at their best, and in most rounds."""
    rounds = list(zip(runs, baseline_runs, strict=False))
    wins = sum(run < baseline for run, baseline in rounds)
    return min(runs) < _FASTER * min(baseline_runs) and 2 * wins > len(rounds)


@functools.cache
def environment() -> dict[str, str]:
    """Returns the facts that verdicts depend on besides their site: processor, drivers and library versions.

    Example:
        >>> from pyfast_xai import tuning
        >>> "torch" in tuning.environment()
        True
    """
    from pyfast_xai import __version__

    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyfast_xai": __version__,
        **{name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ},
    }
    for package in ("triton", "numba"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    if torch.cuda.is_available():
        facts["driver"] = str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def cache_folder() -> Path | None:
    """Returns the folder of this library under the user's cache folder; None if there is no home folder."""
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "pyfast_xai"


class Verdicts:
    """Verdicts by site: in memory, and a file for each in a folder of this environment.

    Each file is written under a temporary name first and contains its environment and site, so that several processes
    can read and write at the same time. A file that is damaged or belongs to another site is ignored, and if the folder
    cannot be written the verdicts stay in memory.

    Args:
        folder: None keeps verdicts in memory only.
        environment: the facts that verdicts depend on besides their site.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> verdicts, site = tuning.Verdicts(None, {}), tuning.Site.of("matmul", torch.rand(2, 2))
        >>> verdicts.put(site, tuning.Verdict({"plain": [1.0]}))
        >>> list(verdicts.get(site).seconds)
        ['plain']
    """

    def __init__(self, folder: Path | None, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._folder = None if folder is None else folder / "tuning" / _digest(self._environment)
        self._memory: dict[Site, Verdict] = {}
        self._lock = threading.Lock()

    def get(self, site: Site) -> Verdict | None:
        """Returns the verdict on a site; None if there is none."""
        with self._lock:
            if site not in self._memory and self._folder is not None:
                entry = self._read(self._folder / f"{_digest(asdict(site))}.json")
                if entry is not None and entry[0] == site:
                    self._memory[site] = entry[1]
            return self._memory.get(site)

    def put(self, site: Site, verdict: Verdict) -> None:
        """Stores a verdict."""
        with self._lock:
            self._memory[site] = verdict
        if self._folder is None:
            return
        content = {"environment": self._environment, "site": asdict(site), "verdict": asdict(verdict)}
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(content, file)
                os.replace(name, self._folder / f"{_digest(asdict(site))}.json")
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise

    def all(self) -> dict[Site, Verdict]:
        """Returns every verdict of this environment, of this process and on disk."""
        files: list[Path] = []
        if self._folder is not None:
            with contextlib.suppress(OSError):
                files = sorted(self._folder.glob("*.json"))
        verdicts = dict(entry for entry in map(self._read, files) if entry is not None)
        with self._lock:
            return verdicts | self._memory

    def _read(self, path: Path) -> tuple[Site, Verdict] | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["environment"] != self._environment:
                return None
            return Site(**content["site"]), Verdict.read(content["verdict"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
