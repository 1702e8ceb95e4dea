"""The judge of `make zoo`: what it says of small models, and that it finds what is wrong."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pyfast_xai import METHODS

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("bench/ is not part of a source distribution", allow_module_level=True)


@pytest.fixture
def judge(monkeypatch):
    """The module of the judge, imported as the command does."""
    monkeypatch.syspath_prepend(BENCH)
    import zoo_judge

    yield zoo_judge
    sys.modules.pop("zoo_judge"), sys.modules.pop("zoo_models", None)


def test_suppression_keeps_what_a_slow_loop_keeps(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from torchvision_nms import nms

    random = torch.Generator().manual_seed(0)
    low = torch.rand(40, 2, generator=random, dtype=torch.float64) * 20
    boxes = torch.cat([low, low + 5 + 10 * torch.rand(40, 2, generator=random, dtype=torch.float64)], 1)
    scores = torch.rand(40, generator=random, dtype=torch.float64)
    scores[7] = scores[3]  # the first of equals is the better one
    stays = []
    for number in sorted(range(40), key=lambda number: (-float(scores[number]), number)):
        if all(_overlap(boxes[number].tolist(), boxes[other].tolist()) <= 0.3 for other in stays):
            stays.append(number)
    assert 1 < len(stays) < 40
    assert nms(boxes, scores, 0.3).tolist() == stays
    assert nms(boxes[:0], scores[:0], 0.3).tolist() == []


def _overlap(first, second):
    """The intersection over union of two boxes, in plain numbers."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


EXPLAINERS = ("saliency", "grad-cam", "eigen-cam", "fixations", "excitation-backprop", "lrp", "occlusion", "score-cam")


@pytest.mark.parametrize("name", ["ViT", "ConvNext", "ResNet", "Swin"])
def test_families_of_transformers_are_served(judge, name):
    pytest.importorskip("transformers")
    import zoo_models

    specimen = zoo_models._of_transformers(name, zoo_models.OF_TRANSFORMERS[name])
    verdicts = list(judge.judge(specimen, (*EXPLAINERS, judge.MODEL)))
    assert [(verdict.explainer, verdict.verdict, verdict.reason) for verdict in verdicts] == [
        (explainer, "served", "") for explainer in (*EXPLAINERS, judge.MODEL)
    ]


class Mixes(nn.Module):
    """Rows depend on each other, and it keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.fc(x * x.mean(0).exp())


def test_what_is_wrong_is_found(judge):
    torch.manual_seed(0)
    model = Mixes()
    (verdict,) = judge.judge(judge.Specimen(model, torch.rand(2, 3, 8, 8)), ("grad-cam",))
    assert verdict.verdict == "wrong"
    assert verdict.reason.startswith("the row alone: signed_map differs by")
    before = judge._photograph(model)
    model.calls += 1
    assert judge._unchanged(model, torch.rand(2, 3, 8, 8).double(), before) == ("wrong", "changed: calls")
    (verdict,) = judge.judge(judge.Specimen(model, torch.rand(2, 3, 8, 8)), ("attention-rollout",))
    assert verdict.verdict == "not applicable"


def test_a_method_of_pictures_does_not_apply_to_videos(judge):
    model = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    verdicts = judge.judge(judge.Specimen(model, torch.rand(2, 3, 4, 8, 8)), ("saliency", "consensus"))
    assert [(one.verdict, one.reason) for one in verdicts] == [
        ("served", ""),
        ("not applicable", "explains pictures alone"),
    ]


def test_a_model_that_does_not_depend_on_the_image_is_wrong_without_a_word(judge, monkeypatch):
    class Silent(METHODS["saliency"]):
        def _explain(self, images, target, args, kwargs):
            explanation = super()._explain(images, target, args, kwargs)
            explanation.heatmap = torch.ones_like(explanation.heatmap)
            return explanation

    monkeypatch.setitem(METHODS, "saliency", Silent)
    (verdict,) = judge.judge(judge.Specimen(Mixes(), torch.rand(2, 3, 8, 8)), ("saliency",))
    assert (verdict.verdict, verdict.reason) == ("wrong", "constant without a word")


def test_a_thinned_network_has_its_operations_at_a_fraction_of_the_width(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from zoo_thin import thinned

    def built():
        grouped = nn.Conv2d(16, 32, 3, groups=2)
        depthwise = nn.Conv2d(32, 32, 3, 2, 1, 1, 32, bias=False)
        norms = (nn.BatchNorm2d(32), nn.GroupNorm(2, 32))
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10))
        return nn.Sequential(nn.Conv2d(3, 16, 3), grouped, depthwise, *norms, *pooled)

    with thinned(4, keep=(10,)):
        thin = built()
    whole = built()
    assert thin(torch.rand(2, 3, 16, 16)).shape == whole(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    shapes = [list(module.weight.shape) for module in thin if hasattr(module, "weight")]
    assert shapes == [[4, 3, 3, 3], [8, 2, 3, 3], [8, 1, 3, 3], [8], [8], [8], [10, 8]]
    assert (thin[2].stride, thin[2].padding, thin[2].groups, thin[2].bias) == ((2, 2), (1, 1), 8, None)
