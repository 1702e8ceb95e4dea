"""The gallery of docs/gallery.md: sample photographs through every method and a real network.

`make gallery` draws it. The network is one of those in PYFAST_XAI_DATA where there is such a
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
from sklearn.datasets import load_sample_image
from torch import Tensor

from pyfast_xai import PyFastXaiError, render
from pyfast_xai.explainers import METHODS
from pyfast_xai.explanation import Explanation
from pyfast_xai.memory import keep_freed_memory
from pyfast_xai.models import LoadedModel, load_model
from pyfast_xai.reproduce import Data

# Photographs free to show: by Stéfan van der Walt (CC0), Rachel Michetti (CC0), danielbuechele (CC BY 2.0) and NASA
# (public domain). Of each a square: left, top and side in pixels.
PHOTOGRAPHS = {
    "a tabby": (data.chelsea, (120, 60, 240)),
    "an espresso": (data.coffee, (100, 0, 400)),
    "a palace": (lambda: load_sample_image("china.jpg"), (120, 60, 320)),
    "a space shuttle": (data.astronaut, (231, 0, 281)),
}
NETWORK = "resnet50_abm_pruned_int8"
# Methods with hundreds of passes by default run tens here, as docs/gallery.md says.
FEWER = {
    "smoothgrad": {"n_samples": 10},
    "integrated-gradients": {"n_steps": 20},
    "occlusion": {"window": 48, "stride": 22},
    "rise": {"n_masks": 150},
    "lime": {"n_samples": 100},
    "meaningful-perturbation": {"n_iterations": 40, "initial_mask": 1.0},
}
# Thousands of passes an image, one for each channel and more.
LEFT_OUT = ("score-cam", "ss-cam", "is-cam")


def photograph(name: str) -> Any:
    """The square of a photograph that is shown."""
    read, (left, top, edge) = PHOTOGRAPHS[name]
    return Image.fromarray(read()).crop((left, top, left + edge, top + edge))


def load(name: str) -> LoadedModel:
    """A network and how it wants pictures."""
    folder = Path(os.environ.get("PYFAST_XAI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if (folder / "models.py").is_file():
        loaded = next(Data(folder, names=(name,)).networks(()))
        # "n02123045 tabby, tabby cat"
        words = (folder / "imagenet" / "synset_words.txt").read_text().splitlines()
        return replace(loaded, labels=[line.split(" ", 1)[1].split(",")[0] for line in words])
    return load_model("torchvision/resnet50", "DEFAULT")


def shown(explanation: Explanation, ground: Tensor) -> Tensor:
    """The picture people know a method by: masked colours, or heat over the photograph."""
    return explanation.rgb() if explanation.method == "fgvis" else explanation.overlay(ground)


def sheet(rows: list[list[Tensor]], labels: list[str], titles: list[str], side: int) -> Any:
    """Two columns of methods, each below the photographs."""
    middle = (len(rows) - 1) // 2
    keys = [render.Key("hot: matters most", colormap=render.DEFAULT_COLORMAP, low="cold")]
    keys.append(render.Key("fixation", color=render.WHITE, mark="dot"))
    halves = ((slice(middle), keys), (slice(middle, None), []))
    parts = [
        render.montage(
            [rows[0], *rows[1:][part]],
            labels=["photograph", *labels[part]],
            titles=[titles],
            side=side,
            keys=item,
        )
        for part, item in halves
    ]
    both = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    both.paste(parts[0], (0, 0))
    both.paste(parts[1], (parts[0].width, 0))
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.jpg"))
    parser.add_argument("--network", default=NETWORK, help="of the folder, trained on ImageNet")
    parser.add_argument("--side", type=int, default=144, help="of a picture on the sheet, in pixels")
    options = parser.parse_args()
    keep_freed_memory()
    loaded = load(options.network)
    pairs = [loaded.preprocess(photograph(name)) for name in PHOTOGRAPHS]
    images, ground = (torch.stack(part) for part in zip(*pairs, strict=True))
    rows, labels, titles = [list(ground)], [], list(PHOTOGRAPHS)
    for name, method in METHODS.items():
        if name in LEFT_OUT:
            continue
        start = time.perf_counter()
        try:
            explanation = method(loaded.model, **FEWER.get(name, {}), labels=loaded.labels)(images)
        except PyFastXaiError as error:
            print(f"{name:22} {error}")
            continue
        seconds = (time.perf_counter() - start) / len(images)
        print(f"{name:22} {seconds:8.2f} s an image", flush=True)
        rows.append(list(shown(explanation, ground)))
        labels.append(name)
        if explanation.target is not None:
            titles = explanation.captions()
    picture = sheet(rows, labels, titles, options.side)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # JPEG, because gradients are noise, for which a PNG is five times as large.
    picture.save(options.out, quality=88)
    print(f"Picture: {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
