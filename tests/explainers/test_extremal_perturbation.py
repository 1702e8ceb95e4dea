"""Extremal perturbation against the authors' algorithm written out with autograd."""

import pytest
import torch
from oracles import extremal_perturbation as oracle
from torch import nn

from pyfast_xai import ExtremalPerturbation
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
SETTINGS = {"step": 3, "sigma": 6.0, "blur": 4.0, "n_levels": 5}


@pytest.fixture
def net():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(90, 5)]
    return nn.Sequential(*layers).eval().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 13, 20, dtype=DOUBLE)


@pytest.mark.parametrize("flip", [True, False], ids=["flipped", "as it is"])
@pytest.mark.parametrize("game", ["preservation", "deletion"])
def test_equals_the_authors_algorithm(net, images, game, flip):
    with torch.no_grad():
        net[-1].weight.mul_(200)  # so that the score counts beside the area
    explain = ExtremalPerturbation(
        net, area_share=0.3, game=game, n_iterations=12, flip=flip, lr=0.05, batch_size=3, **SETTINGS
    )
    found = explain(images, [[0, 3], [4, 1]])
    regions = []
    for row, (n, target) in enumerate([(0, 0), (0, 3), (1, 4), (1, 1)]):
        expected = oracle.optimise(net, images[n], target, 0.3, 12, 3, 6, 4, 5, game == "deletion", flip=flip, lr=0.05)
        regions.append(expected)
        region = found.mask[row, 0] if game == "preservation" else 1 - found.mask[row, 0]
        torch.testing.assert_close(region, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.heatmap[row], expected.float())
    # Targets differ in more than what is compared.
    assert (regions[0] - regions[1]).abs().max() > 1e-3


def test_the_perturbed_image_lies_between_blurs(net, images):
    found = ExtremalPerturbation(net, n_iterations=3, **SETTINGS)(images, 1)
    pyramid = [oracle.smooth(images[0], (1 - i / 4) * 4.0) for i in range(5)]
    torch.testing.assert_close(found.perturbed[0], oracle.between(pyramid, found.mask[0, 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.complement[0], oracle.between(pyramid, 1 - found.mask[0, 0]), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(found.after, net(found.perturbed).softmax(1)[:, 1].float())


@pytest.mark.parametrize("game", ["preservation", "deletion"])
def test_the_region_is_where_the_model_looks_and_has_the_area(game):
    class Corner(nn.Module):
        def forward(self, x):
            # What a blur takes away: the difference of neighbours.
            edges = x[..., :12, :12].diff(dim=3).abs().mean((1, 2, 3))
            return torch.stack([40 * edges, 0 * edges], 1)

    image = torch.randn(1, 3, 28, 28, dtype=DOUBLE)
    explain = ExtremalPerturbation(
        Corner().eval(), area_share=0.25, game=game, n_iterations=250, lr=0.05, flip=False, step=4, sigma=4.0, blur=3.0
    )
    heat = explain(image, 0).heatmap[0]
    assert heat[2:10, 2:10].mean() > 0.8
    assert heat[16:, 16:].mean() < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"area_share": 1.0}, "area_share must lie between 0 and 1, got 1.0"),
        ({"game": "dual"}, "game must be one of 'preservation', 'deletion', got 'dual'"),
        ({"n_levels": 1}, "n_levels must be at least 2, got 1"),
    ],
    ids=["area", "game", "levels"],
)
def test_bad_settings(net, settings, message):
    with pytest.raises(InputError, match=message):
        ExtremalPerturbation(net, **settings)
