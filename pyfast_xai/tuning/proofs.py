"""Proofs that kernels are correct on a device, and faster than plain PyTorch.

A kernel that a device has never run may be wrong, crash or hang there. So it first runs in a separate process,
`python -m pyfast_xai.proof`, which compares it with plain PyTorch on corner cases and times it at the shapes of real
networks. The verdict is stored on disk, for this device and these versions.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch

from pyfast_xai.tuning.contest import enabled
from pyfast_xai.tuning.isolation import child_environment, failure_of
from pyfast_xai.tuning.verdicts import Site, Verdict, Verdicts, cache_folder, environment

logger = logging.getLogger("pyfast_xai")

PROGRAM = ("-m", "pyfast_xai.proof")
REFERENCE = "reference"
_PREFIX = "proof of "
# Seconds for one kernel to agree or to be timed; Triton compiles a kernel for each dtype, and PyTorch is imported.
_TIME_LIMIT = 120.0
_START_LIMIT = 120.0  # seconds until the process has imported PyTorch and measured the device
# Rounds of timing, in a proof at the first use of an op and in `pyfast-xai prove`.
_ROUNDS, _MANY_ROUNDS = 3, 9

Message = dict[str, Any]


class Proofs:
    """Proofs of kernels, each made once for a device and stored.

    Args:
        verdicts: the store of verdicts.
        program: arguments of Python for the process that runs the kernels.
        time_limit: seconds for the comparison of each kernel with plain PyTorch, and again for its timing.
        small: tiny shapes, for tests.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        program: Sequence[str] = PROGRAM,
        time_limit: float = _TIME_LIMIT,
        small: bool = False,
    ) -> None:
        self.verdicts = verdicts
        self._program, self._time_limit, self._small = program, time_limit, small
        self._impossible: dict[Site, str] = {}  # ops that could not be proven here, with the reason
        self._lock = threading.RLock()

    def find(self, op: str, kernels: Sequence[str], device: torch.device) -> Verdict | None:
        """Returns the stored verdict on some kernels of an op; None if they were not all proven."""
        verdict = self.verdicts.get(_site(op, device))
        if verdict is None or not set(kernels) <= verdict.seconds.keys() | verdict.failed.keys():
            return None
        return verdict

    def prove(self, op: str, kernels: Sequence[str], device: torch.device) -> Verdict | None:
        """Returns the verdict on some kernels of an op; proves them if there is none.

        Args:
            op: name of the op.
            kernels: names of backends, the simplest first.
            device: the device that runs them.

        Returns:
            The verdict; None if proofs are off (`PYFAST_XAI_TUNING=off`) or not possible here.
        """
        with self._lock:
            if not enabled():
                return None
            verdict, site = self.find(op, kernels, device), _site(op, device)
            if verdict is None and site not in self._impossible:
                logger.info("proving %s of %s on %s, once for this device", ", ".join(kernels), op, site.device)
                verdict = self.prove_all({op: kernels}, device, rounds=_ROUNDS).get(op)
            return verdict

    def prove_all(
        self,
        ops: Mapping[str, Sequence[str]],
        device: torch.device,
        on_message: Callable[[Message], None] = lambda message: None,
        rounds: int = _MANY_ROUNDS,
    ) -> dict[str, Verdict]:
        """Proves kernels, also those that have a verdict, and stores and returns the verdicts.

        Args:
            ops: names of backends by the name of an op, the simplest first.
            device: the device that runs them.
            on_message: receives every message of the process that runs the kernels.
            rounds: rounds of timing at each shape.

        Returns:
            The verdicts by the name of an op, without the ops that could not be proven here.
        """
        proven: dict[str, Verdict] = {}
        failed: dict[str, dict[str, str]] = {op: {} for op in ops}
        pending = dict(ops)

        def handle(message: Message) -> None:
            op = message.get("op", "")
            if message["kind"] == "failed":
                failed[op][message["backend"]] = message["reason"]
            elif message["kind"] == "proven":
                proven[op] = Verdict(message["seconds"], failed[op])
                self.verdicts.put(_site(op, device), proven[op])
                del pending[op]
            elif message["kind"] == "impossible":
                self._impossible[_site(op, device)] = message["reason"]
                del pending[op]
            on_message(message)

        with self._lock:
            while pending:
                remaining = {op: [name for name in names if name not in failed[op]] for op, names in pending.items()}
                stage, progressed = None, False
                for message in self._messages(
                    {"ops": remaining, "device": str(device), "rounds": rounds, "small": self._small}
                ):
                    if message["kind"] == "ended":
                        break
                    if message["kind"] == "stage":
                        stage = message
                    elif message["kind"] in ("failed", "proven", "impossible"):
                        stage, progressed = None, True
                    handle(message)
                if stage is not None and stage["backend"] != REFERENCE:
                    # The kernel ended its process: the others are proven without it.
                    handle({"kind": "failed", **_kernel_fields(stage), "reason": message["reason"]})
                elif stage is not None or not progressed:
                    # The cause is not a kernel: no process, no device or no memory.
                    for op in list(pending) if stage is None else [stage["op"]]:
                        handle({"kind": "impossible", "op": op, "reason": message["reason"]})
        return proven

    def judge(self, verdict: Verdict | None, op: str, kernel: str, device: torch.device) -> tuple[str | None, str]:
        """Returns the reason why a kernel is not used, None if it is, and a note in its favour."""
        if verdict is None:
            if not enabled():
                return "PYFAST_XAI_TUNING=off leaves it unproven", ""
            if device.type == "cuda" and not torch.cuda.is_available():
                return "there is no device to prove it", ""
            impossible = self._impossible.get(_site(op, device))
            if impossible is not None:
                return f"it could not be proven ({impossible})", ""
            return "not proven on this device yet, which its first use or `pyfast-xai prove` does", ""
        if kernel in verdict.failed:
            return verdict.failed[kernel], ""
        times = min(verdict.seconds[REFERENCE]) / min(verdict.seconds[kernel])
        speed = f"{times:.2g} times as fast as plain PyTorch"
        winner = verdict.fastest()
        if winner != kernel:
            return (speed if winner == REFERENCE else f"correct, but {winner} is faster"), ""
        return None, f"proven on this device on {verdict.date[:10]}, {speed}"

    def _messages(self, request: Message) -> Iterator[Message]:
        """Yields the messages of the process, and at last how it ended; kills it if a stage takes too long."""
        try:
            process = subprocess.Popen(
                [str(sys.executable), *self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=child_environment(),
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            yield {"kind": "ended", "reason": f"no process could be started ({error})"}
            return
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        errors: list[str] = []
        assert process.stdin is not None
        threads = [
            threading.Thread(target=_forward_lines, args=(process.stdout, lines.put), daemon=True),
            threading.Thread(target=_forward_lines, args=(process.stderr, errors.append), daemon=True),
        ]
        reason: str | None = None
        try:
            for thread in threads:
                thread.start()
            with contextlib.suppress(OSError), process.stdin:  # unless it ended at once
                process.stdin.write(json.dumps(request))
            limit = _START_LIMIT
            while (line := lines.get(timeout=limit)) is not None:
                message = json.loads(line)
                limit = _START_LIMIT if message["kind"] == "ceiling" else self._time_limit
                yield message
        except queue.Empty:
            reason = f"it did not end within {limit:g} seconds"
        finally:
            exited = reason is None and _wait_until_exit(process, 10)
            _kill_with_children(process)
            for thread in threads:
                thread.join(10)
        if exited:
            reason = failure_of(process.returncode, "".join(line or "" for line in errors))
        yield {"kind": "ended", "reason": reason or "the process ended before the proof"}


def _kernel_fields(stage: Message) -> dict[str, str]:
    return {"op": stage["op"], "backend": stage["backend"]}


def _forward_lines(stream: Any, emit: Callable[[str | None], None]) -> None:
    with stream:
        for line in stream:
            emit(line)
    emit(None)


def _wait_until_exit(process: subprocess.Popen[str], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _kill_with_children(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    _wait_until_exit(process, 10)  # a process that hangs in a driver cannot be killed


def _site(op: str, device: torch.device) -> Site:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Site(_PREFIX + op, f"kernels {_fingerprint()}", name, 0)


@functools.cache
def _fingerprint() -> str:
    """Returns a digest of the kernels, so that changed ones are proven again."""
    package, digest = files("pyfast_xai"), hashlib.sha256()
    for entry in [package / "_C_cuda.so", *_sources(package / "kernels")]:
        if entry.is_file():
            digest.update(entry.read_bytes())
    return digest.hexdigest()[:16]


def _sources(folder: Any) -> Iterator[Any]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry


def is_proof(site: Site) -> bool:
    """Returns whether a verdict belongs to a proof, and not to a contest."""
    return site.op.startswith(_PREFIX)


@functools.cache
def machine_proofs() -> Proofs:
    """Returns the proofs that are stored for this machine and user."""
    return Proofs(Verdicts(cache_folder(), environment()))
