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

# A candidate serves in the place of a simpler one if it takes so much of that one's time.
_FASTER = 0.95


@dataclass(frozen=True)
class Site:
    """A place where several kernels could serve.

    Attributes:
        op: the job they do.
        arguments: what it is done to: shapes, strides and dtypes of tensors, values of everything else.
        device: "cpu", or the name of the GPU.
        threads: of the CPU.

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
        """Returns the site of an op on such arguments, on the device of the first tensor among them."""
        device = next((value.device for value in arguments if isinstance(value, Tensor)), torch.device("cpu"))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(op, ", ".join(map(_described, arguments)), name, torch.get_num_threads())


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{list(value.stride())}"
    return repr(value)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a contest.

    Attributes:
        seconds: by the name of a candidate, its runs in the order of the rounds. Those of one round were timed next to
            each other; who was far behind has fewer.
        failed: by the name of a candidate, why it did not run.
        date: when it was, in UTC.

    Example:
        >>> from pyfast_xai import tuning
        >>> tuning.Verdict({"plain": [1.0, 1.1], "fast": [0.5, 0.6]}).fastest()
        'fast'
    """

    seconds: Mapping[str, list[float]]
    failed: Mapping[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))

    def fastest(self, names: Sequence[str] | None = None) -> str:
        """Returns which of some candidates serves: the fastest; within noise the one that is listed first.

        Args:
            names: of candidates that ran, the simplest first; None for all of them.
        """
        best, *others = list(self.seconds) if names is None else names
        for name in others:
            if _faster(self.seconds[name], self.seconds[best]):
                best = name
        return best

    @classmethod
    def read(cls, value: Any) -> "Verdict":
        """Returns the verdict that a file holds.

        Raises:
            ValueError, TypeError, KeyError: it holds something else.
        """
        seconds = {str(name): [float(run) for run in runs] for name, runs in value["seconds"].items()}
        if not seconds or not all(
            runs and all(math.isfinite(run) and run > 0 for run in runs) for runs in seconds.values()
        ):
            raise ValueError("the times of a verdict must be positive numbers")
        return cls(seconds, {str(name): str(why) for name, why in value["failed"].items()}, str(value["date"]))


def _faster(runs: Sequence[float], than: Sequence[float]) -> bool:
    """Returns whether runs are faster beyond noise: at their best, and in most rounds."""
    rounds = list(zip(runs, than, strict=False))
    won = sum(run < other for run, other in rounds)
    return min(runs) < _FASTER * min(than) and 2 * won > len(rounds)


@functools.cache
def environment() -> dict[str, str]:
    """Returns what verdicts depend on, beside their site: processor, drivers and versions of the libraries.

    Example:
        >>> from pyfast_xai import tuning
        >>> "torch" in tuning.environment()
        True
    """
    from pyfast_xai import __version__

    known = {
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
            known[package] = metadata.version(package)
    if torch.cuda.is_available():
        known["driver"] = str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())
        known["cuda"] = str(torch.version.cuda or torch.version.hip)
    return known


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def cache_folder() -> Path | None:
    """Returns the folder of this library under the user's cache folder; None where there is no home."""
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

    Each file is written under another name first and says of what environment and site it is, so that several
    processes can read and write at the same time. A file that is damaged or of another site is as good as none, and a
    folder that cannot be written leaves the verdicts in memory.

    Args:
        folder: None for memory alone.
        environment: what verdicts depend on, beside their site.

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
        self._known: dict[Site, Verdict] = {}
        self._lock = threading.Lock()

    def get(self, site: Site) -> Verdict | None:
        """Returns the verdict on a site; None where there is none yet."""
        with self._lock:
            if site not in self._known and self._folder is not None:
                entry = self._read(self._folder / f"{_digest(asdict(site))}.json")
                if entry is not None and entry[0] == site:
                    self._known[site] = entry[1]
            return self._known.get(site)

    def put(self, site: Site, verdict: Verdict) -> None:
        """Keep a verdict."""
        with self._lock:
            self._known[site] = verdict
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
            return verdicts | self._known

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
