"""Replays are never out of date: whatever changes what a model gives is noticed, or the model runs as it is."""

import collections
import functools
import itertools
import logging
import random
import types

import numpy as np
import pytest
import torch
from case_ids import case_id
from torch import nn
from torch.nn.modules import module as process_wide
from torch.nn.utils import parametrize

import pyfast_xai
from pyfast_xai.acceleration import freshness
from pyfast_xai.acceleration.freshness import Snapshot
from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.acceleration.weight_samples import WeightSamples
from pyfast_xai.tape import record

SCALE = 1.0
TABLE = {"scale": [1.0]}
HELPERS = types.ModuleType("helpers")
HELPERS.scale = 1.0


class Options:
    gain = 1.0

    def __init__(self):
        self.scales = [1.0, {"inner": 1.0}]


class Slotted:
    __slots__ = ("__hidden", "scale")

    def __init__(self):
        self.scale, self.__hidden = 1.0, 1.0

    def product(self):
        return self.scale * self.__hidden


def times(factor, x):
    return x * factor


def doubled_if(flag):
    return lambda x: x * (2 if flag[0] else 1)


class Block(nn.Module):
    offset = 0.0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.slope = 0.1
        self.shifts = (1, 1)
        self.flags = {"relu": True, "names": ["a", "b"]}
        self.kinds = {"mean"}
        self.queue = collections.deque([1.0])
        self.options, self.slotted = Options(), Slotted()
        self.table = np.ones(4, np.float32)
        self.plain_tensor = torch.ones(4, 1, 1)
        self.hidden = [nn.Conv2d(4, 4, 1)]  # not registered
        self.function = functools.partial(times, 1.0)
        self.flag = [False]
        self.closure = doubled_if(self.flag)

    def forward(self, x):
        x = self.norm(self.conv(x)) + self.hidden[0](x)
        x = nn.functional.leaky_relu(x, self.slope) if self.flags["relu"] else x.tanh()
        x = (
            x.roll(self.shifts, (2, 3))
            * torch.linspace(0, 1, x.shape[-1])
            * self.plain_tensor
            * torch.from_numpy(self.table)[:, None, None]
        )
        x = x * self.options.scales[0] * self.options.scales[1]["inner"] * self.options.gain + self.offset
        x = x * self.slotted.product() * self.queue[0] * SCALE * TABLE["scale"][0] * HELPERS.scale
        x = x * (3 if "a" not in self.flags["names"] else 1)
        x = self.closure(self.function(x))
        return x.mean((2, 3)) if "mean" in self.kinds else x.amax((2, 3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 3, stride=2), Block(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.stem(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net()
    model.block.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 14)


def data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def data_of_one_filter(model):
    model.block.conv.weight.data[1] = 1


def one_number(model):
    model.block.conv.weight.data[1, 2, 0, 1] += 1


def numpy_alias(model):
    model.head.weight.detach().numpy()[...] *= 2


def buffer_data(model):
    model.block.norm.running_mean.data.add_(1)


def swap_averages(model):
    """As moving averages of weights are put in place and back."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 0.5 + 0.1)


def merge_adapter(model):
    model.head.weight.data += torch.ones(5, 2) @ torch.ones(2, 4)


def transposed_in_place(model):
    weight = model.block.hidden[0].weight
    weight.data = weight.data.transpose(0, 1)


def shared_storage(model):
    model.stem.weight.untyped_storage().copy_(torch.randn_like(model.stem.weight).untyped_storage())


def inference_mode(model):
    with torch.inference_mode():
        model.head.bias.add_(1)


def unregistered_module(model):
    model.block.hidden[0].weight.data.neg_()


def unregistered_module_replaced(model):
    model.block.hidden[0] = nn.Conv2d(4, 4, 1, bias=False)


def plain_tensor(model):
    model.block.plain_tensor.data[2] = 5


def numpy_table(model):
    model.block.table[1] = 7


def eps(model):
    model.block.norm.eps = 1.0


def padding_mode(model):
    model.block.conv.padding, model.block.conv.dilation = (2, 2), (2, 2)


def stride(model):
    model.stem.stride = (1, 1)


def slope(model):
    model.block.slope = 0.5


def shifts(model):
    model.block.shifts = (2, 3)


def flag_in_dict(model):
    model.block.flags["relu"] = False


def name_in_list(model):
    model.block.flags["names"].remove("a")


def name_in_set(model):
    model.block.kinds.clear()


def deque(model):
    model.block.queue[0] = 2.0


def nested_object(model):
    model.block.options.scales[1]["inner"] = 3.0


def attribute_over_class(model):
    model.block.options.gain = 2.0


def class_attribute(model, monkeypatch):
    monkeypatch.setattr(Block, "offset", 1.0)


def class_of_an_object(model, monkeypatch):
    monkeypatch.setattr(Options, "gain", 3.0)


def slot(model):
    model.block.slotted.scale = 2.0


def hidden_slot(model):
    model.block.slotted._Slotted__hidden = 2.0


def partial_function(model):
    model.block.function = functools.partial(times, 2.0)


def closure(model):
    model.block.flag[0] = True


def global_number(model, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 2.0)


def global_table(model, monkeypatch):
    monkeypatch.setitem(TABLE, "scale", [4.0])


def list_in_a_global_table(model, request):
    request.addfinalizer(lambda: TABLE.update(scale=[1.0]))
    TABLE["scale"][0] = 5.0


def attribute_of_a_python_module(model, monkeypatch):
    monkeypatch.setattr(HELPERS, "scale", 2.0)


def global_function(model, monkeypatch):
    monkeypatch.setattr(torch, "relu", torch.tanh)


def functional(model, monkeypatch):
    monkeypatch.setattr(nn.functional, "leaky_relu", lambda x, slope: x.sigmoid())


def forward_of_a_module(model):
    model.stem.forward = lambda x: torch.ones(2, 4, 5, 6) * x.mean()


def forward_of_the_model(model):
    model.forward = lambda x: model.head(model.stem(x).amax((2, 3)))


def forward_of_a_class(model, monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda self, x: self.conv(x).amax((2, 3)))


def forward_of_a_class_of_torch(model, monkeypatch):
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 2)


def call_of_all_modules(model, monkeypatch):
    plain = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: plain(self, *args) * 1.25)


def code_of_a_function(model, monkeypatch):
    monkeypatch.setattr(times, "__code__", (lambda factor, x: x * factor + 1).__code__)


def class_of_a_module(model):
    class Other(Block):
        def forward(self, x):
            return super().forward(x) * 2

    model.block.__class__ = Other


def parametrization(model):
    class Doubles(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.head, "weight", Doubles().eval())


def forward_hook(model):
    model.block.register_forward_hook(lambda module, args, output: output * 3)


def pre_hook_with_kwargs(model):
    model.block.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True)


def global_hook(model, request):
    hook = process_wide.register_module_forward_hook(
        lambda module, args, output: output * 2 if module is model.head else None
    )
    request.addfinalizer(hook.remove)


def replaced_module(model):
    model.head = nn.Linear(4, 5).eval()


def default_dtype_of_a_factory(model):
    model.block.plain_tensor = torch.full((4, 1, 1), 2.0)


CHANGES = [
    *(data, data_of_one_filter, one_number, numpy_alias, buffer_data, swap_averages, merge_adapter),
    *(transposed_in_place, shared_storage, inference_mode, unregistered_module, unregistered_module_replaced),
    *(plain_tensor, numpy_table, eps, padding_mode, stride, slope, shifts, flag_in_dict, name_in_list, name_in_set),
    *(deque, nested_object, attribute_over_class, class_attribute, class_of_an_object, slot, hidden_slot),
    *(
        partial_function,
        closure,
        global_number,
        global_table,
        list_in_a_global_table,
        attribute_of_a_python_module,
        global_function,
    ),
    *(functional, forward_of_a_module, forward_of_the_model, forward_of_a_class, forward_of_a_class_of_torch),
    *(call_of_all_modules, code_of_a_function, class_of_a_module, parametrization, forward_hook),
    *(pre_hook_with_kwargs, global_hook, replaced_module, default_dtype_of_a_factory),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed_at_the_next_call(model, images, change, monkeypatch, request, caplog):
    accelerated = ReplayedModel(model)
    for _ in range(3):  # the next call is the 4th, whose audit is kept out of it
        before = accelerated.record(images).result
    monkeypatch.setattr(ReplayedModel, "_passes", lambda *args: True)
    names = change.__code__.co_varnames[1 : change.__code__.co_argcount]
    change(model, **{name: {"monkeypatch": monkeypatch, "request": request}[name] for name in names})
    expected = record(model, images).result
    assert not torch.allclose(before, expected, rtol=1e-3), "the change changes nothing"
    torch.testing.assert_close(accelerated.record(images).result, expected, rtol=1e-4, atol=1e-5)
    assert not caplog.messages


def test_what_changes_nothing_costs_nothing(model, images):
    accelerated = ReplayedModel(model)
    for _ in range(2):
        accelerated.record(images)
    (templates,) = accelerated._templates.values()
    model.block.slope = float("0.1")  # another object, the same number
    model.block.shifts = (int("1"), int("1"))
    model.requires_grad_(False)
    with pyfast_xai.tape.module_hooks.following(
        lambda module, args: None, lambda module, output: None
    ):  # another thread records
        accelerated.record(images)
    assert next(iter(accelerated._templates.values())) is templates
    assert templates[0].calls == 3


@pytest.mark.parametrize("numbers", [(0.0, -0.0), (1, True), (1.0, 1), (float("nan"), 0.0)], ids=case_id)
def test_numbers_that_compare_alike_are_told_apart(model, numbers):
    model.block.slope = numbers[0]
    snapshot = Snapshot(model)
    assert snapshot.is_current()
    model.block.slope = numbers[1]
    assert not snapshot.is_current()


OPAQUE = {
    "iterator": lambda: itertools.count(),
    "generator of random numbers": lambda: random.Random(0),
    "array of objects": lambda: np.array([object()]),
    "large array": lambda: np.zeros(1 << 20),
    "compiled object": lambda: bytearray(b"12"),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_what_cannot_be_watched_runs_as_it_is(model, images, kind, caplog):
    model.block.extra = {"state": OPAQUE[kind]()}
    accelerated = ReplayedModel(model)
    with caplog.at_level(logging.WARNING, "pyfast_xai"):
        for _ in range(3):
            assert torch.equal(accelerated.record(images).result, record(model, images).result)
    (message,) = caplog.messages
    assert message.startswith("accelerate: the model runs without replays: ")
    assert not accelerated._templates


def test_a_model_that_writes_to_itself_runs_as_it_is(images, caplog):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = []

        def forward(self, x):
            self.calls.append(len(self.calls))
            return x.mean((2, 3))

    model = Counts().eval()
    explainer = ReplayedModel(model)
    for call in range(5):
        before = len(model.calls)
        explainer.record(images)
        assert call < 2 or len(model.calls) in (before, before + 1)
    assert len(caplog.messages) == 1


def test_a_model_that_prepares_itself_in_its_first_call_is_replayed(images):
    class Lazy(nn.Module):
        grid = None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.linspace(0, 1, x.shape[-1])
            return (x * self.grid).mean((2, 3))

    model = Lazy().eval()
    accelerated = ReplayedModel(model)
    for _ in range(3):
        expected = (images * torch.linspace(0, 1, 14)).mean((2, 3))
        torch.testing.assert_close(accelerated.record(images).result, expected)
    assert [[t.calls for t in result] for result in accelerated._templates.values()] == [[3]]


def test_a_model_that_changes_from_call_to_call_is_left_alone(model, images, caplog):
    accelerated = ReplayedModel(model)
    for _ in range(8):
        model.head.weight.data.mul_(1.1)
        torch.testing.assert_close(accelerated.record(images).result, record(model, images).result)
    assert [message for message in caplog.messages if "it changes from call to call" in message]
    assert len(caplog.messages) == 1
    accelerated.forget()
    accelerated.record(images)
    assert accelerated._templates


# Audits


def test_what_samples_miss_is_found_by_an_audit(images, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 400, 3), nn.BatchNorm2d(400), nn.AdaptiveMaxPool2d(1), nn.Flatten()).eval()
    accelerated = ReplayedModel(model)
    for _ in range(5):
        accelerated.record(images)
    index = next(i for i in range(1, 100) if _is_missed(model[0].weight, i))
    model[0].weight.data.view(-1)[index] = 1e3
    expected = record(model, images).result
    results = [accelerated.record(images).result for _ in range(5)]  # the 6th to the 10th
    right = [torch.allclose(result, expected, rtol=1e-4) for result in results]
    assert right == [False, False, True, True, True]
    assert torch.equal(results[2], expected)
    (message,) = caplog.messages
    assert "an audit found that its replay no longer gives its results" in message


def _is_missed(weight, index):
    samples = WeightSamples([weight])
    before = weight.data.view(-1)[index].clone()
    weight.data.view(-1)[index] = 1e3
    missed = samples.unchanged()
    weight.data.view(-1)[index] = before
    return missed


def test_audits_double(model, images, monkeypatch):
    audits, passes = [], ReplayedModel._passes
    monkeypatch.setattr(ReplayedModel, "_passes", lambda self, *args: audits.append(calls[-1]) or passes(self, *args))
    accelerated, calls = ReplayedModel(model), []
    for call in range(1, 40):
        calls.append(call)
        accelerated.record(images)
    assert audits == [2, 2, 3, 4, 8, 16, 32]


def test_a_decision_that_other_inputs_show_is_seen(images):
    class ByStrength(nn.Module):
        """Decides by the size of numbers, which a mirror does not change, out of sight of PyTorch."""

        def forward(self, x):
            strong = np.from_dlpack(x.detach().clone()).std() > 0.5
            return x.mean((2, 3)) if strong else x.amax((2, 3))

    model = ByStrength().eval()
    accelerated = ReplayedModel(model)
    for batch in (images, images / 9, images):
        assert torch.equal(accelerated.record(batch).result, record(model, batch).result)


# Values


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_every_number_of_a_small_tensor_is_seen(dtype):
    tensor = torch.zeros(5, 7).to(dtype)
    views = [tensor, tensor.t(), tensor[::2, 1::3], tensor[1].expand(4, 7), tensor[:0], tensor[0, 0]]
    for view in views:
        samples = WeightSamples([view])
        assert samples.unchanged()
        with torch.inference_mode():
            for index in range(view.numel()):
                place = np.unravel_index(index, tuple(view.shape))
                before = view.data[place].clone()
                view.data[place] = 1
                assert not samples.unchanged(), place
                view.data[place] = before
    assert WeightSamples(views).unchanged()


@pytest.mark.parametrize(
    ("shape", "columns"),
    [((512, 512), True), ((512, 512), False), ((64, 256, 3, 3), False), ((1000, 37), True), ((70001,), False)],
    ids=case_id,
)
def test_a_piece_of_a_large_tensor_is_seen(shape, columns):
    tensor = torch.rand(shape)
    samples = WeightSamples([tensor])
    pieces = tensor.flatten(1).unbind(1)[:5] if columns else tensor.view(-1).split(-(-tensor.numel() // 251))[:-1]
    for piece in pieces:
        before = piece.clone()
        piece.data.mul_(2)
        assert not samples.unchanged()
        piece.data.copy_(before)
        assert samples.unchanged()


def test_memory_that_was_given_back_is_not_read():
    tensor = torch.rand(10_000)
    samples = WeightSamples([tensor])
    tensor.untyped_storage().resize_(0)
    assert not samples.unchanged()


def test_a_look_is_no_operation_that_others_see(model):
    snapshot = Snapshot(model)
    recorded = []

    class Sees(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            recorded.append(op)
            return op(*args, **(kwargs or {}))

    with Sees():
        assert snapshot.is_current()
    assert not recorded


def test_versions_and_memory_of_the_model_are_left_alone(model):
    before = {name: (tensor._version, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert Snapshot(model).is_current()
    after = {name: (tensor._version, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert after == before
    model.head.weight.untyped_storage().resize_(1000)  # NumPy arrays on it would forbid that


def test_installed_packages_are_not_walked():
    assert freshness.is_from_library(nn.Linear)
    assert freshness.is_from_library(pytest.fixture)
    assert not freshness.is_from_library(Net)
