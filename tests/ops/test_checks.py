"""Arguments that would read or write outside are refused, by every backend in the same sentence."""

import ast
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from import_file import import_file
from torch._subclasses.fake_tensor import FakeTensorMode

from pyfast_xai import ops
from pyfast_xai.kernels import checks
from pyfast_xai.ops.registry import BINARIES, OPS

CSRC = Path(__file__).parents[2] / "csrc"
EXAMPLES = int(os.environ.get("PYFAST_XAI_EXAMPLES", "25"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Errors that depend on values, which are not known while an op is traced.
OF_VALUES = ("points must lie in", "offsets must name a tap", "the points found")
# The C++ pools alone ask for one of two memory formats.
OF_LAYOUT = "input, output and offsets of a pool must be all contiguous or all channels_last, got others"
needs_cpp = pytest.mark.skipif(not BINARIES["cpp"], reason="the compiled library is not part of this installation")


def copied(arguments):
    """Tensors of the same values and strides, of which no element shares memory with the originals."""
    return [copy_of(value) if isinstance(value, torch.Tensor) else value for value in arguments]


def copy_of(tensor):
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = tensor.as_strided((span if tensor.numel() else 0,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride(), 0)


def sentence(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def pool_backward(**changes):
    arguments = {
        "grad": torch.ones(4, 3, 4, 4),
        "offsets": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        **{"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1]},
        "out": torch.zeros(4, 3, 8, 8),
    }
    return list((arguments | changes).values())


def pool_forward(**changes):
    arguments = {
        "input": torch.ones(2, 3, 8, 8),
        **{"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1]},
        "output": torch.zeros(2, 3, 4, 4),
        "offsets": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
    }
    return list((arguments | changes).values())


def conv(**changes):
    arguments = {
        "input": torch.ones(2, 4, 5, 5),
        "weight": torch.ones(6, 2, 3, 3),
        "points": torch.tensor([0, 299]),
        "negative": None,
        **{"output_size": [5, 5], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2, "location": 0},
    }
    return list((arguments | changes).values())


def linear(**changes):
    bits = torch.zeros(3, 2, dtype=torch.int64)
    arguments = {
        "input": torch.ones(2, 70),
        "weight_positive": bits,
        "weight_negative": bits,
        "points": torch.tensor([0, 5]),
        "negative": None,
        "capacity": None,
    }
    return list((arguments | changes).values())


def winograd(**changes):
    arguments = {
        "input": torch.ones(1, 16, 8, 8).contiguous(memory_format=torch.channels_last),
        "weight": torch.ones(36, 1, 16, 16),
        **{"bias": None, "padding": [1, 1], "lower": -math.inf, "upper": math.inf},
    }
    return list((arguments | changes).values())


def offsets_with(value, *place):
    offsets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    offsets[place] = value
    return offsets


REFUSED = {
    "max_pool_backward: no such tap": (
        pool_backward(offsets=offsets_with(4, 1, 2, 3, 3)),
        r"offsets must name a tap of their window of [2, 2] inside out of shape [4, 3, 8, 8], got 4",
    ),
    "max_pool_backward: a tap above": (
        pool_backward(padding=[1, 0], offsets=torch.full((2, 3, 4, 4), 1, dtype=torch.uint8)),
        "offsets must name a tap of their window of [2, 2] inside out of shape [4, 3, 8, 8], got 1",
    ),
    "max_pool_backward: a tap below": (
        pool_backward(stride=[2, 2], kernel=[3, 2], offsets=offsets_with(4, 0, 1, 3, 2)),
        "offsets must name a tap of their window of [3, 2] inside out of shape [4, 3, 8, 8], got 4",
    ),
    "max_pool_backward: a tap to the right": (
        pool_backward(kernel=[2, 3], offsets=offsets_with(2, 0, 1, 2, 3)),
        "offsets must name a tap of their window of [2, 3] inside out of shape [4, 3, 8, 8], got 2",
    ),
    "max_pool_backward: a stride of 2**62": (
        pool_backward(stride=[2**62, 1]),
        "stride must be 2 numbers of at least 1 and less than 2**31, got [4611686018427387904, 1]",
    ),
    "max_pool_backward: no offsets": (
        pool_backward(offsets=torch.zeros(0, 3, 4, 4, dtype=torch.uint8)),
        "offsets must have shape [N, 3, 4, 4] with N a divisor of 4, got [0, 3, 4, 4]",
    ),
    "max_pool_backward: windows outside": (
        pool_backward(stride=[3, 2]),
        "grad must have windows inside the input, got [4, 3, 4, 4] for [4, 3, 8, 8]",
    ),
    "max_pool_forward: taps whose number wraps around": (
        pool_forward(kernel=[2**32, 2**32]),
        "kernel must be 2 numbers of at least 1 and less than 2**31, got [4294967296, 4294967296]",
    ),
    "max_pool_forward: many taps": (
        pool_forward(kernel=[2**31 - 1, 2]),
        "kernel must have at most 256 taps, which a byte can tell apart, got 4294967294",
    ),
    "max_pool_forward: padding that no window leaves": (
        pool_forward(padding=[2, 0]),
        "output must have windows inside the input, got [2, 3, 4, 4] for [2, 3, 8, 8]",
    ),
    # The first and the last window hold an element, those between step over all of them.
    "max_pool_forward: windows around the input": (
        pool_forward(
            input=torch.ones(2, 3, 1, 8),
            output=torch.ones(2, 3, 6, 4),
            offsets=torch.ones(2, 3, 6, 4).byte(),
            stride=[1, 2],
            padding=[5, 0],
            dilation=[5, 1],
        ),
        "output must have windows inside the input, got [2, 3, 6, 4] for [2, 3, 1, 8]",
    ),
    "max_pool_forward: a dilation of 2**63 - 1": (
        pool_forward(dilation=[2**63 - 1, 1]),
        "dilation must be 2 numbers of at least 1 and less than 2**31, got [9223372036854775807, 1]",
    ),
    "conv_trace: a point beyond": (
        conv(points=torch.tensor([7, 300])),
        "points must lie in [0, 300) or be -1, got 300",
    ),
    "conv_trace: a point before": (conv(points=torch.tensor([-2, 3])), "points must lie in [0, 300) or be -1, got -2"),
    "conv_trace: an output whose size wraps around": (
        conv(output_size=[2**31 - 1, 2**31 - 1], points=torch.tensor([2**62])),
        "points must lie among fewer than 2**63 places, got sizes whose product is larger",
    ),
    "conv_trace: groups whose product wraps around": (
        conv(groups=2**63 - 1),
        "weight must have shape [O, 4 / 9223372036854775807, *kernel] with O a multiple of 9223372036854775807,"
        " got [6, 2, 3, 3]",
    ),
    "conv_trace: padding of 2**62": (
        conv(padding=[2**62, 0]),
        "padding must be 2 numbers of at least 0 and less than 2**31, got [4611686018427387904, 0]",
    ),
    "conv_trace: a weight without taps": (
        conv(weight=torch.ones(6, 2, 3, 0)),
        "input and weight must not be empty where there are points, got shapes [2, 4, 5, 5] and [6, 2, 3, 0]",
    ),
    "linear_trace: a point beyond": (linear(points=torch.tensor([6])), "points must lie in [0, 6) or be -1, got 6"),
    "linear_trace: another number of neurons": (
        linear(weight_negative=torch.zeros(2, 2, dtype=torch.int64)),
        "weight_negative must have shape [3, 2] as weight_positive has, got [2, 2]",
    ),
    "linear_trace: a capacity of 2**62": (
        linear(capacity=2**62),
        "capacity must be at least 0 and less than 2**60, got 4611686018427387904",
    ),
    "points_union: a negative size": ([torch.tensor([-1, -1]), -100, None], "size must not be negative, got -100"),
    "points_union: the last place and one more": (
        [torch.tensor([2**63 - 1, 0]), 2**63 - 1, None],
        "points must lie in [0, 9223372036854775807) or be -1, got 9223372036854775807",
    ),
    "point_density: sizes whose product wraps around": (
        [torch.tensor([0]), 2**32, 2**32, 2, 1.0],
        "images must have fewer than 2**61 pixels in all, got 4294967296 of 4294967296 x 2",
    ),
    "point_density: no point": ([torch.tensor([-1]), 1, 4, 4, 1.0], "points must lie in [0, 16), got -1"),
    "relu_forward: another shape": (
        [torch.ones(4, 6), 6.0, None, False, torch.ones(4, 5)],
        "out must have shape [4, 6] as input has, got [4, 5]",
    ),
    "relu_backward: few bits": (
        [torch.ones(2, 20), torch.zeros(2, dtype=torch.uint8), 0, 0.0, torch.ones(2, 20)],
        "bits must have shape [3], one bit for each of 20 elements, got [2]",
    ),
    "response_argmax: a small map": (
        [torch.ones(3, 2, 4, 5, 6), torch.ones(3, 2).long(), torch.ones(2, 5, 5), torch.ones(2, 5, 6).long()],
        "best must have shape [2, 5, 6], got [2, 5, 5]",
    ),
    "leading_singular: a k of 2**62": (
        [torch.ones(1, 4, 4), 2**62, 0, 4, 0],
        "k must lie in [1, min(M, N)] for matrices of shape [1, 4, 4], got 4611686018427387904",
    ),
    "sign_bits: a vector": ([torch.ones(4)], "weight must have shape [O, I], got [4]"),
    "winograd_conv2d: no channels": (
        winograd(input=torch.ones(1, 0, 8, 8), weight=torch.ones(36, 1, 0, 16)),
        "input must have shape [N, I, H, W] with I a multiple of 16, got [1, 0, 8, 8]",
    ),
    "winograd_conv2d: no filters": (
        winograd(weight=torch.ones(36, 0, 16, 16)),
        "weight must have shape [36, O / 16, 16, 16], got [36, 0, 16, 16]",
    ),
    "winograd_conv2d: padding of 2**62": (
        winograd(padding=[2**62, 2**62]),
        "padding must be 2 numbers of at least 0 and less than 2**31, got [4611686018427387904, 4611686018427387904]",
    ),
    "winograd_conv2d: an output that wraps around": (
        winograd(padding=[2**31 - 1, 2**31 - 1]),
        "input must have an output of fewer than 2**61 elements, got [1, 16, 8, 8] padded by [2147483647, 2147483647]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_sentence(backend, name):
    arguments, expected = REFUSED[name]
    op = OPS[name.split(":")[0]]
    if missing := op.missing(backend, "cpu"):
        pytest.skip(f"{op.name} on {backend}: {missing}")
    assert sentence(op, *copied(arguments)) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_where_torch_calls_it(name):
    arguments, expected = REFUSED[name]
    assert sentence(getattr(torch.ops.pyfast_xai, name.split(":")[0]), *copied(arguments)) == expected


def traced(op, arguments):
    """What an op says of tensors that have no values."""
    with FakeTensorMode() as mode:
        return sentence(op, *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_while_it_is_traced(name):
    arguments, expected = REFUSED[name]
    if not any(part in expected for part in OF_VALUES):
        assert traced(OPS[name.split(":")[0]].overload, copied(arguments)) == expected


def test_refused_offsets_leave_the_result_as_it_was(backend):
    arguments = pool_backward(offsets=offsets_with(255, 1, 2, 0, 0), out=torch.full((4, 3, 8, 8), 7.0))
    assert sentence(OPS["max_pool_backward"], *arguments) is not None
    assert (arguments[-1] == 7).all()


def test_offsets_of_a_pool_are_always_taken(backend):
    """Every geometry that the forward takes, the backward takes with its offsets."""
    for kernel, stride, padding, dilation in ((3, 2, 1, 1), (2, 1, 1, 3), (3, 1, 2, 2), (1, 3, 0, 1), (2, 2, 1, 1)):
        for size in (1, 2, 3, 7):
            geometry = ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
            windows = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            if windows < 1:
                continue
            input, offsets = torch.randn(1, 2, size, 3), torch.zeros(1, 2, windows, 3, dtype=torch.uint8)
            output = torch.zeros(1, 2, windows, 3)
            if sentence(OPS["max_pool_forward"], input, *map(list, geometry), output, offsets) is None:
                ops.max_pool_backward(output[None], offsets, (size, 3), *geometry)


# Drawn arguments: those of the reference's geometry first, then one or two of them replaced by hostile ones.

HOSTILE = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
small = st.integers(0, 5)
positive = st.integers(1, 4)


def numbers(lowest, highest, count=2):
    return st.lists(st.integers(lowest, highest), min_size=count, max_size=count)


@st.composite
def tensors(draw, shape, dtype, low=-3, high=3):
    """Whole numbers in memory of any order: dense, permuted, with gaps, at an offset, or with strides of zero."""
    shape = tuple(shape)
    layout = draw(st.sampled_from(["dense", "dense", "dense", "permuted", "gaps", "offset", "expanded"]))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randint(low, high + 1, shape, generator=seed)
    values = values.bool() if dtype == torch.bool else values.to(dtype)
    if layout == "permuted" and len(shape) > 1:
        order = draw(st.permutations(range(len(shape))))
        back = [order.index(d) for d in range(len(shape))]
        return values.permute(order).contiguous().permute(back)
    if layout == "gaps" and shape:
        return torch.stack([values, values], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([values.flatten()[:1], values.flatten()])[-values.numel() or 1 :].view(shape)
    if layout == "expanded" and shape and shape[0]:
        return values[:1].expand(shape)
    return values


@st.composite
def dense(draw, shape, dtype, low=-3, high=3, channels_last=False):
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randint(low, high + 1, tuple(shape), generator=seed).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


@st.composite
def pools(draw, backward):
    kernel = draw(numbers(1, 4) | st.sampled_from([[16, 16], [1, 256], [256, 1]]))
    stride, dilation = draw(numbers(1, 3)), draw(numbers(1, 3))
    padding = [draw(st.integers(0, (k - 1) * d)) for k, d in zip(kernel, dilation, strict=True)]
    size, windows = [draw(st.integers(1, 9)) for _ in range(2)], []
    for d in range(2):
        windows.append(draw(st.integers(1, max(1, (size[d] - 1 + padding[d]) // stride[d] + 1))))
    images, channels, last = draw(positive), draw(st.sampled_from([1, 2, 3, 65])), draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    targets = images * draw(st.integers(1, 2)) if backward else images
    map = draw(dense((targets, channels, *size), dtype, channels_last=last))
    pooled = draw(dense((targets, channels, *windows), dtype, channels_last=last))
    offsets = torch.zeros(images, channels, *windows, dtype=torch.uint8)
    offsets = offsets.contiguous(memory_format=torch.channels_last) if last else offsets
    geometry = [kernel, stride, padding, dilation]
    if not backward:
        return [map, *geometry, pooled, offsets]
    if draw(st.booleans()):
        offsets.random_(0, math.prod(kernel), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    else:
        sentence(OPS["max_pool_forward"], map[:images], *geometry, pooled[:images].clone(), offsets)
    return [pooled, offsets, *geometry, map]


@st.composite
def convolutions(draw):
    rank, groups, dtype = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from(DTYPES))
    channels, filters = groups * draw(st.sampled_from([1, 2, 33])), groups * draw(positive)
    images, output = draw(positive), draw(numbers(1, 4, rank))
    input = draw(tensors((images, channels, *draw(numbers(1, 5, rank))), dtype))
    weight = draw(tensors((filters, channels // groups, *draw(numbers(1, 3, rank))), dtype))
    places = images * filters * math.prod(output)
    points = torch.tensor(draw(st.lists(st.integers(-1, places - 1), max_size=40)), dtype=torch.int64)
    negative = draw(st.none() | tensors(points.shape, torch.bool, 0, 1))
    geometry = [output, draw(numbers(1, 4, rank)), draw(numbers(0, 4, rank)), draw(numbers(1, 3, rank))]
    return [input, weight, points, negative, *geometry, groups, draw(st.integers(0, 3))]


@st.composite
def layers(draw):
    rows, features, outputs = draw(positive), draw(st.sampled_from([0, 1, 63, 64, 65, 200, 2100])), draw(positive)
    words = (features + 63) // 64
    bits = [draw(tensors((outputs, words), torch.int64, -(2**62), 2**62)) for _ in range(2)]
    points = torch.tensor(draw(st.lists(st.integers(-1, rows * outputs - 1), max_size=20)), dtype=torch.int64)
    negative = draw(st.none() | tensors(points.shape, torch.bool, 0, 1))
    input = draw(tensors((rows, features), draw(st.sampled_from(DTYPES))))
    return [input, *bits, points, negative, draw(st.none() | st.just(rows * features) | small)]


@st.composite
def unions(draw):
    size = draw(st.sampled_from([0, 1, 64, 1000, 2**40, 2**63 - 1]))
    points = torch.tensor(draw(st.lists(st.integers(-1, size - 1), max_size=40)), dtype=torch.int64)
    return [points, size, draw(st.none() | st.just(len(points)) | small)]


@st.composite
def densities(draw):
    images, height, width = draw(small), draw(st.integers(0, 40)), draw(st.integers(0, 40))
    places = images * height * width
    points = draw(st.lists(st.integers(0, places - 1), max_size=40)) if places else []
    return [torch.tensor(points, dtype=torch.int64), images, height, width, draw(st.sampled_from([0.5, 3.0, 1e-200]))]


@st.composite
def rectifiers(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 9, 65]), max_size=3))
    input, bound = draw(dense(shape, dtype)), draw(st.none() | dense(shape, dtype))
    upper = draw(st.sampled_from([math.inf, 6.0, 1.0, 1e-300]))
    return [input * draw(st.sampled_from([1, -0.0])), upper, bound, bound is not None and draw(st.booleans()), input]


@st.composite
def rectified(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 9, 65]), min_size=1, max_size=3))
    size, rule = math.prod(shape[1:]), draw(st.integers(0, 2))
    bits = None if rule == 1 else draw(tensors(((size + 7) // 8,), torch.uint8, 0, 255))
    slope = draw(st.sampled_from([0.0, 0.5])) if rule == 0 else 0.0
    return [draw(dense(shape, dtype)), bits, rule, slope, torch.zeros(shape, dtype=dtype)]


@st.composite
def responses(draw):
    dtype, (count, images, height, width) = draw(st.sampled_from(DTYPES)), draw(numbers(0, 5, 4))
    wide = torch.promote_types(dtype, torch.float32)
    maps = draw(tensors((count, images, draw(positive), height, width * draw(st.sampled_from([1, 70]))), dtype))
    area = (images, *maps.shape[3:])
    classes = draw(tensors((count, images), torch.int64, -1, 9))
    return [maps, classes, torch.full(area, -math.inf, dtype=wide), torch.full(area, -1)]


@st.composite
def matrices(draw):
    batch, rows, columns = draw(st.integers(0, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    maps = draw(tensors((batch, rows, columns), draw(st.sampled_from(DTYPES))))
    k = draw(st.integers(1, min(rows, columns)))
    return [maps, k, draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.sampled_from(HOSTILE))]


@st.composite
def products(draw):
    channels, filters = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 48]))
    shape = (draw(st.integers(0, 2)), channels, draw(st.integers(3, 9)), draw(st.integers(3, 9)))
    weight = ops.winograd_weight(draw(dense((filters, channels, 3, 3), torch.float32)))
    bias = draw(st.none() | tensors((filters,), torch.float32))
    input = draw(dense(shape, torch.float32, channels_last=True))
    return [input, weight, bias, draw(numbers(0, 4)), draw(st.sampled_from([-math.inf, 0.0])), math.inf]


ARGUMENTS = {
    "conv_trace": convolutions(),
    "leading_singular": matrices(),
    "linear_trace": layers(),
    "max_pool_backward": pools(backward=True),
    "max_pool_forward": pools(backward=False),
    "point_density": densities(),
    "points_union": unions(),
    "relu_backward": rectified(),
    "relu_forward": rectifiers(),
    "response_argmax": responses(),
    "sign_bits": st.tuples(
        st.builds(lambda *size: size, small, st.sampled_from([0, 1, 64, 65, 200])).flatmap(
            lambda size: tensors(size, torch.float32)
        )
    ).map(list),
    "winograd_conv2d": products(),
}


@st.composite
def another(draw, value):
    """Something hostile of the same type."""
    if isinstance(value, torch.Tensor):
        way = draw(st.sampled_from(["values", "dtype", "shape", "strides"]))
        if way == "values" and value.dtype in (torch.int64, torch.uint8) and value.numel():
            low, high = (0, 255) if value.dtype == torch.uint8 else (-(2**63), 2**63 - 1)
            changed = value.clone()
            changed[tuple(draw(st.integers(0, size - 1)) for size in value.shape)] = draw(st.integers(low, high))
            return changed
        if way == "dtype":
            return value.to(draw(st.sampled_from([*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64])))
        if way == "shape":
            shape = [draw(st.sampled_from([size, size, size, 0, size + 1, 2 * size])) for size in value.shape]
            shape = draw(st.sampled_from([shape, shape[1:], [*shape, 1]]))
            return torch.zeros(shape, dtype=value.dtype)
        return draw(tensors(value.shape, value.dtype, 0, 3))
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return draw(st.sampled_from(HOSTILE))
    if isinstance(value, float):
        return draw(st.sampled_from([math.nan, -1.0, 0.0, -math.inf]))
    changed = list(value)
    if changed and draw(st.integers(0, 3)):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.sampled_from(HOSTILE))
        return changed
    return draw(st.sampled_from([changed[1:], [*changed, 1]]))


@st.composite
def hostile(draw, name):
    arguments = draw(ARGUMENTS[name])
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(arguments) - 1))
        # These numbers set the amount of work (passes of an iteration, size of the result): huge ones would run long.
        if (name, at) not in {("leading_singular", 3), ("point_density", 1), ("point_density", 2)}:
            arguments[at] = draw(another(arguments[at]))
    return arguments


def allocates(name, arguments):
    """Whether an op would be right to ask for more memory than there is."""
    if name == "winograd_conv2d":
        return len(arguments[3]) == 2 and max(arguments[3]) in range(256, 2**31)
    if name == "point_density":
        return max(arguments[1:4]) in range(256, 2**62)
    return name in ("points_union", "linear_trace") and (arguments[-1] or 0) in range(2**31 - 1, 2**60)


@needs_cpp
@pytest.mark.parametrize("name", OPS)
def test_cpp_says_what_python_says_and_does_what_the_reference_does(name):
    op = OPS[name]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(hostile(name))
    def agree(arguments):
        if allocates(name, arguments):
            return
        ours, theirs = copied(arguments), copied(arguments)
        message = sentence(getattr(checks, name), *copied(arguments))
        with ops.backend("cpp"):
            try:
                result = op(*ours)
            except RuntimeError as error:
                refused = str(error).splitlines()[0]
                assert refused in (message, OF_LAYOUT) or "the points found" in refused
                if message is not None and not any(part in message for part in OF_VALUES):
                    assert traced(op.overload, arguments) == message
                return
        assert message is None
        with ops.backend("reference"):
            expected = op(*theirs)
        if name == "leading_singular":
            # Vectors of equal values may be any, and the iteration is as good as its random start.
            exact = arguments[2] != ops.Solver.SUBSPACE
            result, expected = (part[1] if exact else torch.zeros_like(part[1]) for part in (result, expected))
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(ours, theirs, equal_nan=True)

    agree()


# The translation.


@pytest.fixture(scope="module")
def generate():
    return import_file(CSRC / "generate.py")


def test_every_op_has_one_check_with_the_arguments_of_its_schema():
    for op in OPS.values():
        parameters = getattr(checks, op.name).__code__.co_varnames[: len(op.overload._schema.arguments)]
        assert list(parameters) == [argument.name for argument in op.overload._schema.arguments]


def test_a_check_becomes_cpp(generate):
    source = (
        "def f(input: Tensor, bias: Tensor | None, k: int, sigma: float) -> None:\n"
        '    """Check."""\n'
        "    half = k // 2\n"
        "    for d in range(2):\n"
        "        if bias is not None and (not sigma > 0.0 or shape(bias)[d] >= 2**31) or half == len(Mode):\n"
        '            refuse(f"bias must be {half}, got {sigma:g}")\n'
    )
    assert generate.checks_header(source, {"Mode": [("A", 0), ("B", 1)]}).split("\n\n")[4] + "\n" == (
        "inline void f(const Tensor&, const std::optional<Tensor>& bias, Int k, double sigma) {\n"
        "  const auto half = quotient(k, Int(2));\n"
        "  for (int d = 0; d < 2; ++d) {\n"
        "    if (((bias.has_value() && (!(sigma > 0.0) || (shape((*bias))[d] >= Int::power_of_two(31))))"
        " || (half == Int(2)))) {\n"
        '      fail("bias must be ", half, ", got ", General{sigma});\n'
        "    }\n  }\n}\n"
    )


@pytest.mark.parametrize("line", ["while k: pass", "k = k / 2", "refuse(f'{k:>3}')", "k = [k]", "print(a=k)"])
def test_what_has_no_translation_is_named(generate, line):
    with pytest.raises(generate.TranslationError, match=r"line 2: .* has no translation to C\+\+"):
        generate.checks_header(f"def f(k: int) -> None:\n    {line}\n", {})


def test_the_words_of_the_checks_are_words_of_both_languages():
    cpp = (CSRC / "arguments.h").read_text()
    tree = ast.parse(Path(checks.__file__).read_text())
    words = next(n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module.endswith("arguments")).names
    for word in (name.name for name in words if name.name[0].islower() and name.name != "refuse"):
        assert f" {word}(" in cpp, word
