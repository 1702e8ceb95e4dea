"""Every Triton kernel against the reference: on the CUDA device, else interpreted on the CPU.

`test_triton.py` runs this file in a process of its own, for Triton reads TRITON_INTERPRET when it is imported.
Interpreted, what only repeats at length is left to the marker `extended`.
"""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_programs
from case_ids import case_id

from pyfast_xai.kernels.reference.conv_trace import conv_trace as reference_conv_trace
from pyfast_xai.kernels.reference.leading_singular import leading_singular as reference_leading_singular
from pyfast_xai.kernels.reference.linear_trace import linear_trace as reference_linear_trace
from pyfast_xai.kernels.reference.max_pool_backward import max_pool_backward as reference_max_pool_backward
from pyfast_xai.kernels.reference.max_pool_forward import max_pool_forward as reference_max_pool_forward
from pyfast_xai.kernels.reference.point_density import point_density as reference_point_density
from pyfast_xai.kernels.reference.points_union import points_union as reference_points_union
from pyfast_xai.kernels.reference.relu_backward import relu_backward as reference_relu_backward
from pyfast_xai.kernels.reference.relu_forward import relu_forward as reference_relu_forward
from pyfast_xai.kernels.reference.response_argmax import response_argmax as reference_response_argmax
from pyfast_xai.kernels.reference.sign_bits import sign_bits
from pyfast_xai.kernels.triton import linear_trace as linear_trace_module
from pyfast_xai.kernels.triton.conv_trace import conv_trace
from pyfast_xai.kernels.triton.leading_singular import leading_singular
from pyfast_xai.kernels.triton.linear_trace import linear_trace
from pyfast_xai.kernels.triton.max_pool_backward import max_pool_backward
from pyfast_xai.kernels.triton.max_pool_forward import max_pool_forward
from pyfast_xai.kernels.triton.point_density import point_density
from pyfast_xai.kernels.triton.points_union import points_union
from pyfast_xai.kernels.triton.relu_backward import relu_backward
from pyfast_xai.kernels.triton.relu_forward import relu_forward
from pyfast_xai.kernels.triton.response_argmax import response_argmax
from pyfast_xai.kernels.triton.sign_bits import sign_bits as sign_bits_kernel
from pyfast_xai.ops import Location, Rectify, Solver

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
every_location = pytest.mark.parametrize("location", Location, ids=lambda location: location.name)
# The interpreter is NumPy, which remarks on infinities and NaNs; a device does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def on_device(kernel, *arguments):
    """Call a kernel with its tensors on the device, and bring back what it returned and wrote into.

    Whole memories travel, not tensors, so that strides and arguments that share memory stay what they are.
    """
    memories = {}

    def moved(tensor):
        actual = tensor.untyped_storage()
        if actual._cdata not in memories:
            memories[actual._cdata] = actual, torch.UntypedStorage(actual.nbytes(), device=DEVICE).copy_(actual)
        there = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        return there.set_(memories[actual._cdata][1], tensor.storage_offset(), tensor.shape, tensor.stride())

    result = kernel(*(moved(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for here, there in memories.values():
        here.copy_(there)
    if isinstance(result, tuple):
        return tuple(part.cpu() for part in result)
    return None if result is None else result.cpu()


# conv_trace

# Input, weight, stride, padding, dilation, groups. A block holds 128 products: what exceeds it, in channels or in
# taps, and what does not fill it.
GEOMETRIES = {
    "1d-dilated-groups": ((2, 6, 31), (9, 2, 5), (1,), (4,), (3,), 3),
    "2d-11x11": ((1, 3, 31, 27), (4, 3, 11, 11), (4, 4), (0, 0), (1, 1), 1),
    "2d-1x1-many-channels": ((3, 150, 5, 7), (6, 150, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "2d-3x3-many-channels": ((1, 150, 4, 3), (2, 150, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d-uneven": ((2, 4, 13, 10), (6, 2, 5, 3), (2, 3), (2, 0), (1, 2), 2),
    "2d-depthwise": ((2, 9, 8, 8), (18, 1, 3, 3), (1, 1), (1, 1), (2, 2), 9),
    "2d-all-padding": ((1, 3, 3, 3), (2, 3, 2, 2), (1, 1), (3, 3), (1, 1), 1),
    "3d-all-padding": ((1, 2, 4, 2, 2), (2, 2, 2, 2, 2), (1, 1, 1), (0, 3, 3), (1, 1, 1), 1),
    "3d-groups": ((1, 4, 4, 5, 3), (4, 2, 1, 3, 3), (2, 1, 1), (0, 1, 1), (1, 1, 1), 2),
}


def convolution(name):
    """Random data of a geometry, and the arguments after it."""
    shape, weight, stride, padding, dilation, groups = GEOMETRIES[name]
    input, weight = torch.randn(shape), torch.randn(weight)
    output = torch.conv1d if len(shape) == 3 else torch.conv2d if len(shape) == 4 else torch.conv3d
    size = output(input, weight, None, stride, padding, dilation, groups).shape
    points = torch.randint(0, math.prod(size), (6,))
    return input, weight, points, (list(size[2:]), list(stride), list(padding), list(dilation), groups)


def whole(tensor):
    """Small whole numbers in its place: no sum of them is rounded, and ties are common."""
    return torch.randint(-2, 3, tensor.shape).to(tensor.dtype)


def assert_traced_as_reference(*arguments):
    traced = on_device(conv_trace, *arguments)
    assert traced.dtype == torch.int64
    assert torch.equal(traced, reference_conv_trace(*arguments))


@pytest.mark.parametrize("name", GEOMETRIES)
@every_location
def test_conv_trace_first_of_equals(name, location):
    input, weight, points, geometry = convolution(name)
    negative = torch.rand(len(points)) < 0.4
    assert_traced_as_reference(whole(input), whole(weight), points, negative, *geometry, location)


@every_location
def test_conv_trace_without_negative(location):
    input, weight, points, geometry = convolution("2d-uneven")
    assert_traced_as_reference(whole(input), whole(weight), points, None, *geometry, location)


@every_dtype
@pytest.mark.parametrize(
    ("name", "location"),
    [("1d-dilated-groups", Location.ACTIVATION), ("2d-3x3-many-channels", Location.PRODUCT)],
    ids=["activation", "product"],
)
def test_conv_trace_strongest_up_to_rounding(dtype, name, location):
    input, weight, points, geometry = convolution(name)
    input, weight, points = input.to(dtype), weight.to(dtype), points[:4]
    negative = torch.rand(len(points)) < 0.4
    traced = on_device(conv_trace, input, weight, points, negative, *geometry, location)
    exact = input.double().requires_grad_()
    _, *settings, groups = geometry
    output = torch.nn.functional.conv1d if input.dim() == 3 else torch.nn.functional.conv2d
    values = output(exact, weight.double(), None, *settings, groups).flatten()
    bound = 100 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for i, (point, target) in enumerate(zip(points.tolist(), traced.tolist(), strict=True)):
        # The gradient is the filter, laid over the window.
        filter_ = torch.autograd.grad(values[point], exact, retain_graph=True)[0]
        contributions = (filter_ * exact).detach() * (-1 if negative[i] else 1)
        n, channel, *_ = np.unravel_index(target, input.shape)
        window = filter_[n, channel] != 0
        group = filter_[n].flatten(1).ne(0).any(1)  # weights of zero are improbable
        sums = contributions[n].flatten(1).sum(1)
        assert group[channel]
        assert sums[channel] >= sums[group].max() - bound * contributions.abs().max()
        judged = contributions if location == Location.PRODUCT else exact.detach()
        assert judged.flatten()[target] >= judged[n, channel][window].max() - bound * contributions.abs().max()


@pytest.mark.parametrize("layout", ["channels_last", "every_second", "cut_channels"])
def test_conv_trace_any_strides(layout):
    input, weight, points, geometry = convolution("2d-uneven")
    input, weight, negative = whole(input), whole(weight), torch.rand(len(points)) < 0.4
    if layout == "channels_last":
        input, weight = (t.to(memory_format=torch.channels_last) for t in (input, weight))
    elif layout == "every_second":
        input, weight = (t.repeat_interleave(2, -1)[..., ::2] for t in (input, weight))
        points, negative = points.repeat(2, 1).T[:, 1], negative.repeat(2, 1).T[:, 1]
    else:
        input, weight = (torch.cat([t * 9, t], 1)[:, t.shape[1] :] for t in (input, weight))
    assert_traced_as_reference(input, weight, points, negative, *geometry, Location.PRODUCT)


def test_conv_trace_padding_is_silent_beside_an_infinite_border():
    # The window of the first output reads the places -2 and 2: the infinity at 0 is not in it.
    input = torch.tensor([[[math.inf, 0.0, 1.0], [0.0, 0.0, 2.0]]])
    arguments = (input, torch.ones(1, 2, 2), torch.tensor([0]), None, [3], [1], [2], [4], 1, Location.PRODUCT)
    assert on_device(conv_trace, *arguments).tolist() == [5]


@pytest.mark.parametrize("negative", [None, torch.tensor([True])], ids=["positive", "negative"])
@pytest.mark.parametrize("location", [Location.PRODUCT, Location.ACTIVATION], ids=lambda location: location.name)
def test_conv_trace_the_first_nan_counts_as_the_largest(negative, location):
    input = torch.ones(1, 4, 3)
    input[0, 3, 0] = input[0, 2, 1] = input[0, 2, 2] = math.nan
    arguments = (input, torch.ones(1, 4, 3), torch.tensor([0]), negative, [1], [1], [0], [1], 1, location)
    assert on_device(conv_trace, *arguments).tolist() == [7]


def test_conv_trace_never_prefers_padding():
    # A window at the places -2 and 2, of which the input has the second, with nothing in it.
    input = torch.full((1, 1, 3), -math.inf)
    arguments = (input, torch.ones(1, 1, 2), torch.tensor([0]), None, [3], [1], [2], [4], 1, Location.ACTIVATION)
    assert on_device(conv_trace, *arguments).tolist() == [2]


def test_conv_trace_sums_of_minus_infinity_tie():
    input = torch.full((1, 200, 2), -math.inf)
    arguments = (input, torch.ones(1, 200, 2), torch.tensor([0]), None, [1], [1], [0], [1], 1, Location.PRODUCT)
    assert on_device(conv_trace, *arguments).tolist() == [0]


def test_conv_trace_sums_half_precision_in_float32():
    # In float16, 2048 + 1 is 2048.
    input = torch.tensor([[[2048.0, 0.0], [2048.0, 1.0], [0.0, 2.0]]], dtype=torch.float16)
    ones = torch.ones(1, 3, 2, dtype=torch.float16)
    arguments = (input, ones, torch.tensor([0]), None, [1], [1], [0], [1], 1, Location.PRODUCT)
    assert on_device(conv_trace, *arguments).tolist() == [2]


@every_location
def test_conv_trace_no_point_stays_none(location):
    input, weight, points, geometry = convolution("2d-uneven")
    points = torch.cat([torch.tensor([-1]), points, torch.tensor([-1, -1])])
    negative = torch.rand(len(points)) < 0.4
    assert_traced_as_reference(whole(input), whole(weight), points, negative, *geometry, location)
    assert_traced_as_reference(whole(input), whole(weight), points[-2:], None, *geometry, location)


def test_conv_trace_no_points():
    input, weight, points, geometry = convolution("3d-groups")
    traced = on_device(conv_trace, input, weight, points[:0], None, *geometry, Location.PRODUCT)
    assert (traced.shape, traced.dtype) == ((0,), torch.int64)


# linear_trace


def layer(rows, features, outputs, count, dtype=torch.float32):
    input, weight = (torch.randint(-2, 3, shape).to(dtype) for shape in ((rows, features), (outputs, features)))
    return input, *sign_bits(weight), torch.randint(0, rows * outputs, (count,)), torch.rand(count) < 0.4


@pytest.mark.parametrize(
    "sizes",
    # 64 inputs a word, 4 or 16 words and 32 points a step.
    [(1, 1, 1, 1), (3, 64, 4, 6), (4, 130, 3, 2), (1, 1100, 90, 80), (5, 257, 1, 3)],
    ids=case_id,
)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("idle", [0, linear_trace_module.IDLE], ids=["wide", "narrow"])
def test_linear_trace(monkeypatch, sizes, signed, idle):
    monkeypatch.setattr(linear_trace_module, "IDLE", idle)
    *arguments, negative = layer(*sizes)
    arguments.append(negative if signed else None)
    reached = on_device(linear_trace, *arguments)
    assert reached.dtype == torch.int64
    assert torch.equal(reached, reference_linear_trace(*arguments))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("capacity", [None, 390, 400])
def test_linear_trace_no_points_among_points_and_a_capacity(signed, capacity):
    input, positive, negative, points, flips = layer(4, 130, 3, 3)
    points, flips = torch.cat([torch.tensor([-1, -1]), points]).flip(0), torch.cat([flips, flips[:2]])
    arguments = (input, positive, negative, points, flips if signed else None, capacity)
    reached = on_device(linear_trace, *arguments)
    assert torch.equal(reached, reference_linear_trace(*arguments))
    assert capacity in (None, len(reached))


@every_dtype
def test_linear_trace_dtypes(dtype):
    arguments = layer(2, 130, 3, 7, dtype)
    assert torch.equal(on_device(linear_trace, *arguments), reference_linear_trace(*arguments))


def test_linear_trace_any_strides():
    input, positive, negative, points, flips = layer(3, 200, 5, 9)
    expected = reference_linear_trace(input, positive, negative, points, flips)
    wide = input.repeat_interleave(2, 1)[:, ::2]
    positive, negative = (bits.T.contiguous().T for bits in (positive, negative))
    reached = on_device(linear_trace, wide, positive, negative, points.repeat(2, 1).T[:, 0], flips)
    assert torch.equal(reached, expected)


def test_linear_trace_nan_excites_nothing():
    bits = sign_bits(torch.tensor([[1.0, torch.nan, -1.0]]))
    input = torch.tensor([[torch.nan, 1.0, -2.0]])
    assert on_device(linear_trace, input, *bits, torch.tensor([0]), None).tolist() == [2]
    assert on_device(linear_trace, input, *bits, torch.tensor([0]), torch.tensor([True])).tolist() == []


def test_linear_trace_reads_tiny_float64():
    # Not to be rounded to float32, in which it is zero.
    input = torch.tensor([[1e-300, -1e-300]], dtype=torch.float64)
    bits = sign_bits(torch.ones(1, 2))
    assert on_device(linear_trace, input, *bits, torch.tensor([0]), None).tolist() == [0]


@pytest.mark.parametrize("sizes", [(3, 200, 5, 0), (3, 0, 5, 2), (0, 5, 2, 0)], ids=case_id)
def test_linear_trace_nothing(sizes):
    rows, features, outputs, count = sizes
    bits = sign_bits(torch.ones(outputs, features))
    reached = on_device(linear_trace, torch.ones(rows, features), *bits, torch.zeros(count, dtype=torch.int64), None)
    assert (reached.shape, reached.dtype) == ((0,), torch.int64)
    reached = on_device(linear_trace, torch.ones(rows, features), *bits, torch.full((count,), -1), None, 3)
    assert reached.tolist() == [-1, -1, -1]


# points_union, sign_bits


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 1), (300, 7), (300, 5000), (5000, 5000), (40, 50_000)],
    ids=["one", "few", "some", "all", "sparse"],
)
def test_points_union(count, size):
    points = torch.randint(-1, size, (count,))
    for capacity in (None, min(count, size), count + 99):
        result = on_device(points_union, points, size, capacity)
        assert result.dtype == torch.int64
        assert torch.equal(result, reference_points_union(points, size, capacity))


def test_points_union_any_strides():
    points = torch.randint(0, 900, (7, 60))
    result = on_device(points_union, points.T.reshape(-1)[::3], 900, None)
    assert torch.equal(result, reference_points_union(points.T.reshape(-1)[::3], 900, None))


def test_points_union_nothing():
    nothing = torch.empty(0, dtype=torch.int64)
    assert on_device(points_union, nothing, 5, None).tolist() == []
    assert on_device(points_union, nothing, 5, 3).tolist() == [-1, -1, -1]
    assert on_device(points_union, torch.full((4,), -1), 5, None).tolist() == []
    assert on_device(points_union, torch.full((4,), -1), 5, 2).tolist() == [-1, -1]


def test_points_union_capacity_that_is_too_small():
    if DEVICE == "cpu":  # an assertion of a device ends its process
        with pytest.raises(RuntimeError, match="capacity must be at least 3, the points found, got 2"):
            points_union(torch.tensor([1, 5, 3]), 9, 2)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 65), (2, 5000), (0, 7), (4, 0)], ids=case_id)
def test_sign_bits(dtype, shape):
    weight = torch.randint(-1, 2, shape).to(dtype)
    if weight.numel() > 64:
        weight[-1, -3:] = torch.tensor([math.nan, math.inf, -0.0]).to(dtype)
    for layout in (weight, weight.T.contiguous().T):
        for result, expected in zip(on_device(sign_bits_kernel, layout), sign_bits(layout), strict=True):
            assert torch.equal(result, expected)


# point_density


@pytest.mark.parametrize(
    ("shape", "sigma"),
    [((1, 1, 1), 1.0), ((2, 17, 31), 2.5), ((3, 33, 8), 0.3), ((1, 24, 50), 20.0), ((1, 5, 100), 7.0)],
    ids=case_id,
)
@pytest.mark.parametrize("count", [1, 300])
def test_point_density(shape, sigma, count):
    points = torch.randint(0, math.prod(shape), (count,))
    density = on_device(point_density, points, *shape, sigma)
    assert density.dtype == torch.float32
    torch.testing.assert_close(density, reference_point_density(points, *shape, sigma), rtol=1e-5, atol=1e-6)


def test_point_density_height_one_at_a_lone_point():
    density = on_device(point_density, torch.tensor([3 * 9 + 4]), 1, 7, 9, 1.5)
    assert density[0, 3, 4] == 1
    assert density.argmax() == 3 * 9 + 4


@pytest.mark.parametrize("shape", [(2, 5, 7), (0, 5, 7), (1, 0, 7), (1, 5, 0)], ids=case_id)
def test_point_density_no_points(shape):
    density = on_device(point_density, torch.empty(0, dtype=torch.int64), *shape, 2.0)
    assert density.dtype == torch.float32
    assert torch.equal(density, torch.zeros(shape))


# relu_forward, relu_backward


def halves(*shape, dtype):
    """Few distinct values: ties with bounds and with the upper end are common."""
    return (torch.randint(-6, 10, shape) / 2).to(dtype)


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def assert_rectified_as_reference(input, upper, bound, clamp):
    out, expected = torch.empty_like(input), torch.empty_like(input)
    bits = on_device(relu_forward, input, upper, bound, clamp, out)
    assert bits.dtype == torch.uint8
    assert torch.equal(bits, reference_relu_forward(input, upper, bound, clamp, expected))
    assert_same(out, expected)


@every_dtype
@pytest.mark.parametrize(("bounded", "clamp"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("upper", [math.inf, 3.0, 0.1], ids=case_id)
def test_relu_forward(dtype, bounded, clamp, upper):
    for size in (1, 8, 63, 2049, 4096):
        assert_rectified_as_reference(
            halves(size, dtype=dtype), upper, halves(size, dtype=dtype) if bounded else None, clamp
        )


@every_dtype
@pytest.mark.parametrize(("bounded", "clamp"), [(False, False), (True, False), (True, True)])
def test_relu_forward_special_values(dtype, bounded, clamp):
    values = torch.tensor([0.0, 1.0, 6.0, 7.0, torch.finfo(dtype).max, math.inf, math.nan], dtype=dtype)
    pairs = torch.cartesian_prod(torch.cat([values, -values]), torch.cat([values, -values]))
    bound = pairs[:, 1].contiguous() if bounded else None
    assert_rectified_as_reference(pairs[:, 0].contiguous(), 6.0, bound, clamp)


def test_relu_forward_an_upper_end_beyond_the_dtype_is_none():
    assert_rectified_as_reference(torch.tensor([math.inf, 1.0], dtype=torch.float16), 1e6, None, False)


def test_relu_forward_in_place_in_the_order_of_memory():
    input = halves(3, 5, 7, 9, dtype=torch.float32).to(memory_format=torch.channels_last)
    expected = torch.empty_like(input)
    bits = reference_relu_forward(input, 3.0, None, False, expected)
    assert torch.equal(on_device(relu_forward, input, 3.0, None, False, input), bits)
    assert torch.equal(input, expected)


@every_dtype
@pytest.mark.parametrize("rule", Rectify, ids=lambda rule: rule.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (2, 2049), (3, 2, 8, 8)], ids=case_id)
def test_relu_backward(dtype, rule, shape):
    grad = torch.randn(shape).to(dtype)
    grad.view(-1)[:6] = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0])[: grad.numel()]
    bits = torch.randint(0, 256, ((grad[0].numel() + 7) // 8,), dtype=torch.uint8)
    # Slopes that bfloat16 holds: the interpreter cuts where a device rounds.
    for slope in (0.0, 0.25) if rule == Rectify.GRADIENT else (0.0,):
        arguments = (grad, None if rule == Rectify.DECONVNET else bits, rule, slope)
        out, expected = torch.empty_like(grad), torch.empty_like(grad)
        on_device(relu_backward, *arguments, out)
        reference_relu_backward(*arguments, expected)
        assert_same(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=case_id)
def test_relu_backward_slope_in_full(dtype):
    grad, bits = torch.randn(2, 100).to(dtype), torch.randint(0, 256, (13,), dtype=torch.uint8)
    expected = torch.empty_like(grad)
    reference_relu_backward(grad, bits, Rectify.GRADIENT, 0.3, expected)
    on_device(relu_backward, grad, bits, Rectify.GRADIENT, 0.3, grad)
    assert_same(grad, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)], ids=case_id)
def test_relu_nothing(shape):
    empty = torch.zeros(shape)
    assert on_device(relu_forward, empty, 6.0, empty, True, empty).shape == (0,)
    bits = torch.zeros((math.prod(shape[1:]) + 7) // 8, dtype=torch.uint8)
    on_device(relu_backward, empty, bits, Rectify.GUIDED, 0.0, empty)


# max_pool_forward, max_pool_backward

# Kernel, stride, padding, dilation, ceil mode.
POOLS = {
    "halving": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlapping": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "dense": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "uneven": ((2, 3), (1, 2), (1, 0), (1, 1), False),
    "dilated": ((3, 2), (2, 1), (1, 1), (2, 3), False),
    "skipping": ((1, 2), (3, 4), (0, 0), (1, 1), False),
    "largest": ((16, 16), (8, 9), (8, 8), (1, 1), False),
}
every_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=case_id)


def pooled(input, pool, layout):
    """Output and offsets of both, which must be the same, and the geometry."""
    *geometry, ceil = POOLS[pool]
    geometry = [list(values) for values in geometry]
    size = torch.nn.functional.max_pool2d(input, *geometry, ceil).shape
    output = torch.full(size, 77, dtype=input.dtype).contiguous(memory_format=layout)
    offsets = torch.full(size, 77, dtype=torch.uint8).contiguous(memory_format=layout)
    expected = output.clone(), offsets.clone()
    on_device(max_pool_forward, input, *geometry, output, offsets)
    reference_max_pool_forward(input, *geometry, *expected)
    assert_same(output, expected[0])
    assert torch.equal(offsets, expected[1])
    return output, offsets, geometry


def assert_pooled_as_reference(input, pool, layout, targets=2):
    output, offsets, geometry = pooled(input, pool, layout)
    # Whole numbers: sums are exact in any order and any dtype.
    grad = torch.randint(-8, 9, (targets * len(output), *output.shape[1:])).to(input.dtype)
    grad = grad.contiguous(memory_format=layout)
    out = torch.full((len(grad), *input.shape[1:]), 77, dtype=input.dtype).contiguous(memory_format=layout)
    expected = out.clone()
    on_device(max_pool_backward, grad, offsets, *geometry, out)
    reference_max_pool_backward(grad, offsets, *geometry, expected)
    assert torch.equal(out, expected)


@every_layout
@pytest.mark.parametrize("pool", POOLS)
def test_max_pool(pool, layout):
    # Few values: windows with several maxima, of which the first wins.
    assert_pooled_as_reference(
        torch.randint(-3, 4, (2, 3, 9, 11)).float().contiguous(memory_format=layout), pool, layout
    )


@every_dtype
@every_layout
def test_max_pool_dtypes(dtype, layout):
    input = torch.randint(-3, 4, (2, 5, 6, 7)).to(dtype).contiguous(memory_format=layout)
    assert_pooled_as_reference(input, "overlapping", layout)


@every_layout
@pytest.mark.parametrize("size", [(1, 700, 3, 4), (1, 3, 3, 700), (2, 40, 5, 33), (1, 1, 1, 1)], ids=case_id)
def test_max_pool_more_than_a_tile(size, layout):
    # Up to 512 places a program, 256 of them along the innermost dimension.
    assert_pooled_as_reference(torch.randn(size).contiguous(memory_format=layout), "dense", layout, targets=1)


@every_layout
def test_max_pool_special_values(layout):
    input = torch.full((1, 2, 4, 4), -math.inf).contiguous(memory_format=layout)
    input[0, 1, 1, 0] = input[0, 1, 1, 1] = math.nan
    input[0, 1, 0, 3], input[0, 1, 1, 2] = math.inf, -0.0
    pooled(input, "halving", layout)


def test_max_pool_any_strides():
    input = torch.randn(2, 6, 12, 10)[:, ::2, 1:-1, ::2]
    pooled(input, "overlapping", torch.channels_last)


def test_max_pool_sums_windows_in_their_order():
    # Every window of the middle is won by the same element; in another order the ones would be lost beside 2 ** 24.
    input, offsets = torch.zeros(1, 1, 3, 3), torch.tensor([[[[8, 7, 6], [5, 4, 3], [2, 1, 0]]]], dtype=torch.uint8)
    grad = torch.tensor([[[[2.0**24, -(2.0**24), 1.0], [1.0, 2.0**24, -(2.0**24)], [1.0, 1.0, 1.0]]]])
    on_device(max_pool_backward, grad, offsets, [3, 3], [1, 1], [1, 1], [1, 1], input)
    total = np.float32(0)
    for item in grad.flatten().numpy():
        total += item
    assert input[0, 0, 1, 1] == float(total)
    assert input.count_nonzero() == 1


def test_max_pool_nothing():
    geometry = ([2, 2], [2, 2], [0, 0], [1, 1])
    images, output, offsets = torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2).byte()
    on_device(max_pool_forward, images, *geometry, output, offsets)
    on_device(max_pool_backward, output, offsets, *geometry, images)
    # A gradient without windows is zero everywhere.
    out = torch.ones(2, 3, 1, 1)
    on_device(max_pool_backward, torch.ones(2, 3, 0, 0), torch.ones(2, 3, 0, 0).byte(), *geometry, out)
    assert not out.any()


# response_argmax


def assert_folded_as_reference(responses, classes):
    wide = torch.promote_types(responses.dtype, torch.float32)
    _, images, _, height, width = responses.shape
    folded, expected = (
        (torch.full((images, height, width), -math.inf, dtype=wide), torch.full((images, height, width), -1))
        for _ in range(2)
    )
    reference_response_argmax(responses, classes, *expected)
    # Also a few classes at a time.
    for part, names in zip(responses.split(3), classes.split(3), strict=True):
        on_device(response_argmax, part, names, *folded)
    for result, same in zip(folded, expected, strict=True):
        assert torch.equal(result, same)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 2, 3, 4, 7), (4, 3, 6, 17, 19), (2, 1, 0, 2, 2)], ids=case_id)
def test_response_argmax(dtype, shape):
    assert_folded_as_reference(torch.randint(-2, 3, shape).to(dtype), torch.randint(-2, 6, shape[:2]))


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
        lambda t: t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t[:, :, :1].expand(t.shape),
        lambda t: t[..., :1],
    ],
    ids=["channels_last", "reversed", "step", "expanded", "column"],
)
def test_response_argmax_any_strides(layout):
    responses = layout(torch.randint(-2, 3, (4, 2, 3, 9, 13)).float())
    assert_folded_as_reference(responses, torch.randint(-2, 6, (2, 4)).T)


def test_response_argmax_nan_and_minus_infinity_never_win():
    values = torch.tensor([[math.nan, -math.inf, math.inf], [1.0, -math.inf, 2.0], [math.nan, math.nan, math.inf]])
    assert_folded_as_reference(values.view(3, 1, 1, 1, 3), torch.tensor([[0], [1], [2]]))


def test_response_argmax_sums_channels_in_their_order():
    # In another order, or with partial sums, the ones would not be lost beside 2 ** 24.
    channels = torch.tensor([2.0**24, 1.0, 1.0, 1.0, 1.0, -(2.0**24), 3.0])
    assert_folded_as_reference(channels.view(1, 1, 7, 1, 1).expand(1, 1, 7, 4, 40), torch.tensor([[0]]))


# leading_singular

every_method = pytest.mark.parametrize("method", [Solver.GRAM, Solver.SUBSPACE], ids=lambda method: method.name)


def decaying(batch, rows, columns, dtype=torch.float32, base=0.5):
    """Matrices with singular values 10, 10 * base, 10 * base^2, ..."""
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(batch, rows, small, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(batch, columns, small, dtype=torch.float64)).Q
    return ((left * 10 * base ** torch.arange(small, dtype=torch.float64)) @ right.mT).to(dtype)


def triplets(matrices, k, method):
    """Call both, and check order, sign rule, and that the residual is small and what it claims to be."""
    result = on_device(leading_singular, matrices, k, method, 1, 0)
    expected = reference_leading_singular(matrices, k, method, 1, 0)
    for part, model in zip(result, expected, strict=True):
        assert (part.shape, part.dtype) == (model.shape, model.dtype)
        assert part.isfinite().all()
    left, singular, right, residual = (part.double() for part in result)
    assert (singular[:, :-1] >= singular[:, 1:]).all()
    assert (left.sum(1) >= -1e-5).all()
    exact = matrices.double()
    error = torch.maximum(
        (exact.mT @ left - right * singular[:, None]).norm(dim=1),
        (exact @ right - left * singular[:, None]).norm(dim=1),
    )
    largest = singular[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    torch.testing.assert_close(residual, error / largest, rtol=1e-3, atol=1e-5)
    assert (residual <= 1e-5).all()
    return result, expected


def assert_orthonormal(vectors):
    """But for vectors of zeros, which go with singular values of zero."""
    identity = torch.diag_embed(vectors.ne(0).any(1).to(vectors.dtype))
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "method", "k"),
    [
        # A small side this small is never replaced by a subspace.
        ((2, 4, 9), Solver.SUBSPACE, 3),
        ((1, 7, 7), Solver.AUTO, 1),
        ((1, 31, 70), Solver.GRAM, 1),
        pytest.param((1, 69, 33), Solver.GRAM, 3, marks=pytest.mark.extended),
        ((1, 31, 70), Solver.SUBSPACE, 3),
        pytest.param((1, 69, 33), Solver.SUBSPACE, 1, marks=pytest.mark.extended),
    ],
)
def test_leading_singular_agrees_with_a_full_svd(shape, method, k):
    (left, singular, right, _), expected = triplets(decaying(*shape), k, method)
    scale = float(expected[1].max())
    torch.testing.assert_close(singular, expected[1], rtol=1e-5, atol=1e-6 * scale)
    for vectors, same in ((left, expected[0]), (right, expected[2])):
        assert_orthonormal(vectors)
        # Small values leave their vectors less certain.
        torch.testing.assert_close(vectors * singular[:, None], same * expected[1][:, None], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=case_id)
def test_leading_singular_half_precision(dtype):
    triplets(decaying(1, 20, 30, dtype), 2, Solver.GRAM)


@pytest.mark.extended
def test_leading_singular_float64_in_a_subspace():
    assert (triplets(decaying(1, 20, 30, torch.float64), 1, Solver.SUBSPACE)[0][3] < 1e-9).all()


def test_leading_singular_float64_is_not_computed_in_float32():
    (_, singular, _, residual), expected = triplets(decaying(1, 20, 30, torch.float64), 2, Solver.GRAM)
    torch.testing.assert_close(singular, expected[1], rtol=1e-12, atol=0)
    assert (residual < 1e-12).all()


def test_leading_singular_is_exact_without_a_gap():
    # The gap of random matrices is small, and the iteration long.
    (_, singular, _, residual), expected = triplets(torch.randn(1, 24, 30), 2, Solver.GRAM)
    torch.testing.assert_close(singular, expected[1], rtol=1e-5, atol=0)
    assert (residual < 1e-5).all()


@pytest.mark.parametrize(
    ("shape", "method"), [((31, 50), Solver.GRAM), ((31, 50), Solver.SUBSPACE), ((3, 4), Solver.GRAM)]
)
def test_leading_singular_rank_one(shape, method):
    matrices = 5 * torch.rand(1, shape[0], 1) @ torch.rand(1, 1, shape[1])
    (left, singular, right, _), _ = triplets(matrices, 3, method)
    torch.testing.assert_close((left[:, :, :1] * singular[:, None, :1]) @ right[:, :, :1].mT, matrices)
    assert (singular[:, 1:] <= 1e-5 * singular[:, :1]).all()
    assert_orthonormal(left)
    assert_orthonormal(right)


@every_method
def test_leading_singular_a_zero_matrix_leaves_the_others_alone(method):
    matrices = decaying(2, 20, 30)
    matrices[0] = 0
    (left, singular, right, residual), expected = triplets(matrices, 1, method)
    for part in (left, singular, right, residual):
        assert not part[0].any()
    torch.testing.assert_close(singular, expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(left[1], expected[0][1], rtol=1e-4, atol=1e-5)


def test_leading_singular_any_strides():
    matrices = decaying(1, 20, 30)
    for same in (matrices.mT.contiguous().mT, matrices.repeat_interleave(2, 2)[:, :, ::2]):
        for part, expected in zip(*triplets(same, 2, Solver.GRAM), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-38, pytest.param(1e-30, marks=pytest.mark.extended), 1e25], ids=case_id)
def test_leading_singular_squares_neither_overflow_nor_vanish(scale):
    _, singular, _, residual = on_device(leading_singular, decaying(1, 20, 30) * scale, 2, Solver.GRAM, 4, 0)
    torch.testing.assert_close(singular, torch.tensor([[10 * scale, 5 * scale]]), rtol=1e-5, atol=0)
    assert (residual < 1e-5).all()


@pytest.mark.parametrize("k", [pytest.param(10, marks=pytest.mark.extended), 30])
def test_leading_singular_many_triplets(k):
    # 10 take a basis of 32 vectors; 30 are more than the kernel holds and go to a full decomposition.
    (_, singular, _, _), expected = triplets(decaying(1, 33, 40, base=0.7), k, Solver.GRAM)
    torch.testing.assert_close(singular, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.extended
def test_leading_singular_passes_of_the_subspace_iteration_help():
    matrices = decaying(1, 30, 40, base=0.9)
    few, many = (on_device(leading_singular, matrices, 1, Solver.SUBSPACE, passes, 0)[3].item() for passes in (0, 1))
    assert many < few


def test_leading_singular_deterministic_for_a_seed():
    matrices = torch.randn(1, 20, 30)
    state = torch.get_rng_state()
    first, second, other = (on_device(leading_singular, matrices, 1, Solver.SUBSPACE, 0, seed) for seed in (7, 7, -2))
    assert torch.equal(torch.get_rng_state(), state)
    for part, same in zip(first, second, strict=True):
        assert torch.equal(part, same)
    assert not torch.equal(first[1], other[1])


def test_leading_singular_no_matrices():
    left, singular, right, residual = on_device(leading_singular, torch.zeros(0, 20, 30), 2, Solver.AUTO, 4, 0)
    assert (left.shape, singular.shape, right.shape, residual.shape) == ((0, 20, 2), (0, 2), (0, 30, 2), (0, 2))


# The order of programs


@triton.jit
def _racing_kernel(counts_ptr):
    tl.store(counts_ptr, tl.load(counts_ptr) + 1)


@triton.jit
def _waiting_kernel(out_ptr):
    # Reads what the program before has written: right as long as programs run one after another.
    before = tl.load(out_ptr + tl.program_id(0))
    tl.store(out_ptr + tl.program_id(0) + 1, before + 1)


interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="a device has its own order")
ORDERS = ["shuffled", "interleaved"]


@interpreted
def test_an_order_shows_what_hangs_on_it():
    counts, numbers = torch.zeros(1, dtype=torch.int32), torch.zeros(21, dtype=torch.int32)
    _racing_kernel[(20,)](counts)
    _waiting_kernel[(20,)](numbers)
    assert (counts.item(), numbers[-1].item()) == (20, 20)
    numbers.zero_()
    with triton_programs.in_order("shuffled", 0):
        _waiting_kernel[(20,)](numbers)
    assert numbers[-1] < 20
    counts.zero_()
    with triton_programs.in_order("interleaved", 0):
        _racing_kernel[(20,)](counts)
    assert counts < 20


def programs_of_many():
    """A call of each op, of several programs."""
    points = torch.randint(0, 2 * 40 * 50, (700,))
    yield point_density, (points, 2, 40, 50, 1.5)
    yield points_union, (points, 2 * 40 * 50, 4000)
    yield sign_bits_kernel, (torch.randn(5, 300),)
    rows, weight = torch.randn(3, 2100), torch.randn(40, 2100)
    yield linear_trace, (rows, *sign_bits(weight), torch.arange(0, 120, 7), torch.rand(18) < 0.5, None)
    yield leading_singular, (decaying(2, 40, 36, base=0.01), 1, Solver.GRAM, 0, 0)
    input, weight, places, geometry = convolution("2d-uneven")
    yield conv_trace, (input, weight, places, None, *geometry, Location.PRODUCT)
    image, pool = torch.randn(2, 3, 20, 20), ([3, 3], [2, 2], [1, 1], [1, 1])
    yield relu_forward, (torch.randn(2, 3, 70, 70), math.inf, None, False, torch.zeros(2, 3, 70, 70))
    yield relu_backward, (torch.randn(2, 1000), None, Rectify.DECONVNET, 0.0, torch.zeros(2, 1000))
    pooled, offsets = torch.zeros(2, 3, 10, 10), torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    yield max_pool_forward, (image, *pool, pooled.clone(), offsets.clone())
    reference_max_pool_forward(image, *pool, pooled, offsets)
    yield max_pool_backward, (torch.randn(pooled.shape), offsets, *pool, image)
    winner = torch.full((2, 40, 30), -1)
    classes, best = torch.arange(6).view(3, 2), torch.full((2, 40, 30), -math.inf)
    yield response_argmax, (torch.randn(3, 2, 3, 40, 30), classes, best, winner)


@interpreted
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", sorted({case[0].__name__ for case in programs_of_many()}))
def test_any_order_of_programs_gives_the_same(kernel, order):
    def tensors(kernel, arguments):
        """What a kernel returned and wrote to."""
        own = [part.clone() if isinstance(part, torch.Tensor) else part for part in arguments]
        result = kernel(*own)
        return [part for part in (*(result if isinstance(result, tuple) else [result]), *own) if torch.is_tensor(part)]

    for case in programs_of_many():
        if case[0].__name__ == kernel:
            expected = tensors(*case)
            with triton_programs.in_order(order, seed=1):
                found = tensors(*case)
            assert all(map(torch.equal, found, expected))


# All


def bad_arguments():
    image, points, bits = torch.ones(2, 4, 5, 5), torch.tensor([0, 299]), torch.zeros(3, 2, dtype=torch.int64)
    geometry = ([5, 5], [1, 1], [1, 1], [1, 1], 2)
    weight, rows, gradients = torch.ones(6, 2, 3, 3), torch.ones(2, 70), torch.ones(2, 20)
    responses, classes = torch.ones(3, 2, 4, 5, 6), torch.ones(3, 2, dtype=torch.int64)
    best, winner = torch.ones(2, 5, 6), torch.ones(2, 5, 6, dtype=torch.int64)
    yield conv_trace, reference_conv_trace, (image, weight, points, torch.tensor([1, 0]), *geometry, 0)
    yield conv_trace, reference_conv_trace, (image.int(), weight.int(), points, None, *geometry, 0)
    yield linear_trace, reference_linear_trace, (rows, bits, bits[:2], torch.tensor([0]), None)
    yield linear_trace, reference_linear_trace, (rows, bits, bits, torch.tensor([0]), None, -1)
    yield point_density, reference_point_density, (torch.tensor([1]), 2, 5, 7, math.nan)
    yield relu_forward, reference_relu_forward, (rows, 0.0, None, False, rows)
    yield relu_forward, reference_relu_forward, (rows, 6.0, None, True, rows)
    yield relu_backward, reference_relu_backward, (gradients, None, 2, 0.0, gradients)
    yield relu_backward, reference_relu_backward, (gradients, bits[0], 0, 0.0, gradients)
    pool = ([2, 2], [2, 2], [0, 0], [1, 1])
    output, offsets = torch.ones(2, 4, 2, 2), torch.ones(2, 4, 2, 2, dtype=torch.uint8)
    yield max_pool_forward, reference_max_pool_forward, (image, *pool, output.double(), offsets)
    yield max_pool_forward, reference_max_pool_forward, (image, [17, 16], *pool[1:], output, offsets)
    yield max_pool_backward, reference_max_pool_backward, (output, offsets.long(), *pool, image)
    yield response_argmax, reference_response_argmax, (responses.double(), classes, best, winner)
    yield response_argmax, reference_response_argmax, (responses, classes, best.mT, winner)
    yield leading_singular, reference_leading_singular, (rows[None], 3, 0, 4, 0)
    yield leading_singular, reference_leading_singular, (rows, 1, 0, 4, 0)
    if DEVICE == "cpu":  # a device asserts what values are, and does not survive it
        yield conv_trace, reference_conv_trace, (image, weight, points + 1, None, *geometry, 0)
        yield linear_trace, reference_linear_trace, (rows, bits, bits, torch.tensor([6]), None)
        full = torch.full_like(bits, -1)
        yield linear_trace, reference_linear_trace, (rows, full, full, torch.tensor([0, 3]), None, 139)
        yield point_density, reference_point_density, (torch.tensor([70]), 2, 5, 7, 2.0)


@pytest.mark.parametrize(
    ("kernel", "reference", "arguments"), [pytest.param(*case, id=case[0].__name__) for case in bad_arguments()]
)
def test_errors_are_the_same_sentences(kernel, reference, arguments):
    with pytest.raises(RuntimeError) as expected:
        reference(*arguments)
    with pytest.raises(RuntimeError) as raised:
        on_device(kernel, *arguments)
    assert str(raised.value) == str(expected.value)
