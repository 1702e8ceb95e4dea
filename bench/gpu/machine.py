"""What the device is, and what runs on it."""

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x", "torchvision", "captum", "grad-cam", "scipy")


def versions() -> dict[str, str]:
    """Of Python, of the packages that matter, of the CUDA compiler and the driver; what is absent is not named."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    result["cuda of torch"] = str(torch.version.cuda)
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
            result[name] = done.stdout.strip().splitlines()[-2 if name == "nvcc" else 0].strip()
    return result


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
