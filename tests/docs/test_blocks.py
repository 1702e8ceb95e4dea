"""Every Python block of README and of the pages that are written around a model at hand: it runs, in the order of its
page, on a small random network in place of downloads. `test_pages.py` runs the pages that stand by themselves."""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pyfast_xai
from pyfast_xai import Preprocess, datasets, models
from pyfast_xai.rules.evidence.backward import _rules as evidence_rules
from pyfast_xai.rules.gradient import GRADIENT

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CLASSES, SIDE = 1000, 32
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SELF_CONTAINED = {*(DOCS / "howto").glob("*.md"), *(DOCS / f"{page}.md" for page in ("index", "start", "which-layer"))}
WRITTEN = [
    path
    for path in [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
    if path not in SELF_CONTAINED and BLOCK.search(path.read_text())
]


class Network(nn.Module):
    """Names of its layers are those of a ResNet, as far as the pages name them."""

    def __init__(self, outputs=CLASSES):
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.layer4 = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, outputs)

    def forward(self, images):
        return self.fc(self.pool(self.layer4(self.layer3(images))).flatten(1))


class Detector(Network):
    """Returns the scores of what it found, as detectors do."""

    def forward(self, images):
        return {"scores": super().forward(images).sigmoid()}


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """What the pages presume: pictures in a folder, their annotations, a model, and the names that stand for them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    pictures = [tmp_path / "cat.jpg", *(tmp_path / "photos" / f"{n}.jpg" for n in range(2))]
    for path in pictures:
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    box = {"category_id": 1, "bbox": [4, 4, 12, 12], "iscrowd": 0, "area": 144}
    coco = {
        "images": [{"id": n, "file_name": path.name, "width": 40, "height": 40} for n, path in enumerate(pictures)],
        "annotations": [{"id": n, "image_id": n, **box} for n in range(len(pictures))],
        "categories": [{"id": 1, "name": "tabby"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    model, preprocess = Network().eval(), Preprocess(SIDE)
    labels = ["tabby", *(f"class {n}" for n in range(1, CLASSES))]
    loaded = models.LoadedModel(model, preprocess, labels, "a network")
    monkeypatch.setattr(pyfast_xai, "load_model", lambda *arguments, **settings: loaded)
    # The part of FiftyOne that a page shows is an application with a window.
    monkeypatch.setitem(sys.modules, "fiftyone", mock.MagicMock())
    return {
        "model": model,
        "binary": Network(1).eval(),
        "detector": Detector().eval(),
        "images": torch.rand(2, 3, SIDE, SIDE),
        "pictures": pictures,
        "preprocess": preprocess,
        "low": torch.zeros(1, 3, 1, 1),
        "high": torch.ones(1, 3, 1, 1),
    }


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_blocks_run(page, surroundings, tmp_path):
    if page.stem in ("datasets", "report"):
        pytest.importorskip("pyarrow")
    if page.stem == "report":
        for method in ("eigen-cam", "clear"):
            options = datasets.RunOptions(
                method=method, out=str(tmp_path / "runs" / method), preprocess=surroundings["preprocess"]
            )
            datasets.explain(str(tmp_path / "photos"), surroundings["model"], options)
    before = [item.clone() for item in surroundings["model"].parameters()]
    # Pages register rules, which hold for the whole process.
    with mock.patch.dict(GRADIENT), mock.patch.dict(evidence_rules):
        for number, block in enumerate(BLOCK.findall(page.read_text())):
            exec(compile(block, f"{page.name}, block {number}", "exec"), surroundings)
    for item, other in zip(surroundings["model"].parameters(), before, strict=False):
        assert torch.equal(item, other)
    if page.stem == "README":
        with Image.open(tmp_path / "cat-grad-cam.png") as saved:
            assert saved.width > 448


def test_the_number_of_explainers_is_right():
    assert "sixty explainers" in " ".join((ROOT / "README.md").read_text().split())
    assert len(pyfast_xai.METHODS) >= 60
