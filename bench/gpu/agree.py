"""The GPU tests, in jobs that run beside each other: a kernel that takes its process down fails its own job alone."""

import importlib.util
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu.steps import Outcome, run


@dataclass(frozen=True)
class Job:
    """Some tests of a file.

    Attributes:
        name: of the job.
        path: of the file, in the repository.
        selection: parts of the names of the tests, with " or " between; empty for all.
        needs: packages that the file imports besides torch and pytest.
    """

    name: str
    path: str
    selection: str = ""
    needs: tuple[str, ...] = ()


_TRITON, _DEVICE, _CUDA = "tests/ops/triton_agree.py", "tests/ops/test_on_device.py", "tests/test_cuda.py"
JOBS = (
    Job("triton: conv_trace", _TRITON, "conv_trace", ("triton",)),
    Job("triton: linear_trace", _TRITON, "linear_trace", ("triton",)),
    Job("triton: point_density", _TRITON, "point_density", ("triton",)),
    Job("triton: relu", _TRITON, "test_relu", ("triton",)),
    Job("triton: max_pool", _TRITON, "max_pool", ("triton",)),
    Job("triton: response_argmax", _TRITON, "response_argmax", ("triton",)),
    Job("triton: leading_singular", _TRITON, "leading_singular", ("triton",)),
    Job("triton: errors", _TRITON, "test_errors", ("triton",)),
    Job("ops: conv_trace", _DEVICE, "conv_trace"),
    Job("ops: points", _DEVICE, "linear_trace or points_union or sign_bits or point_density or point_outside"),
    Job("ops: dense", _DEVICE, "relu or max_pool or response_argmax or leading_singular"),
    Job("ops: devices, streams, graphs", _DEVICE, "addresses or stream or last_device or graph"),
    Job("explainers: equal the CPU", _CUDA, "equals_the_cpu"),
    Job("explainers: precision and layout", _CUDA, "half_precision or memory_formats or autocast"),
    Job("explainers: modes", _CUDA, "compiled or as_it_was or looked_at or replay or current_one"),
    Job("explainers: streams", _CUDA, "another_stream or two_threads"),
    Job("explainers: no waiting, graphs", _CUDA, "waits_for_nothing or can_be_a_graph"),
    Job("explainers: accelerated", _CUDA, "accelerated or long_game or capture_that_fails"),
    Job("explainers: graphs", _CUDA, "graphs_of or graphs_on"),
    Job("boxes by CuPy", "tests/test_localize.py", "on_a_device", ("skimage", "scipy")),
    Job("metrics: localization", "tests/metrics/test_localization.py", "on_a_device", ("skimage", "sklearn")),
    Job("metrics: faithfulness", "tests/metrics/test_faithfulness.py", "on_a_device", ("scipy",)),
    Job("metrics: sanity", "tests/metrics/test_sanity.py", "on_a_device", ("scipy", "skimage")),
)
REHEARSED = (
    Job("triton: max_pool", _TRITON, "max_pool_special", ("triton",)),
    Job("explainers: equal the CPU", _CUDA, "equals_the_cpu_in_float32"),
)


def command(job: Job, root: Path, script: Path) -> list[str]:
    """Of pytest where it is there, else of the plain runner."""
    path = root / job.path
    if importlib.util.find_spec("pytest") is None:
        return [sys.executable, "-W", "ignore", str(script), "--plain-tests", str(path), job.selection]
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(root), "-c", str(root / "pyproject.toml"), "-m", ""]
    # A warning that only this machine gives is no failure of a kernel.
    options += ["-o", "filterwarnings=default", "--tb=short", "--durations=3"]
    return [sys.executable, "-m", "pytest", *options, *(["-k", job.selection] if job.selection else []), str(path)]


def run_all(
    jobs: tuple[Job, ...], root: Path, script: Path, logs: Path, seconds: float, environment: dict[str, str]
) -> list[Outcome]:
    """Run jobs, several at a time.

    Args:
        jobs: to run.
        root: of the repository.
        script: `gpu_check.py`.
        logs: folder for what they print.
        seconds: for all of them together.
        environment: variables for them.
    """

    end = time.monotonic() + seconds

    def one(numbered: tuple[int, Job]) -> Outcome:
        number, job = numbered
        missing = [name for name in job.needs if importlib.util.find_spec(name) is None]
        if missing:
            return Outcome(f"tests, {job.name}", "unavailable", detail=f"needs {', '.join(missing)}")
        log = logs / f"tests-{number:02}.log"
        left = end - time.monotonic()
        result = run(f"tests, {job.name}", command(job, root, script), left, log, environment, logs)
        if result.state == "done":
            result.detail = log.read_text(errors="replace").strip().splitlines()[-1].strip("= ")
        elif result.detail.startswith("exit code 5"):
            result.state, result.detail = "failed", "no test has these words"
        return result

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        return list(pool.map(one, enumerate(jobs)))
