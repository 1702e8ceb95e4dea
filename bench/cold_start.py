"""Seconds until there is a first explanation, each in processes of their own: `make bench-cold-start`.

What `import pyfast_xai` takes beyond `import torch`; then, of each explainer on a small network, its import and first
call beside a second call. Nothing is compiled on the way where there is a binary.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from typing import Any

METHODS = ("EigenCAM", "GradCAM", "CNNFixations", "Saliency", "GuidedBackprop", "FGVis", "CLEAR")
SETTINGS: dict[str, dict[str, Any]] = {"FGVis": {"n_iterations": 5, "progress": False}}


def since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)


def measure(what: str, backend: str) -> dict[str, Any]:
    """Milliseconds in this process, in which nothing was imported yet."""
    start = time.perf_counter()
    torch = importlib.import_module("torch")
    used: dict[str, Any] = {"first_ms": since(start)}
    if what == "import torch":
        return used
    start = time.perf_counter()
    package = importlib.import_module("pyfast_xai")
    if what == "import pyfast_xai":
        return {"first_ms": since(start)}
    method = getattr(package, what.removesuffix(", imported"))
    if what.endswith(", imported"):
        return {"first_ms": since(start)}
    model = small_network(torch)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        model(images)  # what PyTorch does once is not counted
    explainer = method(model, **SETTINGS.get(what, {}))
    with package.backend(backend):
        start = time.perf_counter()
        explainer(images)
        used = {"first_ms": since(start)}
        start = time.perf_counter()
        explainer(images)
    return {**used, "again_ms": since(start)}


def small_network(torch: Any) -> Any:
    """Two convolutions, max-pooling and two linear layers."""
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 256, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--backends", default="auto", help="separated by commas; numba shows what compiling costs")
    parser.add_argument("--rows", action="store_true", help="append what was measured to bench/data/cpu_cold_start.csv")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    imports = [(what, "auto") for what in ("import torch", "import pyfast_xai", "EigenCAM, imported")]
    rows = []
    for what, backend in [*imports, *((method, item) for item in options.backends.split(",") for method in METHODS)]:
        command = [sys.executable, __file__, "--one", what, backend]
        result = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(options.processes)
        ]
        first = sorted(item["first_ms"] for item in result)
        row = {"what": what, "backend": backend, "first_ms": statistics.median(first), "low": first[0]}
        row |= {"high": first[-1], "processes": options.processes}
        repeated = ""
        if "again_ms" in result[0]:
            row["again_ms"] = statistics.median(item["again_ms"] for item in result)
            repeated = f", again {row['again_ms']:.1f} ms"
        print(
            f"{what:20} {backend:10} {row['first_ms']:8.1f} ms ({row['low']:.1f} to {row['high']:.1f}){repeated}",
            flush=True,
        )
        rows.append(row)
    if options.rows:
        import measured  # and torch, which a measuring process must not have yet

        measured.append("cpu_cold_start", rows)


if __name__ == "__main__":
    main()
