import pytest
import torch
from torch import nn

from pyfast_xai import METHODS, EigenCAM, GradCAM, InputError, demo, layers


@pytest.fixture
def model():
    parts = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*parts), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


def test_every_layer_with_a_map_is_listed(model):
    result = layers(model, torch.rand(2, 3, 16, 12))
    assert [(one.name, one.shape, one.grid) for one in result] == [
        ("0.0", (4, 8, 6), (8, 6)),
        ("0.1", (4, 8, 6), (8, 6)),
        ("0.2", (6, 8, 6), (8, 6)),
        ("0", (6, 8, 6), (8, 6)),
    ]
    assert "0.3" in result[-1].other_names
    assert "grad-cam" in result[-1].auto_of
    lines = repr(result).splitlines()
    assert lines[0].split() == ["layer", "activation", "map", "auto", "of"]
    assert lines[-1].split()[:6] == ["0", "6", "x", "8", "x", "6"]


@pytest.mark.parametrize("explainer", [GradCAM, EigenCAM])
def test_explainers_take_the_names_and_auto_is_the_one_that_is_said(explainer):
    model, images = demo.load(), torch.rand(1, 3, 96, 96)
    result = layers(model, images)
    automatic = [one for one in result if explainer.method in one.auto_of]
    assert len(automatic) == 1
    for name in (automatic[0].name, *automatic[0].other_names):
        maps = [explainer(model, layer=layer)(images).signed_map for layer in (name, "auto")]
        assert torch.equal(*maps)
    for one in result[::6]:
        assert explainer(model, layer=one.name)(images).signed_map.shape[1:] == one.grid
    assert set().union(*(one.auto_of for one in result)) <= set(METHODS)


def test_operations_are_listed_where_they_are_asked_for():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            maps = torch.relu(self.conv(x)) + 1
            return self.head(maps.mean((2, 3)))

    model, images = Adds().eval(), torch.rand(1, 3, 8, 8)
    names = [one.name for one in layers(model, images, operations=True)]
    assert {one.name for one in layers(model, images) if one.is_module} == {"conv"}
    assert len(names) == 3  # the convolution, its rectified form and the sum
    assert all(GradCAM(model, layer=name)(images).heatmap.shape == (1, 8, 8) for name in names)


def test_a_module_that_runs_twice_has_two_names():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(192, 2)).eval()
    result = layers(model, torch.rand(1, 3, 8, 8))
    assert [one.name for one in result if one.name.startswith("0")] == ["0@0", "0@1"]


def test_what_does_not_fit_is_said(model):
    with pytest.raises(InputError, match=r"images must have shape .*, got \[16, 12\]"):
        layers(model, torch.rand(16, 12))
    with pytest.raises(InputError, match=r"looks like \[N, H, W, C\]"):
        layers(model, torch.rand(1, 16, 12, 3))
    with pytest.raises(InputError, match="evaluation mode"):
        layers(model.train(), torch.rand(1, 3, 16, 12))
