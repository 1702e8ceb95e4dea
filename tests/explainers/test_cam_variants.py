"""Maps made of other maps, of noisy images and of activations alone: each against a loop in float64, and its peer."""

import numpy as np
import pytest
import torch
from flat_network import Flat, layer_gradients
from torch import nn
from torch.nn import functional

from pyfast_xai import (
    FEM,
    KPCACAM,
    SESS,
    FinerCAM,
    GradCAM,
    GradCAMPlusPlus,
    InputError,
    LayerCAM,
    RandomCAM,
    RefineCAM,
    SmoothGradCAMPlusPlus,
)
from pyfast_xai.compat.grad_cam.pictures import scaled

DOUBLE = torch.float64


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Flat().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


TARGET = torch.tensor([1, 4, 0])


def of_classes(output):
    return output.gather(1, TARGET[:, None])


def shown(maps):
    return functional.interpolate(maps.clamp_min(0)[:, None], (16, 12), mode="bilinear")[:, 0]


def at_most_one(heat):
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-300)


# Several layers in one walk

FUSED = {
    "layer-cam": (lambda net, **s: LayerCAM(net, **s), lambda m: torch.stack([(2 * own).tanh() for own in m]).amax(0)),
    "mean": (lambda net, **s: LayerCAM(net, fuse="mean", gamma=None, **s), lambda m: torch.stack(m).mean(0)),
    "gamma": (
        lambda net, **s: LayerCAM(net, fuse="mean", gamma=0.5, **s),
        lambda m: torch.stack([(own / 2).tanh() for own in m]).mean(0),
    ),
    "max": (lambda net, **s: GradCAM(net, fuse="max", **s), lambda m: torch.stack(m).amax(0)),
    "product": (lambda net, **s: GradCAM(net, fuse="product", **s), lambda m: torch.stack(m).prod(0)),
    "refine-cam": (lambda net, **s: RefineCAM(net, base="hires-cam", **s), lambda m: torch.stack(m).prod(0)),
}


@pytest.mark.parametrize("kind", FUSED)
def test_layers_are_fused(kind, net, images):
    make, fuse = FUSED[kind]
    maps = []
    for layer in ("relu1", "relu2"):
        a, g = layer_gradients(net, layer, images, of_classes)
        if kind in ("max", "product"):
            own = (g.mean((2, 3), keepdim=True) * a).sum(1)
        else:
            own = ((g if kind == "refine-cam" else g.clamp_min(0)) * a).sum(1)
        maps.append(at_most_one(shown(own)))
    result = make(net, layer=["relu1", "relu2"])(images, TARGET)
    torch.testing.assert_close(result.heatmap, fuse(maps), rtol=1e-9, atol=1e-12)
    assert result.signed_map is None


@pytest.mark.filterwarnings("ignore")
def test_refine_cam_equals_pytorch_grad_cam(net, images):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = [peer.utils.model_targets.ClassifierOutputTarget(int(c)) for c in TARGET]
    nn.init.zeros_(net.conv1.bias)
    nn.init.zeros_(net.conv2.bias)
    images[:, :, :8] = 0  # so that nothing is active there
    expected = peer.RefineCAM(net, [net.relu1, net.relu2])(images, targets)
    parts = [GradCAMPlusPlus(net, layer=layer)(images, TARGET).heatmap for layer in ("relu1", "relu2")]
    # There every map is stretched from its least value on, which is zero here.
    assert all((own.amin((1, 2)) == 0).all() for own in parts)
    result = RefineCAM(net, layer=["relu1", "relu2"])(images, TARGET).heatmap
    np.testing.assert_allclose(scaled(result).numpy(), expected, rtol=0, atol=1e-5)


# Rivals


def test_finer_cam_takes_the_nearest_classes_off(net, images):
    result = FinerCAM(net, layer="relu1", gamma=0.8, n_rivals=2)(images, [[1, 2], [4, 0], [0, 3]])
    with torch.no_grad():
        outputs = net(images)
    rows = [(n, c) for n, own in enumerate([[1, 2], [4, 0], [0, 3]]) for c in own]
    for row, (n, c) in enumerate(rows):
        order = sorted((abs(float(outputs[n, d] - outputs[n, c])), d) for d in range(5) if d != c)
        rivals = [d for _, d in order[:2]]
        a, g = layer_gradients(
            net, "relu1", images[n : n + 1], lambda y, c=c, r=rivals: y[:, c] - 0.8 * y[:, r].mean(1)
        )
        expected = (g.mean((2, 3), keepdim=True) * a).sum(1)[0]
        torch.testing.assert_close(result.signed_map[row], expected, rtol=1e-9, atol=1e-12)
        assert result.target[row] == c


@pytest.mark.parametrize("base", ["grad-cam", "layer-cam"])
def test_finer_cam_equals_torch_cam(base, net, images):
    peer = pytest.importorskip("torchcam.methods")
    kind = {"grad-cam": peer.GradCAM, "layer-cam": peer.LayerCAM}[base]
    with peer.FinerCAM(net, "relu1", base_method=kind) as extractor:
        (expected,) = extractor(TARGET.tolist(), net(images), normalized=False)
    result = FinerCAM(net, layer="relu1", base=base)(images, TARGET)
    torch.testing.assert_close(result.signed_map.clamp_min(0), expected, rtol=1e-9, atol=1e-12)


# Noise


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
def test_smooth_grad_cam_equals_the_loop_of_the_paper(layer, net, images):
    explain = SmoothGradCAMPlusPlus(net, layer=layer, n_samples=3, noise=0.2, seed=4)
    result = explain(images, TARGET)
    generator = torch.Generator().manual_seed(4)
    spread = 0.2 * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    noisy = [images + spread * torch.randn(1, 3, 16, 12, generator=generator).double() for _ in range(3)]
    grads = torch.stack([layer_gradients(net, layer, own, of_classes)[1] for own in noisy])
    a, _ = layer_gradients(net, layer, images, of_classes)
    first, square, cube = ((grads**power).mean(0) for power in (1, 2, 3))
    expected = torch.zeros_like(a[:, 0])
    for n in range(3):
        for k in range(a.shape[1]):
            below = 2 * square[n, k] + a[n, k].sum() * cube[n, k]
            alpha = torch.where(below == 0, torch.zeros_like(below), square[n, k] / below)
            expected[n] += (alpha * first[n, k].clamp_min(0)).sum() * a[n, k]
    torch.testing.assert_close(result.signed_map, expected, rtol=1e-8, atol=1e-12 * float(expected.abs().max()))
    for n in range(3):
        alone = explain(images[n : n + 1], int(TARGET[n]))
        torch.testing.assert_close(alone.signed_map[0], result.signed_map[n], rtol=1e-7, atol=1e-12)


# Activations alone


def activation_of(net, images):
    with torch.no_grad():
        return net.relu1(net.conv1(images))


def test_fem_equals_the_loop_of_the_paper(net, images):
    result, a = FEM(net, layer="relu1", k=1.0)(images, 3), activation_of(net, images).numpy()
    expected = np.zeros((3, 8, 6))
    for n in range(3):
        for channel in a[n]:
            expected[n] += channel.mean() * (channel > channel.mean() + channel.std())
    np.testing.assert_allclose(result.signed_map, expected, rtol=1e-12)
    assert result.target is None


def test_fem_of_too_few_positions_says_that_it_is_zero(net, images, caplog):
    net = nn.Sequential(net.conv1, net.relu1, net.conv2, net.relu2, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    square = images[:, :, :12]
    # Of 6 x 6 positions one may be 5.9 deviations above the mean, of a single one none.
    for size, warned in ((12, False), (2, True)):
        caplog.clear()
        found = FEM(net, layer="3")(square[:, :, :size, :size])
        assert ("none of 1 positions can exceed a mean by 2 standard deviations" in caplog.text) is warned
        assert not warned or not found.signed_map.any()


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf", "poly", "cosine", "linear"])
def test_kpca_cam_is_that_of_scikit_learn_but_for_the_sign(kernel, net, images):
    decomposition = pytest.importorskip("sklearn.decomposition")
    result, a = KPCACAM(net, layer="relu1", kernel=kernel)(images).signed_map, activation_of(net, images)
    for n in range(3):
        rows = a[n].flatten(1).T.numpy()
        centred = rows - rows.mean(0)
        expected = decomposition.KernelPCA(n_components=1, kernel=kernel).fit_transform(centred)[:, 0]
        energy = (rows**2).sum(1)
        expected *= 1 if ((expected - expected.mean()) * (energy - energy.mean())).sum() >= 0 else -1
        np.testing.assert_allclose(result[n].flatten(), expected, rtol=1e-6, atol=1e-9)


def test_random_weights_are_those_of_a_seed(net, images):
    result, a = RandomCAM(net, layer="relu1", seed=3)(images).signed_map, activation_of(net, images)
    weights = 2 * torch.rand(6, generator=torch.Generator().manual_seed(3), dtype=DOUBLE) - 1
    torch.testing.assert_close(result, torch.einsum("nchw,c->nhw", a, weights))
    assert not torch.equal(RandomCAM(net, layer="relu1", seed=4)(images).signed_map, result)


# Windows


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("own", "there"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"pool": "max", "smooth": False}, {"pool": "max", "smooth": False}, id="max"),
        pytest.param(
            {"drop_share": 0.5, "threshold": 0.2, "step": 20},
            {"pre_filter_ratio": 0.5, "theta": 0.2, "step_size": 20},
            id="filter",
        ),
    ],
)
def test_sess_equals_pytorch_grad_cam(own, there):
    peer = pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(2, 3, 40, 32)
    targets = [peer.utils.model_targets.ClassifierOutputTarget(c) for c in (1, 4)]
    with peer.SESS(model, [model.relu], num_scales=4, **there) as cam:
        expected = cam(images, targets)
    result = SESS(model, layer="relu", n_scales=4, batch_size=7, **own)(images, [[1, 2], [4, 2]])
    np.testing.assert_allclose(scaled(result.heatmap[::2]).numpy(), expected, rtol=0, atol=2e-4)
    assert result.target.tolist() == [1, 2, 4, 2]


def test_sess_takes_one_forward_a_window():
    torch.manual_seed(0)
    model, images, rows = Small().eval(), torch.randn(1, 3, 32, 32), []
    explain = SESS(model, layer="relu", n_scales=3)
    explain(images)
    handle = model.fc.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    explain(images)
    handle.remove()
    # 1 + 4 + 4 windows; the images themselves, whose classes are asked for; and one image that the layer is found on.
    assert sorted(rows)[-1] == 9
    assert sum(rows) - rows.count(1) == 9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda net: LayerCAM(net, fuse="sum"), "fuse must be one of", id="fuse"),
        pytest.param(lambda net: LayerCAM(net, gamma=0.0), "gamma must be positive", id="gamma"),
        pytest.param(lambda net: RefineCAM(net, base="cam"), "base must be one of", id="base"),
        pytest.param(lambda net: FinerCAM(net, gamma=-1.0), "gamma must be finite and not negative", id="finer"),
        pytest.param(
            lambda net: FinerCAM(net)(torch.rand(1, 3, 16, 12), lambda y: y[:, 0]), "target must", id="target"
        ),
        pytest.param(lambda net: SmoothGradCAMPlusPlus(net, noise=-0.1), "noise must not be negative", id="noise"),
        pytest.param(lambda net: FEM(net, k=0.0), "k must be positive", id="fem"),
        pytest.param(lambda net: KPCACAM(net, kernel="tanh"), "kernel must be one of", id="kernel"),
        pytest.param(lambda net: SESS(net, base="eigen-cam"), "base must be one of", id="sess"),
        pytest.param(lambda net: SESS(net, drop_share=1.0), "drop_share must lie in", id="drop"),
    ],
)
def test_bad_settings(make, words, net):
    with pytest.raises(InputError, match=words):
        make(net.float())
