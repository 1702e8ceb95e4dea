"""The real networks and pictures that figures are measured on: a folder outside the repository, `PYFAST_XAI_DATA`."""

import importlib.util
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IMAGENET = ("resnet50_abm_pruned_int8", "googlenet_abm_pruned_int8", "squeezenet1_1", "mobilenet_v2_coral_int8")


def folder() -> Path:
    """Where the data lies; raises FileNotFoundError with what to do where it does not."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("PYFAST_XAI_DATA", default))
    if not (path / "models.py").is_file():
        raise FileNotFoundError(f"PYFAST_XAI_DATA must name the folder of networks and pictures, got {path}")
    return path


def _definitions(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyfast_xai_bench_networks", path / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Network:
    """A trained network and how it wants its pictures."""

    name: str
    model: nn.Module
    size: int
    definitions: Any
    prep: str

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Model input of RGB pixels 0..255 `[N, 3, size, size]`."""
        return self.definitions.preprocess(pixels, self.prep)


def network(name: str) -> Network:
    """One of the trained networks, in evaluation mode."""
    definitions = _definitions(folder())
    model, meta = definitions.load(name)
    return Network(name, model, meta["size"], definitions, meta["prep"])


@dataclass
class Picture:
    """An ILSVRC validation picture with its class and boxes in pixels of the file."""

    path: Path
    label: int
    size: tuple[int, int]
    boxes: Tensor

    def pixels(self, side: int) -> Tensor:
        """RGB 0..255 `[3, side, side]`, squashed."""
        from PIL import Image

        with Image.open(self.path) as image:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(small)).permute(2, 0, 1).float()

    def boxes_at(self, side: int) -> Tensor:
        """Boxes `[B, 4]` in pixels of the squashed picture."""
        width, height = self.size
        return self.boxes * torch.tensor([side / width, side / height, side / width, side / height])

    @property
    def share(self) -> float:
        """How much of the picture its largest box covers."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2] + 1
        return float((sides.prod(1) / (self.size[0] * self.size[1])).max())


def pictures(count: int | None = None, seed: int = 0) -> list[Picture]:
    """The squashed ILSVRC pictures, shuffled by `seed`; all of them where `count` is None."""
    root = folder() / "imagenet"
    rows = [r for r in json.loads((root / "annotations.json").read_text()) if r["file"].startswith("val227")]
    random.Random(seed).shuffle(rows)
    return [
        Picture(root / r["file"], r["cls"], (r["width"], r["height"]), torch.tensor(r["boxes"])) for r in rows[:count]
    ]
