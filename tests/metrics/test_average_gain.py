"""The average gain against the paper's fraction, image by image in float64."""

import pytest
import torch
from torch import nn

from pyfast_xai import InputError
from pyfast_xai.metrics import average_gain, drop_increase


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 7))

    def forward(self, x):
        return 4 * self.layers(x)


class Brightness(nn.Module):
    """Probability of class 1: how much of an image is left, in percent of its pixels' sum."""

    def forward(self, x):
        share = x.sum((1, 2, 3)) / 100
        return torch.stack([1 - share, share], 1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_equals_the_fraction_of_the_paper(net):
    images, maps = torch.randn(9, 3, 8, 8), torch.rand(9, 8, 8)
    targets = [0, 1, 2, 3, 4, 5, 6, 0, 1]
    double = Net().double().eval()
    double.load_state_dict(net.state_dict())
    expected = []
    for image, heat, target in zip(images.double(), maps.double(), targets, strict=True):
        scaled = (heat - heat.min()) / (heat.max() - heat.min())
        with torch.no_grad():
            p, o = (float(double(x[None]).softmax(1)[0, target]) for x in (image, image * scaled))
        expected.append(max(0.0, o - p) / (1 - p))
    result = average_gain(net, images, maps, targets, batch_size=4)
    assert result.dtype == torch.float32
    assert 0 < sum(gain > 0 for gain in expected) < 9
    assert result.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # Nothing is gained and lost at the same time.
    drop, increase = drop_increase(net, images, maps, targets)
    assert torch.equal(result > 0, increase)
    assert not (drop * result).any()


def test_a_probability_of_one_has_nothing_to_gain():
    images = torch.full((2, 1, 10, 10), 1.0)
    images[1] = 0.5
    maps = torch.rand(2, 10, 10)
    maps[1, :4], maps[1, 4:] = 0, 1
    # Class 0 rises from 0 to 1 - 0.5 * 0.6 where class 1, which is brightness, falls.
    assert average_gain(Brightness().eval(), images[1:], maps[1:], 0).tolist() == pytest.approx([(0.7 - 0.5) / 0.5])
    assert average_gain(Brightness().eval(), images[:1], maps[:1], 1).tolist() == [0]


def test_what_does_not_fit_is_said_so(net):
    images, maps = torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8)
    with pytest.raises(InputError, match=r"^heatmaps must have the size of the images, \[2, 8, 8\], got \[1, 8, 8\]$"):
        average_gain(net, images, maps[:1])
    with pytest.raises(InputError, match=r"^scores must be probabilities for the average gain, got "):
        average_gain(net, 100 * images, maps, 3, outputs="values")
