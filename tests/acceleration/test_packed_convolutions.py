"""Which kernel serves a convolution, by made-up speeds of the kernels."""

import copy
import functools

import pytest
import torch
from case_ids import case_id
from torch import nn

import pyfast_xai
from pyfast_xai import onednn, ops, tuning
from pyfast_xai.acceleration.packed_convolutions import _PackedConvolution
from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.acceleration.weight_cache import WeightCache
from pyfast_xai.tuning import Candidate, Contest, Verdicts

pytestmark = pytest.mark.skipif(
    not onednn.available() or ops.registry.OPS["winograd_conv2d"].missing("cpp", "cpu") is not None,
    reason="convolutions are not packed, or the library is not compiled",
)

KERNELS = ("pytorch", "pytorch, other format", "onednn", "winograd")


class Speeds:
    """Contests by a clock that passes, for a run of a candidate, the seconds that a test wrote down for it."""

    def __init__(self):
        self.seconds = dict.fromkeys(KERNELS, 1.0)
        self.now = 0.0
        self.runs = []
        self.contest = Contest(Verdicts(None, {}), lambda: self.now)

    def choose(self, site, candidates, arguments, **options):
        timed = [
            Candidate(entry.name, functools.partial(self.run, entry), depends_on_data=entry.depends_on_data)
            for entry in candidates
        ]
        winner = self.contest.choose(site, timed, arguments, **options)
        return next(entry for entry in candidates if entry.name == winner.name)

    def run(self, candidate, *arguments):
        self.runs.append(candidate.name)
        self.now += self.seconds[candidate.name]
        return candidate.run(*arguments)


@pytest.fixture
def speeds(monkeypatch):
    made = Speeds()
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")
    monkeypatch.setattr(tuning, "choose", made.choose)
    return made


@pytest.fixture
def serving(monkeypatch):
    """The names of the kernels that ran, contests included, in order."""
    names = []

    def watched(name, method):
        def run(*args, **kwargs):
            names.append(name)
            return method(*args, **kwargs)

        return run

    methods = {"pytorch": ("_pytorch", "_pytorch_adjoint"), "onednn": ("_onednn", "_onednn_adjoint")}
    methods["winograd"] = ("_winograd", "_winograd_adjoint")
    for name, attributes in methods.items():
        for attribute in attributes:
            monkeypatch.setattr(_PackedConvolution, attribute, watched(name, getattr(_PackedConvolution, attribute)))
    return names


def packed(activation=("none", []), **settings):
    weight, bias = torch.randn(32, 16, 3, 3), torch.randn(32)
    geometry = {"padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 1, **settings}
    return _PackedConvolution(WeightCache(), weight, bias, activation=activation, **geometry)


def maps(channels=16):
    return torch.randn(2, channels, 20, 20).contiguous(memory_format=torch.channels_last)


ACTIVATIONS = {
    "none": ([], lambda result: result),
    "relu": ([], torch.relu),
    "hardtanh": ([0, 6], nn.functional.relu6),
    "hardswish": ([], nn.functional.hardswish),
    "swish": ([], nn.functional.silu),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=case_id)
def test_every_kernel_gives_the_convolution(speeds, kernel, activation, layout):
    speeds.seconds[kernel] = 0.1
    numbers, function = ACTIVATIONS[activation]
    convolution, input = packed((activation, numbers)), maps().contiguous(memory_format=layout)
    exact = nn.functional.conv2d(input.double(), convolution.weight.double(), convolution.bias.double(), padding=1)
    before = input.clone()
    results = [convolution(input) for _ in range(2)]
    if kernel == "winograd" and activation in ("hardswish", "swish"):
        assert "winograd" not in speeds.runs
    for result in results:
        torch.testing.assert_close(result.double(), function(exact), rtol=0, atol=1e-5 * float(exact.abs().max()))
    assert torch.equal(input, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_adjoint(speeds, kernel):
    speeds.seconds[kernel] = 0.1
    convolution, grad = packed(), maps(32)
    exact = nn.functional.conv_transpose2d(grad.double(), convolution.weight.double(), padding=1)
    for _ in range(2):
        result = convolution.adjoint(grad, [0, 0])
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("settings", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"padding": (0, 2)}], ids=case_id)
def test_other_geometries_have_their_contests(speeds, settings):
    convolution, input = packed(**settings), maps()
    leaf = input.double().requires_grad_()
    function = functools.partial(nn.functional.conv2d, **{**{"padding": (1, 1)}, **settings})
    exact = function(leaf, convolution.weight.double(), convolution.bias.double())
    largest = float(exact.detach().abs().max())
    torch.testing.assert_close(convolution(input).double(), exact.detach(), rtol=0, atol=1e-5 * largest)
    grad = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last)
    exact.backward(grad.double())
    stride, padding = settings.get("stride", (1, 1)), settings.get("padding", (1, 1))
    reach = settings.get("dilation", (1, 1))[0] * 2 + 1
    rest = [20 + 2 * padding[d] - reach - (exact.shape[2 + d] - 1) * stride[d] for d in range(2)]
    result = convolution.adjoint(grad, rest)
    torch.testing.assert_close(result.double(), leaf.grad, rtol=0, atol=1e-5 * float(leaf.grad.abs().max()))
    assert speeds.runs


@pytest.mark.parametrize("kernel", ["pytorch", "onednn", "winograd"])
def test_the_fastest_serves_ever_after(speeds, serving, kernel):
    speeds.seconds[kernel] = 0.1
    convolution, input, grad = packed(), maps(), maps(32)
    convolution(input)
    convolution.adjoint(grad, [0, 0])
    serving.clear()
    for _ in range(3):
        convolution(input)
        convolution.adjoint(grad, [0, 0])
    assert serving == [kernel] * 6


@pytest.mark.parametrize("slow", [1.0, 1.02, 30.0])
def test_no_kernel_serves_that_is_not_faster_than_pytorchs(speeds, serving, slow):
    speeds.seconds |= dict.fromkeys(KERNELS[1:], slow)
    convolution, input = packed(), maps()
    convolution(input)
    serving.clear()
    convolution(input)
    assert serving == ["pytorch"]


def test_a_wrong_kernel_does_not_serve(speeds, serving, monkeypatch):
    speeds.seconds["winograd"] = 0.1
    monkeypatch.setattr(
        ops, "winograd_conv2d", lambda input, weight, bias, padding, *limits: torch.zeros(2, 32, 20, 20)
    )
    convolution, input = packed(), maps()
    exact = nn.functional.conv2d(input, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(convolution(input), exact, rtol=0, atol=1e-4)
    serving.clear()
    convolution(input)
    assert "winograd" not in serving


def test_winograds_agreement_is_looked_at_for_each_weight(speeds, serving):
    speeds.seconds["winograd"] = 0.1
    convolution, other = packed(), packed()
    convolution(maps())
    # One large number in a corner of a kernel, beside which the others are lost in Winograd's sums, and what it
    # multiplies is zero.
    other.weight[:, 0] = 1e9
    input = maps()
    input[:, 0] = 0
    exact = nn.functional.conv2d(input.double(), other.weight.double(), other.bias.double(), padding=1)
    for _ in range(2):
        serving.clear()
        torch.testing.assert_close(other(input).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_what_losers_made_of_a_weight_is_thrown_away(speeds):
    speeds.seconds["onednn"] = 0.1
    convolution = packed()
    convolution(maps())
    made = {function for function, *_ in convolution.cache._entries}
    assert made == {torch.ops.mkldnn._reorder_convolution_weight.default}


def test_a_model_is_explained_the_same_by_whichever_kernels(speeds):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32 * 16 * 16, 5)).eval().requires_grad_(False)
    images = torch.randn(3, 3, 16, 16)
    leaf = images.double().requires_grad_()
    copy.deepcopy(model).double()(leaf).amax(1).sum().backward()
    for kernel in KERNELS:
        speeds.contest = Contest(Verdicts(None, {}), lambda: speeds.now)
        speeds.seconds = {**dict.fromkeys(KERNELS, 1.0), kernel: 0.1}
        explainer = pyfast_xai.Saliency(model).accelerate()
        for _ in range(2):
            results = explainer(images).attribution
            torch.testing.assert_close(results.double(), leaf.grad, rtol=0, atol=1e-5 * float(leaf.grad.abs().max()))


def test_without_contests_the_last_kernel_serves(serving, monkeypatch):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "off")
    packed()(maps())
    packed(stride=(2, 2))(maps())
    assert serving == ["winograd", "onednn"]


def limited(seconds):
    """A convolution whose contests may take so many seconds a call."""
    made = packed()
    made.contests.seconds = seconds
    made.contests.next_call()
    return made


def test_contests_that_there_is_no_time_for_wait_for_the_next_call(speeds, serving):
    made, first = limited(0), maps()
    expected = made._pytorch(first, made.cache)
    del serving[:]
    torch.testing.assert_close(made(first), expected, rtol=1e-4, atol=1e-4)
    assert serving == ["onednn"]
    assert not speeds.runs
    made.contests.seconds = 1.0
    speeds.seconds["pytorch"] = 0.1
    made.contests.next_call()
    torch.testing.assert_close(made(first), expected, rtol=1e-4, atol=1e-4)
    assert set(speeds.runs) == set(KERNELS)
    assert serving[-1] == "pytorch"


def test_a_contest_uses_up_the_time_of_a_call(speeds, monkeypatch):
    monkeypatch.setattr(tuning, "stopwatch", lambda device, threads: lambda: 2.0)
    made = limited(1.0)
    made(maps())
    assert not made.contests.grants()
    made.contests.next_call()
    assert made.contests.grants()


@pytest.mark.parametrize("winner", KERNELS)
def test_results_lie_in_memory_as_the_first_did(speeds, winner):
    made, first = limited(0), maps().contiguous()
    stride = made(first).stride()
    speeds.seconds[winner] = 0.1
    made.contests.seconds = 1.0
    made.contests.next_call()
    assert made(first).stride() == stride


def test_from_eight_sizes_on_those_that_come_again_hold_contests(speeds):
    accelerated = ReplayedModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())
    for size in range(8, 16):
        accelerated.record(torch.rand(1, 3, size, 9))
    assert speeds.runs
    del speeds.runs[:]
    for call in range(3):
        accelerated.record(torch.rand(1, 3, 16, 9))
        assert bool(speeds.runs) == (call == 2)
