"""Real jobs and real SIGKILLs."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("job.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def kill(folder, kills, seed):
    (folder / "05.jpg").write_bytes(b"no picture")
    (folder / "10.png").write_bytes((folder / "10.png").read_bytes()[:100])
    command = [sys.executable, str(JOB), str(folder.parent), str(kills), str(seed)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["faults"] == []
    assert result["kills"] >= kills
    return result


def test_jobs_that_are_killed_end_as_others_do(folder):
    assert kill(folder, 6, 0)["kills"] >= 6


@pytest.mark.extended
def test_a_thousand_kills(folder):
    assert kill(folder, 1000, 1)["parts"] > 500


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_from_outside(folder, tmp_path, how, code):
    out, scenes = tmp_path / "out", tmp_path / "many"
    scenes.mkdir()
    for n in range(2000):  # enough for the signal to find it at work
        os.link(folder / f"{n % 20:02d}.{('png', 'jpg')[n % 2]}", scenes / f"{n}.{('png', 'jpg')[n % 2]}")
    command = ["run", str(scenes), "--model", "digits", "--method", "fixations", "--out", str(out), "--shard-size", "4"]
    start = [sys.executable, "-m", "pyfast_xai.cli", *command]
    # A shell that starts the tests in the background has them, and what they start, ignore SIGINT.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(start, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    while process.poll() is None and not list(out.glob("part-*")):
        time.sleep(0.01)
    process.send_signal(how)
    _, output = process.communicate(timeout=60)
    assert process.returncode == code, output
    last = output.strip().splitlines()[-1]
    assert last == f"resume  pyfast-xai run {scenes} --model digits --out {out} --method fixations --shard-size 4"
    there = sorted(path.name for path in out.iterdir())
    assert 0 < sum(name.startswith("part") for name in there) < 500
    assert not [name for name in there if name.endswith(".tmp")]
