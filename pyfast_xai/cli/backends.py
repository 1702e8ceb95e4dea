"""`pyfast-xai backends`."""

import contextlib
import os

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def backends() -> None:
    """Show which backend serves each op on each device, which kernels won contests here, and why."""
    import platform

    import torch

    import pyfast_xai
    from pyfast_xai import ops, tuning
    from pyfast_xai.tuning import proofs

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("op", "device", "backend", "why"):
        table.add_column(heading, overflow="fold")
    for served in ops.report():
        table.add_row(served.op, served.device, Text(served.backend, style="bold"), Text(served.reason))
    console.print(table)

    contests = Table(box=box.SIMPLE_HEAD)
    for heading in ("contest of", "on", "threads", "won by", "in ms", "the others", "when"):
        contests.add_column(heading, overflow="fold")
    for site, verdict in tuning.known_verdicts().items():
        if proofs.is_proof(site):
            continue  # said above
        fastest = {name: f"{1e3 * min(runs):.3g}" for name, runs in verdict.seconds.items()}
        winner = verdict.fastest()
        reasons = [f"{name} {ms}" for name, ms in fastest.items() if name != winner]
        reasons += [f"{name}: {reason}" for name, reason in verdict.failed.items()]
        site_text, winner_text = Text(f"{site.device}: {site.arguments}"), Text(winner, style="bold")
        contests.add_row(
            site.op, site_text, str(site.threads), winner_text, fastest[winner], Text(", ".join(reasons)), verdict.date
        )
    if contests.row_count:
        console.print(contests)

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    facts.add_row("pyfast-xai", pyfast_xai.__version__)
    facts.add_row("torch", torch.__version__)
    facts.add_row("numba", _installed("numba"))
    facts.add_row("triton", _installed("triton"))
    # CuPy comes in one package a CUDA release.
    facts.add_row("cupy", _installed("cupy", "cupy-cuda13x", "cupy-cuda12x"))
    facts.add_row("python", platform.python_version())
    facts.add_row("forced", os.environ.get("PYFAST_XAI_BACKEND", "none"))
    facts.add_row("kernels for", ops.instruction_set() or "no instruction set: there is no compiled library")
    facts.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        facts.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    console.print(facts)


def _installed(*packages: str) -> str:
    """Returns the version of the first installed package."""
    from importlib import metadata

    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "not installed"
