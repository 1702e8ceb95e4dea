"""Peak memory of guided backprop beside Captum's, each in a process of its own: `make bench-memory`.

The figure is the increment of the process's peak over the loaded model and its images, as Linux counts it; the median
of several processes, since what the allocator gives back in time differs from run to run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import measured

NETWORKS = ("vgg16", "resnet50")
WHO = ("forward", "pyfast_xai", "captum")


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(network: str, who: str, batch: int) -> dict[str, float]:
    """Run one explanation in this process."""
    import torch

    import pyfast_xai

    torchvision = __import__("torchvision")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    target = list(range(batch))
    if who == "captum":
        from captum.attr import GuidedBackprop

        explain = GuidedBackprop(model)
        run = lambda x, t: explain.attribute(x.requires_grad_(), target=t)  # noqa: E731
    elif who == "pyfast_xai":
        run = pyfast_xai.GuidedBackprop(model)
    else:
        run = lambda x, t: torch.inference_mode()(model)(x)  # noqa: E731
    run(torch.randn(1, 3, 224, 224), [0])  # libraries load their code and pack weights on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    run(images, target)
    return {"increment_mib": (peak() - before) / 2**20, "model_mib": before / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=5, help="of each; the median counts")
    parser.add_argument("--rows", action="store_true", help="append what was measured to bench/data/cpu_memory.csv")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.batch)))
        return
    rows = []
    for network in NETWORKS:
        for who in WHO:
            command = [sys.executable, __file__, "--batch", str(options.batch), "--one", network, who]
            done = [
                subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(options.processes)
            ]
            runs = sorted((json.loads(item.stdout) for item in done), key=lambda run: run["increment_mib"])
            middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            rows.append({"network": network, "batch": options.batch, "who": who, **middle})
            low, median, high = (run["increment_mib"] for run in (runs[0], middle, runs[-1]))
            print(f"{network:10} {who:12} {median:8.0f} MiB over the loaded model ({low:.0f} to {high:.0f})")
    if options.rows:
        measured.append("cpu_memory", rows)


if __name__ == "__main__":
    # The import of torchvision needs the operators that a CPU build of torch lacks.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401

    main()
