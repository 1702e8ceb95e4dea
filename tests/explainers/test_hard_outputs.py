"""Outputs without a gradient: every method that needs one says so, and what to do, in one sentence."""

import pytest
import torch
from quick_settings import QUICK
from torch import nn

from pyfast_xai import METHODS, GradCAM, InputError, Occlusion, ShapleyCAM

# They know no class, so that they explain a model whatever it returns.
WITHOUT_CLASS = {"eigen-cam", "dff", "attention-rollout", "fem", "kpca-cam", "random-cam"}
WAY = "make it return the scores that these were made of, or .* perturbs the image"


class Hard(nn.Module):
    """A segmenter that returns the class of every pixel, or something else that no gradient passes."""

    def __init__(self, end):
        super().__init__()
        self.one, self.two, self.end = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), end

    def forward(self, x):
        return self.end(self.two(self.one(x).relu()))


def hard(end=lambda scores: scores.argmax(1)):
    torch.manual_seed(0)
    return Hard(end).eval(), torch.rand(2, 3, 12, 12)


def explained(name, model, images, target):
    return METHODS[name](model, **QUICK.get(name, {}))(images, target)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in METHODS.items()
        if name not in WITHOUT_CLASS and not method.needs_detections and not method.needs_attention
    ],
)
def test_a_model_that_returns_classes_of_pixels(name):
    model, images = hard()
    with pytest.raises(InputError, match=f"got torch.int64, as argmax returns: {WAY}|model must end in an average"):
        explained(name, model, images, 1)


@pytest.mark.parametrize("name", sorted({"grad-cam", "saliency", "lrp", "deep-lift", "meaningful-perturbation"}))
def test_a_function_of_classes_of_pixels(name):
    model, images = hard()
    with pytest.raises(InputError, match=f"for a method that reads gradients, got torch.int64, as argmax.*{WAY}"):
        explained(name, model, images, lambda output: (output == 1).float().mean((1, 2)))


def test_the_way_out_works():
    model, images = hard()
    share = Occlusion(model, window=4, stride=4)(images, lambda output: (output == 1).float().mean((1, 2)))
    assert share.heatmap.shape == (2, 12, 12)
    assert share.signed_map.any()


def test_a_count_as_target():
    model, images = hard(lambda scores: scores)
    with pytest.raises(InputError, match=r"target must return something that depends .* multiply scores by it"):
        GradCAM(model)(images, lambda output: (output.argmax(1) == 1).float().sum((1, 2)))


@pytest.mark.parametrize(
    ("end", "operation"),
    [
        (lambda scores: scores.mean((2, 3)).detach(), "detach"),
        (lambda scores: (scores.mean((2, 3)) > 0).float(), "gt"),
        (lambda scores: scores.mean((2, 3)).round(), "round"),
    ],
    ids=["detach", "comparison", "round"],
)
def test_scores_that_no_gradient_passes_are_logged(end, operation, caplog):
    model, images = hard(end)
    assert not GradCAM(model)(images, 1).heatmap.any()
    assert f"none passes aten::{operation} in" in caplog.text
    assert "explain what goes into it, or by a method without gradients (occlusion, RISE)" in caplog.text


@pytest.mark.parametrize("end", [torch.Tensor.detach, lambda scores: (scores > 0).float()], ids=["detach", "compare"])
def test_a_curvature_needs_a_gradient(end):
    model, images = hard(lambda scores: end(scores.mean((2, 3))))
    with pytest.raises(InputError, match="model must let gradients of its scores pass to the layer"):
        ShapleyCAM(model)(images, 1)


@pytest.mark.parametrize("name", ["saliency", "grad-cam", "occlusion"])
def test_numbers_that_leave_pytorch(name):
    model, images = hard(lambda scores: torch.from_numpy(scores.mean((2, 3)).detach().numpy()))
    with pytest.raises(InputError, match="model must return a tensor that depends on its input, got none, as where"):
        explained(name, model, images, 1)
