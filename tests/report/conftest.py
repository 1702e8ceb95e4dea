import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("pyarrow")

from pyfast_xai import datasets
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel

CLASSES = ["ant", "bee", "cat </script ><script>document.title='owned'</script ><!-- <script ", "dog", "elk"]
EVIL = "<img src=x onerror=\"document.title='owned'\">.png"


def _network():
    torch.manual_seed(32)
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval()
    with torch.no_grad():  # so that pictures differ in their answers
        net[0].weight.mul_(4)
        net[2].weight.mul_(4)
        net[-1].bias.zero_()
    return net


@pytest.fixture(scope="session")
def loaded():
    return LoadedModel(_network(), Preprocess(24), CLASSES, "tiny")


def _paint(folder, count, seed=0):
    generator = np.random.default_rng(seed)
    for n in range(count):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 28), Image.Resampling.BICUBIC).save(folder / f"{n:02d}.png")


def _explained(folder, loaded, out, method="grad-cam", labels=True, **settings):
    """A run over the pictures of a folder; each third is labelled as class 2, the others by their number."""
    source = str(folder)
    if labels:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".png")
        lines = [f'"{name.replace(chr(34), chr(34) * 2)}",{2 if n % 3 == 0 else n % 5}' for n, name in enumerate(names)]
        source = folder / "list.csv"
        source.write_text("path,label\n" + "\n".join(lines) + "\n")
    datasets.explain(str(source), loaded, method=method, out=out, shard_size=8, **settings)
    return out


@pytest.fixture(scope="session")
def made(tmp_path_factory, loaded):
    """Two runs over fifteen pictures, of which one has an evil name and two are bad."""
    folder = tmp_path_factory.mktemp("pictures")
    _paint(folder, 14)
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "05.png").rename(folder / EVIL)
    (folder / "zz.png").write_bytes(b"")
    out = tmp_path_factory.mktemp("runs")
    runs = [_explained(folder, loaded, out / method, method) for method in ("grad-cam", "clear")]
    return SimpleNamespace(folder=folder, runs=runs, one=runs[0])


class Page:
    """What a report says, read as a browser would: markup first, then data."""

    def __init__(self, path):
        self.text = path.read_text("ascii")
        self.scripts = re.findall(r"<script([^>]*)>(.*?)</script>", self.text, re.DOTALL)
        (output,) = (body for head, body in self.scripts if 'id="data"' in head)
        self.data = json.loads(output)
        blocks = [body for head, body in self.scripts if 'class="pictures"' in head]
        self.fields = [line.split(",") for block in blocks for line in block.split("\n")]

    def column(self, name, run=0):
        return self.data["runs"][run]["columns"][name]

    def word(self, number):
        return None if number is None else self.data["words"][number]


@pytest.fixture
def read():
    return Page


@pytest.fixture(scope="session")
def network():
    return _network


@pytest.fixture(scope="session")
def paint():
    return _paint


@pytest.fixture(scope="session")
def explained():
    return _explained


@pytest.fixture(scope="session")
def classes():
    return CLASSES


@pytest.fixture(scope="session")
def evil_name():
    return EVIL
