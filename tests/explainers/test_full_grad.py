"""FullGrad: its terms add up to the score, and its map is that of a loop over layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyfast_xai import FullGrad
from pyfast_xai.explainers.full_grad import biased
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.tape import record

DOUBLE = torch.float64


class Net(nn.Module):
    """Functional and in-place rectifiers, a skip, batch norm with and without numbers of its own, a pool."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 5)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu_(x + self.bn2(self.conv2(x)))
        return self.fc2(functional.leaky_relu(self.fc1(functional.max_pool2d(x, 2).mean((2, 3)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to(DOUBLE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def test_the_input_and_all_biases_add_up_to_the_score(net, images):
    policy = GradientRules()
    tape = record(net, images, policy=policy)
    layers = biased(tape)
    assert len(layers) == 5
    seed = functional.one_hot(torch.tensor([1, 4, 0]), 5).to(DOUBLE)[None]
    at_input, *gradients = backward_pass(
        policy, tape, {tape.outputs: seed}, [tape.inputs[0], *(layer for layer, _ in layers)]
    )
    total = (at_input[0] * images).sum((1, 2, 3))
    for (_, bias), gradient in zip(layers, gradients, strict=True):
        shape = [1, -1] + [1] * (gradient.dim() - 3)
        total = total + (gradient[0] * bias.view(shape)).flatten(1).sum(1)
    expected = net(images).detach()[range(3), [1, 4, 0]]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def loop(net, images, target):
    saved = {}
    handles = [
        getattr(net, name).register_forward_hook(lambda module, args, out, name=name: saved.__setitem__(name, out))
        for name in ("conv1", "bn1", "bn2")
    ]
    start = images.clone().requires_grad_()
    with torch.enable_grad():
        score = net(start).gather(1, target[:, None]).sum()
        at_input, *grads = torch.autograd.grad(score, [start, *saved.values()])
    for handle in handles:
        handle.remove()
    biases = {
        "conv1": net.conv1.bias,
        "bn1": net.bn1.bias - net.bn1.weight * net.bn1.running_mean / (net.bn1.running_var + net.bn1.eps).sqrt(),
        "bn2": -net.bn2.running_mean / (net.bn2.running_var + net.bn2.eps).sqrt(),
    }
    maps = []
    for n in range(len(images)):
        total = torch.zeros(images.shape[2:], dtype=DOUBLE)
        parts = [at_input[n] * images[n]]
        parts += [g[n] * biases[name].detach()[:, None, None] for name, g in zip(saved, grads, strict=True)]
        for part in parts:
            part = part.abs()
            part = (part - part.min()) / (part.max() - part.min())
            for channel in part:
                resized = functional.interpolate(
                    channel[None, None], images.shape[2:], mode="bilinear", align_corners=True
                )
                total += resized[0, 0]
        maps.append(total)
    return torch.stack(maps)


def test_the_map_is_that_of_a_loop(net, images):
    result = FullGrad(net)(images, [[1, 2], [4, 2], [0, 2]])
    expected = loop(net, images, torch.tensor([1, 4, 0]))
    torch.testing.assert_close(result.heatmap[::2], expected.float())
    accelerated = FullGrad(net).accelerate()(images, [1, 4, 0])
    torch.testing.assert_close(accelerated.heatmap, expected.float())


def test_rows_do_not_depend_on_each_other(net, images):
    together = FullGrad(net)(images, 2).heatmap
    for n in range(3):
        torch.testing.assert_close(FullGrad(net)(images[n : n + 1], 2).heatmap[0], together[n])


class Signed(nn.Module):
    """The length of a vector of one number is divided out, so that all gradient below is rounding."""

    def __init__(self, sign):
        super().__init__()
        self.stem, self.one, self.fc = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)
        self.sign = sign

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x * self.sign(self.one(x))).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
def test_a_layer_of_rounding_is_left_out(images, dtype, monkeypatch):
    torch.manual_seed(0)
    net, images = Signed(lambda x: functional.normalize(x, dim=1)).to(dtype).eval(), images.to(dtype)
    result = FullGrad(net)(images, 2).heatmap
    monkeypatch.setattr("pyfast_xai.explainers.full_grad.ROUNDING", 0)
    assert not torch.allclose(FullGrad(net)(images, 2).heatmap, result, rtol=0.01)
    net.sign = torch.sign
    torch.testing.assert_close(FullGrad(net)(images, 2).heatmap, result, rtol=1e-4, atol=1e-4)
