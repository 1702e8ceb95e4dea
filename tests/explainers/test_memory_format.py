"""Images go to a model in channels_last only where it computes the same."""

import numpy as np
import pytest
import torch
from torch import nn

from pyfast_xai import EigenCAM, GradCAM, Occlusion, Saliency
from pyfast_xai.compat import captum
from pyfast_xai.explainers.common import memory_format


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def finish(self, x):
        return self.head(x.relu().mean((2, 3)))


class Plain(Net):
    def forward(self, x):
        self.saw = x.stride()
        return self.finish(self.conv(x))


class WritesToAFlatMap(Net):
    def forward(self, x):
        y = self.conv(x)
        y.flatten(1)[:, :512] = 0
        return self.finish(y)


class WritesToAReshapedMap(Net):
    def forward(self, x):
        y = self.conv(x)
        y.reshape(len(y), -1).mul_(3)
        return self.finish(y)


class TakesStrides(Net):
    def forward(self, x):
        n, c, h, w = x.shape
        tiles = x.as_strided((n, c, h // 4, w // 4, 4, 4), (c * h * w, h * w, 4 * w, 4, w, 1))
        return self.finish(self.conv(tiles.amax((-1, -2))))


class AsksForTheFormat(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.finish(y if y.is_contiguous() else -y)


class ReadsMemory(Net):
    def forward(self, x):
        order = np.lib.stride_tricks.as_strided(x.numpy(), (x.numel(),), (4,))
        return self.finish(self.conv(x) * float(order[:100].sum()))


class WritesToAFlatMapOfLargeImages(Net):
    def forward(self, x):
        y = self.conv(x)
        if x.shape[-1] > 16:
            y.flatten(1)[:, :512] = 0
        return self.finish(y)


OTHERS = [WritesToAFlatMap, WritesToAReshapedMap, TakesStrides, AsksForTheFormat, ReadsMemory]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_model_that_computes_something_else_gets_images_as_they_are(kind, accelerated):
    model, images = kind().eval(), torch.randn(2, 3, 16, 16)
    leaf = images.clone().requires_grad_()
    if kind is ReadsMemory:  # by NumPy, which takes no tensor that requires a gradient
        order = float(images.flatten()[:100].sum())
        output = model.finish(model.conv(leaf) * order)
    else:
        output = model(leaf)
    (expected,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    explain = Saliency(model)
    if accelerated:
        explain.accelerate()
    for _ in range(2):
        result = explain(images, 1)
        torch.testing.assert_close(result.attribution, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.score, output.softmax(1)[:, 1].detach())
    with torch.no_grad():
        torch.testing.assert_close(explain.forward(images), model(images))
    # The peer's API goes the same way.
    result = captum.Saliency(model).attribute(images, target=1, abs=False)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_what_holds_for_small_images_is_looked_at_for_large_ones():
    model = WritesToAFlatMapOfLargeImages().eval()
    explain = Saliency(model)
    explain(torch.randn(2, 3, 16, 16), 1)
    images = torch.randn(2, 3, 32, 32)
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(explain(images, 1).attribution, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", [AssertionError, ValueError, TypeError, RuntimeError, KeyError])
@pytest.mark.parametrize(
    "explain",
    [
        lambda model, x: Saliency(model)(x, 1).attribution,
        lambda model, x: GradCAM(model)(x, 1).heatmap,
        lambda model, x: EigenCAM(model, layer="conv")(x).heatmap,
        lambda model, x: Occlusion(model, window=8, stride=8)(x, 1).heatmap,
        lambda model, x: captum.Saliency(model).attribute(x, target=1),
        lambda model, x: captum.LayerGradCam(model, model.conv).attribute(x, target=1),
    ],
    ids=["saliency", "grad-cam", "eigen-cam", "occlusion", "captum", "captum layer"],
)
def test_a_model_that_wants_contiguous_images_has_them(error, explain):
    class Wants(Net):
        def forward(self, x):
            if not x.is_contiguous():
                raise error("x must be contiguous")
            return self.finish(self.conv(x))

    model, images = Wants().eval(), torch.randn(2, 3, 16, 16)
    assert explain(model, images).isfinite().all()


def test_an_error_of_the_model_is_the_one_on_the_images_as_they_are():
    class Fails(Net):
        def forward(self, x):
            raise ZeroDivisionError("contiguous" if x.is_contiguous() else "channels_last")

    with pytest.raises(ZeroDivisionError, match="contiguous"):
        Saliency(Fails().eval())(torch.randn(2, 3, 16, 16), 1)


def test_others_get_channels_last_and_are_compared_eight_times_at_most(monkeypatch):
    model = Plain().eval()
    calls = []
    forward = Plain.forward

    def counted(self, x):
        calls.append(x.is_contiguous())
        return forward(self, x)

    monkeypatch.setattr(Plain, "forward", counted)
    explain = Saliency(model)
    for size in range(8, 28):
        explain(torch.randn(1, 3, size, size), 1)
        Saliency(model)(torch.randn(3, 3, size, size), 1)  # another number of images, and another explainer
    assert calls.count(False) == 40
    assert calls.count(True) == memory_format._COMPARISONS


@pytest.mark.parametrize("images", [torch.randn(2, 3, 16, 16).double(), torch.randn(2, 1, 16, 16)], ids=["f64", "grey"])
def test_nothing_is_compared_where_the_format_stays(images, monkeypatch):
    model = Plain()
    model.conv = nn.Conv2d(images.shape[1], 8, 3, padding=1)
    model = model.eval().to(images.dtype)
    calls = []
    forward = Plain.forward
    monkeypatch.setattr(Plain, "forward", lambda self, x: calls.append(1) or forward(self, x))
    Saliency(model)(images, 1)
    assert len(calls) == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_tensor_twice_is_explained_as_the_first_of_two(channels, dtype):
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, a, b):
            return self.encoder(a) * self.encoder(b) + self.encoder(a)

    model = Siamese().eval().to(dtype)
    images = torch.randn(2, channels, 16, 16, dtype=dtype)
    for options in (images, images.contiguous(memory_format=torch.channels_last)):
        twice = Saliency(model)(options, 1, options).attribution
        first, second = (images.clone().requires_grad_() for _ in range(2))
        expected = torch.autograd.grad(model(first, second)[:, 1].sum(), (first, second))
        torch.testing.assert_close(twice, expected[0], rtol=1e-4, atol=1e-6)
        # As autograd has it, where both are one leaf.
        both = captum.Saliency(model).attribute((options, options), target=1, abs=False)
        for result in both:
            torch.testing.assert_close(result, sum(expected), rtol=1e-4, atol=1e-6)
