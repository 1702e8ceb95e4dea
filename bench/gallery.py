"""The gallery of docs/gallery.md: sample photographs of scikit-image through every method and a real network.

`make gallery`. The network is one of those in PYFAST_XAI_DATA where there is such a folder, else torchvision's
ResNet-50 with its published weights.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data
from torch import Tensor

from pyfast_xai import InputError, render
from pyfast_xai.explainers import METHODS
from pyfast_xai.explanation import Explanation
from pyfast_xai.models import LoadedModel, load_model
from pyfast_xai.reproduce import Data

# Photographs free to show: by Stéfan van der Walt (CC0), Rachel Michetti (CC0), SpaceX (CC0), NASA (public domain).
PHOTOGRAPHS = {"chelsea": "a cat", "coffee": "an espresso", "rocket": "a rocket", "astronaut": "an astronaut"}
NETWORK = "resnet50_abm_pruned_int8"


def photograph(name: str) -> Any:
    """The middle square of a photograph."""
    image = Image.fromarray(getattr(data, name)())
    edge = min(image.size)
    left, top = ((size - edge) // 2 for size in image.size)
    return image.crop((left, top, left + edge, top + edge))


def load(name: str) -> LoadedModel:
    """A network and how it wants pictures."""
    folder = Path(os.environ.get("PYFAST_XAI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if (folder / "models.py").is_file():
        return next(Data(folder, names=(name,)).networks(()))
    return load_model("torchvision/resnet50", "DEFAULT")


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
    loaded = load(given.network)
    pairs = [loaded.preprocess(photograph(name)) for name in PHOTOGRAPHS]
    images, ground = (torch.stack(part) for part in zip(*pairs, strict=True))
    rows, labels, titles = [list(ground)], ["photograph"], [list(PHOTOGRAPHS.values())]
    for name, method in METHODS.items():
        began = time.perf_counter()
        try:
            explanation = method(loaded.model)(images)
        except InputError as error:
            print(f"{name:22} {error}")
            continue
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
