"""Models that return more than one tensor, against the same model in plain form."""

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import InputError
from pyfast_xai.compat import grad_cam
from pyfast_xai.compat.grad_cam import ClassifierOutputTarget, SemanticSegmentationTarget

KINDS = ("GradCAM", "LayerCAM", "AblationCAM", "ScoreCAM", "ShapleyCAM", "FullGrad", "EigenGradCAM")


class Net(nn.Module):
    def __init__(self, form, dense):
        super().__init__()
        self.form, self.dense = form, dense
        self.one, self.two, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        below = self.one(x).relu()
        scores, aux = self.two(below), self.other(below)
        scores = scores if self.dense else scores.square().mean((2, 3))
        return {
            "tensor": lambda: scores,
            "out and aux": lambda: {"aux": aux, "out": scores},
            "logits": lambda: {"logits": scores, "hidden_states": (below,)},
            "raw maps": lambda: (scores, {"maps": [aux]}),
        }[self.form]()


def case(form, dense):
    torch.manual_seed(0)
    return Net(form, dense).eval(), torch.rand(2, 3, 10, 12)


@pytest.mark.parametrize("form", ["out and aux", "logits", "raw maps"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True], ids=["classes", "dense"])
def test_targets_are_called_with_the_rows_of_the_scores(kind, form, dense):
    mask = np.zeros((10, 12), np.float32)
    mask[2:6, 3:9] = 1
    chosen = [SemanticSegmentationTarget(k, mask) if dense else ClassifierOutputTarget(k) for k in (1, 3)]
    results = []
    for each in ("tensor", form):
        model, images = case(each, dense)
        results.append(getattr(grad_cam, kind)(model, [model.one])(images, chosen))
    assert results[0].any()
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["out and aux", "logits", "raw maps"])
def test_without_targets_it_is_the_largest_score(form):
    plain, images = case("tensor", False)
    best = [ClassifierOutputTarget(int(k)) for k in plain(images).argmax(1)]
    model, _ = case(form, False)
    found = grad_cam.GradCAM(model, [model.one])(images)
    np.testing.assert_allclose(found, grad_cam.GradCAM(plain, [plain.one])(images, best), rtol=0, atol=1e-6)


def test_what_needs_targets():
    model, images = case("out and aux", True)
    with pytest.raises(InputError, match=r"targets must be given for a model that returns \[2, 4, 10, 12\], not"):
        grad_cam.GradCAM(model, [model.one])(images)

    class Single(Net):
        def forward(self, x):
            return super().forward(x)[:, 0]

    single = Single("tensor", False).eval()
    with pytest.raises(InputError, match=r"that returns \[2\], not \[N, classes\]"):
        grad_cam.GradCAM(single, [single.one])(images)

    class Unnamed(Net):
        def forward(self, x):
            return {"masks": super().forward(x)}

    unnamed = Unnamed("tensor", False).eval()
    with pytest.raises(InputError, match=r"a dict with 'logits' or 'out', got \['masks'\]"):
        grad_cam.GradCAM(unnamed, [unnamed.one])(images, [ClassifierOutputTarget(0)] * 2)
