"""Start and resumption of a run over many files: `python bench/listing.py --files 1000000 --in FOLDER`.

The files are hard links in folders of 1,000, made in FOLDER unless they are there. A start lists them and stores the
listing in the folder of the run; going on opens it there. Each is a process of its own, and the figures are processor
seconds and resident memory beyond what it had with everything imported.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

PER_FOLDER = 1000
PER_FILE = 50_000  # links to one file; some file systems allow 65,000


def link(top: Path, count: int) -> None:
    """Makes the links that are missing; a folder is whole once the next one is there."""
    top.mkdir(parents=True, exist_ok=True)
    there = max(0, len(os.listdir(top / "files")) - 1) if (top / "files").is_dir() else 0
    for folder in range(there, -(-count // PER_FOLDER)):
        original = top / f"original-{folder * PER_FOLDER // PER_FILE}.jpg"
        if not original.exists():
            original.write_bytes(b"no picture, but a file")
        place = top / "files" / f"{folder:06d}"
        place.mkdir(parents=True, exist_ok=True)
        for n in range(folder * PER_FOLDER, min(count, (folder + 1) * PER_FOLDER)):
            try:
                os.link(original, place / f"{n:08d}.jpg")
            except FileExistsError:
                continue


def resident() -> tuple[float, float]:
    """Returns the resident size of this process in MiB, now and at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(sizes["VmRSS"]) / 1024, int(sizes["VmHWM"]) / 1024


def processor() -> float:
    """Returns the processor seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(files: Path, out: Path) -> dict[str, float]:
    """Opens the run of a folder of files, and explains nothing."""
    from pyfast_xai import datasets, demo
    from pyfast_xai.datasets.run import open_run
    from pyfast_xai.images import Preprocess

    model = demo.load()
    before, (memory, _), start = processor(), resident(), time.perf_counter()
    job = datasets.prepare(str(files), model, method="grad-cam", out=out, preprocess=Preprocess(96))
    with open_run(job) as opened:
        shards = len(opened.remaining)
    used = processor() - before
    return {
        "files": len(job.listing),
        "shards": shards,
        "cpu_s": round(used, 2),
        "clock_s": round(time.perf_counter() - start, 2),
        "memory_mib": round(resident()[1] - memory, 1),
        "listing_mb": round(sum(path.stat().st_size for path in out.glob("_listing-*")) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--in", dest="place", type=Path, required=True, help="folder for the links, kept")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    link(options.place, options.files)
    out = options.place / "run"
    shutil.rmtree(out, ignore_errors=True)
    for what in ("start", "goes on"):
        command = [
            sys.executable,
            __file__,
            "--in",
            str(options.place),
            "--one",
            str(options.place / "files"),
            str(out),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(json.dumps({"what": what, **json.loads(done.stdout.splitlines()[-1])}), flush=True)


if __name__ == "__main__":
    main()
