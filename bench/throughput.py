"""A run on a data set beside the bare loop over the same pictures, and its memory: `make bench-throughput`.

Two loops are the measure: `model`, the method on batches that lie decoded in memory, which no runner can beat, and
`loop`, which decodes a batch and then explains it. Rounds of all three alternate in one process; the least of each
counts. Where others use the machine, `of_model_on_core` is the figure to read with the two that tell how long the
thread of the model waited: with one thread of PyTorch, it is the share of that thread's work that the method is.
Memory is the resident size over one long run, in a process of its own. Linux counts it.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from trained import loaded, photographs

from pyfast_xai import datasets
from pyfast_xai.explainers import METHODS
from pyfast_xai.images import load_image

CASES = (
    ("squeezenet1_1", "eigen-cam"),
    ("squeezenet1_1", "fixations"),
    ("squeezenet1_1", "guided-backprop"),
    ("resnet50_abm_pruned_int8", "eigen-cam"),
    ("resnet50_abm_pruned_int8", "guided-backprop"),
)


def resident() -> float:
    """Resident size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and those of them in which this thread had a core: others who use the machine do not count in these."""
    began, on_core = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - began, time.thread_time() - on_core


def measure(name: str, method: str, count: int, batch: int, rounds: int, top_k: int) -> dict[str, object]:
    """Images a second of the two loops and of the runner."""
    model = loaded(name)
    explainer = METHODS[method](model.model)
    paths = photographs(count)
    count = len(paths)
    parts = [paths[start : start + batch] for start in range(0, count, batch)]
    ready = [torch.stack([model.preprocess(load_image(path))[0] for path in part]) for part in parts]
    told = {}

    def bare() -> None:
        for inputs in ready:
            explainer(inputs)

    def loop() -> None:
        for part in parts:
            explainer(torch.stack([model.preprocess(load_image(path))[0] for path in part]))

    def runner() -> None:
        with tempfile.TemporaryDirectory() as out:
            done = datasets.explain(
                [str(path) for path in paths], model, method=explainer, out=out, batch=batch, top_k=top_k,
                shard_size=max(batch, 128 // batch * batch),
            )  # fmt: skip
            assert (done.rows, done.errors) == (count, 0)
            told.update(vars(done.progress))

    explainer(ready[0])
    seconds: dict[str, list[tuple[float, float]]] = {"model": [], "loop": [], "runner": []}
    for _ in range(rounds):
        for who, work in (("model", bare), ("loop", loop), ("runner", runner)):
            seconds[who].append(timed(work))
    best, on_core = ({who: min(one[n] for one in own) for who, own in seconds.items()} for n in (0, 1))
    return {
        "network": name,
        "method": method,
        "images": count,
        "batch": batch,
        "threads": torch.get_num_threads(),
        **{f"{who}_images_per_s": round(count / own, 2) for who, own in best.items()},
        "of_model": round(best["model"] / best["runner"], 3),
        "of_loop": round(best["loop"] / best["runner"], 3),
        "of_model_on_core": round(on_core["model"] / on_core["runner"], 3),
        "waiting_for_decoding": round(told["waiting"] / told["seconds"], 3),
        "waiting_for_writing": round(told["writing"] / told["seconds"], 3),
    }


def memory(name: str, method: str, images: int, batch: int) -> dict[str, object]:
    """Resident size along one run over so many images, the pictures again and again."""
    model = loaded(name)
    pictures = [str(path) for path in photographs()]
    with tempfile.TemporaryDirectory() as out:
        listed = Path(out, "list.csv")
        with listed.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path"])
            writer.writerows([pictures[n % len(pictures)]] for n in range(images))
        seen: list[tuple[int, float]] = []

        def note(progress: datasets.Progress) -> None:
            if not seen or progress.images >= seen[-1][0] + images // 20:
                seen.append((progress.images, resident()))

        done = datasets.explain(
            str(listed), model, method=method, out=Path(out, "run"), batch=batch, shard_size=256, progress=note
        )
        assert (done.rows, done.errors) == (images, 0)
    # What grows with the first parts is buffers; what grows after them is a leak.
    early = [size for count, size in seen if count <= images // 4][-1]
    return {
        "network": name,
        "method": method,
        "images": images,
        "batch": batch,
        "seconds": round(done.progress.seconds, 1),
        "mib_after_a_quarter": round(early, 1),
        "mib_at_the_end": round(seen[-1][1], 1),
        "mib_along": [round(size) for _, size in seen],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=0, help="more than 0 takes Eigen-CAM a forward pass more")
    parser.add_argument("--only", metavar="NETWORK", help="cases of this network")
    parser.add_argument("--memory", type=int, default=0, metavar="IMAGES", help="a long run, for its memory")
    parser.add_argument("--rows", type=Path, help="write the table here")
    parser.add_argument("--long", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.long:
        print(json.dumps(memory(*given.long, given.memory, given.batch)))
        return
    rows = []
    for name, method in CASES:
        if given.only in (None, name):
            rows.append(measure(name, method, given.images, given.batch, given.rounds, given.top_k))
            print(json.dumps(rows[-1]), flush=True)
    if given.memory:
        command = [sys.executable, __file__, "--memory", str(given.memory), "--batch", str(given.batch), "--long"]
        subprocess.run([*command, "squeezenet1_1", "eigen-cam"], check=True, env=os.environ)
    if given.rows:
        with given.rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
