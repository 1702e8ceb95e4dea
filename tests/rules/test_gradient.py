"""The gradient of every op, against autograd."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyfast_xai import Saliency
from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.rules.gradient import (
    DECONVNET,
    EXCITATION,
    GRADIENT,
    GUIDED,
    LINEAR,
    NEAREST,
    BackwardContext,
    GradientRules,
    Rule,
    backward_pass,
    rule,
)
from pyfast_xai.tape import record


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def by_autograd(model, x, seeds):
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        out = model(leaf * 1)  # the model may write to it
        return torch.stack([torch.autograd.grad(out, leaf, seed, retain_graph=True)[0] for seed in seeds])


def by_tape(model, x, targets, overlay=None, **settings):
    policy = GradientRules(overlay)
    tape = record(model, x, policy=policy)
    seeds = torch.randn(targets, *tape.result.shape, dtype=tape.result.dtype)
    return tape, seeds, backward_pass(policy, tape, {tape.outputs: seeds}, tape.inputs, **settings)[0]


def assert_is_gradient(function, x, targets=1):
    model = function if isinstance(function, nn.Module) else Call(function)
    tape, seeds, grad = by_tape(model, x, targets)
    expected = by_autograd(model, x, seeds)
    assert grad.dtype == x.dtype
    assert not grad.is_inference()
    # Products of several targets at once add up in another order.
    torch.testing.assert_close(grad, expected, rtol=0 if targets == 1 else 1e-12, atol=0 if targets == 1 else 1e-12)
    return tape


torch.manual_seed(0)
DOUBLE = {"dtype": torch.float64}
W = torch.randn(6, 4, 3, 3, **DOUBLE)
V = torch.randn(4, **DOUBLE)
M = torch.randn(8, 5, **DOUBLE)
Z = torch.randn(4, 8, 8, dtype=torch.complex128)
SCALAR = torch.tensor(0.7, **DOUBLE)


def norm(x):
    return F.batch_norm(x, V * 0.1, V.abs() + 0.5, V, V * 0.3, False, 0.1, 1e-5)


def written(x):
    y = x * 2
    y[:, 1:3] = y[:, :2].relu() * x[:, 2:]
    y[:, 0].mul_(3)
    return y.sum(1) * y[:, 1]


def copied(x):
    buffer = torch.zeros(2, 4, 8, 8, **DOUBLE)
    buffer[:, :, ::2] = x[:, :, 1::2]
    buffer[:, 1] += x[:, 0]
    return buffer * 2


FUNCTIONS = {
    "conv": lambda x: F.conv2d(x, W, None, 2, 1),
    "conv dilated": lambda x: F.conv2d(x, W, None, 1, 2, 2),
    "conv with rows left over": lambda x: F.conv2d(x, W[..., :2, :2], None, 3),
    "conv uneven": lambda x: F.conv2d(x, W[..., :2], None, (2, 1), (0, 1)),
    "conv grouped": lambda x: F.conv2d(x, W[:4, :1], None, 1, 1, 1, 4),
    "conv same": lambda x: F.conv2d(x, W, None, padding="same"),
    "conv unbatched": lambda x: F.conv2d(x[0], W),
    "conv1d": lambda x: F.conv1d(x.flatten(2), W[..., 0], None, 2, 1),
    "conv3d": lambda x: F.conv3d(x[:, :, None], W[:, :, None], None, 1, (0, 1, 1)),
    "conv transposed": lambda x: F.conv_transpose2d(x, W.transpose(0, 1), None, 2, 1, 1),
    "conv of a made weight": lambda x: F.conv2d(x, W * x.mean()),
    "conv of a constant": lambda x: F.conv2d(torch.ones(1, 4, 8, 8, **DOUBLE), W * x.mean()),
    "linear": lambda x: F.linear(x, M.T, M[0, :5]),
    "linear made bias": lambda x: F.linear(x, M.T, x[0, 0, 0, :5]),
    "mm": lambda x: x[0, 0] @ M,
    "mm from the left": lambda x: M.T @ x[0, 0],
    "matmul": lambda x: x @ x.mT,
    "matmul batch": lambda x: x @ M,
    "addmm": lambda x: torch.addmm(x[0, 0, 0, :5], x[0, 1], M, beta=2, alpha=3),
    "addmm of a constant": lambda x: torch.addmm(x[0, 0], M, M.T @ x[0, 1]),
    "bmm": lambda x: torch.bmm(x[0], x[1]),
    "einsum": lambda x: torch.einsum("nchw,cd->ndhw", x, W[0, :, :, 0]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x.relu()),
    "batch norm": norm,
    "batch norm no weights": lambda x: F.batch_norm(x, V, V.abs() + 0.5),
    "batch norm of the batch": lambda x: F.batch_norm(x, None, None, V, V, True),
    "instance norm": F.instance_norm,
    "layer norm": lambda x: F.layer_norm(x, (8,), M[:, 0], M[:, 1]),
    "group norm": lambda x: F.group_norm(x, 2, V, V),
    "local response norm": lambda x: F.local_response_norm(x, 3),
    "normalize": F.normalize,
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool dilated": lambda x: F.max_pool2d(x, 2, 1, 0, 3),
    "max pool ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max pool uneven": lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    "max pool of zeros": lambda x: F.max_pool2d(x.relu(), 2),
    "max pool indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max pool 1d": lambda x: F.max_pool1d(x.flatten(1), 2),
    "max pool 3d": lambda x: F.max_pool3d(x, 2),
    "max pool large": lambda x: F.max_pool2d(F.pad(x, (8, 8, 8, 8)), 17),
    "max pool unbatched": lambda x: F.max_pool2d(x[0], 2),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 3),
    "avg pool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive avg pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "global avg pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "lp pool": lambda x: F.lp_pool2d(x.abs() + 1, 2, 2),
    "relu": torch.relu,
    "relu in place": lambda x: F.relu_(x * 1),
    "relu of a slice": lambda x: x[:, 1:3, ::2].relu(),
    "relu of a slice in place": lambda x: torch.cat([(y := x * 2)[:, 1:3].relu_(), y], 1),
    "relu and a skip": lambda x: x + x.relu(),
    "relu of a transposed": lambda x: x.permute(0, 3, 1, 2).relu().permute(0, 2, 3, 1) * V.view(4, 1, 1),
    "relu expanded": lambda x: x[:, :1].expand(2, 4, 8, 8).relu(),
    "relu6": F.relu6,
    "relu6 in place": lambda x: F.relu6(x * 9, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.4),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu in place": lambda x: F.leaky_relu_(x * 1, 0.2),
    "prelu": lambda x: F.prelu(x, V),
    "prelu shared": lambda x: F.prelu(x, V[:1]),
    "rrelu": F.rrelu,
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 0.75),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 2, 1),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "threshold": lambda x: F.threshold(x, 0, 0),
    "threshold elsewhere": lambda x: F.threshold(x, 0.3, 2),
    "clamp": lambda x: x.clamp(0, 0.5),
    "clamp below": lambda x: x.clamp(min=0),
    "clamp elsewhere": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(0),
    "maximum": lambda x: torch.maximum(x, x.flip(3)),
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: (x * 1).tanh_(),
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(-1),
    "glu": lambda x: F.glu(x, 1),
    "exp sqrt": lambda x: x.exp().sqrt(),
    "power": lambda x: x**3 / (x * x + 1),
    "add": lambda x: torch.add(x, x.relu(), alpha=0.3),
    "add broadcast": lambda x: x + x.mean((2, 3), keepdim=True) + x[0, 0, 0],
    "add scalar": lambda x: x + x.max(),
    "sub": lambda x: torch.sub(x.relu(), x, alpha=0.4),
    "rsub": lambda x: 1 - x,
    "mul": lambda x: x * x.sigmoid(),
    "mul scalar": lambda x: 3 * x * SCALAR,
    "mul itself": lambda x: x * x,
    "mul broadcast": lambda x: x * x.mean((2, 3), keepdim=True),
    "div": lambda x: x / 3 / V.view(4, 1, 1),
    "div by": lambda x: 2 / (x.abs() + 1),
    "in place chain": lambda x: (x * 1).add_(x).mul_(2).sub_(1).div_(3).neg_(),
    "three uses": lambda x: x * 0.1 + x.relu() * 0.2 + x * 0.7 + x.sigmoid(),
    "cat": lambda x: torch.cat([x, x.relu(), x * 0.3, torch.ones(2, 1, 8, 8, **DOUBLE)], 1),
    "stack": lambda x: torch.stack([x, x * 2], -1),
    "views": lambda x: x.view(2, -1).reshape(8, 64).unflatten(1, (8, 8))[None].squeeze(0).flatten(),
    "permute": lambda x: x.permute(1, 3, -2, 0).transpose(0, -1).mT.movedim(0, 2),
    "t": lambda x: x[0, 0].t(),
    "slice": lambda x: x[:, 1:3, 1:-1:2, -3:],
    "select": lambda x: x[:, -1, 2],
    "selects": lambda x: (y := x * 2)[:, 0] * y[:, 1] + y[:, 3].relu() + y[:, 1],
    "slices that overlap": lambda x: (y := x * 2)[:, 1:] * 3 + y[:, :3] + y[:, ::2].sum(1, keepdim=True),
    "parts and the whole": lambda x: (y := x * 2) + y[:, :1] * y[:, 2:3] + y.sum(1, keepdim=True) + y[:, 1:2],
    "a part beside another tensor": lambda x: (y := x * 2)[:, :2] + (z := x * 3)[:, 2:] + y[:, 2:] * z[:, :2],
    "index": lambda x: x[:, [0, 2, 2]],
    "mask": lambda x: torch.where(x > 0, x, x * 0.1) + x.masked_fill(x > 0.3, 2),
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "split": lambda x: torch.cat(x.split(3, 1)[::-1], 1),
    "chunk": lambda x: x.chunk(2, -1)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1) * 2,
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "flip": lambda x: x.flip(2),
    "pad": lambda x: F.pad(x, (1, 2, -1, 0)),
    "pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 3),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "interpolate nearest": lambda x: F.interpolate(x, (11, 5)),
    "mean": lambda x: x.mean((2, 3)),
    "mean of all": lambda x: x.mean() * 2,
    "mean kept": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(-1) + x.sum(),
    "var": lambda x: x.var((2, 3)),
    "norm": lambda x: x.norm(dim=1),
    "amax": lambda x: x.amax((2, 3)),
    "max": lambda x: x.max(1)[0],
    "cumsum": lambda x: x.cumsum(1),
    "strided": lambda x: x.as_strided((3, 4), (2, 5), 7) + x.mT.as_strided((3, 4), (0, 1)),
    "strided scalars": lambda x: x[0, 0, 0, 0].as_strided((), (), 9) + x.sum().as_strided((), ()),
    "strided beside the part": lambda x: x[:, 1, 2, 3].as_strided((2, 3, 2), (4, 1, 1), 1) * 2,
    "strided expanded": lambda x: x[:, :1].expand(2, 3, 8, 8).as_strided((3, 4), (2, 5), 7),
    "strided beside what is expanded": lambda x: x[0, 0, :1, 0].expand(2, 3).as_strided((2, 3, 2), (4, 1, 1), 1),
    "written views": written,
    "written input": lambda x: x.mul_(2).add_(x.mean()) * x,
    "written view of an input": lambda x: (y := x.mT).add_(x.mean()) * y.sigmoid(),
    "scalars": lambda x: (s := x.sum()).sum(-1) * s.mean(0, keepdim=True) * s.transpose(0, -1) * s.sum([]),
    "copied": copied,
    "dtype": lambda x: x.float().double() * 2,
    "fill": lambda x: (x * 1).zero_() + x,
    "dropout": lambda x: F.dropout(x, training=False) * 2,
    "detach": lambda x: x * x.detach(),
    "cdist": lambda x: torch.cdist(x[0], x[1]),
    "complex filter": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * Z[:, :, :5], s=x.shape[-2:]) + x,
    "complex spectrum": lambda x: torch.fft.fft2(x).abs().log1p(),
    "complex angle": lambda x: torch.fft.fft2(x).angle(),
    "complex real and imaginary": lambda x: (z := torch.fft.fft(x)).real * z.imag,
    "complex conjugate": lambda x: ((z := torch.fft.fft(x)) * z.conj()).real + (z.conj() * Z).imag,
    "complex rotary": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * Z[..., :4]),
    "complex polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
    "complex pair": lambda x: torch.complex(x, x.relu()).sqrt().imag,
    "complex products": lambda x: ((z := torch.fft.fft(x)) @ z.mT).abs() + (z @ Z).real + (z[0, 0] @ Z[0]).imag,
    "complex bmm": lambda x: torch.bmm((z := torch.fft.fft(x))[0], z[1].conj()).imag,
    "complex linear": lambda x: F.linear(torch.fft.fft(x), Z[0], Z[0, 0]).abs(),
    "complex addmm": lambda x: torch.addmm((z := torch.fft.fft(x)[0])[0], z[1], Z[0], beta=2 + 1j, alpha=1 - 3j).imag,
    "complex sums": lambda x: (torch.add(x, (z := torch.fft.fft(x)), alpha=2 + 1j) - z.sub(x, alpha=3j)).abs(),
    "complex quotients": lambda x: (1 / ((z := torch.fft.fft(x)) + 4)).real + (z / (2 + 1j)).imag + (z / Z).real,
    "complex convolution": lambda x: F.conv2d(torch.fft.fft(x), W * (1 + 2j)).imag,
    "complex mean": lambda x: torch.fft.fft(x).mean((2, 3)).abs() + torch.fft.fft(x).sum(-1).angle().sum(2),
    "complex powers": lambda x: (torch.fft.fft(x) ** 2).exp().real,
    "complex sign": lambda x: torch.fft.fft(x).sgn().imag,
    "complex writes": lambda x: torch.view_as_real(torch.fft.fft(x).clone().mul_(Z).add_(x)),
    "complex cast": lambda x: (x.to(torch.complex128) * Z).real + x.to(torch.complex64).imag,
    "nothing selected": lambda x: x.mean(1) + (x[x > 1e6].view(-1, 8).relu().reshape(-1, 8) @ M).sum(),
    "frac of a step": lambda x: x - x.floor() + x.round().detach(),
}


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_of_an_op_is_that_of_autograd(name, targets):
    assert_is_gradient(FUNCTIONS[name], torch.randn(2, 4, 8, 8, **DOUBLE), targets)


def test_the_tape_can_be_walked_again_where_it_is_retained():
    model, x = Call(lambda x: F.max_pool2d(F.silu(F.conv2d(x, W).relu()), 2)), torch.randn(2, 4, 8, 8, **DOUBLE)
    policy = GradientRules()
    tape = record(model, x, policy=policy)
    seeds = {tape.outputs: torch.randn(1, *tape.result.shape, **DOUBLE)}
    first, repeated = (backward_pass(policy, tape, seeds, tape.inputs, retain=True)[0] for _ in range(2))
    assert torch.equal(first, repeated)
    assert any(node.saved for node in tape)
    assert torch.equal(backward_pass(policy, tape, seeds, tape.inputs)[0], first)
    assert not any(node.saved for node in tape)


def test_seeds_are_not_written_to():
    model, x = Call(lambda x: x.relu().relu()), torch.randn(2, 4, 8, 8, **DOUBLE)
    policy = GradientRules()
    tape = record(model, x, policy=policy)
    seed = torch.randn(1, 2, 4, 8, 8, **DOUBLE)
    before = seed.clone()
    backward_pass(policy, tape, {tape.outputs: seed}, tape.inputs)
    assert torch.equal(seed, before)


def test_to_a_value_on_the_way():
    """Also where the walk goes on below it, to another."""
    model, x = Call(lambda x: (h := F.conv2d(x, W).relu()) * 2 + h), torch.randn(2, 4, 8, 8, **DOUBLE)
    policy = GradientRules()
    tape = record(model, x, policy=policy)
    middle = tape.find("relu")
    seed = torch.randn(1, *tape.result.shape, **DOUBLE)
    at_middle, at_input = backward_pass(policy, tape, {tape.outputs: seed}, [middle, *tape.inputs], retain=True)
    torch.testing.assert_close(at_middle, 3 * seed, rtol=1e-15, atol=0)
    assert torch.equal(at_input[0], by_autograd(model, x, seed)[0])
    assert torch.equal(backward_pass(policy, tape, {tape.outputs: seed}, [middle])[0], at_middle)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("pool", [lambda y: F.adaptive_avg_pool2d(y, 1), lambda y: y.mean((2, 3)), nn.Flatten()])
def test_gradients_lie_in_memory_as_their_maps(pool, targets, monkeypatch):
    orders = []

    def derivative(ctx, self):
        x = ctx.tensor("self")
        orders.append((ctx.grad.stride(2), x.stride(1)))
        ctx.propagate(self, torch.ops.aten.silu_backward(ctx.grad, x.expand_as(ctx.grad)))

    monkeypatch.setitem(GRADIENT, "aten::silu", Rule(derivative, saves=["self"]))
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    # The second function reads what the pooling sends, the first what the second does.
    model = Call(lambda x: pool(F.silu(F.silu(x * 1) * 2)))
    _, seeds, grad = by_tape(model, x, targets)
    assert orders[1] == (1, 1)
    torch.testing.assert_close(grad, by_autograd(model, x, seeds))


def test_where_nothing_arrives_is_zero():
    x = torch.randn(2, 4, 8, 8, **DOUBLE)
    _, _, grad = by_tape(Call(lambda x: x.detach() * 2), x, 2)
    assert grad.shape == (2, *x.shape)
    assert (grad == 0).all()


def test_an_op_without_derivative_is_named():
    model, x = Call(lambda x: torch.histc(x, 4).relu()), torch.randn(2, 4, 8, 8)
    with pytest.raises(UnsupportedOpError, match=r"aten::histc, which ran in 'the model' .* cannot be differentiated"):
        by_tape(model, x, 1)

    table = {}

    @rule("histc", table=table)
    def histc(ctx, x, bins):
        ctx.propagate(x, ctx.grad.sum().expand(len(ctx.grad), *x.shape))

    _, seeds, grad = by_tape(model, x, 1, table)
    assert (grad == seeds.sum()).all()


def kept(tape):
    """Bytes that a reading saved, storage by storage."""
    storages = {s.tensor.untyped_storage()._cdata: s.tensor.untyped_storage() for n in tape for s in n.saved.values()}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_saturating_function_keeps_its_result_alone():
    x = torch.randn(2, 3)
    for function in (torch.sigmoid, torch.tanh):
        node = by_tape(Call(lambda x, function=function: function(x * 1)), x, 1, retain=True)[0].nodes[-1]
        assert list(node.saved) == ["result"]


def test_what_is_saved():
    """A bit an element of a rectifier, a byte an output of a pool, of layers nothing (DESIGN: save what is needed)."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3)),
        *(nn.ReLU(True), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8 * 49, 5)),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    bits, offsets = (2 * 16 * 32 * 32 + 2 * 8 * 14 * 14) // 8, 2 * 16 * 16 * 16
    assert kept(record(model, x, policy=GradientRules())) == bits + offsets
    assert kept(record(model, x, policy=GradientRules(GUIDED))) == bits + offsets
    assert kept(record(model, x, policy=GradientRules(DECONVNET))) == offsets


def test_a_rule_can_replace_that_of_the_gradient():
    table = {}

    @rule("convolution", "conv2d", table=table)
    def ones(ctx: BackwardContext, input, *args):
        ctx.propagate(input, torch.ones(len(ctx.grad), *input.shape, dtype=input.dtype))

    _, _, grad = by_tape(Call(lambda x: F.conv2d(x * 3, W)), torch.randn(2, 4, 8, 8, **DOUBLE), 2, table)
    assert (grad == 3).all()


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x):
        top = self.down1(x).relu()
        bottom = F.relu(self.down2(F.max_pool2d(top, 2)))
        return self.last(torch.cat([top, self.up(bottom).relu_()], 1))


class Captioner(nn.Module):
    """Looks at the image first, then at its own last word."""

    def __init__(self, cell):
        super().__init__()
        self.conv, self.words = nn.Conv2d(4, 6, 3, 2), nn.Embedding(9, 6)
        self.recurrent = cell(6, 7, batch_first=True)
        self.fc = nn.Linear(7, 9)

    def forward(self, x):
        image = self.conv(x).relu().mean((2, 3))
        sequence = torch.stack([image, self.words(torch.tensor([1, 2])), image.tanh()], 1)
        return self.fc(self.recurrent(sequence)[0][:, -1])


class StepByStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.cell, self.fc = nn.Conv2d(4, 6, 3, 2), nn.LSTMCell(6, 7), nn.Linear(7, 9)

    def forward(self, x):
        image = self.conv(x).relu().mean((2, 3))
        state = None
        for _ in range(3):
            state = self.cell(image, state)
        return self.fc(state[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(4, 8, 2, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x):
        return self.encoder(self.patches(x).flatten(2).mT).mean(1)


NETWORKS = {
    "U-Net": UNet,
    "LSTM captioner": lambda: Captioner(nn.LSTM),
    "GRU captioner": lambda: Captioner(nn.GRU),
    "RNN captioner": lambda: Captioner(nn.RNN),
    "LSTM step by step": StepByStep,
    "transformer": Encoder,
}


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_of_a_network_is_that_of_autograd(name, targets, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # the oracle's, it is fused
    model, x = NETWORKS[name]().to(torch.float64).eval(), torch.randn(2, 4, 8, 8, **DOUBLE)
    _, seeds, grad = by_tape(model, x, targets)
    # Adjoints of convolutions onto a few pixels add up in another order.
    torch.testing.assert_close(grad, by_autograd(model, x, seeds), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_of_a_network_in_float32(name):
    model, x = NETWORKS[name]().eval(), torch.randn(2, 4, 8, 8)
    _, seeds, grad = by_tape(model, x, 1)
    torch.testing.assert_close(grad, by_autograd(model, x, seeds), rtol=1e-4, atol=1e-6)


def test_integers_on_the_way_are_passed_over():
    class Counts(nn.Module):
        def forward(self, x):
            positive = (x > 0).long().sum((2, 3))
            return (x * x).sum((2, 3)) * torch.relu(positive).clamp_max(3).float()

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    actual = x.clone().requires_grad_()
    Counts()(actual)[:, 1].sum().backward()
    torch.testing.assert_close(Saliency(Counts().eval())(x, 1).attribution, actual.grad)


RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.4, training=True),
    "dropout in place": lambda x: F.dropout(x * 1, 0.4, training=True, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x[0], 0.4, training=True),
    "dropout2d": lambda x: F.dropout2d(x, 0.4, training=True),
    "dropout3d": lambda x: F.dropout3d(x[None], 0.4, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.4, training=True),
    "native dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x.relu(), dropout_p=0.4),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "fractional pool": lambda x: F.fractional_max_pool2d(x, 2, output_size=3),
    "noise": lambda x: x * torch.randn_like(x) + torch.normal(x, 1.0) * x,
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_the_forward_pass(name):
    """Also of the second operation that draws, and the generator is where it was before."""
    function = RANDOM[name]
    model, x = Call(lambda x: function(x * 3) * function(x)), torch.randn(2, 4, 8, 8, **DOUBLE)
    torch.manual_seed(5)
    _, seeds, grad = by_tape(model, x, 2)
    torch.manual_seed(5)
    expected = by_autograd(model, x, seeds)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(5)
    policy = GradientRules()
    tape = record(model, x, policy=policy)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    repeated = backward_pass(policy, tape, {tape.outputs: seeds}, tape.inputs)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(repeated, grad)


NORMS = {
    "instance norm": F.instance_norm,
    "batch norm of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "group norm": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x, x.shape[2:]),
    "convolution": lambda x: F.conv2d(x, W[:, :, :1, :1]),
    "convolution of rows": lambda x: F.conv2d(x, W[:, :, :1, :2]),
    "transposed convolution": lambda x: F.conv_transpose2d(x, W[:4], None, 2),
    "max pool": lambda x: F.max_pool2d(x, (1, 2)),
    "average pool": lambda x: F.avg_pool2d(x, (1, 2)),
    "adaptive pool": lambda x: F.adaptive_max_pool2d(x, (1, 2)),
    "interpolation": lambda x: F.interpolate(x, (3, 5), mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, (3, 5), mode="bicubic"),
    "silu": F.silu,
    "softmax": lambda x: x.softmax(1),
}


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 4, 1, 8), (1, 4, 7, 3), (2, 4, 1, 4)])
@pytest.mark.parametrize("name", NORMS)
def test_strides_of_dimensions_of_one_mean_nothing(name, shape):
    """Kernels of PyTorch take the memory format from them; finite differences do not."""

    def function(x):
        y = NORMS[name](x).flatten(2).transpose(1, 2)
        return (y @ torch.linspace(-1, 1, 3 * y.shape[2], **DOUBLE).view(-1, 3)).sigmoid()

    model, x = Call(function), torch.randn(shape, **DOUBLE)
    for options in (x, x.contiguous(memory_format=torch.channels_last)):
        _, seeds, grad = by_tape(model, options, 1)
        direction = torch.randn(shape, **DOUBLE)
        slope = (model(options + 1e-6 * direction) - model(options - 1e-6 * direction)).mul(seeds[0]).sum() / 2e-6
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_batches_without_images(name):
    """Wherever PyTorch itself has a gradient of nothing."""
    model, x = Call(FUNCTIONS[name]), torch.randn(2, 4, 8, 8, **DOUBLE)[:0]
    try:
        expected = by_autograd(
            model, x, torch.zeros(1, *model(x).shape, dtype=torch.promote_types(model(x).dtype, x.dtype))
        )
    except (RuntimeError, IndexError):
        return
    _, _, grad = by_tape(model, x, 1)
    assert grad.shape == expected.shape == (1, *x.shape)


class Binarize(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.sign()

    @staticmethod
    def backward(context, grad):
        return grad


CUTS = {
    "aten::sign": Binarize.apply,
    "aten::round": torch.round,
    "aten::floor": torch.floor,
    "aten::ceil": torch.ceil,
    "aten::trunc": lambda x: x.trunc(),
    "aten::div": lambda x: x.div(0.1, rounding_mode="floor"),
    "aten::gt": lambda x: (x > 0).double(),
    "aten::argmax": lambda x: F.one_hot(x.argmax(-1), 8).double(),
    "aten::to": lambda x: x.long().double(),
    "aten::detach": lambda x: x.detach(),
    "aten::bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_lets_no_gradient_pass_is_named_once(name, caplog):
    model, x = Call(lambda x: F.conv2d(CUTS[name](x) * 2, W)), torch.randn(2, 4, 8, 8, **DOUBLE)
    policy = GradientRules()
    for _ in range(2):
        tape = record(model, x, policy=policy)
        seeds = {tape.outputs: torch.ones(1, *tape.outputs.shape, **DOUBLE)}
        assert (backward_pass(policy, tape, seeds, tape.inputs)[0] == 0).all()
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"none passes {name} in 'the model'" in message


def test_a_way_around_what_lets_no_gradient_pass_is_no_warning(caplog):
    assert_is_gradient(lambda x: x.round() * x + x.detach(), torch.randn(2, 4, 8, 8, **DOUBLE))
    _, _, grad = by_tape(Call(lambda x: (x.detach(), x * 0)[1]), torch.randn(2, 4, 8, 8, **DOUBLE), 1)
    assert not caplog.records
    assert (grad == 0).all()


@torch.library.custom_op("grads_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.filterwarnings("ignore:torch")  # quantization is deprecated, and in use
def test_an_op_that_autograd_does_not_know_is_an_error():
    with pytest.raises(UnsupportedOpError, match=r"grads_tests::twice, which ran in 'the model' .*rule\("):
        by_tape(Call(lambda x: twice(x) + x), torch.randn(2, 4, 8, 8), 1)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 5)).eval()
    model = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedOpError, match=r"quantized::linear_dynamic, which ran in '1' .*occlusion"):
        by_tape(model, torch.randn(2, 4, 8, 8), 1)
    quantized = Call(lambda x: torch.quantize_per_tensor(x.relu(), 0.1, 0, torch.quint8).dequantize() * 2)
    with pytest.raises(UnsupportedOpError, match=r"aten::quantize_per_tensor in 'the model' .*before it is quantized"):
        by_tape(quantized, torch.randn(2, 4, 8, 8), 1)
    with pytest.raises(UnsupportedOpError, match="aten::heaviside"):
        by_tape(Call(lambda x: torch.heaviside(x, x) * x), torch.randn(2, 4, 8, 8), 1)


def test_a_rule_that_is_registered_later_takes_effect(monkeypatch):
    for of in (GradientRules(), GradientRules({}), GradientRules(GUIDED)):
        model, x = Call(torch.round), torch.randn(2, 4, 8, 8, **DOUBLE)
        with monkeypatch.context() as patch:
            patch.setitem(GRADIENT, "aten::round", GRADIENT["aten::round"])

            @rule("round")
            def through(ctx, x):
                ctx.propagate(x, ctx.grad)

            tape = record(model, x, policy=of)
            seeds = torch.randn(1, *x.shape, **DOUBLE)
            assert torch.equal(backward_pass(of, tape, {tape.outputs: seeds}, tape.inputs)[0], seeds)


@pytest.mark.parametrize("table", [GRADIENT, GUIDED, DECONVNET, LINEAR, NEAREST, EXCITATION])
def test_tables_are_copied_by_name(table):
    assert copy.deepcopy(table) is table
    assert pickle.loads(pickle.dumps(table)) is table


def test_a_write_through_a_view_of_another_dtype_is_an_error():
    def function(x):
        z = torch.fft.fft(x).clone()
        z.real.mul_(2)
        return z.abs()

    with pytest.raises(UnsupportedOpError, match=r"write to a view of another dtype .*float64 of torch\.complex128"):
        by_tape(Call(function), torch.randn(2, 4, 8, 8, **DOUBLE), 1)
