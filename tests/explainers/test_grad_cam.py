"""The gradient CAMs beside Grad-CAM: each against a loop of its paper in float64, and against its peer."""

import numpy as np
import pytest
import torch
from flat_network import Flat, layer_gradients
from torch import nn
from torch.nn import functional

import pyfast_xai
from pyfast_xai import EigenGradCAM, GradCAM, HiResCAM, SegEigenCAM, XGradCAM
from pyfast_xai.compat.grad_cam.pictures import scaled
from pyfast_xai.explainers.common.cam_rules import RULES

DOUBLE = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Flat().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


TARGET = torch.tensor([1, 4, 0])


def of_classes(target):
    return lambda output: output.gather(1, target[:, None])


def first_component(products):
    """Of `[C, h, w]`, turned to rise with the sum over channels."""
    rows = products.flatten(1).T
    rows = rows - rows.mean(0)
    direction = torch.linalg.svd(rows)[2][0]
    result, total = rows @ direction, products.sum(0).flatten()
    rises = ((result - result.mean()) * (total - total.mean())).sum()
    return (result if rises >= 0 else -result).view(products.shape[1:])


def hires(g, a):
    return sum(g[k] * a[k] for k in range(len(a)))


def layer_cam(g, a):
    return sum(g[k].clamp_min(0) * a[k] for k in range(len(a)))


def xgrad(g, a):
    total = torch.zeros_like(a[0])
    for k in range(len(a)):
        below = float(a[k].sum())
        total += (float((g[k] * a[k]).sum()) / below if below else 0) * a[k]
    return total


def elementwise(g, a):
    return sum((g[k] * a[k]).clamp_min(0) for k in range(len(a)))


LOOPS = {
    "hires-cam": hires,
    "layer-cam": layer_cam,
    "xgrad-cam": xgrad,
    "grad-cam-elementwise": elementwise,
    "eigen-grad-cam": lambda g, a: first_component(g * a),
    "seg-eigen-cam": lambda g, a: first_component(g.abs() * a),
}


@pytest.mark.parametrize("layer", ["relu1", "conv2", "relu3"])
@pytest.mark.parametrize("method", LOOPS)
def test_equals_the_loop_of_the_paper(net, images, method, layer):
    activation, grad = layer_gradients(net, layer, images, of_classes(TARGET))
    expected = torch.stack([LOOPS[method](g, a) for g, a in zip(grad, activation, strict=True)])
    result = pyfast_xai.METHODS[method](net, layer=layer)(images, TARGET)
    torch.testing.assert_close(result.signed_map, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    heat = functional.interpolate(expected.clamp_min(0)[:, None], (16, 12), mode="bilinear")[:, 0]
    torch.testing.assert_close(result.heatmap, heat, rtol=0, atol=1e-12 * float(heat.max()))
    assert result.method == method


@pytest.mark.parametrize("method", LOOPS)
def test_targets_share_a_walk_and_rows_do_not_depend_on_each_other(net, images, method):
    explain = pyfast_xai.METHODS[method](net, layer="conv2")
    together = explain(images, [[1, 4], [0, 2], [3, 3]])
    for row, (n, target) in enumerate([(0, 1), (0, 4), (1, 0), (1, 2), (2, 3), (2, 3)]):
        alone = explain(images[n : n + 1], target)
        torch.testing.assert_close(together.signed_map[row], alone.signed_map[0], rtol=1e-9, atol=1e-12)
        assert together.target[row] == target


PEERS = {
    "hires-cam": "HiResCAM",
    "layer-cam": "LayerCAM",
    "xgrad-cam": "XGradCAM",
    "grad-cam-elementwise": "GradCAMElementWise",
}


def scaled_as_there(maps, size):
    """Signed maps as pytorch-grad-cam shows them."""
    return scaled(scaled(maps.clamp_min(0), size)).numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["relu1", "relu3"])
@pytest.mark.parametrize("method", PEERS)
def test_equals_pytorch_grad_cam(net, images, method, layer):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = [peer.utils.model_targets.ClassifierOutputTarget(int(c)) for c in TARGET]
    with getattr(peer, PEERS[method])(net, [net.get_submodule(layer)]) as cam:
        expected = cam(images, targets)
    result = pyfast_xai.METHODS[method](net, layer=layer)(images, TARGET).signed_map
    np.testing.assert_allclose(scaled_as_there(result, (16, 12)), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), [(EigenGradCAM, "EigenGradCAM"), (SegEigenCAM, "SegEigenCAM")])
def test_equals_pytorch_grad_cam_but_for_the_sign(net, images, kind, name):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = [peer.utils.model_targets.ClassifierOutputTarget(int(c)) for c in TARGET]
    result = kind(net, layer="relu1")(images, TARGET).signed_map
    either = [scaled_as_there(item, (16, 12)) for item in (result, -result)]
    with getattr(peer, name)(net, [net.relu1]) as cam:
        for row, theirs in enumerate(cam(images, targets)):
            assert min(abs(item[row] - theirs).max() for item in either) < 1e-4


def test_behind_an_average_three_methods_are_grad_cam(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    net = net.eval().to(DOUBLE)
    expected = GradCAM(net, layer="1")(images, TARGET).signed_map
    for kind in (HiResCAM, XGradCAM):
        torch.testing.assert_close(kind(net, layer="1")(images, TARGET).signed_map, expected, rtol=0, atol=1e-14)


class Pyramid(nn.Module):
    """Its first score comes from the first level, the second from the last."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.heads = nn.ModuleList(nn.Conv2d(4, 1, 1) for _ in range(2))

    def forward(self, x):
        low = self.low(x).tanh()
        maps = (self.heads[0](low), self.heads[1](self.high(low).tanh()))
        return torch.cat([one.mean((2, 3)) for one in maps], 1)


def test_a_row_of_which_nothing_arrives_is_named(images, caplog):
    torch.manual_seed(0)
    net = Pyramid().eval().to(DOUBLE)
    found = GradCAM(net, layer="high")(images, torch.tensor([1, 0, 1])).signed_map
    assert found.flatten(1).any(1).tolist() == [True, False, True]
    assert "the map of row 1 is zero, for nothing of its target arrives at the layer" in caplog.text


class ClassToken(nn.Module):
    """Reads one token, to which the others are mixed behind a norm."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.mix, self.fc = nn.Linear(13, 13), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        return self.fc((x + self.mix(self.norm(x).tanh().mT).mT)[:, 0])


def test_hires_cam_explains_what_a_norm_makes_of_tokens(images):
    """The gradient at what the norm reads is orthogonal to it but for the epsilon of the norm."""
    torch.manual_seed(0)
    net, kept = ClassToken().eval().to(DOUBLE), []
    before = HiResCAM(net, layer="cat")(images, TARGET).signed_map
    found = HiResCAM(net)(images, TARGET).signed_map
    handle = net.norm.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.enable_grad():
        scores = net(images.clone().requires_grad_()).gather(1, TARGET[:, None])
        (gradient,) = torch.autograd.grad(scores.sum(), kept[0])
    handle.remove()
    expected = (gradient * kept[0]).sum(2)[:, 1:].detach().view(3, 4, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert before.abs().max() < 1e-3 * expected.abs().max()


def test_channels_without_activation_weigh_nothing_in_xgrad_cam():
    weights = RULES["xgrad-cam"].weights(torch.randn(2, 1, 3, 3, 2), torch.zeros(1, 3, 3, 2))
    assert torch.equal(weights, torch.zeros(2, 1, 2))


def test_several_layers_take_one_forward(net, images):
    explain, rows = pyfast_xai.LayerCAM(net, layer=["relu1", "conv2", "relu3"]), []
    handle = net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    explain(images)
    rows.clear()
    explain(images)
    handle.remove()
    assert [count for count in rows if count > 1] == [3]  # of one image is the forward that finds the layers
