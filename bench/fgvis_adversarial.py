"""FGVis Table 1: can an explanation be generated of a class that is not in the picture?

The generation game without sparsity, played for the least likely class (the second least, where the grey image is of
that class), on pictures whose class the network is sure of. It is won once the perturbed picture is of that class.
Wagner et al. (2019) played it on 1000 ILSVRC validation pictures with p >= 0.995: 100 % undefended; defended 0.2 %
(VGG-16), 0.0 % (AlexNet, ResNet-50, GoogLeNet).

    make bench-fgvis
"""

import argparse
import csv
import datetime
import time
from pathlib import Path

import networks
import torch
from torch import Tensor, nn

from pyfast_xai import FGVis, __version__

DEFENCES = ("none", "gradient", "forward")


def sure(network: networks.Network, count: int, least: float) -> Tensor:
    """Pictures `[count, 3, H, W]` that the network classifies correctly with at least this probability."""
    kept: list[Tensor] = []
    pictures = networks.pictures()
    for start in range(0, len(pictures), 16):
        batch = pictures[start : start + 16]
        images = network.preprocess(torch.stack([picture.pixels(network.size) for picture in batch]))
        with torch.inference_mode():
            shares = network.model(images).softmax(1)
        labels = torch.tensor([picture.label for picture in batch])
        kept += list(images[shares.gather(1, labels[:, None])[:, 0] >= least])
        if len(kept) >= count:
            break
    return torch.stack(kept[:count])


def absent(model: nn.Module, images: Tensor) -> Tensor:
    """The least likely class of each image, or the second where that is what a grey image is taken for."""
    with torch.inference_mode():
        two = model(images).topk(2, largest=False).indices
        grey = model(torch.zeros_like(images[:1])).argmax()
    return torch.where(two[:, 0] == grey, two[:, 1], two[:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(networks.IMAGENET))
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=["none", "gradient"])
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--least", type=float, default=0.995, help="probability of the true class")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=Path, help="write the table here")
    given = parser.parse_args()
    rows = []
    for name in given.networks:
        network = networks.network(name)
        images = sure(network, given.count, given.least)
        target = absent(network.model, images)
        for defence in given.defences:
            began = time.perf_counter()
            explain = FGVis(
                network.model,
                **{"game": "generation", "defence": defence, "sparsity": 0.0, "until": "class", "patience": 0},
                iterations=given.iterations,
            )
            parts = [
                explain(images[i : i + given.batch], target[i : i + given.batch])
                for i in range(0, len(images), given.batch)
            ]
            won = torch.cat([part.reached for part in parts])
            row = {
                **{"date": datetime.date.today().isoformat(), "pyfast_xai": __version__, "torch": torch.__version__},
                **{"network": name, "pictures": len(images), "least": given.least, "iterations": given.iterations},
                **{"defence": defence, "generated_percent": round(100 * float(won.float().mean()), 2)},
                "median_probability": round(float(torch.cat([part.after for part in parts]).median()), 5),
            }
            rows.append(row)
            seconds = time.perf_counter() - began
            print(
                f"{name:28} {defence:9} {row['generated_percent']:6.1f} % of {len(images)}, {seconds:.0f} s", flush=True
            )
    if given.rows:
        with given.rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
