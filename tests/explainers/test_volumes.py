"""Volumes, clips and signals: the definitions written out, and a stack of one slice as the image it is."""

import itertools
import math

import pytest
import torch
from quick_settings import QUICK
from torch import nn
from torch.nn import functional

from pyfast_xai import (
    CAM,
    LIME,
    METHODS,
    RISE,
    CNNFixations,
    EigenCAM,
    Explanation,
    ExtremalPerturbation,
    FeatureAblation,
    GradCAM,
    InputError,
    LayerCAM,
    Occlusion,
    Saliency,
    ScoreCAM,
)

DOUBLE = torch.float64
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = {1: "linear", 3: "trilinear"}
SIZES = {1: (24,), 3: (8, 12, 10)}


class Net(nn.Module):
    """Two convolutions with a pool between, and an average in front of the classifier."""

    def __init__(self, rank, attends=False):
        super().__init__()
        self.attends = attends
        self.one, self.two = CONVOLUTIONS[rank](2, 6, 3, padding=1), CONVOLUTIONS[rank](6, 8, 3, padding=1)
        self.pool, self.norm, self.fc = POOLS[rank](2), NORMS[rank](8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(torch.relu(self.one(x)))
        x = torch.relu(self.norm(self.two(x)))
        if self.attends:
            tokens = x.flatten(2).mT
            return self.fc(functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))
        return self.fc(x.flatten(2).mean(2))


def case(rank):
    torch.manual_seed(0)
    return Net(rank).to(DOUBLE).eval(), torch.randn(3, 2, *SIZES[rank], dtype=DOUBLE)


def activation_and_gradient(model, images, target):
    """Of the last map, by autograd."""
    below = torch.relu(model.norm(model.two(model.pool(torch.relu(model.one(images))))))
    below.retain_grad()
    model.fc(below.flatten(2).mean(2))[:, target].sum().backward()
    return below.detach(), below.grad


@pytest.mark.parametrize("rank", SIZES)
def test_saliency_is_the_gradient(rank):
    model, images = case(rank)
    images.requires_grad_()
    model(images)[:, 3].sum().backward()
    explanation = Saliency(model)(images, 3)
    torch.testing.assert_close(explanation.attribution, images.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(explanation.heatmap, images.grad.abs().amax(1).float())


@pytest.mark.parametrize("rank", SIZES)
@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (GradCAM, lambda gradient: gradient.flatten(2).mean(2)),
        (CAM, lambda gradient: gradient.flatten(2).sum(2)),
        (LayerCAM, lambda gradient: gradient.clamp_min(0)),
    ],
    ids=["grad-cam", "cam", "layer-cam"],
)
def test_class_activation_maps_weigh_channels(rank, kind, weights):
    model, images = case(rank)
    activation, gradient = activation_and_gradient(model, images.clone().requires_grad_(), 3)
    weight = weights(gradient)
    weight = weight.view(*weight.shape, *[1] * rank) if weight.dim() == 2 else weight
    expected = (weight * activation).sum(1)
    explanation = kind(model)(images, 3)
    torch.testing.assert_close(explanation.signed_map, expected, rtol=0, atol=1e-13)
    heat = functional.interpolate(expected[:, None].clamp_min(0), SIZES[rank], mode=MODES[rank])[:, 0]
    torch.testing.assert_close(explanation.heatmap.double(), heat, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", SIZES)
def test_eigen_cam_is_the_first_component(rank):
    model, images = case(rank)
    activation, _ = activation_and_gradient(model, images.clone().requires_grad_(), 3)
    explanation = EigenCAM(model)(images)
    for row, result in zip(activation, explanation.signed_map, strict=True):
        left, values, _ = torch.linalg.svd(row.flatten(1).T, full_matrices=False)
        expected = (left[:, 0] * values[0]).view(row.shape[1:])
        sign = 1 if (expected * result).sum() > 0 else -1
        torch.testing.assert_close(result, sign * expected, rtol=0, atol=1e-7)
    assert explanation.heatmap.shape == (3, *SIZES[rank])


IMAGES_ALONE = {
    *("consensus", "sess", "xrai", "d-rise"),
    *("meaningful-perturbation", "extremal-perturbation"),
}


def test_which_methods_take_images_alone():
    assert {name for name, method in METHODS.items() if 5 not in method.ranks} == IMAGES_ALONE
    assert {name for name, method in METHODS.items() if 3 not in method.ranks} == IMAGES_ALONE


def stacked(flat):
    """The same network for volumes of one slice."""
    deep = Net(3, flat.attends).to(DOUBLE).eval()
    deep.one = nn.Conv3d(2, 6, (1, 3, 3), padding=(0, 1, 1)).to(DOUBLE)
    deep.two = nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)).to(DOUBLE)
    deep.pool = nn.AvgPool3d((1, 2, 2))
    with torch.no_grad():
        for one, other in ((deep.one, flat.one), (deep.two, flat.two)):
            one.weight.copy_(other.weight.unsqueeze(2))
            one.bias.copy_(other.bias)
        deep.fc.load_state_dict(flat.fc.state_dict())
    return deep.eval()


def settings(name):
    return {"window": 4, "stride": 4} if name == "occlusion" else QUICK.get(name, {})


VOLUMES = [name for name in METHODS if name not in IMAGES_ALONE]


@pytest.mark.parametrize("name", VOLUMES)
def test_a_stack_of_one_slice_is_an_image(name):
    torch.manual_seed(0)
    flat = Net(2, METHODS[name].needs_attention).to(DOUBLE).eval()
    images = torch.randn(2, 2, 12, 10, dtype=DOUBLE)
    expected = METHODS[name](flat, **settings(name))(images)
    result = METHODS[name](stacked(flat), **settings(name))(images.unsqueeze(2))
    assert expected.heatmap.any()
    torch.testing.assert_close(result.heatmap.squeeze(1), expected.heatmap, rtol=1e-5, atol=1e-6)
    if expected.attribution is not None:
        torch.testing.assert_close(result.attribution.squeeze(2), expected.attribution, rtol=1e-9, atol=1e-12)
    if expected.signed_map is not None:
        torch.testing.assert_close(result.signed_map.squeeze(1), expected.signed_map, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", SIZES)
@pytest.mark.parametrize("name", VOLUMES)
def test_every_row_of_volumes_and_signals_is_of_its_image_alone(name, rank):
    torch.manual_seed(0)
    model = Net(rank, METHODS[name].needs_attention).to(DOUBLE).eval()
    images = torch.randn(2, 2, *SIZES[rank], dtype=DOUBLE)
    result = METHODS[name](model, **settings(name))(images, 1)
    assert result.heatmap.shape == (2, *SIZES[rank])
    assert result.attribution is None or result.attribution.shape == images.shape
    assert any(field is not None and field.any() for field in (result.heatmap, result.attribution, result.signed_map))
    if rank == 3:
        assert result.slice("y", 3).heatmap.shape == (2, 8, 10)
        assert result.projection("x").heatmap.shape == (2, 8, 12)
    if name != "feature-permutation":  # which compares with the other images
        alone = METHODS[name](model, **settings(name))(images[1:], 1)
        torch.testing.assert_close(alone.heatmap, result.heatmap[1:], rtol=1e-6, atol=1e-9)


def score_without(model, images, where, target):
    """The scores of the images where a place is zero, `[N]`, as probabilities."""
    hidden = images.clone()
    hidden[(slice(None), slice(None), *where)] = 0
    with torch.no_grad():
        return model(hidden).softmax(1)[:, target]


@pytest.mark.parametrize("rank", SIZES)
def test_occlusion_is_the_mean_drop_over_windows(rank):
    model, images = case(rank)
    with torch.no_grad():
        before = model(images).softmax(1)[:, 3]
    window, stride = {1: ((5,), (3,)), 3: ((4, 5, 4), (4, 3, 2))}[rank]
    total = torch.zeros(len(images), *SIZES[rank], dtype=DOUBLE)
    covers = torch.zeros(SIZES[rank], dtype=DOUBLE)
    counts = [
        math.ceil((whole - size) / step) + 1 for whole, size, step in zip(SIZES[rank], window, stride, strict=True)
    ]
    for place in itertools.product(*map(range, counts)):
        where = tuple(slice(step * i, step * i + size) for step, i, size in zip(stride, place, window, strict=True))
        covers[where] += 1
        total[(slice(None), *where)] += (before - score_without(model, images, where, 3)).view(-1, *[1] * rank)
    result = Occlusion(model, window=window, stride=stride)(images, 3)
    torch.testing.assert_close(result.signed_map, total / covers, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.attribution, (total / covers)[:, None].expand_as(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", SIZES)
def test_feature_ablation_by_hand(rank):
    model, images = case(rank)
    with torch.no_grad():
        before = model(images).softmax(1)[:, 3]
    halves = torch.zeros(SIZES[rank], dtype=torch.int64)
    halves[SIZES[rank][0] // 2 :] = 1
    result = FeatureAblation(model, feature_mask=halves)(images, 3)
    for part in (0, 1):
        hidden = torch.where(halves == part, 0, images)
        with torch.no_grad():
            drop = before - model(hidden).softmax(1)[:, 3]
        torch.testing.assert_close(result.values[:, part], drop, rtol=0, atol=1e-12)
        assert (result.signed_map[:, halves == part] == result.values[:, part, None]).all()
    grid = FeatureAblation(model, feature_mask=2)(images, 3).feature_mask
    assert grid.unique().tolist() == list(range(2**rank))


@pytest.mark.parametrize("rank", SIZES)
def test_rise_is_the_weighted_mean_of_its_masks(rank):
    """By the masks that the model sees: images of ones are the masks."""
    model, images = case(rank)
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return model(x)

    ones = torch.ones_like(images[:1])
    result = RISE(Watched().eval(), n_masks=30, cells=3, accelerate=False)(ones, 3)
    masks = torch.cat([x for x in seen if not torch.equal(x, ones)])[:, 0]
    assert masks.shape == (30, *SIZES[rank])
    assert 0 <= masks.min() < 0.1
    assert 0.9 < masks.max() <= 1
    with torch.no_grad():
        scores = model(masks[:, None].expand(-1, 2, *masks.shape[1:])).softmax(1)[:, 3]
    expected = torch.einsum("m,m...->...", scores, masks) / (30 * 0.5)
    torch.testing.assert_close(result.signed_map[0], expected, rtol=0, atol=1e-12)
    variation = masks.flatten(1).std(0)
    assert (variation > 0).all()
    for axis in range(rank):  # masks differ along every axis
        assert (masks.diff(dim=1 + axis) != 0).any()


@pytest.mark.parametrize("rank", SIZES)
def test_score_cam_masks_with_channels(rank):
    model, images = case(rank)
    activation, _ = activation_and_gradient(model, images.clone().requires_grad_(), 3)
    up = functional.interpolate(activation, SIZES[rank], mode=MODES[rank], align_corners=False)
    low, high = (extreme(up, tuple(range(2, 2 + rank)), keepdim=True) for extreme in (torch.amin, torch.amax))
    varies = (high > low).flatten(1)  # a channel that is the same everywhere weighs nothing
    masks = (up - low) / (high - low).clamp_min(1e-300)
    with torch.no_grad():
        scores = torch.stack([model(images * masks[:, k : k + 1])[:, 3] for k in range(8)], 1)
    weights = scores.where(varies, -torch.inf).softmax(1).view(3, 8, *[1] * rank)
    torch.testing.assert_close(ScoreCAM(model)(images, 3).signed_map, (weights * activation).sum(1), rtol=0, atol=1e-12)


def test_fixations_of_a_volume_do_not_depend_on_the_order_of_its_axes():
    model, images = case(3)
    turned, _ = case(3)
    with torch.no_grad():
        for layer in (turned.one, turned.two):
            layer.weight.copy_(layer.weight.permute(0, 1, 3, 4, 2).clone())
    expected, result = CNNFixations(model)(images, 3), CNNFixations(turned)(images.permute(0, 1, 3, 4, 2), 3)
    torch.testing.assert_close(result.heatmap, expected.heatmap.permute(0, 2, 3, 1), rtol=0, atol=1e-5)
    for one, other in zip(expected.points, result.points, strict=True):
        assert one.shape[1] == 3
        assert set(map(tuple, one[:, [1, 2, 0]].tolist())) == set(map(tuple, other.tolist()))


@pytest.mark.parametrize("rank", SIZES)
def test_fixations_are_gathered_points_and_their_density(rank):
    model, images = case(rank)
    size = torch.tensor(SIZES[rank], dtype=DOUBLE)
    every = CNNFixations(model, radius_share=0)(images, 1)
    explain = CNNFixations(model, radius_share=0.2, min_neighbour_share=0.2, sigma_share=0.1)
    result = explain(images, 1)
    sigma = 0.1 * float(size.norm())
    grid = torch.stack(torch.meshgrid(*[torch.arange(side) for side in SIZES[rank]], indexing="ij"), -1).double()
    for n, points in enumerate(every.points):
        distances = torch.cdist(points.double(), points.double())
        near = (distances < 0.2 * size.norm()).sum(1)
        kept = points[near > math.floor(0.2 * len(points))]
        kept = kept if len(kept) else points
        assert result.points[n].tolist() == kept.tolist()
        squares = (grid[..., None, :] - kept).square().sum(-1)
        density = (-squares / (2 * sigma**2)).exp().sum(-1)
        torch.testing.assert_close(result.heatmap[n].double(), density, rtol=1e-5, atol=1e-5)


def test_fixations_in_slices_and_without_crops():
    model, images = case(3)
    explanation = CNNFixations(model)(images, 1)
    one = explanation.slice("z", 4)
    for points, whole in zip(one.points, explanation.points, strict=True):
        assert points.tolist() == whole[whole[:, 0] == 4][:, 1:].tolist()
    assert one.plot().size[0] > 100
    assert [points.shape[1] for points in explanation.projection("y").points] == [2, 2, 2]
    with pytest.raises(InputError, match="crops must be None for volumes and signals, got 4"):
        CNNFixations(model, crops=4)(images)


def test_superpixels_are_of_images():
    model, images = case(3)
    with pytest.raises(InputError, match="feature_mask must be an int, a tensor or a function for volumes and signals"):
        LIME(model)(images)
    assert LIME(model, feature_mask=2, n_samples=20)(images, 1).heatmap.shape == (3, 8, 12, 10)


def test_windows_on_volumes():
    model, images = case(3)
    thin = images[:, :, :2]
    assert Occlusion(model, window=6, stride=6)(thin, 1).heatmap.shape == (3, 2, 12, 10)
    with pytest.raises(InputError, match=r"window must have 3 sizes in pixels for images with as many axes, got 2"):
        Occlusion(model, window=(4, 4))(images)


@pytest.mark.parametrize("rank", SIZES)
def test_accelerated_is_as_recorded(rank):
    model, images = case(rank)
    for kind in (Saliency, GradCAM, EigenCAM):
        explain = kind(model).accelerate()
        for _ in range(3):
            result = explain(images)
        torch.testing.assert_close(result.heatmap, kind(model)(images).heatmap, rtol=1e-5, atol=1e-6)


def test_tokens_of_a_volume():
    """Patches of a volume in a row, as a vision transformer for volumes has them."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix, self.fc = nn.Conv3d(1, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.fc(torch.relu(self.mix(x)).mean(1))

    torch.manual_seed(0)
    explanation = GradCAM(Tokens().eval())(torch.randn(2, 1, 8, 12, 16), 1)
    assert explanation.signed_map.shape == (2, 2, 3, 4)
    assert explanation.heatmap.shape == (2, 8, 12, 16)


def test_slices_and_projections_can_be_drawn():
    model, images = case(3)
    explanation = Saliency(model)(images, 3)
    assert repr(explanation) == "Explanation(saliency, 3 images 8x12x10, target [3, 3, 3])"
    for dim, axis in enumerate("zyx", 1):
        one = explanation.slice(axis, 2)
        assert torch.equal(one.heatmap, explanation.heatmap.select(dim, 2))
        assert torch.equal(one.attribution, explanation.attribution.select(dim + 1, 2))
        assert torch.equal(one.images, images.select(dim + 1, 2))
        assert torch.equal(explanation.projection(axis).heatmap, explanation.heatmap.amax(dim))
    hottest = explanation.heatmap.flatten(2).sum(2).argmax(1)
    assert torch.equal(explanation.slice().heatmap, explanation.heatmap[torch.arange(3), hottest])
    assert explanation.slice().plot().size[0] > 100
    assert explanation.projection("y").boxes().shape == (3, 4)
    assert explanation._repr_png_() is not None


def test_what_volumes_do_not_have():
    model, images = case(3)
    explanation = Saliency(model)(images, 3)
    for refused in (explanation.boxes, explanation.peak, explanation.plot, explanation.overlay, explanation.rgb):
        with pytest.raises(InputError, match=r"\[3, 8, 12, 10\]: take a slice\(\) or a projection\(\)"):
            refused()
    with pytest.raises(InputError, match="index must be one of 8 slices across 'z', got 8"):
        explanation.slice("z", 8)
    with pytest.raises(InputError, match="axis must be 'z', 'y' or 'x', got 't'"):
        explanation.projection("t")
    with pytest.raises(InputError, match="must be that of volumes"):
        Explanation("mine", torch.rand(1, 4, 4)).slice()
    with pytest.raises(
        InputError, match=r"images must have shape \[N, C, H, W\], got \[3, 2, 8, 12, 10\]: videos and volumes are"
    ):
        ExtremalPerturbation(model)(images)
    with pytest.raises(InputError, match=r"images must have shape \[N, C, D, H, W\], got \[2, 8, 12\]"):
        Saliency(model)(images[0, ..., 0])


def test_a_network_of_images_takes_no_signals():
    """An image without its batch has as many dimensions as signals, and channels may be mixed by `Conv1d` (ECA-Net)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(2), nn.Conv1d(4, 2, 1))
    for images in (torch.rand(3, 12, 12), torch.rand(1, 1, 3, 12, 12)):
        with pytest.raises(InputError, match=r"images must have shape \[N, C, H, W\], got"):
            Saliency(model.eval())(images)
