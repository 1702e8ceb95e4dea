"""A run on JPEG files of camera size beside what it is made of and what it replaces: `make bench-throughput`.

Four sides take turns in one process, and the least of several rounds of each counts:

- `forward`: the model alone, on batches that lie decoded in memory;
- `explainer`: the method on the same batches, which no runner beats by much;
- `loop`: a plain loop that decodes a batch with Pillow, explains it with pytorch-grad-cam and writes each map with
  `np.savez`; CNN-Fixations has no such peer, and its loop explains with this library;
- `run`: `datasets.explain`, from files to a folder of parts.

`of_loop`, `of_explainer` and `of_forward` are how many times as fast as each the run is. Where others use the machine,
wall times mean little; the columns in seconds of processor time say what the work takes, all threads together.
`--memory` follows the resident size over one long run in a process of its own, on Linux.
"""

import argparse
import copy
import csv
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measured
import numpy as np
import torch
from PIL import Image
from quick import load, settle
from trained import loaded, photographs

from pyfast_xai import datasets
from pyfast_xai.explainers import METHODS
from pyfast_xai.images import load_image
from pyfast_xai.models import LoadedModel

NETWORKS = ("resnet50_abm_pruned_int8", "mobilenet_v2_coral_int8")
EXPLAINED_BY = ("eigen-cam", "grad-cam", "fixations", "guided-backprop")


def resident() -> float:
    """Returns the resident size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def processor() -> float:
    """Returns the seconds that all threads of this process have had a core."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Returns seconds on the clock, and of processor time."""
    start, before = time.perf_counter(), processor()
    work()
    return time.perf_counter() - start, processor() - before


def camera_files(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Returns photographs as JPEG files of the size of a camera's."""
    paths = []
    for n, path in enumerate(photographs(count)):
        with Image.open(path) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(folder / f"{n:05d}.jpg", quality=90)
        paths.append(folder / f"{n:05d}.jpg")
    return paths


def _complete_torchvision() -> None:
    """Makes torchvision, which the peer imports, importable beside a CPU build of torch."""
    spec = importlib.util.spec_from_file_location("complete", Path(__file__).parents[1] / "conftest.py")
    spec.loader.exec_module(sys.modules.setdefault("complete", importlib.util.module_from_spec(spec)))


def peer(model: torch.nn.Module, method: str) -> Callable[[torch.Tensor], Any]:
    """Returns what explains a batch in the plain loop."""
    _complete_torchvision()
    from pytorch_grad_cam import EigenCAM, GradCAM, GuidedBackpropReLUModel

    if method == "fixations":
        return METHODS[method](model, accelerate=False)
    if method == "guided-backprop":
        guided = GuidedBackpropReLUModel(model, "cpu")
        return lambda images: [guided(image[None]) for image in images]
    *_, layer = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    cam = {"eigen-cam": EigenCAM, "grad-cam": GradCAM}[method](model, [layer])
    return lambda images: cam(images, None)


def measure(
    network: LoadedModel, name: str, method: str, paths: list[Path], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Returns images a second of the four sides."""
    model, preprocess, batch = network.model, network.preprocess, arguments.batch
    explainer = METHODS[method](model, accelerate=arguments.accelerate)
    parts = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    ready = [torch.stack([preprocess(load_image(path))[0] for path in part]) for part in parts]
    # The peer's hooks stay on its model: replays serve none that has hooks.
    explain_peer = peer(copy.deepcopy(model), method)
    progress: dict[str, Any] = {}

    def forward() -> None:
        with torch.inference_mode():
            for images in ready:
                model(images)

    def bare() -> None:
        for images in ready:
            explainer(images)

    def loop() -> None:
        with tempfile.TemporaryDirectory() as out:
            for n, part in enumerate(parts):
                results = explain_peer(torch.stack([preprocess(load_image(path))[0] for path in part]))
                maps = results.heatmap.numpy() if method == "fixations" else results
                for k, one in enumerate(maps):
                    np.savez(Path(out, f"{n}-{k}.npz"), map=np.asarray(one))

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            options = datasets.RunOptions(
                method=explainer,
                out=out,
                batch_size=batch,
                top_k=arguments.top_k,
                shard_size=8 * batch,
                reduced_jpeg=arguments.reduced_jpeg,
            )
            done = datasets.explain([str(path) for path in paths], network, options)
            assert (done.rows, done.errors) == (len(paths), 0)
            progress.update(vars(done.progress))

    sides = {"forward": forward, "explainer": bare, "loop": loop, "run": run}
    # Recording, packing of weights and the first pages of memory belong to no side.
    with torch.inference_mode():
        model(ready[0])
    for work in (bare, run):
        settle(work, lambda: explainer.accelerated_model.preparations if arguments.accelerate else 0)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side, work in sides.items():
            seconds[side].append(timed(work))
    clock, cpu = ({side: min(pair[n] for pair in pairs) for side, pairs in seconds.items()} for n in (0, 1))
    count = len(paths)
    return {
        "load": round(os.getloadavg()[0], 1),
        "network": name,
        "method": method,
        "images": count,
        "pixels": f"{arguments.width}x{arguments.height}",
        "batch": batch,
        "accelerated": arguments.accelerate,
        "reduced_jpeg": arguments.reduced_jpeg,
        **{f"{side}_per_s": round(count / used, 2) for side, used in clock.items()},
        **{f"{side}_cpu_ms": round(1000 * used / count, 1) for side, used in cpu.items()},
        "of_loop": round(clock["loop"] / clock["run"], 2),
        "of_explainer": round(clock["explainer"] / clock["run"], 2),
        "of_forward": round(clock["forward"] / clock["run"], 2),
        **{f"of_{side}_cpu": round(cpu[side] / cpu["run"], 2) for side in ("loop", "explainer", "forward")},
        "decoding_threads": progress["threads"],
        "waiting_for_decoding": round(progress["waiting"] / progress["seconds"], 3),
        "waiting_for_writing": round(progress["writing"] / progress["seconds"], 3),
        "rounds": arguments.rounds,
    }


def memory(name: str, method: str, images: int, batch: int) -> dict[str, object]:
    """Returns the resident size along one run over so many images, the same pictures over and over."""
    model = loaded(name)
    pictures = [str(path) for path in photographs()]
    with tempfile.TemporaryDirectory() as out:
        listed = Path(out, "list.csv")
        with listed.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path"])
            writer.writerows([pictures[n % len(pictures)]] for n in range(images))
        recorded: list[tuple[int, float]] = []

        def note(progress: datasets.RunProgress) -> None:
            if not recorded or progress.images >= recorded[-1][0] + images // 20:
                recorded.append((progress.images, resident()))

        options = datasets.RunOptions(method=method, out=Path(out, "run"), batch_size=batch, shard_size=256)
        done = datasets.explain(str(listed), model, options, progress=note)
        assert (done.rows, done.errors) == (images, 0)
    # Memory that grows with the first parts is buffers; memory that grows after them is a leak.
    early = [size for count, size in recorded if count <= images // 4][-1]
    return {
        "network": name,
        "method": method,
        "images": images,
        "batch": batch,
        "seconds": round(done.progress.seconds, 1),
        "mib_after_a_quarter": round(early, 1),
        "mib_at_the_end": round(recorded[-1][1], 1),
        "mib_along": [round(size) for _, size in recorded],
    }


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each network and method."""
    with tempfile.TemporaryDirectory() as folder:
        paths = camera_files(Path(folder), options.images, (options.width, options.height))
        for name in NETWORKS:
            if options.network in (None, name):
                model = loaded(name)
                for method in EXPLAINED_BY:
                    if options.method in (None, method):
                        yield measure(model, name, method, paths, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--width", type=int, default=4000, help="of the JPEG files, in pixels")
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=0, help="classes that come with each image")
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--reduced-jpeg", action="store_true", help="in runs alone; the loop decodes files whole")
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--method", choices=EXPLAINED_BY)
    parser.add_argument("--memory", type=int, default=0, metavar="IMAGES", help="a long run, for its memory")
    parser.add_argument("--rows", action="store_true", help="keep what was measured in bench/data/throughput.csv")
    parser.add_argument("--library", metavar="_C.so", help="ours in place of the one that is installed")
    parser.add_argument("--long", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.long:
        print(json.dumps(memory(*options.long, options.memory, options.batch)))
        return
    load(options.library)
    for row in cases(options):
        print(json.dumps(row), flush=True)
        if options.rows:
            measured.append("throughput", [row])
    if options.memory:
        command = [sys.executable, __file__, "--memory", str(options.memory), "--batch", str(options.batch), "--long"]
        subprocess.run([*command, NETWORKS[1], "eigen-cam"], check=True, env=os.environ)


if __name__ == "__main__":
    main()
