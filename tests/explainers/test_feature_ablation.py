"""Feature ablation and permutation against Captum and against plain loops; feature masks of every kind."""

import pytest
import torch
from captum.attr import FeatureAblation as Captum
from torch import nn

from pyfast_xai import FeatureAblation, FeaturePermutation
from pyfast_xai.errors import InputError

DOUBLE = torch.float64
GRID = torch.arange(20).view(4, 5).repeat_interleave(3, 0).repeat_interleave(3, 1)  # of 12 x 15 pixels
RAMP = torch.linspace(-1, 1, 180, dtype=DOUBLE).view(12, 15)
MASKS = {
    "a grid": GRID,
    "numbers with gaps": 7 * GRID - 3,
    "channels": torch.arange(3).view(1, 3, 1, 1).expand(1, 3, 12, 15),
    "channels apart": torch.stack([GRID, GRID + 20, GRID // 2])[None],
    "single pixels": torch.arange(180).view(12, 15),
}


@pytest.fixture
def net():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(120, 5)]
    return nn.Sequential(*layers).eval().double()


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 15, dtype=DOUBLE)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "baseline", [0.0, 0.7, torch.linspace(-1, 1, 180, dtype=DOUBLE).view(12, 15)], ids=["zero", "a number", "a tensor"]
)
def test_equals_captum(net, images, mask, baseline):
    result = FeatureAblation(net, feature_mask=MASKS[mask], baseline=baseline, batch_size=7)(images, [2, 0, 4])
    mask = MASKS[mask] if MASKS[mask].dim() == 4 else MASKS[mask][None, None]
    theirs = Captum(lambda x: net(x).softmax(1))
    with torch.no_grad():
        expected = theirs.attribute(
            images,
            target=torch.tensor([2, 0, 4]),
            feature_mask=mask,
            baselines=baseline if isinstance(baseline, float) else baseline.expand_as(images),
        )
    torch.testing.assert_close(result.attribution, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(result.signed_map, expected.mean(1), rtol=0, atol=1e-14)
    assert torch.equal(result.heatmap, result.signed_map.clamp_min(0).float())


def test_values_are_those_of_the_numbered_features(net, images):
    result = FeatureAblation(net, feature_mask=MASKS["channels apart"])(images, [[0, 1]] * 3)
    assert result.values.shape == (6, 40)
    assert result.feature_mask.shape == (6, 3, 12, 15)
    for row in range(6):
        assert torch.equal(result.values[row][result.feature_mask[row]], result.attribution[row])


def test_images_with_fewer_features_than_others(net, images):
    masks = torch.stack([GRID, GRID // 2, 0 * GRID])
    result = FeatureAblation(net, feature_mask=masks, batch_size=4)(images, 1)
    assert result.values.isnan().sum(1).tolist() == [0, 10, 19]
    for n in range(3):
        alone = FeatureAblation(net, feature_mask=masks[n])(images[n : n + 1], 1)
        torch.testing.assert_close(alone.signed_map[0], result.signed_map[n], rtol=0, atol=1e-14)


def test_a_number_is_a_grid(net, images):
    result = FeatureAblation(net, feature_mask=4)(images)
    rows, columns = torch.arange(12) // 3, torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [3] * 3)
    assert torch.equal(result.feature_mask[0, 0], 4 * rows[:, None] + columns)
    assert FeatureAblation(net)(images).values.shape == (3, 49)
    # Not more cells than pixels.
    assert FeatureAblation(net, feature_mask=99)(images[..., :12, :]).feature_mask.amax() == 179


def test_a_mean_is_that_of_the_feature_in_each_channel(images):
    class Seeing(nn.Module):
        def forward(self, x):
            self.seen = x.clone()
            return x.mean((2, 3))

    mask = MASKS["channels apart"]
    net = Seeing().eval()
    FeatureAblation(net, feature_mask=mask, baseline="mean", batch_size=99)(images[:1])
    for feature, changed in enumerate(net.seen):
        for channel in range(3):
            within, pixels = mask[0, channel] == feature, images[0, channel]
            expected = torch.where(within, pixels[within].mean(), pixels)
            torch.testing.assert_close(changed[channel], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2])
def test_permutation_is_the_mean_over_other_images(net, images, count):
    """With as many permutations as there are other images, nothing is left to chance."""
    others = images[: count + 1]
    result = FeaturePermutation(net, feature_mask=GRID, n_permutations=count, batch_size=7)(others, 3)
    with torch.no_grad():
        before = net(others).softmax(1)[:, 3]
        for n in range(len(others)):
            for feature in range(20):
                drops = [
                    before[n] - net(torch.where(feature == GRID, others[m], others[n])[None]).softmax(1)[0, 3]
                    for m in range(len(others))
                    if m != n
                ]
                torch.testing.assert_close(result.values[n, feature], sum(drops) / len(drops), rtol=0, atol=1e-14)


def test_a_permutation_gives_each_image_the_features_of_another(net, images):
    """Of three images there are two ways without an image that keeps its own, one a shift of the other."""
    both = FeaturePermutation(net, feature_mask=GRID, n_permutations=2)(images, 3).values
    ways = {
        tuple((FeaturePermutation(net, feature_mask=GRID, seed=seed)(images, 3).values / both)[:, 0].tolist())
        for seed in range(12)
    }
    assert len(ways) == 2
    torch.testing.assert_close(torch.tensor(list(ways)).mean(0), torch.ones(3))


def test_references_make_images_independent_of_each_other(net, images):
    references = torch.randn(4, 3, 12, 15, dtype=DOUBLE)
    explain = FeaturePermutation(net, feature_mask=5, references=references, n_permutations=3)
    result = explain(images, 0)
    for n in range(3):
        torch.testing.assert_close(explain(images[n : n + 1], 0).values[0], result.values[n], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_permutations": 3}, "images must have 3 others for n_permutations=3, got 2"),
        (
            {"references": torch.zeros(2, 3, 5, 5)},
            r"references must have shape \[R, 3, 12, 15\], got \[2, 3, 5, 5\]",
        ),
        ({"n_permutations": 0}, "n_permutations must be at least 1, got 0"),
    ],
    ids=["too few", "another shape", "none"],
)
def test_bad_settings_of_permutation(net, images, settings, message):
    with pytest.raises(InputError, match=message):
        FeaturePermutation(net, **settings)(images)
