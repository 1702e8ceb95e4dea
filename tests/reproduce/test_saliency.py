"""Table II of CNN-Fixations on pictures whose objects an explainer can be made to find."""

import json

import pytest
import torch
from torch import nn

from pyfast_xai import Saliency
from pyfast_xai.errors import InputError
from pyfast_xai.reproduce import saliency
from pyfast_xai.reproduce.transfer import last_features, with_classes


class Bright(Saliency):
    """Finds what is bright."""

    def __call__(self, images, target=None):
        explanation = super().__call__(images, target)
        explanation.heatmap = (images[:, 0] > 0.6).float()
        return explanation


@pytest.fixture
def two_classes(root, picture, boxes):
    """Six pictures of a bright square; every second also has a dark corner."""
    rows = []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        picture(root / "coco_ccby" / f"{i}.png", boxes[i])
        outlines = {"square": [x1, y1, x2, y1, x2, y2, x1, y2]}
        if i % 2:
            outlines["corner"] = [36, 0, 39, 0, 39, 3, 36, 3]
        rows.append(
            {
                "file": f"{i}.png",
                "objects": [
                    {"category": kind, "bbox_xywh": [0, 0, 9, 9], "iscrowd": 0, "segmentation": [outline]}
                    for kind, outline in outlines.items()
                ],
            }
        )
    (root / "coco_ccby" / "annotations.json").write_text(json.dumps(rows))


@pytest.mark.usefixtures("two_classes")
def test_each_class_has_its_pixels(data, monkeypatch):
    monkeypatch.setattr(saliency, "METHODS", {"Grad-CAM": Bright})
    monkeypatch.setattr(saliency, "LEAST", 3)
    fitted = []

    def recorded(model, name, features, present):
        fitted.append(present)
        return with_classes(model, name, features, present)

    monkeypatch.setattr(saliency, "with_classes", recorded)
    outcome = saliency.table_2(data.__class__(data.root, None, data.names))
    assert outcome.heads[-2:] == ["corner", "square"]
    (row,) = outcome.rows
    assert row[1:3] == ["Grad-CAM", "60.09"]
    corner, square = map(float, row[-2:])
    # Bright pixels are those of the square, and none of the corner's but by chance among the cold ones.
    assert square > 95
    assert corner < 10
    assert float(row[3]) == pytest.approx((corner + square) / 2, abs=0.1)
    # The picture that is explained is not among those that the layer is fitted to.
    assert [len(present) for present in fitted] == [4, 5, 5, 5, 5]


def test_a_class_must_have_enough_pictures(data):
    with pytest.raises(InputError, match=r"data must hold 5 pictures with masks of a class, got {'square': 3}"):
        saliency.table_2(data)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_new_layer_learns_classes(kind):
    torch.manual_seed(0)
    last = [nn.Flatten(), nn.Linear(8, 5)] if kind == "linear" else [nn.Conv2d(8, 5, 1), nn.Flatten()]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *last).eval()
    images = torch.rand(40, 3, 6, 6)
    number = torch.arange(40)
    present = torch.stack([number % 2 == 0, number % 3 == 0], 1)
    images[present[:, 0], 0] += 2
    images[present[:, 1], 1] += 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    features, name = last_features(model, images)
    taught = with_classes(model, name, features, present)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert float(((taught(images) > 0) == present).float().mean()) > 0.95
    assert not taught.training


def test_a_rectifier_after_the_last_layer_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputError, match="model must return the scores of a linear layer"):
        last_features(model, torch.randn(2, 3, 4, 4))
