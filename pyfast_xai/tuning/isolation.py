"""The first run of a kernel, in a process of its own that may crash or hang."""

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
    """Returns why `function(*arguments)` does not run to its end in a process of its own; None if it does.

    Args:
        function: at the top of a module that the other process can import.
        arguments: tensors on any device, and numbers, strings, lists, tuples and dictionaries of them.
        time_limit: seconds, after which the process is killed; it takes some to import PyTorch.

    Example:
        >>> import torch
        >>> from pyfast_xai import tuning
        >>> print(tuning.prove(torch.matmul, [torch.ones(2, 3), torch.ones(3, 2)], time_limit=60))  # doctest: +SKIP
    """
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier() or getattr(sys.modules.get(function.__module__), name, None) is not function:
        return f"{function!r} is not at the top of a module, where another process finds it"
    request = io.BytesIO()
    torch.save({"module": function.__module__, "name": name, "arguments": list(arguments)}, request)
    try:
        process = subprocess.run(
            [sys.executable, "-c", _RUN],
            input=request.getvalue(),
            capture_output=True,
            timeout=time_limit,
            env=environment_of_a_child(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {time_limit:g} seconds"
    except OSError as error:
        return f"no process could be started for it ({error})"
    return way_of_ending(process.returncode, process.stderr.decode(errors="replace"))


def environment_of_a_child() -> dict[str, str]:
    """Returns the environment of a process that imports what this one does and starts no contests of its own."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "PYFAST_XAI_TUNING": "off", "PYFAST_XAI_BACKEND": "auto"}


def way_of_ending(code: int, printed: str) -> str | None:
    """Returns why a process did not end well; None if it did.

    Args:
        code: that it returned, negative for a signal.
        printed: on its standard error.
    """
    if code < 0:
        return f"it was ended by {_signal_name(-code)}"
    if code:
        return (printed.strip().splitlines() or [f"exit status {code}"])[-1]
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _serve() -> None:
    """Run what `prove` wrote to the standard input of this process."""
    request = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
    function = getattr(importlib.import_module(request["module"]), request["name"])
    with torch.inference_mode():
        function(*request["arguments"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
