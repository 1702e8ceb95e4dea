"""The gallery of docs/gallery.md: sample photographs of scikit-image through every method and a real network.

`make gallery`, about six minutes on one core. The network is one of those in PYFAST_XAI_DATA where there is such a
folder, else torchvision's ResNet-50 with its published weights.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data
from torch import Tensor

from pyfast_xai import InputError, render
from pyfast_xai.explainers import METHODS
from pyfast_xai.explanation import Explanation
from pyfast_xai.memory import keep_freed_memory
from pyfast_xai.models import LoadedModel, load_model
from pyfast_xai.reproduce import Data

# Photographs free to show: by Stéfan van der Walt (CC0), Rachel Michetti (CC0), SpaceX (CC0), NASA (public domain).
PHOTOGRAPHS = {"chelsea": "a cat", "coffee": "an espresso", "rocket": "a rocket", "astronaut": "an astronaut"}
NETWORK = "resnet50_abm_pruned_int8"
# What needs hundreds of passes by default makes do with tens: docs/gallery.md says so.
FEWER = {
    "smoothgrad": {"samples": 10},
    "integrated-gradients": {"steps": 20},
    "occlusion": {"window": 48, "stride": 22},
    "rise": {"masks": 150},
    "lime": {"samples": 100},
    "meaningful-perturbation": {"iterations": 40, "start": 1.0},
}


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
        loaded = next(Data(folder, names=(name,)).networks(()))
        # "n02123045 tabby, tabby cat"
        words = (folder / "imagenet" / "synset_words.txt").read_text().splitlines()
        return replace(loaded, classes=[line.split(" ", 1)[1].split(",")[0] for line in words])
    return load_model("torchvision/resnet50", "DEFAULT")


def shown(explanation: Explanation, ground: Tensor) -> Tensor:
    """The picture people know a method by: signed colours, masked colours or heat over the photograph."""
    if explanation.attribution is None or explanation.method in ("fixations", "clear", "occlusion"):
        return explanation.overlay(ground)
    return explanation.rgb()


def sheet(rows: list[list[Tensor]], labels: list[str], titles: list[str], side: int) -> Any:
    """Two columns of methods, each below the photographs."""
    middle = len(rows) // 2
    parts = [
        render.montage([rows[0], *rows[1:][part]], labels=["photograph", *labels[part]], titles=[titles], side=side)
        for part in (slice(middle), slice(middle, None))
    ]
    both = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    both.paste(parts[0], (0, 0))
    both.paste(parts[1], (parts[0].width, 0))
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.jpg"))
    parser.add_argument("--network", default=NETWORK, help="of the folder, trained on ImageNet")
    parser.add_argument("--side", type=int, default=128, help="of a picture on the sheet, in pixels")
    given = parser.parse_args()
    keep_freed_memory()
    loaded = load(given.network)
    pairs = [loaded.preprocess(photograph(name)) for name in PHOTOGRAPHS]
    images, ground = (torch.stack(part) for part in zip(*pairs, strict=True))
    rows, labels, titles = [list(ground)], [], list(PHOTOGRAPHS.values())
    for name, method in METHODS.items():
        began = time.perf_counter()
        try:
            explanation = method(loaded.model, **FEWER.get(name, {}), labels=loaded.classes)(images)
        except InputError as error:
            print(f"{name:22} {error}")
            continue
        seconds = (time.perf_counter() - began) / len(images)
        print(f"{name:22} {seconds:8.2f} s an image", flush=True)
        rows.append(list(shown(explanation, ground)))
        labels.append(name)
        if explanation.target is not None:
            titles = explanation.captions()
    picture = sheet(rows, labels, titles, given.side)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    # As a JPEG, for gradients are noise, of which a PNG is five times as large.
    picture.save(given.out, quality=88)
    print(f"Picture: {given.out}, {given.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
