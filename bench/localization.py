"""Where do explanations point? Box and pointing accuracy on real networks and pictures, with the centre baseline.

    python bench/localization.py --out out/localization.md

Box error: intersection over union with no ground-truth box reaches 0.5 (inclusive pixels); "top-1" also asks for the
right class. Pointing: the peak of the heat map lies in a ground-truth box. Both also for pictures whose largest box
covers under a quarter of them, where the centre is no good guess.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import networks
import torch
from torch import Tensor, nn

import pyfast_xai
from pyfast_xai import CNNFixations, EigenCAM, Explainer, localize

METHODS: dict[str, Callable[[nn.Module], Explainer]] = {
    "CNN-Fixations, default (activation)": lambda m: CNNFixations(m),
    "CNN-Fixations, product": lambda m: CNNFixations(m, location="product"),
    "CNN-Fixations, center": lambda m: CNNFixations(m, location="center"),
    "CNN-Fixations, activation, unsigned": lambda m: CNNFixations(m, signed=False),
    "CNN-Fixations, paper": lambda m: CNNFixations(m, variant="paper"),
    "CNN-Fixations, authors": lambda m: CNNFixations(m, variant="authors"),
    "Eigen-CAM": lambda m: EigenCAM(m),
    "Eigen-CAM, centred": lambda m: EigenCAM(m, center=True),
}


class Score:
    """Counts of hits over pictures."""

    def __init__(self) -> None:
        self.rows: list[tuple[bool, bool, bool, bool]] = []  # small, box, box and class, pointing

    def add(self, box: Tensor, peak: tuple[int, int], right: bool, truth: Tensor, small: bool) -> None:
        hit = bool((localize.iou(box, truth) >= 0.5).any())
        y, x = peak
        inside = bool(((truth[:, 0] <= x) & (x <= truth[:, 2]) & (truth[:, 1] <= y) & (y <= truth[:, 3])).any())
        self.rows.append((small, hit, hit and right, inside))

    def cells(self) -> list[str]:
        table = torch.tensor(self.rows, dtype=torch.float64)
        small = table[table[:, 0] == 1]
        error = 100 * (1 - table.mean(0))
        return [
            f"{error[1]:.1f}",
            f"{error[2]:.1f}",
            f"{100 - error[3]:.1f}",
            f"{100 * (1 - small[:, 1].mean()):.1f}",
            f"{100 * small[:, 3].mean():.1f}",
        ]


def centre(side: int, share: float = 0.8) -> Tensor:
    """A centred box with `share` of each side."""
    edge = side * (1 - share) / 2
    return torch.tensor([edge, edge, side - 1 - edge, side - 1 - edge])


def evaluate(name: str, pictures: list[networks.Picture], batch: int = 20) -> dict[str, list[str]]:
    """A row of figures for each method on one network."""
    net = networks.network(name)
    explainers = {label: make(net.model) for label, make in METHODS.items()}
    scores = {label: Score() for label in ["centre", *explainers]}
    for at in range(0, len(pictures), batch):
        part = pictures[at : at + batch]
        images = net.preprocess(torch.stack([p.pixels(net.size) for p in part]))
        with torch.inference_mode():
            right = net.model(images).argmax(1) == torch.tensor([p.label for p in part])
        results = {label: explainer(images) for label, explainer in explainers.items()}
        boxes = {label: result.boxes() for label, result in results.items()}
        peaks = {label: result.peak().tolist() for label, result in results.items()}
        for i, picture in enumerate(part):
            truth, small = picture.boxes_at(net.size), picture.share < 0.25
            for label in explainers:
                scores[label].add(boxes[label][i], tuple(peaks[label][i]), bool(right[i]), truth, small)
            middle = (net.size // 2, net.size // 2)
            scores["centre"].add(centre(net.size), middle, bool(right[i]), truth, small)
    return {label: score.cells() for label, score in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=None, help="how many; all by default")
    parser.add_argument("--networks", nargs="+", default=networks.IMAGENET)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    pictures = networks.pictures(arguments.pictures)
    small = sum(p.share < 0.25 for p in pictures)
    lines = [
        f"{len(pictures)} ILSVRC validation pictures, {small} of them with a box under a quarter of the picture. "
        f"pyfast_xai {pyfast_xai.__version__}, torch {torch.__version__}.",
        "",
        "| network | method | box error | top-1 box error | pointing | box error, small | pointing, small |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.networks:
        for label, cells in evaluate(name, pictures).items():
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
