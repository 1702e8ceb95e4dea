"""A collection as small as can be: a network of two convolutions, pictures of bright squares, and their boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from pyfast_xai.reproduce import Data

MODELS = """
import torch
from torch import nn


def load(name):
    if name not in ("squeezenet1_1", "googlenet_small"):
        raise KeyError(name)
    generator = torch.Generator().manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)]
    model = nn.Sequential(
        convolutions[0], nn.ReLU(), nn.MaxPool2d(2), convolutions[1], nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval(), {"size": 32, "prep": "unit"}


def preprocess(pixels, prep):
    return pixels / 255
"""


def draw(path, box, side=40):
    generator = np.random.default_rng(sum(box))
    canvas = generator.integers(0, 60, (side, side, 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    canvas[y1 : y2 + 1, x1 : x2 + 1] = [250, 200, 40]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)
    return path


BOXES = [(3, 4, 12, 15), (20, 5, 36, 22), (8, 20, 18, 38), (5, 5, 35, 35), (22, 22, 30, 30), (0, 0, 14, 20)]


@pytest.fixture
def boxes():
    return BOXES


@pytest.fixture
def picture():
    """Paints a picture with a bright box."""
    return draw


@pytest.fixture
def root(tmp_path):
    """A folder with the small collection."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "models.py").write_text(MODELS)
    rows = []
    for i, box in enumerate(BOXES):
        draw(root / "imagenet" / f"val227_some/{i}.png", box)
        rows.append({"file": f"val227_some/{i}.png", "cls": i % 4, "boxes": [list(map(float, box))]})
    rows.append({"file": "others/0.png", "cls": 0, "boxes": [[0.0, 0, 1, 1]]})
    (root / "imagenet" / "annotations.json").write_text(json.dumps(rows))
    objects = []
    for i, (x1, y1, x2, y2) in enumerate(BOXES[:3]):
        draw(root / "coco_ccby" / f"{i}.png", BOXES[i])
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        thing = {"category": "square", "bbox_xywh": [x1, y1, x2 - x1 + 1, y2 - y1 + 1], "iscrowd": 0}
        crowd = {"category": "crowd", "bbox_xywh": [0, 0, 40, 40], "iscrowd": 1, "segmentation": {"counts": "x"}}
        objects.append({"file": f"{i}.png", "objects": [{**thing, "segmentation": outline}, crowd]})
    (root / "coco_ccby" / "annotations.json").write_text(json.dumps(objects))
    return root


@pytest.fixture
def data(root):
    return Data(root, count=4, names=("squeezenet1_1",), batch_size=3)
