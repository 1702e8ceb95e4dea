"""Every CUDA and Triton kernel once, on small tensors of odd sizes, to be watched by compute-sanitizer."""

import shutil
from pathlib import Path

import torch

TOOLS = ("memcheck", "racecheck")
FOUND = 99  # exit code for errors of a kernel, told from those of the program


def program() -> str | None:
    """Path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def command(tool: str, python: list[str]) -> list[str]:
    """Watch a Python process, but not what it starts, nor calls of the driver that libraries make to try something."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [str(program()), *options, *python]


def judge(log: Path, code_detail: str) -> tuple[str, str]:
    """State and detail of a watched run that did not end with 0."""
    text = log.read_text(errors="replace")
    if code_detail.startswith(f"exit code {FOUND}"):
        result = [line for line in text.splitlines() if line.startswith("=========")]
        return "failed", "\n".join(result[:20])
    for reason in ("Device not supported", "Internal Sanitizer Error", "LibraryNotLoaded", "Unable to find"):
        if reason in text:
            return "unavailable", f"compute-sanitizer says: {reason}"
    return "failed", code_detail


def small_calls(kind: str) -> None:
    """Run each kernel of each compiled backend once for each dtype."""
    from gpu.kernels import backends
    from gpu.kernels import small_calls as calls  # needs the package, which the rest of this file does not

    for call in calls(kind):
        for backend in backends(call, kind):
            if backend == "reference":
                continue
            call.kernel(backend)(*call.arguments())
            if kind == "cuda":
                torch.cuda.synchronize()
            print(f"{call.op} on {backend}, {call.dtype}: ran", flush=True)
