"""Builds, tests and measures everything that a GPU is needed for, in one command and a few minutes.

    python bench/gpu_check.py --out out/gpu

No network, no make and no installation: torch with CUDA, Triton, NumPy, nvcc and CMake are what it uses, and pytest,
ninja, CuPy, torchvision, compute-sanitizer, Captum and pytorch-grad-cam where they are. Writes `gpu.json` and `gpu.csv`
after every step and `gpu.log` in the end. The exit code is 1 where a test or a build failed, 2 where there is no GPU.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT, SCRIPT = Path(__file__).resolve().parents[1], Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parent))  # nothing else of the repository: the package that was built is imported

import torch  # noqa: E402
from gpu import agree, architectures, build, goals, machine, plain, report, sanitize, steps  # noqa: E402
from gpu.steps import Outcome, Rows  # noqa: E402


def commit() -> str:
    """Of the tree, from the environment where git is not there to be asked."""
    options = os.environ.get("PYFAST_XAI_COMMIT")
    if options or shutil.which("git") is None:
        return options or "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


class Check:
    """The steps, one after another, in processes of their own.

    Args:
        out: folder for the results.
        work: folder for what is left behind.
        kind: of device, "cuda", or "cpu" for a rehearsal.
        seconds: for everything.
        compiles: False leaves the compilation out.
    """

    def __init__(self, out: Path, work: Path, kind: str, seconds: float, compiles: bool) -> None:
        self.out, self.work, self.kind, self.compiles = out, work, kind, compiles
        self.small = kind == "cpu"
        self.end = time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self.rows = Rows(work / "rows.jsonl")
        self.facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commit": commit()}
        self.facts |= {"rehearsal": self.small, "command": " ".join(sys.argv)}
        path = os.pathsep.join(filter(None, [str(work / "package"), os.environ.get("PYTHONPATH")]))
        self.environment = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        self.environment |= {"TRITON_CACHE_DIR": str(work / "triton"), "PYTHONDONTWRITEBYTECODE": "1"}
        # Verdicts of this run alone: what its kernels prove serves its explainers.
        self.environment |= {"XDG_CACHE_HOME": str(work / "cache"), "PYFAST_XAI_TUNING": "off" if self.small else "on"}
        # The caller's own setting must not choose the backend.
        self.environment |= {"PYFAST_XAI_BACKEND": "reference" if self.small else "auto"}
        self.environment |= {"PYFAST_XAI_TEST_DEVICE": kind}
        if self.small:
            self.environment |= {"TRITON_INTERPRET": "1"}

    def left(self) -> float:
        return self.end - time.monotonic()

    def child(self, *step: str) -> list[str]:
        """The command of a step of this very script."""
        options = ["--step", *step, "--work", str(self.work), "--kind", self.kind]
        return [sys.executable, "-W", "ignore", str(SCRIPT), *options]

    def step(self, name: str, command: list[str], limit: float, **environment: str) -> Outcome:
        log = self.work / f"{len(self.outcomes):02}-{name.replace(' ', '-')}.log"
        options = self.environment | environment
        outcome = steps.run(name, command, min(limit, self.left()), log, options, self.work)
        self.done(outcome)
        return outcome

    def done(self, *outcomes: Outcome) -> None:
        """Write everything down that is known so far."""
        self.outcomes += outcomes
        for outcome in outcomes:
            print(f"{outcome.state:11} {outcome.seconds:6.1f} s  {outcome.name}", flush=True)
            if outcome.bad:
                print(outcome.detail, flush=True)
        rows = self.rows.read()
        report.write(self.out, self.facts, self.outcomes, rows, self.goals(rows))

    def goals(self, rows: list[dict[str, Any]]) -> list[goals.Goal]:
        """A rehearsal reaches none."""
        return [] if self.small else goals.goals(rows)

    def run(self) -> int:
        """All steps; the exit code."""
        package = self.work / "package" / "pyfast_xai"
        build.assemble(ROOT, package)
        self.facts |= {"versions": machine.versions(), "device": machine.device(self.kind)}
        if self.compiles:
            self.step("build", self.child("build"), 150)
        jobs = agree.REHEARSED if self.small else agree.JOBS
        seconds = min(120, self.left())
        self.done(*agree.run_all(jobs, ROOT, SCRIPT, self.work, seconds, self.environment))
        self.step("kernels", self.child("kernels"), 200)
        for network in architectures.NETWORKS[1:2] if self.small else architectures.NETWORKS:
            self.step(f"explainers, {network}", self.child("explainers", network), 60)
        self.sanitize()
        rows = self.rows.read()
        page = report.summary(self.facts, self.outcomes, rows, self.goals(rows))
        logs = [f"==> {log.name}\n{log.read_text(errors='replace')}" for log in sorted(self.work.glob("*.log"))]
        (self.out / "gpu.log").write_text("\n".join([page, *logs]))
        print("\n" + page)
        wrong = [row for row in rows if row.get("right") is False]
        for row in wrong:
            print(f"WRONG: {row['name']} on {row['backend']}, {row['shape']}, {row['dtype']} {row.get('error', '')}")
        return 1 if wrong or any(outcome.bad for outcome in self.outcomes) else 0

    def sanitize(self) -> None:
        """The calls alone first: what fails without being watched is no finding of the sanitizer."""
        alone = self.step("small calls", self.child("small-calls"), 60)
        if self.small:
            return
        why = "compute-sanitizer is not there" if sanitize.program() is None else "the calls do not run by themselves"
        if sanitize.program() is None or alone.state != "done":
            self.done(*(Outcome(f"compute-sanitizer {tool}", "unavailable", detail=why) for tool in sanitize.TOOLS))
            return
        with ThreadPoolExecutor() as pool:
            self.done(*pool.map(self._watch, sanitize.TOOLS))

    def _watch(self, tool: str) -> Outcome:
        log = self.work / f"sanitizer-{tool}.log"
        # Without a pool of memory every tensor has bounds of its own.
        environment = self.environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = sanitize.command(tool, self.child("small-calls"))
        outcome = steps.run(f"compute-sanitizer {tool}", command, self.left(), log, environment, self.work)
        if outcome.state == "failed":
            outcome.state, outcome.detail = sanitize.judge(log, outcome.detail)
        elif outcome.state == "timed out":  # it slows everything down a hundredfold, which is no finding
            outcome.state = "unavailable"
        return outcome


def run_step(options: argparse.Namespace) -> None:
    """One step, in this process."""
    name, *more = options.step
    rows, small = Rows(options.work / "rows.jsonl"), options.kind == "cpu"
    if name == "build":
        build.compile_all(ROOT, options.work, options.work / "package" / "pyfast_xai")
    elif name == "small-calls":
        sanitize.small_calls(options.kind)
    elif name == "kernels":
        from gpu import kernels  # needs the package, which the parent does without

        kernels.measure(rows, options.kind, small)
    elif name == "explainers":
        from gpu import explainers  # likewise

        explainers.measure(rows, options.kind, small, more[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.json, gpu.csv and gpu.log")
    parser.add_argument("--seconds", type=float, default=465, help="for everything; steps that do not fit are left out")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to see that the script works")
    parser.add_argument("--no-build", action="store_true", help="Triton and plain PyTorch alone")
    for hidden in ("--step", "--plain-tests"):
        parser.add_argument(hidden, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_tests:
        plain.main(Path(options.plain_tests[0]), " ".join(options.plain_tests[1:]))
        return 0
    if options.step:
        run_step(options)
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and a CUDA build of torch, and found none; --rehearse runs it on the CPU.")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        kind = "cpu" if options.rehearse else "cuda"
        return Check(options.out.resolve(), Path(work), kind, options.seconds, not options.no_build).run()


if __name__ == "__main__":
    sys.exit(main())
