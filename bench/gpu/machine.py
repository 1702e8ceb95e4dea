"""What the device is, and the two rates that nothing on it exceeds: of copying and of multiplying."""

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from gpu.steps import Rows
from gpu.timing import Clock

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x", "torchvision", "captum", "grad-cam", "scipy")


def versions() -> dict[str, str]:
    """Of Python, of the packages that matter, of the CUDA compiler and the driver; what is absent is not named."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["cuda of torch"] = str(torch.version.cuda)
    for name, command in (
        ("nvcc", ["nvcc", "--version"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    ):
        program = compiler() if name == "nvcc" else shutil.which(command[0])
        if program is None:
            continue
        try:
            done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            found[name] = done.stdout.strip().splitlines()[-2 if name == "nvcc" else 0].strip()
    return found


def compiler() -> str | None:
    """Path of nvcc."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def device(kind: str) -> dict[str, Any]:
    """What the device says of itself."""
    if kind != "cuda":
        return {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
    }


def measure(rows: Rows, kind: str) -> None:
    """Bytes a second of a copy, read and written, and operations a second of a product of matrices."""
    clock = Clock(kind)
    size = 2**30 if kind == "cuda" else 2**20
    source = torch.randint(-99, 99, (size,), dtype=torch.int8, device=kind)
    there = torch.empty_like(source)
    time = clock.median(lambda: there.copy_(source), rounds=30)
    rows.add(kind="ceiling", name="copy", value=2 * size / time.median, unit="B/s", **time.as_dict())
    # On random numbers: zeros switch fewer transistors and run faster.
    side = 8192 if kind == "cuda" else 64
    torch.set_float32_matmul_precision("highest")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=kind).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        time = clock.median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), rounds=15)
        name = str(dtype).removeprefix("torch.")
        rows.add(kind="ceiling", name=name, value=2 * side**3 / time.median, unit="op/s", **time.as_dict())
