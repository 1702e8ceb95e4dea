"""Measures the goals on this machine in under ten minutes, and prints what falls short: `make bench-quick`.

Every figure is a quotient of processor seconds taken in turns in one process, the least of each: of an explanation and
a forward of its model, or of one of our classes and the peer's that it stands for. Explanations are recorded and
replayed; replays count once there is nothing left to prepare. What there is no time for is left out, and named.
"""

import argparse
import gc
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

NETWORKS = ("resnet50", "resnet18", "vgg16", "mobilenet_v2")
BATCHES = (1, 8)
ROUNDS = 3
CALLS = 40  # at most, until nothing is left to prepare

Run = Callable[[], Any]

LAST = {
    "resnet50": lambda model: model.layer4[-1],
    "resnet18": lambda model: model.layer4[-1],
    "vgg16": lambda model: model.features[-2],
    "mobilenet_v2": lambda model: model.features[-1],
    "densenet121": lambda model: model.features[-1],
    "efficientnet_b0": lambda model: model.features[-1],
}

# The largest quotients at one image and at eight.
EXPLAINERS = {
    "eigen-cam": (1.0, 0.85),
    "grad-cam": (1.0, 0.85),
    "fixations": (1.3, 1.0),
    "saliency": (1.9, 1.7),
    "guided-backprop": (1.9, 1.7),
}
CLASSES = ("Saliency", "GuidedBackprop", "GradCAM", "EigenCAM")
DROP_IN, MEDIAN, ACCELERATED = (0.9, 0.8), (0.7, 0.6), 1.02

RECORDED, FASTER, REPLAYED = "recorded, in forwards", "the faster way, in forwards", "replayed, in recorded calls"
OF_PEER_RECORDED, OF_PEER = "recorded, of the peer's time", "the faster way, of the peer's time"


def load(library: str | None) -> None:
    """Import torch and, if a library is named, have it loaded in the place of the one that is installed."""
    import torch

    if library is None:
        return
    load_library = torch.ops.load_library

    def load_other(path: str | Path) -> None:
        ours = Path(path).name == "_C.so" and Path(path).parent.name == "pyfast_xai"
        load_library(library if ours else path)

    torch.ops.load_library = load_other


def seconds(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Returns the least processor seconds of each of some calls that take turns."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def settle(run: Run, preparations: Callable[[], int]) -> None:
    """Calls what is replayed until nothing is left to prepare."""
    for _ in range(CALLS):
        before = preparations()
        run()
        if preparations() == before:
            return


def ways(name: str, model: Any, images: Any) -> dict[str, Run]:
    """Returns the calls of an explainer that is recorded and of one that is replayed."""
    from pyfast_xai import METHODS

    plain, fast = METHODS[name](model, accelerate=False), METHODS[name](model, accelerate=True)
    settle(lambda: fast(images), lambda: fast.accelerated_model.preparations)
    plain(images)
    return {"recorded": lambda: plain(images), "replayed": lambda: fast(images)}


def beside_peer(name: str, network: str, model: Any, other: Any, images: Any) -> dict[str, Run]:
    """Returns the calls of a peer's class, and of ours that stands for it, recorded and replayed.

    Theirs gets a model of its own, since it leaves hooks there, with which ours would be recorded.
    """
    import captum.attr
    import pytorch_grad_cam

    from pyfast_xai import compat
    from pyfast_xai.compat import captum as own_captum
    from pyfast_xai.compat import grad_cam as own_grad_cam

    target = list(range(len(images)))
    if hasattr(captum.attr, name):
        ours, theirs = getattr(own_captum, name)(model), getattr(captum.attr, name)(other)

        def call(options: Any) -> Any:
            return options.attribute(images.clone().requires_grad_(), target=target)
    else:
        ours = getattr(own_grad_cam, name)(model, [LAST[network](model)])
        theirs = getattr(pytorch_grad_cam, name)(other, [LAST[network](other)])

        def call(options: Any) -> Any:
            return options(images, targets=None)

    def recorded() -> Any:
        with compat.accelerate(False):
            return call(ours)

    def replayed() -> Any:
        with compat.accelerate(True):
            return call(ours)

    call(theirs)
    recorded()
    replayed()
    (kind,) = ours._replays._kinds.values()
    settle(replayed, lambda: kind._pinned.preparations)
    return {"theirs": lambda: call(theirs), "recorded": recorded, "replayed": replayed}


def measure(network: str, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of a network and a number of images."""
    import copy

    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(network, weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    place = BATCHES.index(batch)

    def row(what: str, quotient: str, above: float, below: float, goal: float | None = None) -> dict[str, Any]:
        common = {"network": network, "batch": batch, "what": what, "quotient": quotient}
        return common | {"ms": 1e3 * above, "beside_ms": 1e3 * below, "value": above / below, "goal": goal}

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    forward()
    for name, goals in EXPLAINERS.items():
        least = seconds({"forward": forward, **ways(name, model, images)}, rounds)
        yield row(name, RECORDED, least["recorded"], least["forward"])
        yield row(name, FASTER, min(least["recorded"], least["replayed"]), least["forward"], goals[place])
        yield row(name, REPLAYED, least["replayed"], least["recorded"], ACCELERATED)
        gc.collect()
    other = copy.deepcopy(model)
    for name in CLASSES:
        least = seconds(beside_peer(name, network, model, other, images), rounds)
        yield row(name, OF_PEER_RECORDED, least["recorded"], least["theirs"])
        yield row(name, OF_PEER, min(least["recorded"], least["replayed"]), least["theirs"], DROP_IN[place])
        gc.collect()


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """Returns what is above its goal, in words."""
    missed = [row for row in rows if row["goal"] is not None and row["value"] > row["goal"]]
    result = [
        f"{row['network']}, batch {row['batch']}: {row['what']}, {row['quotient']}: {row['value']:.2f}, "
        f"goal {row['goal']}"
        for row in missed
    ]
    for batch, goal in zip(BATCHES, MEDIAN, strict=True):
        actual = [row["value"] for row in rows if row["batch"] == batch and row["quotient"] == OF_PEER]
        if actual and statistics.median(actual) > goal:
            result.append(f"batch {batch}: {OF_PEER}, median: {statistics.median(actual):.2f}, goal {goal}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {', '.join(LAST)}")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=540, help="after which no further row is measured")
    parser.add_argument("--rows", action="store_true", help="append what was measured to bench/data/quick.csv")
    parser.add_argument("--library", help="a build of the kernels to measure in the place of the installed one")
    options = parser.parse_args()
    unknown = set(options.networks.split(",")) - LAST.keys()
    if unknown:
        parser.error(f"--networks must be of {', '.join(LAST)}, got {', '.join(sorted(unknown))}")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # threads that wait count as well
        os.environ[name] = str(options.threads)
    load(options.library)
    import measured
    import torch

    import conftest  # noqa: F401 torchvision beside a CPU build of torch
    import pyfast_xai

    warnings.simplefilter("ignore")
    logging.getLogger("pyfast_xai").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    freed = "kept" if pyfast_xai.keep_freed_memory() else "given back"
    where = measured.taken()
    print(
        f"{where['cpu']}, kernels for {where['instruction_set']}, {where['threads']} threads, torch {where['torch']}, "
        f"freed memory {freed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    start, rows, left_out = time.perf_counter(), [], []
    for batch in map(int, options.batches.split(",")):
        for network in options.networks.split(","):
            actual = []
            for row in measure(network, batch, options.rounds):
                actual.append(row | {"freed": freed, "rounds": options.rounds, "load": round(os.getloadavg()[0], 1)})
                if time.perf_counter() - start > options.seconds:
                    left_out.append(f"what comes after {row['what']} of {network}, {batch} images")
                    break
            rows += actual
            shown = [(row["what"], row["quotient"], f"{row['value']:.2f}", row["goal"] or "") for row in actual]
            print(f"\n{network}, {batch} images\n" + measured.table([("what", "quotient", "value", "goal"), *shown]))
            sys.stdout.flush()
            if options.rows:
                measured.append("quick", actual)
    short = shortfalls(rows)
    print("\n".join(["", f"{len(short)} goals are missed:", *(f"- {line}" for line in short)]))
    print("\n".join(["left out, for it would take too long:", *(f"- {line}" for line in left_out)] if left_out else []))


if __name__ == "__main__":
    main()
