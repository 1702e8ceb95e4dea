"""Runs on JPEG files of camera size beside what they are made of and what they replace: `make bench-throughput`.

For each network and method five sides take turns in one process, and the least of several rounds of each counts:

- `forward`: the model alone, on batches that lie decoded in memory;
- `explainer`: the method on the same batches;
- `loop`: a plain loop that decodes a batch with Pillow, explains it with pytorch-grad-cam and writes each map with
  `np.savez`; CNN-Fixations has no such peer, and its loop explains with this library;
- `run`: `datasets.run_job`, from files to a folder of parts, with files decoded whole, and as `reduced_jpeg` does.

`of_loop`, `of_explainer` and `of_forward` are how many times as fast as each the run is. The bare method has nothing to
decode, and no runner is faster than its decoding and its method together on the cores that there are. So `of_both` is
the processor time of decoding and the method, each done bare and alone, over that of the run: what is missing to 1 is
what the runner adds. The account says where all processor time of a run went, in milliseconds an image:

- `decode`: reading, decoding and resizing; `normalise`: bytes to numbers; `explain`: the method;
- `answers`: what a run needs of the model beyond the method, such as whether its outputs are finite;
- `rows`: boxes, maps and columns; `write`: Parquet and the disk;
- `rest`: what none of them explains: Python, queues, and caches that threads share. `decode_in_run` and
  `explain_in_run` are what both took within the run, so that a rest shows whose it is.

Hashing the weights and listing the files (`start`) happen once a run and are timed apart. `--memory` follows the
resident size over one long run in a process of its own, on Linux.
"""

# ruff: noqa: E402 another library is loaded in the place of the installed one before the latter is imported

import argparse
import contextlib
import copy
import csv
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quick import load, settle

_library = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_library.add_argument("--library")
load(_library.parse_known_args()[0].library)

import measured
import numpy as np
import torch
from PIL import Image
from trained import loaded, photographs

from pyfast_xai import datasets
from pyfast_xai.datasets import run_worker
from pyfast_xai.datasets.batching import BatchExplainer
from pyfast_xai.datasets.columns import Part
from pyfast_xai.datasets.decode import Decoded, decode, normalised, pillow_for_threads, recycle_pixels
from pyfast_xai.datasets.schema import PartInfo
from pyfast_xai.explainers import METHODS
from pyfast_xai.images import MAX_PIXELS, load_image
from pyfast_xai.models import LoadedModel

NETWORKS = ("resnet50_abm_pruned_int8", "mobilenet_v2_coral_int8")
ACCOUNT = ("decode", "normalise", "explain", "answers", "rows", "write", "rest", "decode_in_run", "explain_in_run")
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


def camera_files(folder: Path, count: int, size: tuple[int, int], distinct: int = 12) -> list[Path]:
    """Returns photographs as JPEG files of the size of a camera's: a few of them, under many names."""
    paths = [folder / f"{n:05d}.jpg" for n in range(count)]
    for path, photograph in zip(paths[:distinct], photographs(distinct), strict=False):
        with Image.open(photograph) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    for n, path in enumerate(paths[distinct:]):
        os.link(paths[n % distinct], path)
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


class Case:
    """A network and a method, and all that is done with them.

    Args:
        network: with its preprocessing.
        method: name of the explainer.
        paths: of the JPEG files.
        folder: for what is written.
        options: of the command line.
    """

    def __init__(
        self, network: LoadedModel, method: str, paths: list[Path], folder: Path, options: argparse.Namespace
    ) -> None:
        self.network, self.method, self.paths, self.folder, self.options = network, method, paths, folder, options
        self.explainer = METHODS[method](network.model, accelerate=options.accelerate)
        # The peer's hooks stay on its model: replays serve none that has hooks.
        self.explain_peer = peer(copy.deepcopy(network.model), method)
        self.parts = [paths[start : start + options.batch] for start in range(0, len(paths), options.batch)]
        self.loop_parts = self.parts[: max(1, options.loop_images // options.batch)]
        pixels = [decode(item, network.preprocess, MAX_PIXELS).input for item in self.items()]
        self.pixels = [torch.stack(pixels[n : n + options.batch]) for n in range(0, len(pixels), options.batch)]
        self.ready = [normalised(batch, network.preprocess) for batch in self.pixels]
        self.start: list[tuple[float, float]] = []
        self.progress: dict[bool, datasets.RunProgress] = {}
        self.in_run: dict[bool, list[dict[str, float]]] = {False: [], True: []}

    def items(self) -> list[datasets.Item]:
        return list(datasets.Files(self.paths).items(0, len(self.paths)))

    def forward(self) -> None:
        with torch.inference_mode():
            for images in self.ready:
                self.network.model(images)

    def bare(self) -> None:
        for images in self.ready:
            self.explainer(images)

    def loop(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            for n, part in enumerate(self.loop_parts):
                images = torch.stack([self.network.preprocess(load_image(path))[0] for path in part])
                results = self.explain_peer(images)
                maps = results.heatmap.numpy() if self.method == "fixations" else results
                for k, one in enumerate(maps):
                    np.savez(Path(out, f"{n}-{k}.npz"), map=np.asarray(one))

    def job(self, out: str, reduced_jpeg: bool = False) -> datasets.Job:
        options = datasets.RunOptions(
            method=self.explainer,
            out=out,
            batch_size=self.options.batch,
            top_k=self.options.top_k,
            shard_size=len(self.paths),
            reduced_jpeg=reduced_jpeg,
        )
        return datasets.prepare([str(path) for path in self.paths], self.network, options)

    def run(self, reduced_jpeg: bool) -> tuple[float, float]:
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            made: list[datasets.Job] = []
            self.start.append(timed(lambda: made.append(self.job(out, reduced_jpeg))))
            summaries: list[datasets.Summary] = []
            with within_run() as seconds:
                used = timed(lambda: summaries.append(datasets.run_job(made[0])))
        self.in_run[reduced_jpeg].append(seconds)
        (done,) = summaries
        assert (done.rows, done.errors) == (len(self.paths), 0)
        self.progress[reduced_jpeg] = done.progress
        return used

    def decode(self, reduced_jpeg: bool) -> None:
        recycle_pixels()
        with pillow_for_threads(MAX_PIXELS):
            for item in self.items():
                assert decode(item, self.network.preprocess, MAX_PIXELS, reduced_jpeg).error is None

    def account(self) -> dict[str, float]:
        """Returns processor seconds of what a run does beside decoding and the method, each done alone."""
        seconds: dict[str, float] = {}

        def note(name: str, work: Callable[[], Any]) -> Any:
            results: list[Any] = []
            seconds[name] = timed(lambda: results.append(work()))[1]
            return results[0]

        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            job = self.job(out)
            job.store.folder.make()
            batches_of = BatchExplainer(self.explainer, self.options.top_k, self.options.batch)
            part = Part(range(len(self.paths)), job.settings.stored, self.network.preprocess)
            note("normalise", lambda: [normalised(batch, self.network.preprocess) for batch in self.pixels])
            results = note("explain_and_answers", lambda: [batches_of(images, None) for images in self.ready])
            decoded = [Decoded(item, size=(self.options.width, self.options.height)) for item in self.items()]

            def rows() -> Any:
                for n, batch in enumerate(results):
                    for result in batch:
                        part.add(decoded[n * self.options.batch : (n + 1) * self.options.batch], result, 0.0)
                return part.table(PartInfo(job.manifest.fingerprint, 0, 0, len(self.paths), 0, self.options.batch))

            table = note("rows", rows)
            note("write", lambda: job.store.write(0, table))
        return seconds


@contextlib.contextmanager
def within_run() -> Iterator[dict[str, float]]:
    """Counts the processor seconds that runs spend in decoding and in the method, on whatever threads."""
    seconds = {"decode_in_run": 0.0, "explain_in_run": 0.0}
    lock = threading.Lock()

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    seconds[name] += time.thread_time() - start

        return call

    explain = BatchExplainer.__call__
    run_worker.decode = counted(decode, "decode_in_run")
    BatchExplainer.__call__ = counted(explain, "explain_in_run")
    try:
        yield seconds
    finally:
        run_worker.decode, BatchExplainer.__call__ = decode, explain


def least(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns the least seconds on the clock, and the least of processor time."""
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def measure(case: Case, name: str, seconds_left: float) -> Iterator[dict[str, Any]]:
    """Yields a row for files that are decoded whole, and one for those that are decoded at a fraction of their size.

    Args:
        case: what is measured.
        name: of the network.
        seconds_left: no round begins after these.
    """
    end = time.monotonic() + seconds_left
    options, preparations = case.options, lambda: 0
    if options.accelerate:
        preparations = lambda: case.explainer.accelerated_model.preparations  # noqa: E731
    # Recording, packing of weights and the first pages of memory belong to no side.
    case.forward()
    settle(case.bare, preparations)
    settle(case.account, preparations)
    for reduced_jpeg in (True, False):
        settle(lambda reduced_jpeg=reduced_jpeg: case.run(reduced_jpeg), preparations)
    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "forward": lambda: timed(case.forward),
        "explainer": lambda: timed(case.bare),
        "loop": lambda: timed(case.loop),
        "run": lambda: case.run(False),
        "run_reduced": lambda: case.run(True),
        "decode": lambda: timed(lambda: case.decode(False)),
        "decode_reduced": lambda: timed(lambda: case.decode(True)),
    }
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    accounts: list[dict[str, float]] = []
    rounds = 0
    while rounds < options.rounds and (not rounds or time.monotonic() < end):
        for side, work in sides.items():
            taken[side].append(work())
        accounts.append(case.account())
        rounds += 1
    counts = dict.fromkeys(sides, len(case.paths)) | {"loop": sum(map(len, case.loop_parts))}
    # Milliseconds an image.
    clock = {side: 1000 * least(pairs)[0] / counts[side] for side, pairs in taken.items()}
    cpu = {side: 1000 * least(pairs)[1] / counts[side] for side, pairs in taken.items()}
    parts = {key: 1000 * min(account[key] for account in accounts) / len(case.paths) for key in accounts[0]}
    start = least(case.start)
    for reduced_jpeg in (False, True):
        suffix = "_reduced" if reduced_jpeg else ""
        run, run_cpu, decoding = clock[f"run{suffix}"], cpu[f"run{suffix}"], cpu[f"decode{suffix}"]
        progress = case.progress[reduced_jpeg]
        account = {
            "decode": decoding,
            "normalise": parts["normalise"],
            "explain": cpu["explainer"],
            "answers": parts["explain_and_answers"] - cpu["explainer"],
            "rows": parts["rows"],
            "write": parts["write"],
        }
        account["rest"] = run_cpu - sum(account.values())
        for key in ("decode_in_run", "explain_in_run"):
            account[key] = 1000 * min(seconds[key] for seconds in case.in_run[reduced_jpeg]) / len(case.paths)
        yield {
            "load": round(os.getloadavg()[0], 1),
            "network": name,
            "method": case.method,
            "images": len(case.paths),
            "pixels": f"{options.width}x{options.height}",
            "file_kb": round(sum(path.stat().st_size for path in case.paths) / len(case.paths) / 1000),
            "batch": options.batch,
            "accelerated": options.accelerate,
            "reduced_jpeg": reduced_jpeg,
            **{f"{side}_per_s": round(1000 / clock[side], 2) for side in ("forward", "explainer", "loop")},
            "run_per_s": round(1000 / run, 2),
            **{f"{side}_cpu_ms": round(cpu[side], 1) for side in ("forward", "explainer", "loop")},
            "run_cpu_ms": round(run_cpu, 1),
            **{f"of_{side}": round(clock[side] / run, 2) for side in ("loop", "explainer", "forward")},
            **{f"of_{side}_cpu": round(cpu[side] / run_cpu, 2) for side in ("loop", "explainer", "forward")},
            "of_both": round((decoding + cpu["explainer"]) / run_cpu, 2),
            **{f"{key}_ms": round(value, 2) for key, value in account.items()},
            "start_s": round(start[1], 2),
            "decoding_threads": progress.threads,
            "waiting_for_decoding": round(progress.waiting / progress.seconds, 3),
            "waiting_for_writing": round(progress.writing / progress.seconds, 3),
            "rounds": rounds,
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
    """Yields the rows of each network and method."""
    end = time.monotonic() + 60 * options.minutes
    chosen = [
        (name, method)
        for name in NETWORKS
        for method in EXPLAINED_BY
        if options.network in (None, name) and options.method in (None, method)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = camera_files(Path(folder), options.images, (options.width, options.height))
        for done, (name, method) in enumerate(chosen):
            case = Case(loaded(name), method, paths, Path(folder), options)
            yield from measure(case, name, (end - time.monotonic()) / (len(chosen) - done))


def shown(rows: list[dict[str, Any]]) -> str:
    """Returns what was measured as two tables: how fast runs are, and where their processor time went."""
    names = ("network", "method", "reduced_jpeg")
    speeds = ("run_per_s", "of_loop", "of_explainer", "of_forward", "of_loop_cpu", "of_explainer_cpu", "of_forward_cpu")
    tables = [
        (*names, *speeds, "of_both", "rounds", "load"),
        (*names, "run_cpu_ms", *(f"{key}_ms" for key in ACCOUNT), "waiting_for_decoding", "start_s"),
    ]
    return "\n\n".join(
        measured.table([columns, *([row[key] for key in columns] for row in rows)]) for columns in tables
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--loop-images", type=int, default=8, help="of them for the plain loop, which is slow")
    parser.add_argument("--width", type=int, default=4000, help="of the JPEG files, in pixels")
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="at most, as far as the time allows; at least one")
    parser.add_argument("--minutes", type=float, default=8, help="no further round begins after these")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; decoding has the other cores")
    parser.add_argument("--top-k", type=int, default=0, help="classes that come with each image")
    parser.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--method", choices=EXPLAINED_BY)
    parser.add_argument("--memory", type=int, default=0, metavar="IMAGES", help="a long run, for its memory")
    parser.add_argument("--rows", action="store_true", help="keep what was measured in bench/data/throughput.csv")
    parser.add_argument("--table", action="store_true", help="show what was kept, and measure nothing")
    parser.add_argument("--library", metavar="_C.so", help="ours in place of the one that is installed")
    parser.add_argument("--long", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.long:
        print(json.dumps(memory(*options.long, options.memory, options.batch)))
        return
    if options.table:
        print(shown(measured.read("throughput", "network", "method", "reduced_jpeg")))
        return
    torch.set_num_threads(options.threads)
    rows = []
    for row in cases(options):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.rows:
            measured.append("throughput", [row])
    print(f"\n{json.dumps(measured.taken())}\n\n{shown(rows)}")
    if options.memory:
        command = [sys.executable, __file__, "--memory", str(options.memory), "--batch", str(options.batch), "--long"]
        subprocess.run([*command, NETWORKS[1], "eigen-cam"], check=True, env=os.environ)


if __name__ == "__main__":
    main()
