"""The kernels that PyTorch has but does not always choose: the same results, and PyTorch's own where they are not."""

import contextlib

import pytest
import torch
from case_ids import case_id
from torch.nn import functional

from pyfast_xai import onednn
from pyfast_xai.rules.gradient import GradientRules, backward_pass
from pyfast_xai.tape import record

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Which library's product ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op._schema.name)
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def allowed(enabled):
    """As `torch.backends.mkldnn.flags`, which warns of settings that it leaves alone."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 0, 7), (1, 7), (7,)], ids=case_id)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)
@torch.no_grad()
def test_linear(shape, turned, bias, dtype):
    input = torch.randn(shape, dtype=dtype)
    weight = torch.randn(7, 4, dtype=dtype).mT if turned else torch.randn(4, 7, dtype=dtype)
    bias = torch.randn(4, dtype=dtype) if bias else None
    expected = functional.linear(input, weight, bias)
    torch.testing.assert_close(onednn.linear(input, weight, bias), expected)
    if input.dim() > 1:
        torch.testing.assert_close(onednn.linear(input.mT.contiguous().mT, weight, bias), expected)


@needs_onednn
@torch.no_grad()
def test_who_multiplies():
    weight = torch.randn(4, 7)
    for rows, enabled, used in ((8, True, True), (1, True, False), (8, False, False)):
        with allowed(enabled), Products() as products:
            onednn.linear(torch.randn(rows, 7), weight)
        assert ("mkldnn::_linear_pointwise" in products.names) == used


@pytest.fixture
def threads():
    """Sets how many there are, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"padding": 1}, {"stride": 2}], ids=case_id)
@pytest.mark.parametrize(
    ("images", "many", "enabled"), [(3, 1, True), (3, 1, False), (3, 2, True), (16, 1, True)], ids=case_id
)
def test_pointwise_convolutions_backwards(settings, images, many, enabled, threads):
    """Where PyTorch would take BLAS, and nowhere else, oneDNN is called by name; the gradient is autograd's."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(6, 8, 1, **settings)
    images = torch.randn(images, 6, 9, 8, requires_grad=True)
    seed = torch.randn_like(model(images))
    (expected,) = torch.autograd.grad(model(images), images, seed)
    threads(many)
    with allowed(enabled), Products() as products:
        policy = GradientRules()
        tape = record(model, images.detach(), policy=policy)
        (grad,) = backward_pass(policy, tape, {tape.outputs: seed[None]}, tape.inputs)
    torch.testing.assert_close(grad[0], expected)
    by_name = enabled and many == 1 and len(images) < 16 and "stride" not in settings
    assert ("mkldnn::_convolution_transpose_pointwise" in products.names) == by_name
