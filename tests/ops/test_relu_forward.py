import itertools
import math

import numpy as np
import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
every_bound = pytest.mark.parametrize(
    ("bounded", "clamp"), [(False, False), (True, False), (True, True)], ids=["free", "bounded", "clamped"]
)
# Dense in memory, whatever the order of the dimensions.
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "5d": lambda t: t[:, None].to(memory_format=torch.channels_last_3d),
    "0d": lambda t: t[1, 2, 3, 4].clone(),
    "offset": lambda t: t[1],
}


def in_memory(tensor):
    return tensor.as_strided((tensor.numel(),), (1,)).double().numpy()


def assert_rectified(input, upper=math.inf, bound=None, clamp=False, out=None):
    """The definition in float64, in the order of memory; `upper` must be exact in the dtype."""
    x = in_memory(input)
    expected = np.minimum(np.maximum(x, 0), upper)
    passes = (x > 0) & ((x < upper) | (upper == math.inf))
    if bound is not None:
        b = in_memory(bound)
        passes &= expected <= b
        if clamp:
            expected = np.minimum(expected, b)
    output, bits = ops.relu_forward(input, upper=upper, bound=bound, clamp=clamp, out=out)
    assert output.dtype == input.dtype
    assert output.shape == input.shape
    assert output.stride() == input.stride()
    np.testing.assert_array_equal(in_memory(output), expected)
    # packbits fills the last byte up with zeros.
    np.testing.assert_array_equal(bits.numpy(), np.packbits(passes, bitorder="little"))
    return output


def halves(*shape, dtype=torch.float32):
    """Few distinct values: ties with bounds and with the upper end are common."""
    return (torch.randint(-6, 10, shape) / 2).to(dtype)


@every_dtype
@every_bound
@pytest.mark.parametrize("upper", [math.inf, 3])
def test_definition_at_every_size(backend, dtype, bounded, clamp, upper):
    for size in (1, 7, 8, 9, 63, 64, 65, 1000):
        bound = halves(size, dtype=dtype) if bounded else None
        assert_rectified(halves(size, dtype=dtype), upper, bound, clamp)


@every_bound
def test_more_than_one_thread_takes(backend, bounded, clamp):
    size = 100_003
    assert_rectified(torch.randn(size), 1, torch.randn(size).abs() if bounded else None, clamp)


@every_dtype
@every_bound
@pytest.mark.parametrize("upper", [math.inf, 6])
def test_special_values(backend, dtype, bounded, clamp, upper):
    smallest = math.ldexp(torch.finfo(dtype).tiny, -2)  # subnormal
    largest = torch.finfo(dtype).max
    values = [0.0, smallest, 1.0, 6.0, 7.0, largest, math.inf, math.nan]
    values += [-value for value in values]
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=dtype)
    assert_rectified(pairs[:, 0].contiguous(), upper, pairs[:, 1].contiguous() if bounded else None, clamp)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=case_id)
@every_bound
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts_are_read_in_the_order_of_memory(backend, dtype, bounded, clamp, layout):
    input, bound = (LAYOUTS[layout](halves(3, 5, 7, 9, dtype=dtype)) for _ in range(2))
    assert_rectified(input, 3, bound if bounded else None, clamp)


@pytest.mark.parametrize("view", ["step", "cut", "expand", "expand_inside"])
@every_bound
def test_other_layouts_are_made_dense(backend, view, bounded, clamp):
    base = halves(4, 6, 10)
    before = base.clone()
    input = {
        "step": base[:, :, ::3],
        "cut": base[1:, 2:5],
        "expand": base.expand(2, 4, 6, 10),
        "expand_inside": base[:, :, :1].expand(4, 6, 10),
    }[view]
    bound = halves(*input.shape) if bounded else None
    output, bits = ops.relu_forward(input, upper=3, bound=bound, clamp=clamp)
    # The same as of a copy in whichever order was chosen.
    dense = torch.empty_like(output).copy_(input)
    expected, expected_bits = ops.relu_forward(dense, upper=3, bound=bound, clamp=clamp)
    assert torch.equal(output, expected)
    assert torch.equal(bits, expected_bits)
    assert torch.equal(base, before)
    assert torch.equal(expected, torch.minimum(input.clamp(0, 3), bound) if clamp else input.clamp(0, 3))


def test_a_bound_in_another_order_is_rearranged(backend):
    input, bound = halves(2, 3, 4, 5).to(memory_format=torch.channels_last), halves(2, 3, 4, 5)
    expected = ops.relu_forward(input, bound=bound.to(memory_format=torch.channels_last), clamp=True)
    for result, same in zip(ops.relu_forward(input, bound=bound, clamp=True), expected, strict=True):
        assert torch.equal(result, same)


def test_strides_of_single_elements_do_not_matter(backend):
    input = halves(1, 3, 4, 4)
    other = input.as_strided(input.shape, (999, 16, 4, 1))
    assert ops.relu_forward(input, bound=other, out=torch.empty_like(other))[1].shape == (6,)


@every_dtype
@every_bound
def test_in_place(backend, dtype, bounded, clamp):
    input = halves(3, 5, 7, 9, dtype=dtype).to(memory_format=torch.channels_last)
    bound = torch.empty_like(input).copy_(halves(3, 5, 7, 9)) if bounded else None
    expected, bits = ops.relu_forward(input, upper=3, bound=bound, clamp=clamp)
    output, same_bits = ops.relu_forward(input, upper=3, bound=bound, clamp=clamp, out=input)
    assert output is input
    assert torch.equal(input, expected)
    assert torch.equal(bits, same_bits)


def test_out(backend):
    out = torch.empty(1000)
    assert assert_rectified(halves(1000), out=out) is out


@every_dtype
def test_upper_is_rounded_to_the_dtype(backend, dtype):
    upper = torch.tensor(0.1, dtype=dtype)
    values = torch.stack([torch.nextafter(upper, torch.zeros_like(upper)), upper, torch.ones_like(upper)])
    output, bits = ops.relu_forward(values, upper=0.1)
    assert output.tolist() == [values[0].item(), upper.item(), upper.item()]
    assert bits.tolist() == [0b001]


def test_an_upper_end_beyond_the_dtype_is_none(backend):
    input = torch.tensor([math.inf, 1.0], dtype=torch.float16)
    output, bits = ops.relu_forward(input, upper=1e6)
    assert torch.equal(output, input)
    assert bits.tolist() == [0b11]


@every_dtype
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 5)], ids=case_id)
def test_nothing(backend, dtype, shape):
    output, bits = ops.relu_forward(torch.zeros(shape, dtype=dtype), bound=torch.zeros(shape, dtype=dtype), clamp=True)
    assert output.shape == shape
    assert bits.shape == (0,)
    assert bits.dtype == torch.uint8


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[::2]], ids=["dense", "strided"])
def test_parameters_are_read_like_tensors(backend, view):
    values = halves(70)
    parameter = torch.nn.Parameter(values)
    output, bits = ops.relu_forward(view(parameter), bound=view(parameter), clamp=True)
    expected, expected_bits = ops.relu_forward(view(values), bound=view(values), clamp=True)
    assert not output.requires_grad
    assert torch.equal(output, expected)
    assert torch.equal(bits, expected_bits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": torch.ones(4, 6, dtype=torch.int32)}, "input must be float16, bfloat16, float32 or float64, got"),
        ({"upper": 0.0}, "upper must be positive, got 0"),
        ({"upper": math.nan}, "upper must be positive, got nan"),
        ({"clamp": True}, "bound must be a tensor where clamp is true, got None"),
        ({"bound": torch.ones(4, 5)}, r"bound must have shape \[4, 6\] as input has, got \[4, 5\]"),
        ({"bound": torch.ones(4)}, r"bound must have shape \[4, 6\] as input has, got \[4\]"),
        ({"bound": torch.ones(6, 4, dtype=torch.float64).T}, "bound must be .*float32.*, got .*float64"),
        ({"out": torch.ones(4, 6, dtype=torch.float16)}, "out must be .*float32.*, got .*float16"),
        ({"out": torch.ones(24)}, r"out must have shape \[4, 6\] as input has, got \[24\]"),
        ({"out": torch.ones(6, 4).T}, r"out must have strides \[6, 1\] as input has, got \[1, 4\]"),
        (
            {"input": torch.ones(4, 12)[:, ::2], "out": torch.ones(4, 6)},
            r"input must be dense, got shape \[4, 6\] with strides \[12, 2\]",
        ),
        ({"input": torch.ones(1, 6).expand(4, 6), "out": torch.ones(4, 6)}, "input must be dense, got shape"),
    ],
)
def test_bad_arguments(backend, changed, message):
    with pytest.raises(RuntimeError, match=message):
        ops.relu_forward(**({"input": torch.ones(4, 6)} | changed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=case_id)
@every_bound
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (0, 3)], ids=case_id)
def test_opcheck(dtype, bounded, clamp, shape):
    input, bound = (halves(*shape, dtype=dtype) for _ in range(2))
    arguments = (input, 3.0, bound if bounded else None, clamp, torch.zeros_like(input))
    torch.library.opcheck(torch.ops.pyfast_xai.relu_forward.default, arguments)
