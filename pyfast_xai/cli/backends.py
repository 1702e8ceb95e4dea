"""`pyfast-xai backends`."""

import contextlib
import os

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def backends() -> None:
    """Show which backend serves each op on each device, and why."""
    import platform

    import torch

    import pyfast_xai
    from pyfast_xai import ops

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "device", "backend", "why"):
        table.add_column(heading, overflow="fold")
    for served in ops.report():
        table.add_row(served.op, served.device, Text(served.backend, style="bold"), Text(served.reason))
    console.print(table)

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    facts.add_row("pyfast-xai", pyfast_xai.__version__)
    facts.add_row("torch", torch.__version__)
    facts.add_row("numba", _installed("numba"))
    facts.add_row("triton", _installed("triton"))
    # CuPy comes in one package a CUDA release.
    facts.add_row("cupy", _installed("cupy", "cupy-cuda13x", "cupy-cuda12x"))
    facts.add_row("python", platform.python_version())
    facts.add_row("forced", os.environ.get("PYFAST_XAI_BACKEND", "none"))
    facts.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        facts.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    console.print(facts)


def _installed(*packages: str) -> str:
    """Version of the first of `packages` that is there."""
    from importlib import metadata

    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "not installed"
