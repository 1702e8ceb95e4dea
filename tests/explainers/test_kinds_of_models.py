"""Every explainer on models that are not a classifier of square colour images, against the same model in plain form."""

import pytest
import torch
from quick_settings import QUICK
from torch import nn
from torch.nn import functional

from pyfast_xai import METHODS, InputError

DOUBLE = torch.float64
NAMES = [name for name, method in METHODS.items() if not method.needs_detections]
every_method = pytest.mark.parametrize("name", NAMES)


class Net(nn.Module):
    """Ends in an average and a linear layer, so that CAM is defined, with attention for the methods that read it."""

    def __init__(self, channels, classes, attends):
        super().__init__()
        self.attends = attends
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.fc, self.table = nn.Linear(8, classes), nn.Linear(2, 8)

    def features(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        if self.attends:
            tokens = x.flatten(2).mT
            return functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1)
        return x.mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class Binary(Net):
    def forward(self, x):
        return super().forward(x).squeeze(1)


class Heads(Net):
    def forward(self, x):
        features = self.features(x)
        return {"age": features[:, :1], "logits": self.fc(features), "sizes": (features[:, 1:3],)}


class WithTable(Net):
    def forward(self, x, table):
        return self.fc(self.features(x) * (1 + self.table(table).tanh() / 2))


def built(kind, name, channels=3, classes=4):
    torch.manual_seed(0)
    return kind(channels, classes, METHODS[name].needs_attention).to(DOUBLE).eval()


def drawn(channels=3, size=(16, 16)):
    return torch.rand(2, channels, *size, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def explained(name, model, images, target=None, *args):
    return METHODS[name](model, **QUICK.get(name, {}))(images, target, *args)


def same(found, expected, rows=slice(None)):
    for field in ("heatmap", "signed_map", "attribution"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs[rows], rtol=1e-6, atol=1e-9)


@every_method
def test_a_binary_head_without_a_dimension_of_classes(name):
    refusals = {"fgvis": "outputs must say how", "finer-cam": "model must have"}  # they need more than a value
    if name in refusals:
        for kind in (Binary, Net):
            with pytest.raises(InputError, match=refusals[name]):
                explained(name, built(kind, name, classes=1), drawn())
        return
    found, expected = (explained(name, built(kind, name, classes=1), drawn()) for kind in (Binary, Net))
    same(found, expected)
    assert found.heatmap.shape == (2, 16, 16)
    if found.score is not None:
        assert torch.equal(found.score, expected.score)


@every_method
def test_several_heads(name):
    found, expected = (explained(name, built(kind, name), drawn(), [1, 2]) for kind in (Heads, Net))
    same(found, expected)
    assert found.target is None or found.target.tolist() == [1, 2]


@every_method
def test_a_table_beside_the_image(name):
    model, images = built(WithTable, name), drawn()
    if name == "cam":  # which needs a head that reads the average alone
        with pytest.raises(InputError, match="model must end in an average over positions"):
            explained(name, model, images, [1, 2], torch.zeros(2, 2, dtype=DOUBLE))
        return
    table = torch.tensor([[0.5, -2.0], [3.0, 1.0]], dtype=DOUBLE)
    found = explained(name, model, images, [1, 2], table)
    assert found.heatmap.shape == (2, 16, 16)
    if name != "feature-permutation":  # which compares with the other images
        same(explained(name, model, images[1:], [2], table[1:]), found, slice(1, 2))


@every_method
@pytest.mark.parametrize(
    ("channels", "size"), [(1, (16, 16)), (5, (16, 16)), (3, (12, 28))], ids=["one", "five", "oblong"]
)
def test_channels_and_images_that_are_not_square(name, channels, size):
    model, images = built(Net, name, channels), drawn(channels, size)
    found = explained(name, model, images, 2)
    assert found.heatmap.shape == (2, *size)
    assert found.attribution is None or found.attribution.shape == images.shape
    assert found.heatmap.isfinite().all()
    assert found.heatmap.any()
    if name != "feature-permutation":
        same(explained(name, model, images[1:], 2), found, slice(1, 2))
