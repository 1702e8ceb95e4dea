"""Ablation-CAM and Shapley-CAM against loops of the papers in float64, and against pytorch-grad-cam."""

import numpy as np
import pytest
import torch
from ablation_networks import Average, Flattened, Skip, Stem
from torch import nn
from torch.nn import functional

from pyfast_xai import AblationCAM, GradCAM, InputError, ShapleyCAM, UnsupportedOpError
from pyfast_xai.compat.grad_cam.pictures import scaled

DOUBLE = torch.float64


KINDS = {kind.__name__.lower(): kind for kind in (Average, Flattened, Skip)}


@pytest.fixture(params=KINDS)
def net(request):
    torch.manual_seed(0)
    return KINDS[request.param]().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


TARGETS = torch.tensor([[1, 4], [0, 2], [3, 3]])


def loop(net, image, target, *, probability=False):
    """The map of Ablation-CAM, one channel after the other."""
    with torch.no_grad():
        below = functional.relu(net.conv1(image[None]))
        a = net.layer(below)

        def score(activation):
            answer = net.above(activation, below.clone())[0]
            return float((answer.softmax(0) if probability else answer)[target])

        before, total = score(a.clone()), torch.zeros_like(a[0, 0])
        for k in range(a.shape[1]):
            without = a.clone()
            without[:, k] = 0
            total += (before - score(without)) / abs(before) * a[0, k]
    return total


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_ablation_cam_equals_the_loop_of_the_paper(net, images, batch_size, score):
    result = AblationCAM(net, layer="layer", batch_size=batch_size, score=score)(images, TARGETS)
    expected = [
        loop(net, image, int(c), probability=score == "probability")
        for image, item in zip(images, TARGETS, strict=True)
        for c in item
    ]
    torch.testing.assert_close(result.signed_map, torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert result.target.tolist() == TARGETS.flatten().tolist()
    heat = functional.interpolate(torch.stack(expected).clamp_min(0)[:, None], (16, 12), mode="bilinear")[:, 0]
    torch.testing.assert_close(result.heatmap, heat, rtol=1e-9, atol=1e-12)


def test_rows_do_not_depend_on_each_other(net, images):
    for kind in (AblationCAM, ShapleyCAM):
        together = kind(net, layer="layer")(images, 2)
        for n in range(3):
            alone = kind(net, layer="layer")(images[n : n + 1], 2)
            torch.testing.assert_close(together.signed_map[n], alone.signed_map[0], rtol=1e-8, atol=1e-12)


def test_functions_are_targets(net, images):
    for kind in (AblationCAM, ShapleyCAM):
        result = kind(net, layer="layer")(images, lambda answer: answer[:, 1].exp())
        assert result.target is None
        assert result.signed_map.shape == (3, 4, 3)
    expected = GradCAM(net, layer="layer")(images, 1).signed_map
    linear = ShapleyCAM(net, layer="layer")(images, lambda answer: answer[:, 1]).signed_map
    if isinstance(net, Average):  # without curvature it is Grad-CAM
        torch.testing.assert_close(linear, expected, rtol=1e-9, atol=1e-12)
    else:
        assert not torch.allclose(linear, expected)


def test_behind_an_average_one_forward_suffices(images):
    net, rows = Average().to(DOUBLE).eval(), []
    handle = net.fc.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    explain = AblationCAM(net, layer="layer")
    explain(images, TARGETS)
    handle.remove()
    assert [count for count in rows if count > 1] == [3]  # of one image is the forward that finds the layer


def shapley_loop(net, image, target):
    """The map of Shapley-CAM, by the whole Hessian."""
    below = functional.relu(net.conv1(image[None])).detach()
    a = net.layer(below).detach()

    def score(flat):
        answer = net.above(flat.view_as(a), below.clone())[0]
        return answer[target] + answer.log_softmax(0)[target]

    with torch.enable_grad():
        flat = a.flatten().requires_grad_()
        gradient = torch.autograd.functional.jacobian(score, flat)
        hessian = torch.autograd.functional.hessian(score, flat)
    weights = (gradient - hessian @ flat.detach() / 2).view_as(a).mean((2, 3))
    return (weights[0, :, None, None] * a[0]).sum(0)


def test_shapley_cam_equals_the_loop_of_the_paper(net, images):
    result = ShapleyCAM(net, layer="layer")(images, TARGETS)
    expected = [shapley_loop(net, image, int(c)) for image, item in zip(images, TARGETS, strict=True) for c in item]
    torch.testing.assert_close(result.signed_map, torch.stack(expected), rtol=1e-8, atol=1e-11)


def as_there(maps):
    """Signed maps as pytorch-grad-cam shows them."""
    return scaled(scaled(maps.clamp_min(0), (16, 12))).numpy()


@pytest.mark.filterwarnings("ignore")
def test_shapley_cam_equals_pytorch_grad_cam(net, images):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = [peer.utils.model_targets.ClassifierOutputReST(c) for c in (1, 4, 0)]
    cam = peer.ShapleyCAM(net, [net.layer])  # not as a context: that raises as it ends
    expected = cam(images, targets)
    result = ShapleyCAM(net, layer="layer")(images, [1, 4, 0]).signed_map
    np.testing.assert_allclose(as_there(result), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_ablation_cam_equals_pytorch_grad_cam_where_that_is_right(images):
    """Scores are positive there, and the least activation of every image is zero."""
    peer = pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.ReLU(), nn.Flatten())
    net = net.append(nn.Linear(48, 5)).append(nn.Softplus()).to(DOUBLE).eval()
    targets = [peer.utils.model_targets.ClassifierOutputTarget(c) for c in (1, 4, 0)]
    with peer.AblationCAM(net, [net[1]]) as cam:
        expected = cam(images, targets)
    result = AblationCAM(net, layer="1", outputs="values")(images, [1, 4, 0]).signed_map
    np.testing.assert_allclose(as_there(result), expected, rtol=0, atol=1e-4)


class Tokens(nn.Module):
    """Channels are the last dimension, and a class token is read in the end."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.norm1, self.mix, self.norm2, self.fc = nn.LayerNorm(8), nn.Linear(13, 13), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = self.norm1(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.fc(self.norm2(x + self.mix(x.mT).mT)[:, 0])


def test_tokens(images):
    torch.manual_seed(0)
    net = Tokens().to(DOUBLE).eval()
    result = AblationCAM(net, layer="norm1")(images, 3)
    with torch.no_grad():
        x = net.patch(images).flatten(2).mT
        x = net.norm1(torch.cat([net.token.expand(len(x), -1, -1), x], 1))

        def above(tokens):
            return net.fc(net.norm2(tokens + net.mix(tokens.mT).mT)[:, 0])[:, 3]

        before, expected = above(x), torch.zeros(3, 12, dtype=DOUBLE)
        for k in range(8):
            without = x.clone()
            without[..., k] = 0
            expected += ((before - above(without)) / before.abs())[:, None] * x[:, 1:, k]
    torch.testing.assert_close(result.signed_map, expected.view(3, 4, 3), rtol=1e-9, atol=1e-12)
    assert ShapleyCAM(net)(images).heatmap.shape == (3, 16, 12)


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused, self.patch, self.fc = fused, nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT[:, None]
        plain = (x @ x.mT / 8**0.5).softmax(-1) @ x
        return self.fc((functional.scaled_dot_product_attention(x, x, x) if self.fused else plain)[:, 0].mean(1))


def test_fused_attention_has_the_curvature_of_attention_that_is_spelled_out(images):
    fused, plain = (Attention(fused).to(DOUBLE).eval() for fused in (True, False))
    plain.load_state_dict(fused.state_dict())
    found, expected = (ShapleyCAM(net, layer="patch")(images, TARGETS).signed_map for net in (fused, plain))
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@torch.library.custom_op("pyfast_xai_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("pyfast_xai_tests::slope_of_cube", mutates_args=())
def slope_of_cube(x: torch.Tensor) -> torch.Tensor:
    return 3 * x**2


cube.register_autograd(
    lambda ctx, grad: grad * slope_of_cube(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Cube(nn.Module):
    """Has a derivative whose own derivative nobody wrote."""

    def __init__(self):
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(cube(self.patch(x)).mean((2, 3)))


def test_an_operation_without_a_second_derivative_is_named(images):
    with pytest.raises(UnsupportedOpError, match="an operation above the layer has no second derivative"):
        ShapleyCAM(Cube().eval(), layer="patch")(images.float(), 1)


class Random(Stem):
    def above(self, x, below):
        return functional.dropout(x, 0.5, training=True).mean((2, 3))


def test_a_model_that_draws_from_the_layer_is_refused(images):
    with pytest.raises(InputError, match="model must be replayable above the layer"):
        AblationCAM(Random().to(DOUBLE).eval(), layer="layer")(images, 1)
    with pytest.raises(InputError, match="score must be one of"):
        AblationCAM(Random(), score="loss")


def test_several_layers_are_averaged(net, images):
    result = AblationCAM(net, layer=["conv1", "layer"])(images, 1)
    parts = [AblationCAM(net, layer=layer)(images, 1).heatmap for layer in ("conv1", "layer")]
    expected = torch.stack([item / item.amax((1, 2), keepdim=True).clamp_min(1e-300) for item in parts]).mean(0)
    torch.testing.assert_close(result.heatmap, expected)
