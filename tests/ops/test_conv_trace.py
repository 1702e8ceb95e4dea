import itertools
import math
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from case_ids import case_id
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pyfast_xai import ops
from pyfast_xai.ops import Location

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Geometry:
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def output(self):
        sizes = zip(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)

    @property
    def places(self):
        return self.input[0] * self.weight[0] * math.prod(self.output)

    def trace(self, input, weight, points, negative, location):
        return ops.conv_trace(
            input,
            weight,
            points,
            negative,
            self.output,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            location,
        )


GEOMETRIES = {
    "1d": Geometry((2, 6, 17), (4, 6, 3), (2,), (1,), (1,)),
    "1d-dilated-groups": Geometry((2, 6, 31), (9, 2, 5), (1,), (4,), (3,), 3),
    "2d-3x3": Geometry((2, 7, 9, 11), (5, 7, 3, 3), (1, 1), (1, 1), (1, 1)),
    "2d-7x7-stride": Geometry((1, 3, 23, 19), (8, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    "2d-11x11-unpadded": Geometry((1, 3, 31, 27), (4, 3, 11, 11), (4, 4), (0, 0), (1, 1)),
    "2d-1x1-stride": Geometry((3, 65, 5, 7), (6, 65, 1, 1), (2, 2), (0, 0), (1, 1)),
    "2d-uneven": Geometry((2, 4, 13, 10), (6, 2, 5, 3), (2, 3), (2, 0), (1, 2), 2),
    "2d-even-kernel": Geometry((2, 3, 8, 9), (4, 3, 2, 4), (1, 2), (1, 3), (1, 1)),
    "2d-depthwise": Geometry((2, 9, 8, 8), (18, 1, 3, 3), (1, 1), (1, 1), (2, 2), 9),
    "2d-wider-than-input": Geometry((2, 3, 3, 2), (4, 3, 5, 5), (1, 1), (2, 2), (1, 1)),
    # Border windows that meet the input with no tap at all.
    "2d-all-padding": Geometry((1, 3, 3, 3), (2, 3, 2, 2), (1, 1), (3, 3), (1, 1)),
    "2d-1x1-map": Geometry((2, 130, 1, 1), (3, 130, 1, 1), (1, 1), (0, 0), (1, 1)),
    "3d": Geometry((2, 3, 5, 6, 7), (4, 3, 3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
    "3d-groups": Geometry((1, 4, 4, 5, 3), (4, 2, 1, 3, 3), (2, 1, 1), (0, 1, 1), (1, 1, 1), 2),
}

every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
every_location = pytest.mark.parametrize("location", Location, ids=lambda location: location.name)


def receptive_field(g, input, weight, point):
    """Algorithm 2 up to line 7 for one point: image, first channel, window start, taps in the input, products."""
    n, o, *at = np.unravel_index(point, (g.input[0], g.weight[0], *g.output))
    first = o // (g.weight[0] // g.groups) * g.weight[1]
    start = [y * s - p for y, s, p in zip(at, g.stride, g.padding, strict=True)]
    products = {}  # place in the input -> [C / groups]
    for tap in itertools.product(*map(range, g.weight[2:])):
        place = tuple(y + t * d for y, t, d in zip(start, tap, g.dilation, strict=True))
        if all(0 <= y < size for y, size in zip(place, g.input[2:], strict=True)):
            field = input[(n, slice(first, first + g.weight[1]), *place)]
            products[place] = field * weight[(o, slice(None), *tap)]
    return n, first, at, start, products


def fixed_place(g, at, start, location):
    """The place of a window whose position does not hang on values."""
    if location == Location.CENTER:
        middle = [y + d * (k // 2) for y, d, k in zip(start, g.dilation, g.weight[2:], strict=True)]
    elif location == Location.SAME:
        middle = [y * s for y, s in zip(at, g.stride, strict=True)]
    else:
        middle = start  # a window of padding alone
    return tuple(min(max(y, 0), size - 1) for y, size in zip(middle, g.input[2:], strict=True))


def trace_slowly(g, input, weight, points, negative, location):
    """Algorithm 2 in float64, a point at a time; exact, ties included, where the numbers are small and whole."""
    input, weight = input.double().numpy(), weight.double().numpy()
    traced = []
    for i, point in enumerate(points.tolist()):
        n, first, at, start, products = receptive_field(g, input, weight, point)
        turn = -1 if negative is not None and negative[i] else 1
        sums = turn * sum(products.values(), np.zeros(g.weight[1]))
        best = max(range(g.weight[1]), key=lambda c: sums[c])
        if location == Location.PRODUCT and products:
            place = max(products, key=lambda p: turn * products[p][best])
        elif location == Location.ACTIVATION and products:
            place = max(products, key=lambda p: input[(n, first + best, *p)])
        else:
            place = fixed_place(g, at, start, location)
        traced.append(np.ravel_multi_index((n, first + best, *place), g.input))
    return torch.tensor(traced, dtype=torch.int64)


def assert_strongest(g, input, weight, points, negative, location, traced):
    """The chosen channel and place hold the largest value up to rounding, whatever their indices."""
    eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    input, weight = input.double().numpy(), weight.double().numpy()
    assert traced.dtype == torch.int64
    assert traced.shape == points.shape
    for i, (point, target) in enumerate(zip(points.tolist(), traced.tolist(), strict=True)):
        n, first, at, start, products = receptive_field(g, input, weight, point)
        turn = -1 if negative is not None and negative[i] else 1
        image, channel, *place = map(int, np.unravel_index(target, g.input))
        place, best = tuple(place), channel - first
        assert image == n
        assert 0 <= best < g.weight[1]
        sums = turn * sum(products.values(), np.zeros(g.weight[1]))
        size = sum((abs(product) for product in products.values()), np.zeros(g.weight[1])).max()
        assert sums[best] >= sums.max() - 2 * len(products) * eps * size
        if location in (Location.CENTER, Location.SAME) or not products:
            assert place == fixed_place(g, at, start, location)
        elif location == Location.PRODUCT:
            values = [turn * product[best] for product in products.values()]
            assert turn * products[place][best] >= max(values) - 2 * eps * max(map(abs, values))
        else:
            assert input[(n, channel, *place)] == max(input[(n, channel, *p)] for p in products)


def whole_numbers(g, count, least=-2, most=2):
    """Data no sum of which is rounded, with ties in plenty."""
    input = torch.randint(least, most + 1, g.input).float()
    weight = torch.randint(least, most + 1, g.weight).float()
    return input, weight, torch.randint(0, g.places, (count,)), torch.rand(count) < 0.4


@every_geometry
@every_location
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_first_of_equals_on_whole_numbers(backend, geometry, location, signed):
    input, weight, points, negative = whole_numbers(geometry, 60)
    negative = negative if signed else None
    traced = geometry.trace(input, weight, points, negative, location)
    assert torch.equal(traced, trace_slowly(geometry, input, weight, points, negative, location))


@every_geometry
@every_location
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_strongest_up_to_rounding(backend, geometry, location, dtype):
    input, weight = torch.randn(geometry.input).to(dtype), torch.randn(geometry.weight).to(dtype)
    points = torch.randint(0, geometry.places, (40,))
    negative = torch.rand(40) < 0.4
    traced = geometry.trace(input, weight, points, negative, location)
    assert_strongest(geometry, input, weight, points, negative, location, traced)


@st.composite
def geometries(draw):
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))

    def sizes(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    per_group = draw(st.integers(1, 5))
    g = Geometry(
        (draw(st.integers(1, 2)), groups * per_group, *sizes(1, 7)),
        (groups * draw(st.integers(1, 3)), per_group, *sizes(1, 4)),
        sizes(1, 3),
        sizes(0, 4),
        sizes(1, 3),
        groups,
    )
    assume(min(g.output) > 0)
    return g


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometries(), st.sampled_from(Location), st.integers(0, 2**31))
def test_any_geometry(backend, geometry, location, seed):
    torch.manual_seed(seed)
    input, weight, points, negative = whole_numbers(geometry, 12, -1, 1)
    traced = geometry.trace(input, weight, points, negative, location)
    assert torch.equal(traced, trace_slowly(geometry, input, weight, points, negative, location))


@pytest.mark.parametrize("name", ["1d", "2d-uneven", "2d-depthwise", "3d"])
@every_location
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=case_id)
@pytest.mark.parametrize("layout", ["channels_last", "every_second", "cut_channels"])
def test_memory_format_does_not_matter(backend, name, location, dtype, layout):
    g = GEOMETRIES[name]
    input, weight, points, negative = whole_numbers(g, 50)
    input, weight = input.to(dtype), weight.to(dtype)
    expected = trace_slowly(g, input, weight, points, negative, location)
    if layout == "channels_last":
        input, weight = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (input, weight))
    elif layout == "every_second":
        input, weight = (t.repeat_interleave(2, -1)[..., ::2] for t in (input, weight))
        points, negative = points.repeat(2, 1).T[:, 1], negative.repeat(2, 1).T[:, 1]
    else:
        input, weight = (torch.cat([t * 9, t], 1)[:, t.shape[1] :] for t in (input, weight))
    assert torch.equal(g.trace(input, weight, points, negative, location), expected)


@every_location
def test_many_points_agree_with_the_reference(backend, location):
    g = Geometry((4, 33, 28, 28), (48, 33, 3, 3), (1, 1), (1, 1), (1, 1))
    input, weight, points, negative = whole_numbers(g, 5000)
    with ops.backend("reference"):
        expected = g.trace(input, weight, points, negative, location)
    assert torch.equal(g.trace(input, weight, points, negative, location), expected)


@every_geometry
@every_location
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_no_point_stays_none(backend, geometry, location, signed):
    input, weight, points, negative = whole_numbers(geometry, 30)
    negative = negative if signed else None
    expected = geometry.trace(input, weight, points, negative, location)
    absent = torch.rand(30) < 0.5
    traced = geometry.trace(input, weight, points.masked_fill(absent, -1), negative, location)
    assert torch.equal(traced, expected.masked_fill(absent, -1))
    none = geometry.trace(input, weight, torch.full_like(points, -1), negative, location)
    assert torch.equal(none, torch.full_like(points, -1))


@every_location
def test_dead_receptive_fields_go_to_the_first_channel(backend, location):
    g = GEOMETRIES["2d-3x3"]
    points = torch.arange(g.places)
    traced = g.trace(torch.zeros(g.input), torch.randn(g.weight), points, None, location)
    channel = traced // math.prod(g.input[2:]) % g.input[1]
    assert not channel.any()


def test_first_tap_in_the_input_wins_a_tie(backend):
    g = GEOMETRIES["2d-3x3"]
    # The corner's window has four taps in the input, the first of them at (0, 0).
    traced = g.trace(torch.ones(g.input), torch.ones(g.weight), torch.tensor([0]), None, Location.PRODUCT)
    assert traced.tolist() == [0]


@every_location
def test_no_negative_is_all_positive(backend, location):
    g = GEOMETRIES["2d-uneven"]
    input, weight, points, _ = whole_numbers(g, 50)
    none = g.trace(input, weight, points, None, location)
    assert torch.equal(g.trace(input, weight, points, torch.zeros(50, dtype=torch.bool), location), none)


@pytest.mark.parametrize("location", [Location.PRODUCT, Location.CENTER, Location.SAME], ids=lambda loc: loc.name)
def test_a_negative_point_is_a_positive_one_of_the_negative_filter(backend, location):
    g = GEOMETRIES["2d-uneven"]
    input, weight, points, _ = whole_numbers(g, 50)
    inhibited = g.trace(input, weight, points, torch.ones(50, dtype=torch.bool), location)
    assert torch.equal(inhibited, g.trace(input, -weight, points, None, location))


@pytest.mark.parametrize("location", [Location.CENTER, Location.SAME], ids=lambda loc: loc.name)
def test_center_is_same_in_a_window_padded_to_its_size(backend, location):
    g = GEOMETRIES["2d-3x3"]
    input, weight, points, _ = whole_numbers(g, 50)
    traced = g.trace(input, weight, points, None, location)
    area = math.prod(g.output)
    assert torch.equal(traced % area, points % area)


def test_half_precision_is_summed_in_float32(backend):
    # In float16, 2048 + 1 is 2048 and 40000 + 40000 is infinite.
    g = Geometry((1, 3, 2), (1, 3, 2), (1,), (0,), (1,))
    input = torch.tensor([[[2048.0, 0.0], [2048.0, 1.0], [0.0, 2.0]]], dtype=torch.float16)
    ones = torch.ones(g.weight, dtype=torch.float16)
    assert g.trace(input, ones, torch.tensor([0]), None, Location.PRODUCT).tolist() == [2]
    input = torch.tensor([[[40000.0, 30000.0], [40000.0, 40000.0], [0.0, 2.0]]], dtype=torch.float16)
    assert g.trace(input, ones, torch.tensor([0]), None, Location.PRODUCT).tolist() == [2]


def test_padding_is_silent_beside_an_infinite_border(backend):
    g = Geometry((1, 2, 3), (1, 2, 2), (1,), (2,), (4,))
    # The window of the first output reads the places -2 and 2: the infinity at 0 is not in it.
    input = torch.tensor([[[math.inf, 0.0, 1.0], [0.0, 0.0, 2.0]]])
    assert g.trace(input, torch.ones(g.weight), torch.tensor([0]), None, Location.PRODUCT).tolist() == [5]


@pytest.mark.parametrize("negative", [None, torch.tensor([True])], ids=["positive", "negative"])
def test_the_first_nan_counts_as_the_largest(backend, negative):
    g = Geometry((1, 4, 3), (1, 4, 3), (1,), (0,), (1,))
    input = torch.ones(g.input)
    input[0, 3, 0] = input[0, 2, 1] = input[0, 2, 2] = math.nan
    for location in (Location.PRODUCT, Location.ACTIVATION):
        assert g.trace(input, torch.ones(g.weight), torch.tensor([0]), negative, location).tolist() == [7]


@every_location
@pytest.mark.parametrize("name", ["1d", "2d-3x3", "3d"])
def test_no_points(backend, name, location):
    input, weight, points, negative = whole_numbers(GEOMETRIES[name], 0)
    traced = GEOMETRIES[name].trace(input, weight, points, negative, location)
    assert traced.shape == (0,)
    assert traced.dtype == torch.int64


def test_no_images(backend):
    g = Geometry((0, 3, 5, 5), (2, 3, 3, 3), (1, 1), (1, 1), (1, 1))
    points = torch.empty(0, dtype=torch.int64)
    assert g.trace(torch.zeros(g.input), torch.zeros(g.weight), points, None, Location.PRODUCT).numel() == 0


def test_parameters_are_read_like_tensors(backend):
    g = GEOMETRIES["2d-3x3"]
    input, weight, points, negative = whole_numbers(g, 20)
    expected = g.trace(input, weight, points, negative, Location.PRODUCT)
    traced = g.trace(input.requires_grad_(), torch.nn.Parameter(weight), points, negative, Location.PRODUCT)
    assert torch.equal(traced, expected)


def test_threads_agree(backend):
    g = GEOMETRIES["2d-uneven"]
    input, weight, points, negative = whole_numbers(g, 500)
    expected = g.trace(input, weight, points, negative, Location.PRODUCT)
    results = {}

    def work(i):
        with ops.backend(backend):
            results[i] = [g.trace(input, weight, points, negative, Location.PRODUCT) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for each in results.values() for result in each)


def _arguments(**changed):
    arguments = {
        "input": torch.ones(2, 4, 5, 5),
        "weight": torch.ones(6, 2, 3, 3),
        "points": torch.tensor([0, 299]),
        "negative": None,
        "output_size": (5, 5),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 2,
        "location": 0,
    }
    return arguments | changed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("points", torch.tensor([300])),
        ("points", torch.tensor([-2])),
        ("points", torch.tensor([[1]])),
        ("points", torch.tensor([1], dtype=torch.int32)),
        ("negative", torch.tensor([True])),
        ("negative", torch.tensor([1, 0])),
        ("input", torch.ones(4, 5)),
        ("weight", torch.ones(6, 3, 3, 3)),
        ("weight", torch.ones(5, 2, 3, 3)),
        ("weight", torch.ones(6, 2, 3)),
        ("weight", torch.ones(6, 2, 3, 3, dtype=torch.float64)),
        ("output_size", (5,)),
        ("stride", (1, 1, 1)),
        ("stride", (0, 1)),
        ("padding", (1,)),
        ("padding", (1, -1)),
        ("dilation", (1,)),
        ("dilation", (0, 1)),
        ("groups", 0),
        ("location", 4),
        ("location", -1),
    ],
)
def test_bad_arguments_are_named(backend, argument, value):
    with pytest.raises(RuntimeError, match=rf"\b{argument}\b"):
        ops.conv_trace(**_arguments(**{argument: value}))


def test_integers_are_no_activations(backend):
    whole = {"input": torch.ones(2, 4, 5, 5, dtype=torch.int64), "weight": torch.ones(6, 2, 3, 3, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=r"\binput\b"):
        ops.conv_trace(**_arguments(**whole))


def test_error_says_what_was_expected_and_what_came(backend):
    with pytest.raises(RuntimeError, match=r"points must lie in \[0, 300\) or be -1, got 317"):
        ops.conv_trace(**_arguments(points=torch.tensor([5, 317])))


@pytest.mark.parametrize("name", ["1d", "2d-uneven", "3d"])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 9), (torch.bfloat16, 9), (torch.float64, 0)], ids=case_id)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_opcheck(name, dtype, count, signed):
    g = GEOMETRIES[name]
    input, weight, points, negative = whole_numbers(g, count)
    arguments = (input.to(dtype), weight.to(dtype), points, negative if signed else None)
    geometry = (list(g.output), list(g.stride), list(g.padding), list(g.dilation), g.groups, 0)
    torch.library.opcheck(torch.ops.pyfast_xai.conv_trace.default, (*arguments, *geometry))
