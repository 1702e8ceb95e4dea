"""What explainers remember about a model goes when the model changes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import CNNFixations, EigenCAM, ExcitationBackprop, GradCAM, GradCAMPlusPlus, GuidedGradCAM
from pyfast_xai.explainers.common.model_cache import ModelCache


class Net(nn.Module):
    """Two stages of which a flag can leave out the second."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 5)
        self.deep = True

    def forward(self, x, deep=True):
        x = self.first(x)
        if deep and self.deep:
            x = self.second(x)
        return self.head(x.mean((2, 3)))


def twice_and_one(module, args, output):
    return output * 2 + 1


def pooled(module, args, output):
    return functional.avg_pool2d(output, 2)


CHANGES = {
    "a hook behind the last layer": lambda net: net.second.register_forward_hook(twice_and_one),
    "a hook that makes the map smaller": lambda net: net.second.register_forward_hook(pooled),
    "a forward that was replaced": lambda net: setattr(net.second[1], "forward", torch.nn.functional.softplus),
    "a module that was replaced": lambda net: setattr(
        net, "second", nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()).eval()
    ),
    "a module that was added": lambda net: net.second.append(nn.Conv2d(8, 8, 1).eval()),
    "an attribute of the model": lambda net: setattr(net, "deep", False),
    "an attribute of a layer": lambda net: setattr(net.second[0], "stride", (2, 2)),
}
METHODS = [GradCAM, GradCAMPlusPlus, EigenCAM, GuidedGradCAM, ExcitationBackprop]


def entry(cache, images):
    with cache.entry(images, (), {}) as result:
        return result


def assert_like_a_fresh_one(explainer, fresh, *args, **kwargs):
    explanation, expected = explainer(*args, **kwargs), fresh(*args, **kwargs)
    torch.testing.assert_close(explanation.heatmap, expected.heatmap)


@pytest.mark.parametrize("accelerated", [False, True], ids=["recorded", "accelerated"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_a_changed_model_is_explained_at_its_new_layer(method, change, accelerated):
    net, images = Net().eval(), torch.randn(2, 3, 16, 16)
    explainer = method(net)
    if accelerated:
        explainer.accelerate()
    explainer(images)
    explainer(images)
    CHANGES[change](net)
    assert_like_a_fresh_one(explainer, method(net), images)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_other_arguments_of_the_model_have_layers_of_their_own(method):
    net, images = Net().eval(), torch.randn(2, 3, 16, 16)
    explainer = method(net)
    for deep in (True, False, True):
        assert_like_a_fresh_one(explainer, method(net), images, deep=deep)


@pytest.mark.parametrize("method", [GradCAM, EigenCAM], ids=lambda method: method.method)
def test_another_model_or_layer_is_noticed(method):
    net, images = Net().eval(), torch.randn(2, 3, 16, 16)
    explainer = method(net)
    explainer(images)
    explainer.layers = ["first"]
    assert_like_a_fresh_one(explainer, method(net, layer="first"), images)


def test_fixations_start_at_the_last_call_of_a_changed_model():
    class Repeated(Net):
        times = 1

        def forward(self, x):
            x = self.first(x)
            for _ in range(self.times):
                x = self.second(x)
            return self.head(x.mean((2, 3)))

    net, images = Repeated().eval(), torch.randn(2, 3, 16, 16)
    explainer = CNNFixations(net, neuron=("second", (0, 4, 4)))
    explainer(images)
    net.times = 3
    expected = CNNFixations(net, neuron=("second", (0, 4, 4)))(images)
    assert all(torch.equal(a, b) for a, b in zip(explainer(images).points, expected.points, strict=True))


@pytest.mark.parametrize("method", [GradCAM, EigenCAM], ids=lambda method: method.method)
def test_a_model_that_keeps_what_it_saw_runs_one_time_a_call(method):
    net, images = Net().eval(), torch.randn(2, 3, 16, 16)
    rows, latest = [], {}

    def note(module, args, output):
        rows.append(len(output))
        latest["features"] = output
        module.seen = output

    net.first.register_forward_hook(note)
    explainer = method(net)
    explainer(images)
    explainer(images)
    first = len(rows)
    for batch in (images, images[:1], images.repeat(2, 1, 1, 1)):
        explainer(batch)
    assert rows[first:] == [2, 1, 4]


def test_a_copy_remembers_nothing():
    net, images = Net().eval(), torch.randn(2, 3, 16, 16)
    explainer = GradCAM(net)
    explainer(images)
    for other in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        other.model.deep = False
        assert_like_a_fresh_one(other, GradCAM(other.model), images)
        assert other.model is not net


def test_entries_are_bounded():
    net = Net().eval()
    cache = ModelCache(GradCAM(net), dict)
    entries = [entry(cache, torch.zeros(1, 3, 4, 4 + n)) for n in range(1000)]
    assert len({id(entry) for entry in entries}) == 1000
    assert len(cache._entries) <= 256
    assert entry(cache, torch.zeros(1, 3, 4, 1003)) is entries[-1]


def test_nothing_is_kept_of_a_model_whose_changes_cannot_be_seen():
    net = Net().eval()
    net.table = np.zeros(1_000_000)  # too large to be compared
    cache = ModelCache(GradCAM(net), dict)
    assert entry(cache, torch.zeros(1, 3, 4, 4)) is not entry(cache, torch.zeros(1, 3, 4, 4))
