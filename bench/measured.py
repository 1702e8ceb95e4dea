"""Rows of measurements, with when, where and with what they were taken, and the files they are kept in."""

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import pyfast_xai
from pyfast_xai import ops

Row = dict[str, Any]

DATA = Path(__file__).parent / "data"
TAKEN = ("date", "commit", "pyfast_xai", "torch", "cpu", "threads", "instruction_set")
# The columns of each file, after the above; `freed` says what became of freed memory, see `--freed`.
COLUMNS = {
    # An explanation beside a forward of its model on the same images.
    "cpu": (
        *("freed", "network", "batch", "method", "backend"),
        *("forward_ms", "explain_ms", "forwards", "low", "high", "rounds"),
    ),
    # The same, along an axis: "size", "batch", "depth", "classes" or "points".
    "cpu_growth": (
        *("freed", "axis", "value", "network", "batch", "method", "backend"),
        *("forward_ms", "explain_ms", "forwards", "low", "high", "rounds"),
    ),
    # An op beside another that does the same, and its share of what the machine can do.
    "cpu_ops": (
        *("freed", "op", "shape", "dtype", "backend", "version", "ms", "ms_low", "ms_high", "beside", "beside_ms"),
        *("times", "low", "high", "rounds", "bytes", "operations", "copy", "float32", "share", "bound"),
    ),
    "cpu_memory": ("network", "batch", "who", "increment_mib", "model_mib"),
    # Quotients of processor seconds, and the largest that each should be.
    "quick": (
        *("freed", "network", "batch", "what", "quotient", "ms", "beside_ms", "value", "goal", "rounds", "load"),
    ),
    # A run on files beside what it is made of; `load` is that of the machine, cores in use by others among it.
    "throughput": (
        *("load", "network", "method", "images", "pixels", "file_kb", "batch", "accelerated", "reduced_jpeg"),
        *("forward_per_s", "explainer_per_s", "loop_per_s", "run_per_s"),
        *("forward_cpu_ms", "explainer_cpu_ms", "loop_cpu_ms", "run_cpu_ms"),
        *("of_loop", "of_explainer", "of_forward", "of_loop_cpu", "of_explainer_cpu", "of_forward_cpu", "of_both"),
        *("decode_ms", "normalise_ms", "explain_ms", "answers_ms", "rows_ms", "write_ms", "rest_ms"),
        *("decode_in_run_ms", "explain_in_run_ms", "start_s"),
        *("decoding_threads", "waiting_for_decoding", "waiting_for_writing", "rounds"),
    ),
    "cpu_cold_start": ("what", "backend", "first_ms", "low", "high", "again_ms", "processes"),
}


def cpu() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def taken() -> Row:
    """When, where and with what."""
    command = ["git", "-C", str(DATA.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "pyfast_xai": pyfast_xai.__version__,
        "torch": torch.__version__,
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
    }


def instruction_set() -> str:
    """That of our kernels, and PyTorch's own where it is another."""
    ours, capability = ops.instruction_set() or "none", torch.backends.cpu.get_cpu_capability()
    theirs = {"AVX512": "AVX-512", "DEFAULT": "SSE2"}.get(capability, capability)
    return ours if ours == theirs else f"{ours}, PyTorch {theirs}"


def append(name: str, rows: Iterable[Row]) -> None:
    """Add rows to one of the files."""
    path = DATA / f"{name}.csv"
    new = not path.exists()
    DATA.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*TAKEN, *COLUMNS[name]))
        if new:
            writer.writeheader()
        common = taken()
        writer.writerows({**common, **row} for row in rows)


def read(name: str, *same: str) -> list[Row]:
    """The rows of a file, of those that agree in some columns the last."""
    path = DATA / f"{name}.csv"
    if not path.exists():
        return []
    saved: dict[tuple[str, ...], Row] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[column] for column in (*same, "threads", "instruction_set"))
            saved.pop(key, None)
            saved[key] = row
    return list(saved.values())


def table(rows: Iterable[Iterable[object]]) -> str:
    """In Markdown; the first row is the head."""
    head, *body = ([str(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))
