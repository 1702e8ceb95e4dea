import csv
import datetime
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import pyfast_xai

DATA = Path(__file__).parent / "data" / "cpu.csv"
COLUMNS = (
    "date", "commit", "pyfast_xai", "torch", "cpu", "threads", "network", "batch", "method", "backend",
    "forward_ms", "explain_ms", "forwards", "low", "high", "rounds",
)  # fmt: skip


NETWORKS = (
    *("alexnet", "vgg16", "googlenet", "resnet50", "resnet101"),
    *("densenet121", "mobilenet_v2", "vit_b_16"),
)


def pytest_addoption(parser):
    parser.addoption("--rows", action="store_true", help="append what was measured to bench/data/cpu.csv")
    parser.addoption("--networks", default=",".join(NETWORKS), help="of torchvision, separated by commas")
    parser.addoption("--batches", default="8", help="images at a time, separated by commas")
    parser.addoption("--rounds", type=int, default=7, help="pairs of forward and explanation that are timed")


def pytest_generate_tests(metafunc):
    if "network" in metafunc.fixturenames:
        names, batches = (metafunc.config.getoption(name).split(",") for name in ("--networks", "--batches"))
        cases = [(name, int(batch)) for name in names for batch in batches]
        metafunc.parametrize("network", cases, ids=[f"{n}-{b}" for n, b in cases], indirect=True, scope="module")


def _cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@pytest.fixture(scope="session")
def rows(request):
    """Collects measured rows; prints them at the end and appends them to the CSV when asked to."""
    collected = []
    yield collected
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "pyfast_xai": pyfast_xai.__version__,
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    print(f"\n\n{common['cpu']}, {common['threads']} threads, torch {common['torch']}, commit {common['commit']}")
    print("| network | method | backend | forwards (20-80 %) | ms | forward ms |\n|---|---|---|---|---|---|")
    for row in collected:
        print(
            f"| {row['network']} | {row['method']} | {row['backend']} | {row['forwards']:.2f} ({row['low']:.2f}-"
            f"{row['high']:.2f}) | {row['explain_ms']:.0f} | {row['forward_ms']:.0f} |"
        )
    if request.config.getoption("--rows") and collected:
        new = not DATA.exists()
        DATA.parent.mkdir(exist_ok=True)
        with DATA.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows({**common, **row} for row in collected)
