"""The gallery of docs/gallery.md: sample photographs of scikit-image through every method and a real network.

`make gallery`. The network is one of those in PYFAST_XAI_DATA where there is such a folder, else torchvision's
ResNet-50 with its published weights.
"""

import argparse
import time
from pathlib import Path

import networks
import torch
from skimage import data
from torch import Tensor, nn

from pyfast_xai import render
from pyfast_xai.explainers import METHODS
from pyfast_xai.explanation import Explanation

# Photographs free to show: by Stéfan van der Walt (CC0), Rachel Michetti (CC0), SpaceX (CC0), NASA (public domain).
PHOTOGRAPHS = {"chelsea": "a cat", "coffee": "an espresso", "rocket": "a rocket", "astronaut": "an astronaut"}
NETWORK = "resnet50_abm_pruned_int8"


def pixels(name: str, side: int) -> Tensor:
    """The middle square of a photograph, RGB 0..255 `[3, side, side]`."""
    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float()
    edge = min(image.shape[1:])
    top, left = ((size - edge) // 2 for size in image.shape[1:])
    square = image[None, :, top : top + edge, left : left + edge]
    return nn.functional.interpolate(square, (side, side), mode="bilinear", antialias=True)[0].clamp(0, 255)


def load(name: str) -> tuple[nn.Module, int, object]:
    """A network, the side of its input and how it wants pixels."""
    try:
        network = networks.network(name)
        return network.model, network.size, network.preprocess
    except FileNotFoundError:
        from torchvision.models import ResNet50_Weights, resnet50

        weights = ResNet50_Weights.DEFAULT
        recipe = weights.transforms()
        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
        return resnet50(weights=weights).eval(), 224, lambda raw: (raw - mean) / std


def shown(explanation: Explanation, ground: Tensor) -> Tensor:
    """The picture people know a method by: signed colours, masked colours or heat over the photograph."""
    if explanation.attribution is None or explanation.method in ("fixations", "clear", "occlusion"):
        return explanation.overlay(ground)
    return explanation.rgb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.png"))
    parser.add_argument("--network", default=NETWORK)
    parser.add_argument("--side", type=int, default=200, help="of a picture on the sheet, in pixels")
    given = parser.parse_args()
    model, size, preprocess = load(given.network)
    raw = torch.stack([pixels(name, size) for name in PHOTOGRAPHS])
    images, ground = preprocess(raw), raw / 255
    rows, labels, titles = [list(ground)], ["photograph"], [list(PHOTOGRAPHS.values())]
    for name, method in METHODS.items():
        began = time.perf_counter()
        explanation = method(model)(images)
        seconds = (time.perf_counter() - began) / len(images)
        print(f"{name:22} {seconds:8.2f} s an image")
        rows.append(list(shown(explanation, ground)))
        labels.append(name)
        if explanation.target is not None:
            titles = [explanation.captions()]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_bytes(render.png_bytes(render.montage(rows, labels=labels, titles=titles, side=given.side)))
    print(f"Picture: {given.out}")


if __name__ == "__main__":
    main()
