"""Saliency, DeconvNet, guided backprop and what is built on them: definitions, and other people's code as oracles."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyfast_xai import DeconvNet, EigenCAM, GuidedBackprop, InputXGradient, IntegratedGradients, Saliency, SmoothGrad
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.backprop import REDUCTIONS

DOUBLE = torch.float64


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (x > 0)


class _Deconv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


ORACLES = {GuidedBackprop: _Guided, DeconvNet: _Deconv}


def by_patched_relu(function, model, images, target):
    """Gradients with every ReLU of PyTorch replaced, whatever way the model calls it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("relu", "relu_"):
            patch.setattr(torch, name, function.apply)
            patch.setattr(torch.Tensor, name, lambda x: function.apply(x))
        leaf = images.clone().requires_grad_()
        score = model(leaf).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, leaf)[0]


def settled(model, size):
    """A random network whose batch norms have met a batch: activations neither fade nor explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0
    if norms:
        model.train()(torch.randn(4, 3, *size))
    return model.eval().requires_grad_(False)


class PreActivation(nn.Module):
    """The input of each ReLU also feeds a skip."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.conv2(self.relu(x))
        x = x + self.conv2(x.relu())
        x = x + self.conv2(F.relu(x))
        return self.fc(F.relu(x, inplace=True).mean((2, 3)))


def zoo(name):
    models = pytest.importorskip("torchvision.models")
    aux = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=10, **aux)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "densenet121", "resnet18", "vgg11", "pre-activation"])
def test_every_relu_is_rewritten(name, method):
    size = (96, 80) if name == "inception_v3" else (64, 48)
    model = (PreActivation().eval() if name == "pre-activation" else settled(zoo(name), size)).double()
    images = torch.randn(2, 3, *size, dtype=DOUBLE)
    explanation = method(model)(images)
    expected = by_patched_relu(ORACLES[method], model, images, explanation.target)
    assert expected.abs().max() > 0
    torch.testing.assert_close(explanation.attribution, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    plain = Saliency(model)(images).attribution
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("method", "peer"), [(GuidedBackprop, "GuidedBackprop"), (DeconvNet, "Deconvolution")])
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
@pytest.mark.filterwarnings("ignore")
def test_equals_captum_where_captum_is_right(name, method, peer):
    attr = pytest.importorskip("captum.attr")
    model = settled(zoo(name), (64, 48)).double()
    images = torch.randn(2, 3, 64, 48, dtype=DOUBLE)
    expected = getattr(attr, peer)(model).attribute(images.clone().requires_grad_(), target=[3, 7]).detach()
    actual = method(model)(images, [3, 7]).attribution
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_equals_pytorch_grad_cam_where_it_is_right():
    peer = pytest.importorskip("pytorch_grad_cam")
    model = settled(zoo("resnet18"), (64, 48))
    image = torch.randn(1, 3, 64, 48).contiguous(memory_format=torch.channels_last)
    actual = GuidedBackprop(model)(image, 3).attribution[0].permute(1, 2, 0)
    expected = peer.GuidedBackpropReLUModel(model.requires_grad_(True), device="cpu")(image, target_category=3)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-4 * float(abs(expected).max()))


@pytest.mark.parametrize(("method", "composite"), [(GuidedBackprop, "GuidedBackprop"), (DeconvNet, "DeconvNet")])
def test_equals_zennit_where_zennit_is_right(method, composite):
    composites = pytest.importorskip("zennit.composites")
    model = settled(zoo("vgg11"), (64, 48)).double()
    images = torch.randn(2, 3, 64, 48, dtype=DOUBLE, requires_grad=True)
    with getattr(composites, composite)().context(model) as changed:
        (expected,) = torch.autograd.grad(changed(images)[:, 4].sum(), images)
    actual = method(model)(images, 4).attribution
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


RECTIFIERS = {
    "relu": torch.relu,
    "relu in place": lambda x: F.relu_(x * 1),
    "relu6": lambda x: F.relu6(4 * x) / 4,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1], dtype=DOUBLE)),
    "elu": lambda x: F.elu(x, 0.5),
    "celu": lambda x: F.celu(x, 0.5),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: x.clamp_min(0),
    "threshold": lambda x: F.threshold(x, 0, 0),
}


class One(nn.Module):
    """One nonlinearity between the image and its answers."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).flatten(1)


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_rule_of_every_rectifier(name, channels_last):
    model, images = One(RECTIFIERS[name]).eval(), 2 * torch.randn(2, 3, 5, 7, dtype=DOUBLE)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    seed = torch.randn(2, 105, dtype=DOUBLE)
    leaf = images.clone().requires_grad_()
    out = model(leaf)

    def derivative(gradient):
        return torch.autograd.grad(out, leaf, gradient, retain_graph=True)[0]

    positive = seed.clamp(min=0)
    assert torch.equal(Saliency(model)(images, seed).attribution, derivative(seed))
    guided = derivative(positive) * (images > 0)
    torch.testing.assert_close(GuidedBackprop(model)(images, seed).attribution, guided, rtol=0, atol=1e-14)
    assert (guided >= 0).all()
    deconv = positive.view(images.shape)
    torch.testing.assert_close(DeconvNet(model)(images, seed).attribution, deconv, rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, F.hardsigmoid, F.hardtanh, lambda x: x.clamp(-1, 1)])
@pytest.mark.parametrize("method", [GuidedBackprop, DeconvNet])
def test_what_does_not_rectify_keeps_its_gradient_and_says_so(function, method, caplog):
    model, images = One(function).eval(), torch.randn(2, 3, 5, 7, dtype=DOUBLE)
    seed = torch.randn(2, 105, dtype=DOUBLE)
    explain = method(model)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        assert torch.equal(explain(images, seed).attribution, Saliency(model)(images, seed).attribution)
        explain(images, seed)
    assert [record.getMessage() for record in caplog.records] == [
        f"{method.method}: the model has no rectifier, so that this is its plain gradient"
    ]


@pytest.fixture
def net():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 9, 5)),
    ).to(DOUBLE).eval()  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(3, 3, 10, 10, dtype=DOUBLE)


METHODS = [Saliency, DeconvNet, GuidedBackprop, InputXGradient, SmoothGrad, IntegratedGradients]
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_no_target_is_the_largest_output(net, images, method):
    result = method(net)(images)
    assert torch.equal(result.target, net(images).argmax(1))
    torch.testing.assert_close(result.score, net(images).softmax(1).amax(1).float())
    assert torch.equal(result.attribution, method(net)(images, result.target).attribution)


@every_method
def test_several_classes_in_one_pass(net, images, method):
    classes = torch.tensor([[0, 1], [4, 2], [3, 3]])
    together = method(net)(images, classes)
    assert together.attribution.shape == (6, 3, 10, 10)
    assert together.target.tolist() == classes.flatten().tolist()
    assert torch.equal(together.images, images.repeat_interleave(2, 0))
    for k in range(2):
        alone = method(net)(images, classes[:, k]).attribution
        torch.testing.assert_close(together.attribution[k::2], alone, rtol=0, atol=1e-13)


@every_method
def test_any_start(net, images, method):
    """A gradient of the outputs, and a function of them, give what a class gives where they mean the same."""
    expected = method(net)(images, [1, 0, 4]).attribution
    seed = F.one_hot(torch.tensor([1, 0, 4]), 5).to(DOUBLE)
    by_seed = method(net)(images, seed)
    assert by_seed.target is None
    assert by_seed.score is None
    torch.testing.assert_close(by_seed.attribution, expected, rtol=0, atol=1e-14)
    by_function = method(net)(images, lambda logits: (logits * seed).sum(1))
    torch.testing.assert_close(by_function.attribution, expected, rtol=0, atol=1e-14)


def test_a_cost_as_start(net, images):
    """Nie et al. also start at the squared distance of softmax and one-hot."""

    def cost(logits):
        return (logits.softmax(1) - F.one_hot(logits.argmax(1), 5)).square().sum(1)

    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad(cost(net(leaf)).sum(), leaf)[0]
    torch.testing.assert_close(Saliency(net)(images, cost).attribution, expected, rtol=0, atol=1e-14)


def test_a_segmenter_by_a_function(images):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, dtype=DOUBLE)

        def forward(self, x):
            return {"aux": x.sum(), "out": self.conv(x).relu()}

    model = Segmenter().eval()
    result = Saliency(model)(images, lambda out: out["out"][:, 2, 3, 4]).attribution
    assert result[:, :, 2:5, 3:6].abs().sum() > 0
    result[:, :, 2:5, 3:6] = 0
    assert (result == 0).all()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (7, r"target must lie in \[0, 5\), got 7"),
        (torch.zeros(3, 4), r"target must have the shape of the output, \[3, 5\], where it is floating-point, got"),
        (lambda logits: logits, r"target must return a tensor of one number an image, \[N\], got \[3, 5\]"),
        (lambda logits: 3.0, "target must return a tensor of one number an image"),
        (lambda logits: logits.detach().sum(1), "target must return something that depends on the model's output"),
        ("cat", "target must be None, an int"),
    ],
)
def test_bad_targets(net, images, target, message):
    with pytest.raises(InputError, match=message):
        Saliency(net)(images, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(net, images, reduction):
    result = GuidedBackprop(net, reduction=reduction)(images)
    a = result.attribution
    expected = {
        "max": a.abs().max(1)[0],
        "mean": a.abs().sum(1) / 3,
        "norm": (a**2).sum(1).sqrt(),
        "sum": a.sum(1).relu(),
    }[reduction]
    torch.testing.assert_close(result.heatmap, expected.float())


def test_bad_settings(net):
    for settings, message in [
        ({"reduction": "min"}, "reduction must be one of"),
        ({"base": "lime"}, "base must be one of"),
    ]:
        with pytest.raises(InputError, match=message):
            SmoothGrad(net, **settings)
    with pytest.raises(InputError, match="samples must be at least 1, got 0"):
        SmoothGrad(net, n_samples=0)
    with pytest.raises(InputError, match="noise must not be negative, got -1"):
        SmoothGrad(net, noise=-1)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        IntegratedGradients(net, n_steps=0)
    with pytest.raises(InputError, match=r"baseline must broadcast to the images, \[2, 3, 10, 10\], got \[7\]"):
        IntegratedGradients(net, baseline=torch.zeros(7))(torch.zeros(2, 3, 10, 10, dtype=DOUBLE))


def test_input_x_gradient(net, images):
    expected = images * Saliency(net)(images, 2).attribution
    assert torch.equal(InputXGradient(net)(images, 2).attribution, expected)


@pytest.mark.parametrize("of", [Saliency, DeconvNet, GuidedBackprop])
@pytest.mark.parametrize("squared", [False, True])
def test_smoothgrad_is_the_mean_over_noisy_copies(net, images, of, squared):
    result = SmoothGrad(net, base=of.method, n_samples=4, noise=0.2, squared=squared, seed=5)(images, 1).attribution
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(1, 3, 10, 10, generator=generator) for _ in range(4)]
    spread = 0.2 * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    each = torch.stack([of(net)(images + spread * n, 1).attribution for n in noise])
    torch.testing.assert_close(result, (each.square() if squared else each).mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("baseline", [0.0, torch.randn(1, 3, 1, 1, dtype=DOUBLE)], ids=["number", "tensor"])
def test_integrated_gradients_add_up_to_the_change_of_the_score(net, images, baseline):
    result = IntegratedGradients(net, n_steps=400, baseline=baseline)(images, 1).attribution
    change = (net(images) - net(torch.zeros_like(images) + baseline))[:, 1]
    torch.testing.assert_close(result.sum((1, 2, 3)), change, rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_integrated_gradients_equal_captums(net, images):
    attr = pytest.importorskip("captum.attr")
    expected = attr.IntegratedGradients(net).attribute(images.clone().requires_grad_(), target=2, n_steps=20).detach()
    result = IntegratedGradients(net, n_steps=20)(images, 2).attribution
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-8)  # its weights are rounded to float32


@every_method
def test_a_row_does_not_depend_on_the_others(net, images, method):
    together = method(net)(images).attribution
    for n in range(3):
        torch.testing.assert_close(method(net)(images[n : n + 1]).attribution[0], together[n], rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [Saliency, SmoothGrad, InputXGradient, IntegratedGradients])
def test_a_row_without_a_gradient_is_said(method, caplog):
    """The probability of the second image has reached 1, where its gradient is zero to the last bit."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False), nn.Sigmoid()).eval()
    nn.init.constant_(model[1].weight, 50.0)
    images = torch.stack([torch.linspace(-0.01, 0.01, 12).view(3, 2, 2), torch.linspace(0.9, 1.0, 12).view(3, 2, 2)])
    more = {} if method is not IntegratedGradients else {"baseline": images * 0.99}
    attribution = method(model, **more)(images, 0).attribution
    assert attribution[0].any()
    assert not attribution[1].any()
    assert caplog.text.count("the attribution of row 1 is zero") == 1
    caplog.clear()
    method(model, **({} if not more else {"baseline": images[:1] * 0.99}))(images[:1], 0)
    assert not caplog.text


def test_pictures(net, images):
    result = GuidedBackprop(net)(images)
    rgb = result.rgb()
    assert rgb.shape == (3, 3, 10, 10)
    ordered = result.attribution[0].abs().flatten().sort().values  # 300 numbers, the largest six of which are clipped
    expected = (result.attribution[0] / ordered[293] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(rgb[0], expected.float())
    without = EigenCAM(net)(images)
    with pytest.raises(InputError, match="gives no attribution that could be shown"):
        without.rgb()
