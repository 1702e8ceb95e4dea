"""Calls with one key are calls that differ in the numbers of their tensors only."""

import enum
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import pyfast_xai
from pyfast_xai.acceleration.cache_key import cache_key


class Color(enum.Enum):
    RED = 1
    BLUE = 2

    def __repr__(self):
        return "a color"


class Same:
    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return "Same()"

    def __eq__(self, other):
        return isinstance(other, Same)

    def __hash__(self):
        return 0


def holed(value):
    mask = np.ones((64, 64), np.float32)
    mask[30, 30] = value
    return mask


DIFFER = [
    (holed(0), holed(1)),
    (np.zeros(4, np.float32), np.zeros(4, np.int32)),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (np.float32(0.1), np.float64(0.1)),
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    ("1", 1),
    (b"1", "1"),
    ([1, 2], (1, 2)),
    ({"a": 1}, {"b": 1}),
    (slice(1, 2), slice(1, 3)),
    (Color.RED, Color.BLUE),
    (torch.relu, torch.tanh),
    (torch.float32, torch.float64),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(2, 2), torch.zeros(2, 2).t()),
    (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
    (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64).conj()),
]


@pytest.mark.parametrize(("one", "other"), DIFFER, ids=lambda thing: type(thing).__name__)
def test_what_differs_has_another_key(one, other):
    image = torch.rand(2, 3)
    for argument in (one, other):
        assert cache_key((image, argument), {}) == cache_key((image.clone(), argument), {}) is not None
    assert cache_key((image, one), {}) != cache_key((image, other), {})
    assert cache_key((image,), {"x": [one]}) != cache_key((image,), {"x": [other]})


def test_equal_values_have_one_key():
    for one, other in ((holed(3), holed(3)), (float("nan"), float("nan")), ("a" * 999, "".join("a" * 999))):
        assert cache_key((one,), {}) == cache_key((other,), {})


@pytest.mark.parametrize(
    "argument",
    [
        Same(1),
        functools.partial(torch.mul, 2),
        (lambda factor: lambda x: x * factor)(2),
        nn.Linear(2, 2),
        np.array([object()]),
        np.ma.array([1.0], mask=[True]),
        iter([1]),
        bytearray(b"1"),
        torch.eye(2).to_sparse(),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_may_change_has_no_key(argument):
    assert cache_key((torch.rand(2), argument), {}) is None
    assert cache_key((torch.rand(2),), {"nested": [{"in": argument}]}) is None


def test_tensors_on_one_memory_are_told_apart():
    memory = torch.rand(4)
    assert cache_key((memory, memory), {}) != cache_key((memory, memory.clone()), {})


def test_settings_count():
    image = torch.rand(2)
    plain = cache_key((image,), {})
    with torch.autocast("cpu", torch.bfloat16):
        assert cache_key((image,), {}) != plain
    torch.set_default_dtype(torch.float64)
    try:
        assert cache_key((image,), {}) != plain
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert cache_key((image,), {}) not in (plain, None)

    class Overrides(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Overrides():
        assert cache_key((image,), {}) is None
    assert cache_key((image,), {}) == plain


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x, mask):
        mask = mask.factor if isinstance(mask, Same) else torch.from_numpy(mask)
        return self.head(self.conv(x * mask).relu().mean((2, 3)))


@pytest.mark.parametrize("masks", [(holed(0), holed(5)), (Same(1.0), Same(3.0))], ids=["arrays", "objects"])
def test_explanations_are_of_the_arguments_at_hand(masks):
    torch.manual_seed(0)
    model, images = Masked().eval(), torch.rand(1, 3, 64, 64)
    plain, fast = pyfast_xai.Saliency(model), pyfast_xai.Saliency(model).accelerate()
    for mask in masks * 3:
        expected = plain(images, 1, mask).attribution
        torch.testing.assert_close(fast(images, 1, mask).attribution, expected, rtol=1e-4, atol=1e-7)
    if isinstance(masks[0], Same):
        masks[0].factor = 9.0
        expected = plain(images, 1, masks[0]).attribution
        torch.testing.assert_close(fast(images, 1, masks[0]).attribution, expected, rtol=1e-4, atol=1e-7)
