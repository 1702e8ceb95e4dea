"""CLEAR Table 1 on MNIST: how much of the accuracy is in the strong features, and how much in the rest.

    python bench/clear_mnist.py DATA mnist_fcn.safetensors

The network is that of `examples/train_mnist_fcn.py`, and so are the images it has not seen. A feature is strong where
the response to the right class is at least a threshold of its largest, with its neighbours where it is dilated; what is
taken away becomes background.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pyfast_xai import CLEAR
from pyfast_xai.metrics import strong_features

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_mnist_fcn import network, split

PAPER = {"full": 99.26, "only": 79.89, "without": 43.45}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--variants", nargs="+", default=["linear", "deconvnet", "guided"])
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--dilations", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--dominant", action="store_true", help="only where no other class responds more")
    parser.add_argument("--unpooling", default="switches")
    parser.add_argument("--fill", type=float, default=0.0, help="what pixels that are taken away become")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the table here, as CSV")
    given = parser.parse_args()
    model = network().eval()
    model.load_state_dict(load_file(given.weights))
    _, (images, digits) = split(given.data)
    images, digits = images[: given.count], digits[: given.count]
    rows = [{"variant": "paper", "threshold": "", "dilation": "", **PAPER}]
    print(f"{'':12}{'threshold':>10}{'dilation':>10}{'full':>8}{'only strong':>13}{'without':>9}\n{'paper':32}", end="")
    print(f"{PAPER['full']:8.2f}{PAPER['only']:13.2f}{PAPER['without']:9.2f}")
    for variant in given.variants:
        explain = CLEAR(model, classes=None, variant=variant, unpooling=given.unpooling)
        every = torch.cat([explain.responses(part, range(10)) for part in images.split(100)])
        responses = every[torch.arange(len(every)), digits]
        if given.dominant:
            responses = torch.where(responses == every.amax(1), responses, 0)
        for threshold in given.thresholds:
            for dilation in given.dilations:
                found = strong_features(
                    model, images, responses, digits, threshold=threshold, dilation=dilation, fill=given.fill
                )
                shares = {name: round(100 * float(part.float().mean()), 2) for name, part in found._asdict().items()}
                rows.append({"variant": variant, "threshold": threshold, "dilation": dilation, **shares})
                print(f"{variant:12}{threshold:10.2f}{dilation:10}", end="")
                print(f"{shares['full']:8.2f}{shares['only']:13.2f}{shares['without']:9.2f}", flush=True)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
