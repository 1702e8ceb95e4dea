"""Weights in oneDNN's order, kept between recordings: the same to the last bit, and never stale."""

import gc

import pytest
import torch
from torch import nn

from pyfast_xai import EigenCAM, Saliency, onednn
from pyfast_xai.acceleration import weight_layouts
from pyfast_xai.acceleration.weight_layouts import WeightLayouts
from pyfast_xai.tape import record

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def layouts(monkeypatch):
    actual = WeightLayouts()
    monkeypatch.setattr(weight_layouts, "LAYOUTS", actual)
    return actual


def network(strides=(1, 2, 1), kernels=(3, 3, 1)):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 256, 3, padding=1), nn.ReLU()]
    for stride, kernel in zip(strides, kernels, strict=True):
        layers += [nn.Conv2d(256, 256, kernel, stride, kernel // 2), nn.BatchNorm2d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 5)).eval()


def images(rows=1):
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def fresh(method, model, batch, monkeypatch):
    """Returns the heat map that is computed without kept layouts."""
    with monkeypatch.context() as patch:
        patch.setattr(weight_layouts, "LAYOUTS", WeightLayouts(limit=0))
        return method(model)(batch).heatmap


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", [Saliency, EigenCAM])
def test_explanations_are_the_same_to_the_last_bit(layouts, monkeypatch, method, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, batch = network(), images(rows)
        expected = fresh(method, model, batch, monkeypatch)
        explainer = method(model)
        for _ in range(3):
            assert torch.equal(explainer(batch).heatmap, expected)
        assert layouts.nbytes > 0
    finally:
        torch.set_num_threads(before)


def test_what_runs_one_time_keeps_nothing(layouts):
    model = network()
    for recordings in range(3):
        assert (layouts.nbytes > 0) == (recordings > 1)
        record(model, images().to(memory_format=torch.channels_last), prepare=layouts.begin())


def multiply(weight):
    weight.data.mul_(1.5)


def one_number(weight):
    weight.data[-1, -1, -1, -1] += 1


def permute(weight):
    weight.data.copy_(weight.data.roll(1, 0))


def through_numpy(weight):
    weight.detach().numpy()[3] *= -1


def negative_zero(weight):
    weight.data[0, 0] = 0.0
    weight.data[0, 1] = -0.0


@pytest.mark.parametrize("change", [multiply, one_number, permute, through_numpy, negative_zero])
def test_a_changed_weight_is_seen(layouts, monkeypatch, change):
    model, batch = network(), images()
    explainer = Saliency(model)
    for _ in range(3):
        explainer(batch)
    version = model[2].weight._version
    change(model[2].weight)
    assert model[2].weight._version == version, "PyTorch knows nothing of it"
    for _ in range(3):
        assert torch.equal(explainer(batch).heatmap, fresh(Saliency, model, batch, monkeypatch))


def test_weights_in_channels_last_have_layouts_of_their_own(layouts, monkeypatch):
    model, batch = network(), images()
    for _ in range(2):
        Saliency(model)(batch)
    with torch.no_grad():
        model[2].weight.data = model[2].weight.data.to(memory_format=torch.channels_last)
    for _ in range(3):
        assert torch.equal(Saliency(model)(batch).heatmap, fresh(Saliency, model, batch, monkeypatch))


def test_layouts_go_with_the_model(layouts):
    model = network()
    for _ in range(2):
        Saliency(model)(images())
    assert layouts.nbytes > 4 * 256 * 256 * 9
    del model
    gc.collect()
    assert layouts.nbytes == 0


def test_the_limit_holds(layouts, monkeypatch):
    small = WeightLayouts(limit=3 << 20)  # one of the two weights of 3 x 3, one way
    monkeypatch.setattr(weight_layouts, "LAYOUTS", small)
    model, batch = network(), images()
    explainer = Saliency(model)
    expected = fresh(Saliency, model, batch, monkeypatch)
    for _ in range(4):
        assert torch.equal(explainer(batch).heatmap, expected)
        assert small.nbytes <= 3 << 20
    assert small.nbytes > 0


def test_a_tape_runs_with_pytorchs_own_kernels_later(layouts):
    model, batch = network(), images()
    for _ in range(2):
        Saliency(model)(batch)
    tape = record(model, batch.to(memory_format=torch.channels_last), prepare=layouts.begin())
    assert all(node.kernel is None for node in tape.nodes)


def test_maps_of_one_pixel_are_left_alone(layouts, monkeypatch):
    """They are in both memory formats at once, and other kernels serve them."""
    model, batch = network(strides=(2, 2, 2), kernels=(3, 3, 3)), torch.rand(1, 3, 8, 8)
    explainer = Saliency(model)
    for _ in range(3):
        assert torch.equal(explainer(batch).heatmap, fresh(Saliency, model, batch, monkeypatch))


def test_large_maps_and_small_weights_are_left_alone(layouts):
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 2)).eval()
    for _ in range(3):
        Saliency(small)(images())
    wide = network(strides=(1,), kernels=(3,))
    for _ in range(3):
        Saliency(wide)(torch.rand(1, 3, 48, 48))
    assert layouts.nbytes == 0
