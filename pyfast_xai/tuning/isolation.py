"""The first run of a kernel, in a separate process that may crash or hang."""

import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_RUN = "from pyfast_xai.tuning.isolation import _serve; _serve()"


def prove(function: Callable[..., Any], arguments: Sequence[Any], time_limit: float) -> str | None:
    """Runs `function(*arguments)` in a separate process; returns the reason why it failed, None if it did not.

    Args:
        function: a function at the top level of a module that the other process can import.
        arguments: tensors on any device, and numbers, strings, lists, tuples and dictionaries of them.
        time_limit: seconds after which the process is killed, including the import of PyTorch.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> print(tuning.prove(torch.matmul, [torch.ones(2, 3), torch.ones(3, 2)], time_limit=60))  # doctest: +SKIP
    """
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier() or getattr(sys.modules.get(function.__module__), name, None) is not function:
        return f"{function!r} is not at the top level of a module, where another process finds it"
    request = io.BytesIO()
    torch.save({"module": function.__module__, "name": name, "arguments": list(arguments)}, request)
    try:
        process = subprocess.run(
            [sys.executable, "-c", _RUN],
            input=request.getvalue(),
            capture_output=True,
            timeout=time_limit,
            env=child_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {time_limit:g} seconds"
    except OSError as error:
        return f"no process could be started for it ({error})"
    return failure_of(process.returncode, process.stderr.decode(errors="replace"))


def child_environment() -> dict[str, str]:
    """Returns the environment of a child process: the same import path, and no contests."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "PYFAST_XAI_TUNING": "off", "PYFAST_XAI_BACKEND": "auto"}


def failure_of(returncode: int, stderr: str) -> str | None:
    """Returns the reason why a process failed; None if it succeeded.

    Args:
        returncode: its exit status, negative for a signal.
        stderr: its output on standard error.
    """
    if returncode < 0:
        return f"it was ended by {_signal_name(-returncode)}"
    if returncode:
        return (stderr.strip().splitlines() or [f"exit status {returncode}"])[-1]
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _serve() -> None:
    """Runs the request that `prove` wrote to the standard input of this process."""
    request = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
    function = getattr(importlib.import_module(request["module"]), request["name"])
    with torch.inference_mode():
        function(*request["arguments"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
