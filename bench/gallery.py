"""The gallery of docs/gallery.md, photographs through most methods and a real network, and the overview of README.

`make gallery` draws both. The network is one of those in PYFAST_XAI_DATA where there is such a
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
    "blur-ig": {"n_steps": 20},
    "guided-ig": {"n_steps": 30},
    "xrai": {"n_steps": 10},
    "kernel-shap": {"n_samples": 200},
    "shapley-value-sampling": {"n_samples": 3},
    "hsic": {"n_samples": 150},
    "sobol": {"n_designs": 3},
    "extremal-perturbation": {"n_iterations": 60},
}
# Thousands of passes an image, or no picture of one class: detectors, a map of each channel, a map of chance.
LEFT_OUT = ("score-cam", "ss-cam", "is-cam", "shapley-values", "d-rise", "crp", "random-cam")
# The columns of the overview.
OVERVIEW = (
    *("grad-cam", "eigen-cam", "fixations", "excitation-backprop"),
    *("guided-backprop", "smoothgrad", "clear", "fgvis"),
)
KEYS = (
    render.Key("hot: matters most", colormap=render.DEFAULT_COLORMAP, low="cold"),
    render.Key("fixation", color=render.WHITE, mark="dot"),
)


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


def gallery(rows: list[list[Tensor]], labels: list[str], titles: list[str], side: int) -> Any:
    """Two columns of methods, each below the photographs."""
    middle = (len(rows) - 1) // 2
    halves = ((slice(middle), KEYS), (slice(middle, None), []))
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


def overview(rows: list[list[Tensor]], labels: list[str], titles: list[str], side: int) -> Any:
    """A row for each photograph, a column for each of a few methods."""
    chosen = [labels.index(METHODS[name].__name__) for name in OVERVIEW]
    columns = [rows[0], *(rows[1 + index] for index in chosen)]
    return render.montage(
        [list(row) for row in zip(*columns, strict=True)],
        labels=titles,
        titles=[["photograph", *(labels[index] for index in chosen)]],
        side=side,
        keys=KEYS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of both pictures")
    parser.add_argument("--only-overview", action="store_true", help="draw the overview alone, in minutes")
    parser.add_argument("--network", default=NETWORK, help="of the folder, trained on ImageNet")
    parser.add_argument("--side", type=int, default=144, help="of a picture on the sheet, in pixels")
    options = parser.parse_args()
    keep_freed_memory()
    loaded = load(options.network)
    pairs = [loaded.preprocess(photograph(name)) for name in PHOTOGRAPHS]
    images, ground = (torch.stack(part) for part in zip(*pairs, strict=True))
    rows, labels, titles = [list(ground)], [], list(PHOTOGRAPHS)
    for name, method in METHODS.items():
        if name in LEFT_OUT or (options.only_overview and name not in OVERVIEW):
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
        labels.append(method.__name__)
        if explanation.target is not None:
            titles = explanation.captions()
    options.out.mkdir(parents=True, exist_ok=True)
    for draw in (overview,) if options.only_overview else (overview, gallery):
        # JPEG, because gradients are noise, for which a PNG is five times as large.
        path = options.out / f"{draw.__name__}.jpg"
        draw(rows, labels, titles, options.side).save(path, quality=75)
        print(f"Picture: {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
