import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("pyarrow")

from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel

SIDE = 24


def tiny():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.fixture
def loaded():
    """A network of 24 x 24 inputs and five named classes."""
    return LoadedModel(tiny(), Preprocess(SIDE), ["ant", "bee", "cat", "dog", "elk"], "tiny")


def picture(seed, size=(32, 28)):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(seed, kind="PNG", size=(32, 28), **how):
    sink = io.BytesIO()
    picture(seed, size).save(sink, kind, **how)
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures, 00.png to 19.jpg."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(20):
        kind, suffix = (("PNG", "png"), ("JPEG", "jpg"))[n % 2]
        (folder / f"{n:02d}.{suffix}").write_bytes(encoded(n, kind))
    return folder


@pytest.fixture
def make_picture():
    return encoded
