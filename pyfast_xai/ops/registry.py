"""Which backend serves which op on which device, and why.

Schemas and fakes are declared in Python and the binaries hold implementations only, so an installation without a
binary has the same ops. An automatic choice may fall back and says so once in the log; a backend the user named
works or raises.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyfast_xai.errors import BackendError, InputError
from pyfast_xai.ops import library

logger = logging.getLogger("pyfast_xai")

LIBRARY = torch.library.Library("pyfast_xai", "DEF")  # noqa: TOR901 the ops live as long as the process
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# The backends of each device type, best first. The first is the compiled library.
PREFERENCE = {"cpu": ("cpp", "numba", "reference"), "cuda": ("cuda", "triton", "reference")}
# Kernels that no device has run are not chosen by themselves; see docs/gpu.md.
UNPROVEN = ("triton",)
BACKENDS = ("auto", "reference", "numba", "cpp", "triton", "cuda")
# The CUDA library needs symbols that only a CUDA build of torch has.
BINARIES = {"cpp": library.load("_C"), "cuda": torch.backends.cuda.is_built() and library.load("_C_cuda")}


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: contextvars.ContextVar[str] = contextvars.ContextVar(
    "pyfast_xai_backend", default=_known(os.environ.get("PYFAST_XAI_BACKEND", "auto"))
)


class backend(contextlib.ContextDecorator):  # noqa: N801 reads as a verb: `with pyfast_xai.backend("numba"):`
    """Serve every op from one backend inside a `with` block or a decorated function.

    Args:
        name: "reference", "numba", "cpp", "triton", "cuda", or "auto" to choose per op and device.

    Raises:
        InputError: an unknown name.
        BackendError: raised by an op that this backend cannot serve here.
    """

    def __init__(self, name: str) -> None:
        self.name = _known(name)
        self._tokens: list[contextvars.Token[str]] = []

    def __enter__(self) -> "backend":
        self._tokens.append(_forced.set(self.name))
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.reset(self._tokens.pop())


def asked_for() -> str:
    """The backend that ops are served from here, "auto" where each has its own."""
    return _forced.get()


class Op:
    """An op of this library: its schema, its fake, and the backends that implement it.

    Args:
        schema: the schema without namespace, e.g. `"points_union(Tensor points, int size) -> Tensor"`.
        fake: shapes and dtypes of the results, for tracing.
    """

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name = schema[: schema.index("(")]
        LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.register_fake(f"pyfast_xai::{self.name}", fake, lib=LIBRARY)
        self._compiled = {
            device: torch._C._dispatch_has_kernel_for_dispatch_key(f"pyfast_xai::{self.name}", key)
            for device, key in DISPATCH_KEYS.items()
        }
        for device, compiled in self._compiled.items():
            if not compiled:
                LIBRARY.impl(self.name, functools.partial(self._fall_back, device), DISPATCH_KEYS[device])
        self.overload = getattr(torch.ops.pyfast_xai, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        name = _forced.get()
        if name == "auto":
            return self.overload(*args)
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        missing = self.missing(name, device)
        if missing is not None:
            raise BackendError(f"backend {name!r} cannot serve {self.name} on {device}: {missing}")
        return self.overload(*args) if name in BINARIES else self._python_kernel(name)(*args)

    def missing(self, name: str, device: str) -> str | None:
        """Why backend `name` cannot serve this op on `device`; None where it can."""
        if name == "reference":
            return None
        if name not in PREFERENCE.get(device, ()):
            return f"it has no kernels for {device}"
        if name in BINARIES:
            if not BINARIES[name]:
                return "the compiled library is not part of this installation"
            return None if self._compiled[device] else "the compiled library has no such kernel"
        if importlib.util.find_spec(name) is None:
            return f"the package {name} is not installed"
        if importlib.util.find_spec(self._module(name)) is None:
            return "no kernel was written for it"
        return None

    def served(self, device: str) -> tuple[str, str]:
        """The backend that serves this op on `device` by itself, and why."""
        passed: list[str] = []
        for name in PREFERENCE.get(device, ("reference",)):
            missing = self.missing(name, device)
            if missing is None and name in UNPROVEN:
                missing = "it has not run on a device yet and must be asked for by name"
            if missing is None:
                return name, "; ".join(passed) or "first choice"
            passed.append(f"{name}: {missing}")
        raise AssertionError("the reference serves everything")

    def _module(self, name: str) -> str:
        return f"pyfast_xai.kernels.{name}.{self.name}"

    def _python_kernel(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self._module(name)), self.name)

    @functools.cache  # noqa: B019 ops live as long as the process
    def _fallback_kernel(self, device: str) -> Callable[..., Any]:
        name, why = self.served(device)
        logger.warning("%s on %s runs on backend %s (%s)", self.name, device, name, why)
        return self._python_kernel(name)

    def _fall_back(self, device: str, *args: Any) -> Any:
        return self._fallback_kernel(device)(*args)


OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Served:
    """One cell of the table of backends: who serves an op on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


def report() -> list[Served]:
    """Every op on every device type this build of torch has, with the backend that serves it and the reason."""
    devices = ["cpu"] + (["cuda"] if torch.backends.cuda.is_built() else [])
    return [Served(op.name, device, *op.served(device)) for op in OPS.values() for device in devices]
