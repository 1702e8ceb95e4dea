import math

import numpy as np
import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops
from pyfast_xai.ops import Rectify

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
every_rule = pytest.mark.parametrize("rule", Rectify, ids=lambda rule: rule.name)


def random_bits(size):
    """Bits, and the mask they stand for."""
    mask = np.random.default_rng(size).random(size) < 0.5
    return torch.from_numpy(np.packbits(mask, bitorder="little")), mask


def assert_passed(grad, rule, out=None):
    """The definition in float64; `grad` [K, ...] is dense, its first dimension outermost."""
    size = grad[0].numel()
    bits, mask = random_bits(size)

    def rows(tensor):
        return tensor.as_strided((len(grad), size), (size, 1)).double().numpy()

    before = rows(grad)
    passes = np.ones_like(before, dtype=bool)
    if rule in (Rectify.GRADIENT, Rectify.GUIDED):
        passes &= mask
    if rule in (Rectify.DECONVNET, Rectify.GUIDED):
        passes &= ~(before <= 0)
    expected = np.where(passes, before, 0)
    result = ops.relu_backward(grad, None if rule == Rectify.DECONVNET else bits, rule, out=out)
    assert result.dtype == grad.dtype
    assert result.shape == grad.shape
    assert result.stride() == grad.stride()
    np.testing.assert_array_equal(rows(result), expected)
    return result


@every_dtype
@every_rule
@pytest.mark.parametrize("targets", [1, 3])
def test_definition_at_every_size(backend, dtype, rule, targets):
    for size in (1, 7, 8, 9, 63, 64, 65, 1000):
        assert_passed(torch.randn(targets, size).to(dtype), rule)


@every_rule
@pytest.mark.parametrize("shape", [(1, 100_003), (3, 50_001), (50_001, 3)], ids=case_id)
def test_more_than_one_thread_takes(backend, rule, shape):
    assert_passed(torch.randn(shape), rule)


@every_dtype
@every_rule
def test_special_values(backend, dtype, rule):
    smallest = math.ldexp(torch.finfo(dtype).tiny, -2)  # subnormal
    values = [0.0, smallest, 1.0, torch.finfo(dtype).max, math.inf, math.nan]
    values += [-value for value in values]
    assert_passed(torch.tensor(values, dtype=dtype).repeat(2, 20), rule)


@every_rule
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
        lambda t: t.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1),
        lambda t: t[:1].as_strided((1, *t.shape[1:]), (7, *t.stride()[1:])),
        lambda t: t[:, 0, 0, 0, 0].clone(),
        lambda t: t[1:],
    ],
    ids=["channels_last", "reversed", "one_target", "0d", "offset"],
)
def test_rows_are_read_in_the_order_of_memory(backend, rule, layout):
    assert_passed(layout(torch.randn(3, 2, 5, 3, 7)), rule)


@every_rule
@pytest.mark.parametrize(
    ("view", "dense"),
    [
        (lambda t: t[:1].expand(3, 4, 5, 7), lambda t: t),
        (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: t),
        (lambda t: t.repeat_interleave(2, -1)[..., ::2], lambda t: t),
        (lambda t: t[:1].mT.contiguous().mT.expand(3, 4, 5, 7), lambda t: t.mT.contiguous().mT),
    ],
    ids=["expanded", "targets_inside", "every_second", "expanded_transposed"],
)
def test_other_gradients_are_copied_in_the_order_of_their_dimensions(backend, rule, view, dense):
    grad = view(torch.randn(3, 4, 5, 7))
    before = grad.clone()
    bits = None if rule == Rectify.DECONVNET else random_bits(140)[0]
    expected = ops.relu_backward(dense(grad.contiguous()), bits, rule)
    assert torch.equal(ops.relu_backward(grad, bits, rule), expected)
    assert torch.equal(grad, before)


@every_dtype
@every_rule
def test_in_place(backend, dtype, rule):
    grad = torch.randn(3, 131).to(dtype)
    expected = assert_passed(grad.clone(), rule)
    bits = None if rule == Rectify.DECONVNET else random_bits(131)[0]
    assert ops.relu_backward(grad, bits, rule, out=grad) is grad
    assert torch.equal(grad, expected)


def test_out(backend):
    out = torch.empty(2, 77)
    assert assert_passed(torch.randn(2, 77), Rectify.GUIDED, out) is out


@every_dtype
def test_slope(backend, dtype):
    grad = torch.randn(3, 131).to(dtype)
    grad[:, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    bits, mask = random_bits(131)
    expected = torch.where(torch.from_numpy(mask), grad, grad * 0.3)
    torch.testing.assert_close(
        ops.relu_backward(grad, bits, negative_slope=0.3), expected, rtol=0, atol=0, equal_nan=True
    )
    ops.relu_backward(grad, bits, negative_slope=0.3, out=grad)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("upper", [math.inf, 6.0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=case_id)
def test_there_and_back_is_autograd(backend, dtype, upper, memory_format):
    input = (4 * torch.randn(2, 5, 7, 9)).to(dtype).to(memory_format=memory_format)
    grad = torch.randn(2, 5, 7, 9).to(dtype).to(memory_format=memory_format)
    leaf = input.clone().requires_grad_()
    output = torch.relu(leaf) if upper == math.inf else torch.nn.functional.hardtanh(leaf, 0.0, upper)
    output.backward(grad)
    rectified, bits = ops.relu_forward(input, upper=upper)
    assert torch.equal(rectified, output)
    assert torch.equal(ops.relu_backward(grad[None], bits)[0], leaf.grad)


@every_dtype
def test_gradient_is_torchs_to_the_bit(backend, dtype):
    input, grad = (torch.randn(1001).to(dtype) for _ in range(2))
    grad[:6] = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0])
    for x in (input, input.flip(0).contiguous()):
        passed = ops.relu_backward(grad[None], ops.relu_forward(x)[1])[0]
        expected = torch.ops.aten.threshold_backward(grad, x, 0)
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(passed.view(width), expected.view(width))


def test_bits_of_a_bound_clip_the_gradient(backend):
    input, bound, grad = torch.randn(500), torch.randn(500).relu(), torch.randn(2, 500)
    bits = ops.relu_forward(input, bound=bound)[1]
    expected = grad * ((input > 0) & (input <= bound))
    assert torch.equal(ops.relu_backward(grad, bits), expected)


def test_strided_bits(backend):
    grad, (bits, _) = torch.randn(2, 77), random_bits(77)
    assert torch.equal(ops.relu_backward(grad, bits.repeat_interleave(2)[::2]), ops.relu_backward(grad, bits))


@every_rule
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 5)], ids=case_id)
def test_nothing(backend, rule, shape):
    size = math.prod(shape[1:])
    bits = None if rule == Rectify.DECONVNET else torch.zeros((size + 7) // 8, dtype=torch.uint8)
    for out in (None, torch.zeros(shape)):
        assert ops.relu_backward(torch.zeros(shape), bits, rule, out=out).shape == shape


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[:, ::2]], ids=["dense", "strided"])
def test_gradients_that_require_gradients_are_read_like_tensors(backend, view):
    values = torch.randn(3, 20)
    bits = torch.full((3,), 0b10101010, dtype=torch.uint8)[: (view(values).shape[1] + 7) // 8]
    result = ops.relu_backward(view(torch.nn.Parameter(values)), bits, negative_slope=0.5)
    assert not result.requires_grad
    assert torch.equal(result, ops.relu_backward(view(values), bits, negative_slope=0.5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": torch.ones(2, 20, dtype=torch.int32)}, "grad must be float16, bfloat16, float32 or float64, got"),
        ({"grad": torch.tensor(1.0)}, r"grad must have shape \[K, ...\], got \[\]"),
        ({"grad": torch.ones(20, 2).T, "out": torch.ones(20, 2).T}, "grad must be dense with its first dimension"),
        ({"grad": torch.ones(1, 20).expand(2, 20), "out": torch.ones(2, 20)}, "grad must be dense with its first"),
        ({"rule": 3}, r"rule must be in \[0, 3\), got 3"),
        ({"rule": -1}, r"rule must be in \[0, 3\), got -1"),
        ({"negative_slope": 0.5, "rule": 2}, "negative_slope must be 0 unless rule is GRADIENT, got 0.5"),
        ({"rule": 1}, "bits must be None where rule is DECONVNET, got a tensor"),
        ({"bits": None}, "bits must be a tensor unless rule is DECONVNET, got None"),
        ({"bits": None, "rule": 2}, "bits must be a tensor unless rule is DECONVNET, got None"),
        ({"bits": torch.zeros(3, dtype=torch.int64)}, "bits must be .*uint8, got .*int64"),
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, r"bits must have shape \[3\], .*, got \[2\]"),
        ({"bits": torch.zeros(1, 3, dtype=torch.uint8)}, r"bits must have shape \[3\], .*, got \[1, 3\]"),
        ({"out": torch.ones(2, 20, dtype=torch.float16)}, "out must be .*float32.*, got .*float16"),
        ({"out": torch.ones(2, 2, 10)}, r"out must have shape \[2, 20\] as grad has, got \[2, 2, 10\]"),
        ({"out": torch.ones(20, 2).T}, r"out must have strides \[20, 1\] as grad has, got \[1, 2\]"),
    ],
)
def test_bad_arguments(backend, changed, message):
    arguments = {"grad": torch.ones(2, 20), "bits": torch.zeros(3, dtype=torch.uint8)} | changed
    with pytest.raises(RuntimeError, match=message):
        ops.relu_backward(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=case_id)
@every_rule
@pytest.mark.parametrize("shape", [(3, 2, 5), (0, 3)], ids=case_id)
def test_opcheck(dtype, rule, shape):
    grad = torch.randn(shape).to(dtype)
    bits = None if rule == Rectify.DECONVNET else random_bits(math.prod(shape[1:]))[0]
    arguments = (grad, bits, int(rule), 0.0, torch.zeros_like(grad))
    torch.library.opcheck(torch.ops.pyfast_xai.relu_backward.default, arguments)
