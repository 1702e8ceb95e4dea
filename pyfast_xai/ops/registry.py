"""The registry of backends: it chooses the one that serves an op on a device, and gives the reason.

Schemas and fakes are declared in Python and the binaries hold implementations only, so an installation without a
binary has the same ops. An automatic choice may fall back and says so once in the log; a backend the user named
works or raises. On a CUDA device a kernel is chosen automatically after it was proven there: correct, and faster than
plain PyTorch.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyfast_xai.errors import BackendError, InputError
from pyfast_xai.kernels import checks
from pyfast_xai.ops import library
from pyfast_xai.tuning import Verdict, proofs

logger = logging.getLogger("pyfast_xai")

LIBRARY = torch.library.Library("pyfast_xai", "DEF")  # noqa: TOR901 the ops live as long as the process
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# The compiled CUDA kernels are separate ops, so that this module chooses the backend on a device.
COMPILED = {"cpp": LIBRARY, "cuda": torch.library.Library("pyfast_xai_cuda", "DEF")}  # noqa: TOR901
# The backends of each device type, best first. The first is the compiled library.
PREFERENCE = {"cpu": ("cpp", "numba", "reference"), "cuda": ("cuda", "triton", "reference")}
# Each device proves these before they are chosen automatically.
TO_PROVE = ("cuda", "triton")
BACKENDS = ("auto", "reference", "numba", "cpp", "triton", "cuda")
# The CUDA library needs symbols that only a CUDA build of torch has.
BINARIES = {"cpp": library.load("_C"), "cuda": torch.backends.cuda.is_built() and library.load("_C_cuda")}


def _checked_name(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: contextvars.ContextVar[str] = contextvars.ContextVar(
    "pyfast_xai_backend", default=_checked_name(os.environ.get("PYFAST_XAI_BACKEND", "auto"))
)


class backend(contextlib.ContextDecorator):  # noqa: N801 reads as a verb: `with pyfast_xai.backend("numba"):`
    """Runs every op on one backend inside a `with` block or a decorated function.

    Args:
        name: "reference", "numba", "cpp", "triton", "cuda", or "auto" to choose per op and device.

    Raises:
        InputError: an unknown name.
        BackendError: raised by an op that this backend cannot serve here.

    Example:
        >>> import torch
        >>> import pyfast_xai
        >>> from pyfast_xai import ops
        >>> with pyfast_xai.backend("reference"):
        ...     positive, negative = ops.sign_bits(torch.tensor([[1.0, -1.0, 2.0]]))
        >>> positive, negative
        (tensor([[5]]), tensor([[2]]))
    """

    def __init__(self, name: str) -> None:
        self.name = _checked_name(name)
        self._tokens: list[contextvars.Token[str]] = []

    def __enter__(self) -> "backend":
        self._tokens.append(_forced.set(self.name))
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.reset(self._tokens.pop())


def current_backend() -> str:
    """Returns the backend of the current context; "auto" chooses one for each op."""
    return _forced.get()


class Op:
    """An op of this library: its schema, its fake, and the backends that implement it.

    Args:
        schema: the schema without namespace, e.g. `"points_union(Tensor points, int size) -> Tensor"`.
        fake: shapes and dtypes of the results, for tracing; called with arguments that passed the op's check.
    """

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name = schema[: schema.index("(")]
        LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
        COMPILED["cuda"].define(schema)
        check = getattr(checks, self.name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"pyfast_xai::{self.name}", checked, lib=LIBRARY)
        self.overload = getattr(torch.ops.pyfast_xai, self.name).default
        self._compiled = {"cpp": self._is_compiled("cpp", "cpu"), "cuda": self._is_compiled("cuda", "cuda")}
        for device, key in DISPATCH_KEYS.items():
            if device == "cuda" or not self._compiled["cpp"]:
                LIBRARY.impl(self.name, self._fall_back, key)
        OPS[self.name] = self

    def _is_compiled(self, name: str, device: str) -> bool:
        qualified = f"{COMPILED[name].ns}::{self.name}"
        return torch._C._dispatch_has_kernel_for_dispatch_key(qualified, DISPATCH_KEYS[device])

    def __call__(self, *args: Any) -> Any:
        name = _forced.get()
        if name == "auto":
            return self.overload(*args)
        device = _first_device(args).type
        missing = self.missing(name, device)
        if missing is not None:
            raise BackendError(f"backend {name!r} cannot serve {self.name} on {device}: {missing}")
        return self.kernel(name)(*args)

    def missing(self, name: str, device: str) -> str | None:
        """Returns the reason why backend `name` cannot run this op on `device`; None if it can."""
        if name == "reference":
            return None
        if name not in PREFERENCE.get(device, ()):
            return f"it has no kernels for {device}"
        if name in BINARIES:
            if not BINARIES[name]:
                return "the compiled library is not part of this installation"
            return None if self._compiled[name] else "the compiled library has no such kernel"
        if importlib.util.find_spec(name) is None:
            return f"the package {name} is not installed"
        if importlib.util.find_spec(self._module(name)) is None:
            return "no kernel was written for it"
        return None

    def kernel(self, name: str) -> Callable[..., Any]:
        """Returns the kernel of a backend that is not missing, to be called with the arguments of the schema."""
        if name in BINARIES:
            return getattr(getattr(torch.ops, COMPILED[name].ns), self.name).default
        return self._python_kernel(name)

    def to_prove(self, device: str) -> list[str]:
        """Returns the backends that `device`, a type of devices, has to prove for this op, the simplest first."""
        names = reversed(PREFERENCE.get(device, ()))
        return [name for name in names if name in TO_PROVE and self.missing(name, device) is None]

    def served(self, device: str | torch.device) -> tuple[str, str]:
        """Returns the default backend of this op on `device` and the reason, given the proofs so far."""
        target = torch.device(device)
        kernels = self.to_prove(target.type)
        return self._served(target, proofs.machine_proofs().find(self.name, kernels, target) if kernels else None)

    def _served(self, device: torch.device, proof: Verdict | None) -> tuple[str, str]:
        rejected: list[str] = []
        for name in PREFERENCE.get(device.type, ("reference",)):
            missing, note = self.missing(name, device.type), ""
            if missing is None and name in TO_PROVE:
                missing, note = proofs.machine_proofs().judge(proof, self.name, name, device)
            if missing is None:
                return name, "; ".join(filter(None, [note, *rejected])) or "first choice"
            rejected.append(f"{name}: {missing}")
        raise AssertionError("the reference serves everything")

    def _module(self, name: str) -> str:
        return f"pyfast_xai.kernels.{name}.{self.name}"

    def _python_kernel(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self._module(name)), self.name)

    @functools.cache  # noqa: B019 ops live as long as the process
    def _fallback_kernel(self, device: torch.device) -> Callable[..., Any]:
        kernels = self.to_prove(device.type)
        proof = proofs.machine_proofs().prove(self.name, kernels, device) if kernels else None
        name, reason = self._served(device, proof)
        message = "%s on %s runs on backend %s (%s)"
        if name in TO_PROVE or device.type in _warned_devices:
            logger.info(message, self.name, device.type, name, reason)
        else:
            _warned_devices.add(device.type)
            logger.warning(f"{message}; `pyfast-xai backends` lists all ops", self.name, device.type, name, reason)
        return self.kernel(name)

    def _fall_back(self, *args: Any) -> Any:
        return self._fallback_kernel(_first_device(args))(*args)


def _first_device(arguments: Sequence[Any]) -> torch.device:
    return next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))


OPS: dict[str, Op] = {}
_warned_devices: set[str] = set()  # types of devices on which an op did not run on its first choice, which was logged


@dataclass(frozen=True)
class Served:
    """A cell of the table of backends: the backend of an op on a device, and the reason."""

    op: str
    device: str
    backend: str
    reason: str


def report() -> list[Served]:
    """Returns every op on every device type this build of torch has, with the backend that serves it and the reason.

    Example:
        >>> from pyfast_xai import ops
        >>> sorted({served.op for served in ops.report() if served.device == "cpu"})[:3]
        ['conv_trace', 'leading_singular', 'linear_trace']
    """
    devices = ["cpu"] + (["cuda"] if torch.backends.cuda.is_built() else [])
    return [Served(op.name, device, *op.served(device)) for op in OPS.values() for device in devices]
