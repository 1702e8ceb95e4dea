"""Jobs that are killed, for test_kills.py: `python job.py FOLDER KILLS SEED`.

Everything is imported once; every job is a fork, stopped by SIGKILL at a random moment, started again, and so on until
one comes to its end. Prints JSON: kills, runs, parts seen after kills, and what was wrong.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from pyfast_xai import datasets
from pyfast_xai.datasets.store import PartStore
from pyfast_xai.explainers import METHODS as EXPLAINERS
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel

METHODS = ("eigen-cam", "saliency", "fixations")


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return LoadedModel(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval(), Preprocess(24), None, "tiny")


def explain(folder, out, method):
    datasets.explain(
        str(folder), network(), method=method, out=out, shard_size=3, batch_size=2, workers=2, accelerate=False
    )


def started(folder, out, method):
    """A process that explains."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            explain(folder, out, method)
            code = 0
        finally:
            os._exit(code)
    return child


def finished(child, seconds):
    """Whether a process came to its end by itself; else it is killed."""
    end = time.monotonic() + seconds
    while True:
        done, state = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(state) == 0, state
            return True
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            _, state = os.waitpid(child, 0)
            # It may have ended in between.
            return os.waitstatus_to_exitcode(state) == 0
        time.sleep(0.001)


def rows(out):
    timing = ("decode_ms", "explain_ms")
    return [{name: value for name, value in row.items() if name not in timing} for row in datasets.open(out)]


def main(folder, kills, seed):
    torch.set_num_threads(1)
    chance, faults = random.Random(seed), []
    done = {"kills": 0, "runs": 0, "parts": 0, "unfinished": 0}
    expected, seconds = {}, {}
    for method in METHODS:
        # Compiled kernels are loaded here, for all.
        EXPLAINERS[method](network().model)(torch.rand(2, 3, 24, 24))
        # In a fork, too: threads of a library that started before one do not live in it.
        start = time.monotonic()
        assert finished(started(folder / "pictures", folder / method, method), 60)
        seconds[method] = time.monotonic() - start
        expected[method] = rows(folder / method)
    while done["kills"] < kills:
        method, out = chance.choice(METHODS), folder / f"job-{done['runs']}"
        longest = 1.2 * seconds[method]
        while not finished(started(folder / "pictures", out, method), chance.uniform(0, longest)):
            done["kills"] += 1
            longest *= 1.05  # the machine may have become slower since
            names = os.listdir(out) if out.is_dir() else []
            done["unfinished"] += sum(name.endswith(".tmp") for name in names)
            for name in names:
                if name.startswith("part-"):
                    done["parts"] += 1
                    PartStore(out).read(int(name[5:13]))
        done["runs"] += 1
        if rows(out) != expected[method]:
            faults.append(f"{out.name} ({method}): other rows than in a run that was not stopped")
        faults += datasets.verify(out).faults
        if sorted(os.listdir(out)) != sorted(os.listdir(folder / method)):
            faults.append(f"{out.name}: {os.listdir(out)}")
    print(json.dumps({**done, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
