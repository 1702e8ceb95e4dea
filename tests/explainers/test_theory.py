"""The theory paper (Nie, Zhang and Patel, 2018) on random networks, without data."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyfast_xai import DeconvNet, GuidedBackprop, Saliency
from pyfast_xai.reproduce.backprop import fully_connected, limit, three_layers

SIDE, CLASSES = 32, 10


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


@pytest.fixture
def images():
    """Smooth random pictures, so that a patch is not like any other."""
    coarse = torch.randn(4, 3, 8, 8)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)


def test_guided_backprop_tends_to_the_image_as_filters_grow(images):
    likeness = [
        cosine(GuidedBackprop(three_layers(n, side=SIDE))(images, 0).attribution, limit(images)) for n in (16, 64, 1024)
    ]
    assert likeness[0] < likeness[1] < likeness[2]
    assert likeness[2] > 0.9
    assert cosine(GuidedBackprop(three_layers(1024, side=SIDE))(images, 0).attribution, images) > 0.6


@pytest.mark.parametrize("method", [Saliency, DeconvNet])
def test_saliency_and_deconvnet_do_not(images, method):
    assert abs(cosine(method(three_layers(1024, side=SIDE))(images, 0).attribution, limit(images))) < 0.1


def test_nor_does_guided_backprop_in_a_fully_connected_network(images):
    """It would take exponentially many neurons (section 3.1.2): one neuron sees the whole image at once."""
    actual = cosine(GuidedBackprop(fully_connected(1024, side=SIDE))(images, 0).attribution, images)
    assert actual < 0.5 * cosine(GuidedBackprop(three_layers(1024, side=SIDE))(images, 0).attribution, limit(images))


def test_max_pooling_makes_deconvnet_recover_the_image(images):
    """Section 3.2: the switches hold what the missing mask of the rectifiers does not."""
    without = cosine(DeconvNet(three_layers(1024, side=SIDE))(images, 0).attribution, limit(images))
    pooled = cosine(DeconvNet(three_layers(1024, pool=3, side=SIDE))(images, 0).attribution, limit(images))
    assert abs(without) < 0.1
    assert pooled > 0.5


def vgg_like():
    layers, channels = [], 3
    for width in (32, 64, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    for weight in model.parameters():
        nn.init.kaiming_normal_(weight) if weight.dim() > 1 else nn.init.zeros_(weight)
    return model.eval()


def sensitivity(method, model, images):
    """Distance between the maps of two classes, each scaled to unit length (Fig. 7)."""
    both = method(model)(images, torch.tensor([[1, 6]] * len(images))).attribution
    first, second = F.normalize(both.flatten(1), dim=1).view(len(images), 2, -1).unbind(1)
    return float((first - second).norm(dim=1).mean())


def test_only_saliency_is_sensitive_to_the_class(images):
    """Fig. 7, on random weights."""
    distance = {}
    for method in (Saliency, DeconvNet, GuidedBackprop):
        torch.manual_seed(1)
        distance[method] = sum(sensitivity(method, vgg_like(), images) for _ in range(3)) / 3
    assert distance[Saliency] > 1.5 * distance[DeconvNet]
    assert distance[DeconvNet] >= distance[GuidedBackprop]
