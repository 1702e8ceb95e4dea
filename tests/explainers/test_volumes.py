"""Volumes, clips and signals: the definitions written out, and a stack of one slice as the image it is."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pyfast_xai
from pyfast_xai import CAM, EigenCAM, Explanation, GradCAM, InputError, LayerCAM, Occlusion, Saliency

DOUBLE = torch.float64
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = {1: "linear", 3: "trilinear"}
SIZES = {1: (24,), 3: (8, 12, 10)}
GRADIENTS = ("Saliency", "GuidedBackprop", "DeconvNet", "InputXGradient", "SmoothGrad", "IntegratedGradients")
CAMS = ("CAM", "GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM", "EigenGradCAM", "GuidedGradCAM")


class Net(nn.Module):
    """Two convolutions with a pool between, and an average in front of the classifier."""

    def __init__(self, rank):
        super().__init__()
        self.one, self.two = CONVOLUTIONS[rank](2, 6, 3, padding=1), CONVOLUTIONS[rank](6, 8, 3, padding=1)
        self.pool, self.norm, self.fc = POOLS[rank](2), NORMS[rank](8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(torch.relu(self.one(x)))
        x = torch.relu(self.norm(self.two(x)))
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


@pytest.mark.parametrize("name", [*GRADIENTS, *CAMS, "EigenCAM"])
def test_a_stack_of_one_slice_is_an_image(name):
    torch.manual_seed(0)
    flat = Net(2).to(DOUBLE).eval()
    deep = Net(3).to(DOUBLE).eval()
    deep.one = nn.Conv3d(2, 6, (1, 3, 3), padding=(0, 1, 1)).to(DOUBLE)
    deep.two = nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)).to(DOUBLE)
    deep.pool = nn.AvgPool3d((1, 2, 2))
    with torch.no_grad():
        for one, other in ((deep.one, flat.one), (deep.two, flat.two)):
            one.weight.copy_(other.weight.unsqueeze(2))
            one.bias.copy_(other.bias)
        deep.fc.load_state_dict(flat.fc.state_dict())
    deep.eval()
    images = torch.randn(2, 2, 12, 10, dtype=DOUBLE)
    kind = getattr(pyfast_xai, name)
    expected, result = kind(flat)(images), kind(deep)(images.unsqueeze(2))
    torch.testing.assert_close(result.heatmap.squeeze(1), expected.heatmap, rtol=1e-5, atol=1e-6)
    if expected.attribution is not None:
        torch.testing.assert_close(result.attribution.squeeze(2), expected.attribution, rtol=1e-9, atol=1e-12)


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
        Occlusion(model)(images)
    with pytest.raises(InputError, match=r"images must have shape \[N, C, D, H, W\], got \[2, 8, 12\]"):
        Saliency(model)(images[0, ..., 0])


def test_a_network_of_images_takes_no_signals():
    """An image without its batch has as many dimensions as signals, and channels may be mixed by `Conv1d` (ECA-Net)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(2), nn.Conv1d(4, 2, 1))
    for images in (torch.rand(3, 12, 12), torch.rand(1, 1, 3, 12, 12)):
        with pytest.raises(InputError, match=r"images must have shape \[N, C, H, W\], got"):
            Saliency(model.eval())(images)
