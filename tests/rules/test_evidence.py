"""Sets of points: what is absent stays so, and where branches meet there is room for all."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from case_ids import case_id
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyfast_xai.errors import UnsupportedOpError
from pyfast_xai.ops import Location
from pyfast_xai.rules import evidence
from pyfast_xai.rules.dimensions import per_dimension
from pyfast_xai.rules.evidence import Options, Points, backward, points
from pyfast_xai.rules.evidence.points import gather, marking, unravel
from pyfast_xai.tape import record

MODES = {"left out": contextlib.nullcontext, "marked": marking}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def members(result):
    """The points that are there, with their signs."""
    negative = [False] * len(result) if result.negative is None else result.negative.tolist()
    return {(i, low) for i, low in zip(result.index.tolist(), negative, strict=True) if i >= 0}


def lists(size=6):
    one = st.tuples(st.integers(0, size - 1), st.booleans(), st.booleans())
    return st.lists(st.lists(one, min_size=1, max_size=8), min_size=1, max_size=3)


@every_mode
@settings(max_examples=60, deadline=None)
@given(lists(), st.booleans())
def test_union_is_that_of_sets(mode, parts, signed):
    """Of shares of what may be there twice, with signs or without."""
    with mode():
        saved, expected = [], set()
        for part in parts:
            index, low, keep = map(torch.tensor, zip(*part, strict=True))
            saved.append(Points(index, low if signed else None).to(index, keep))
            expected |= {(i, b and signed) for i, b, k in part if k}
        result = points.union(saved, 6)
    assert members(result) == expected
    assert result.distinct
    assert (result.index >= 0).sum() == len(expected)
    if mode is not marking:
        assert len(result) == len(expected)


@every_mode
def test_what_is_absent_stays_absent(mode):
    with mode():
        options = Points(torch.tensor([4, 1, 3])).to(torch.tensor([4, 1, 3]), torch.tensor([True, False, True]))
        moved = options.to(options.index + 1).flip()
        assert members(moved) == {(5, True), (4, True)}
        assert members(moved.to(moved.index, moved.index == 5)) == {(5, True)}
        assert len(moved) == (3 if mode is marking else 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=case_id)
def test_an_absent_point_is_read_without_harm(layout):
    tensor = torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=layout)
    index = torch.tensor([-1, 119, -1, 7])
    with marking():
        assert gather(tensor, index)[[1, 3]].tolist() == [119, 7]
        coordinates = torch.stack(unravel(index, tensor.shape))
    assert coordinates[:, [1, 3]].tolist() == [[1, 0], [2, 0], [3, 1], [4, 2]]
    assert (coordinates >= 0).all()


def test_shares_that_meet_have_the_room_of_the_whole():
    with marking():
        whole = Points(torch.arange(10))
        here = torch.arange(10) < 4
        repeated = points.union([whole.to(whole.index, here), whole.to(whole.index + 50, ~here)], 1000)
        assert len(repeated) == 10
        assert members(repeated) == {(i if i < 4 else i + 50, False) for i in range(10)}
        # Other points, and places that are fewer than points.
        assert len(points.union([repeated, Points(torch.arange(7))], 1000)) == 17
        six = Points(torch.arange(6))
        assert len(points.union([six, Points(torch.arange(6))], 6)) == 6
        assert len(points.union([six, Points(torch.arange(6)), Points(torch.arange(6)).flip()], 6)) == 12


def test_more_points_than_there_is_room_for_are_an_error():
    with marking():
        whole = Points(torch.arange(10))
        with pytest.raises(RuntimeError, match="capacity must"):
            points.union([whole, whole.to(whole.index + 50)], 1000)


@pytest.fixture
def _own_rules(monkeypatch):
    monkeypatch.setattr(backward, "_rules", dict(backward._rules))


class Sum(nn.Module):
    def forward(self, x):
        return torch.add(x.flip(-1), x.roll(1, -1))


@every_mode
@pytest.mark.usefixtures("_own_rules")
@pytest.mark.parametrize("spelling", ["the same to both", "a share to one"])
def test_a_rule_may_send_the_same_points_both_ways(mode, spelling):
    @evidence.rule("add")
    def both(ctx, first, second, **_):
        left = ctx.points.to(ctx.points.index, ctx.points.index > 1) if "share" in spelling else ctx.points
        ctx.propagate(first, left)
        ctx.propagate(second, ctx.points)

    x = torch.randn(1, 8)
    tape = record(Sum(), x, policy=evidence.policy)
    with mode():
        starts = {tape.outputs: Points(torch.tensor([1, 2, 5]))}
        result = evidence.walk(tape, starts, tape.inputs[0], Options())
    left = {2, 5} if "share" in spelling else {1, 2, 5}
    assert {i for i, _ in members(result)} == {7 - i for i in left} | {0, 1, 4}


class Halves(nn.Module):
    """Halves that meet again, many times."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            a, b = x.chunk(2, 1)
            x = torch.cat([a + b, b], 1)
        return x


def test_parts_of_one_tensor_that_meet_have_the_room_of_the_whole():
    tape = record(Halves(20), torch.randn(1, 64, 3), policy=evidence.policy)
    with marking():
        starts = {tape.outputs: Points(torch.tensor([5, 100]))}
        result = evidence.walk(tape, starts, tape.inputs[0], Options())
    assert len(result) == 2
    assert len(members(result)) == 2


class TwoHeads(nn.Module):
    """An average that the answer reads with a layer between and without."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        pooled = x.mean((2, 3))
        return pooled + self.fc(pooled)


@every_mode
def test_points_that_passed_a_layer_and_points_that_did_not_are_told_apart(mode):
    """All that contributes to an average is evidence of it where the average is what is explained, and there alone."""
    model, x = TwoHeads(), torch.rand(2, 3, 4, 4) / 10
    with torch.no_grad():
        model.fc.weight[:], model.fc.bias[:] = 2 * torch.eye(3), -3.0
    x += torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)  # the layer gives -1 and 7, the skip 1 and 5
    tape = record(model, x, policy=evidence.policy)
    with mode():
        starts = {tape.outputs: Points(torch.tensor([1, 3 + 1]))}
        result = evidence.walk(tape, starts, tape.inputs[0], Options(first_fc="all"))
    strongest = 48 + 16 + int(x[1, 1].argmax())
    assert members(result) == {(i, False) for i in (*range(16, 32), strongest)}


@torch.library.custom_op("evidence_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * scale


@pytest.mark.usefixtures("_own_rules")
@pytest.mark.parametrize("weighted", [False, True])
def test_a_rule_says_whether_its_op_is_a_layer_with_weights(weighted):
    """The skip path, which wins ties, is the one with fewer layers; points below a layer are none of the start."""
    recorded = []

    class Skipping(nn.Module):
        def forward(self, x):
            y = x * 1
            return scaled(y, torch.ones(())) + y

    @evidence.rule("evidence_tests::scaled", weighted=weighted)
    def scaled_rule(ctx, x, scale):
        ctx.propagate(x, ctx.points)

    @evidence.rule("mul")
    def mul(ctx, x, one):
        recorded.append((ctx.points.start, members(ctx.points)))
        ctx.propagate(x, ctx.points)

    tape = record(Skipping(), torch.tensor([[1.0, 2, 3]]), policy=evidence.policy)
    add = next(node for node in tape if node.name == "add")
    evidence.walk(tape, {tape.outputs: Points(torch.tensor([1]))}, tape.inputs[0], Options())
    # Equal contributors: to the skip, that is past the layer, where the op is one.
    assert recorded == [(True, {(1, False)})]
    depth = backward._Walk(tape, tape.inputs[0], Options()).depth
    assert (depth(add.args[0]), depth(add.args[1])) == (int(weighted), 0)
    recorded.clear()
    tape = record(Call(lambda x: scaled(x * 1, torch.ones(()))), torch.ones(1, 3), policy=evidence.policy)
    evidence.walk(tape, {tape.outputs: Points(torch.tensor([1]))}, tape.inputs[0], Options())
    assert recorded == [(not weighted, {(1, False)})]


ODD = {
    "a sum of nothing": (lambda x: x.abs() + x[:0].sum(), (2, 3)),
    "attention of one head": (lambda x: F.scaled_dot_product_attention(x, x, x), (5, 4)),
    "shared keys": (lambda x: F.scaled_dot_product_attention(x, x[:1], x[:1, :1]), (2, 3, 5, 4)),
    "fewer dimensions": (lambda x: F.scaled_dot_product_attention(x[0], x, x), (2, 3, 5, 4)),
    "a map without a batch": (lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3), None, 1, 1), (3, 5, 5)),
    "scalars of a stack": (lambda x: torch.stack([(s := x.sum()).permute(()), s * 2, s]), (2, 3)),
    "a scalar": (lambda x: x.sum().sum(-1).transpose(0, -1).mean(0, keepdim=True), (2, 3)),
}


@pytest.mark.parametrize("name", ODD)
def test_points_of_odd_shapes_lie_on_the_input(name):
    function, shape = ODD[name]
    tape = record(Call(function), torch.randn(shape), policy=evidence.policy)
    starts = {tape.outputs: Points(torch.tensor([tape.outputs.numel - 1]))}
    result = evidence.walk(tape, starts, tape.inputs[0], Options())
    assert len(result)
    assert all(0 <= index < tape.inputs[0].numel for index in result.index.tolist())


def test_complex_numbers_have_no_largest():
    tape = record(Call(lambda x: (x * (1 + 2j)).abs()), torch.randn(1, 3), policy=evidence.policy)
    with pytest.raises(UnsupportedOpError, match="no rule for complex numbers, which aten::"):
        evidence.walk(tape, {tape.outputs: Points(torch.tensor([1]))}, tape.inputs[0], Options())


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def traced(function, x, points, options=None):
    """The points of an image that lead to each of some points on the output of a function, as sets of coordinates."""
    tape = record(Call(function), x, policy=evidence.policy)
    result = []
    for point in points:
        starts = {tape.outputs: Points(torch.tensor([int(np.ravel_multi_index(point, tape.outputs.shape))]))}
        index = evidence.walk(tape, starts, tape.inputs[0], options or Options()).index
        result.append({tuple(int(i) for i in np.unravel_index(i, x.shape)) for i in index.tolist()})
    return result


TRANSPOSED = {
    "a doubling": {"stride": 2},
    "a doubling of 4x4": {"kernel": (4, 4), "stride": 2, "padding": 1},
    "odd sizes": {"kernel": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
    "dilated": {"kernel": (3, 3), "stride": 2, "padding": 1, "dilation": 2, "output_padding": 1},
    "of groups": {"stride": 2, "groups": 2},
    "cut at the border": {"kernel": (2, 2), "stride": 2, "padding": 2},
    "of stride one": {"kernel": (3, 3), "padding": 1},
}


@pytest.mark.parametrize("location", ["product", "center", "activation"])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_convolution_is_traced_to_the_channel_that_contributes_most(case, location):
    geometry = dict(TRANSPOSED[case])
    kernel, groups = geometry.pop("kernel", (2, 2)), geometry.get("groups", 1)
    x = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    weight = torch.randn(4, 6 // groups, *kernel, dtype=torch.float64)
    output = F.conv_transpose2d(x, weight, None, **geometry)
    points = [tuple(int(torch.randint(size, ())) for size in output.shape) for _ in range(40)]
    options = Options(location=Location[location.upper()])
    result = traced(lambda x: F.conv_transpose2d(x, weight, None, **geometry), x, points, options)
    stride, padding, dilation = (per_dimension(geometry.get(n, d), 2) for n, d in _DEFAULTS)
    for (n, o, *at), places in zip(points, result, strict=True):
        contributions = {}  # by channel and pixel
        group, filters = o // (6 // groups), o % (6 // groups)
        for i in range(group * 4 // groups, (group + 1) * 4 // groups):
            for tap in itertools.product(*map(range, kernel)):
                first = [a + p - t * d for a, p, t, d in zip(at, padding, tap, dilation, strict=True)]
                pixel = tuple(f // s for f, s in zip(first, stride, strict=True))
                if any(f % s for f, s in zip(first, stride, strict=True)):
                    continue
                if all(0 <= p < size for p, size in zip(pixel, x.shape[2:], strict=True)):
                    contributions[(i, *pixel)] = float(x[(n, i, *pixel)] * weight[(i, filters, *tap)])
        if not contributions:
            continue
        sums = {i: sum(v for k, v in contributions.items() if k[0] == i) for i, *_ in contributions}
        best = max(sums, key=sums.get)
        ((image, channel, *pixel),) = places
        assert (image, channel) == (n, best)
        if location == "product":
            inside = {k: v for k, v in contributions.items() if k[0] == best}
            if max(inside.values()) > 0:
                assert (channel, *pixel) == max(inside, key=inside.get)
        elif location == "activation":
            assert (channel, *pixel) == max((k for k in contributions if k[0] == best), key=lambda k: x[(n, *k)])


_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))


def test_the_extremes_of_a_dimension_are_traced_to_their_elements():
    x = torch.randn(2, 3, 4, 5)
    for name, reduce in (("max", torch.amax), ("min", torch.amin)):
        for function in (lambda x, n=name: getattr(x, n)(2).values, lambda x, r=reduce: r(x, 2)):
            points = [(n, c, w) for n in range(2) for c in range(3) for w in range(5)]
            rows = getattr(x, f"arg{name}")(2)
            assert traced(function, x, points) == [{(n, c, int(rows[n, c, w]), w)} for n, c, w in points]
    whole = traced(lambda x: x.flatten(1).max(1, keepdim=True).values, x, [(1, 0)])
    assert whole == [{tuple(int(i) for i in np.unravel_index(60 + int(x[1].argmax()), x.shape))}]
    other = torch.randn(2, 3, 4, 5)
    assert traced(lambda x: torch.max(x, other), x, [(0, 0, 0, 0), (1, 2, 3, 4)]) == [
        {p} if x[p] >= other[p] else set() for p in ((0, 0, 0, 0), (1, 2, 3, 4))
    ]


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1)},
    ],
    ids=["apart", "overlapping", "dilated"],
)
def test_a_sum_of_patches_is_traced_to_the_largest(geometry):
    image = torch.randn(2, 3, 8, 8)
    columns = torch.rand_like(F.unfold(image, **geometry))
    pixels = torch.arange(image.numel(), dtype=torch.float64).view(image.shape)
    # Where the elements of the patches lie in the image; what they fold to covers the image, or not everywhere.
    lies = F.unfold(pixels + 1, **geometry) - 1
    points = [tuple(int(torch.randint(size, ())) for size in image.shape) for _ in range(60)]
    result = traced(lambda c: F.fold(c, (8, 8), **geometry), columns, points)
    for point, places in zip(points, result, strict=True):
        patches = (lies == float(pixels[point])).nonzero()
        expected = {max((tuple(p.tolist()) for p in patches), key=lambda p: columns[p])} if len(patches) else set()
        assert places == expected


def test_a_similarity_is_traced_to_what_contributes_on_either_side():
    x = torch.randn(4, 6)
    ((first, second), result) = (1, 3), traced(lambda x: (x * 1) @ (x * 1).T, x, [(1, 3)])[0]
    contributes = {k for k in range(6) if x[first, k] * x[second, k] > 0}
    assert result == {(row, k) for row in (first, second) for k in contributes}


def test_the_side_of_other_inputs_is_left_alone():
    class Similarity(nn.Module):
        def forward(self, images, words):
            text = nn.functional.embedding(words, table).cumsum(1).mean(1)  # no rule is there for cumsum
            return (images * 1) @ text.T

    table, images = torch.randn(9, 6), torch.randn(2, 6)
    words = torch.randint(9, (3, 4))
    tape = record(Similarity(), images, words, policy=evidence.policy)
    result = evidence.walk(tape, {tape.outputs: Points(torch.tensor([4]))}, tape.inputs[0], Options())
    text = nn.functional.embedding(words, table).cumsum(1).mean(1)
    assert {i - 6 for i in result.index.tolist()} == {k for k in range(6) if images[1, k] * text[1, k] > 0}


@every_mode
def test_a_sum_of_a_product_is_traced_as_its_two_operations_are(mode):
    """`addcmul`, as in global response normalisation, with each combination of constants."""
    x = torch.randn(2, 3, 4)
    weight, bias = torch.randn(3, 1), torch.randn(4)
    pairs = [
        (lambda x: torch.addcmul(bias, weight, x), lambda x: bias + weight * x),
        (lambda x: torch.addcmul(bias, weight, x, value=-2.0), lambda x: bias - weight * (x * 2)),
        (lambda x: torch.addcmul(x, weight, bias), lambda x: x + weight * bias),
        (lambda x: torch.addcmul(x, weight, x.flip(2)), lambda x: x + weight * x.flip(2)),
        (lambda x: torch.addcmul(x, x.flip(2), x.roll(1, 1)), lambda x: x + x.flip(2) * x.roll(1, 1)),
        (lambda x: torch.addcmul(x, weight, x.flip(2), value=-0.5), lambda x: x - weight * (x.flip(2) * 0.5)),
    ]

    def signed(function):
        tape = record(Call(function), x, policy=evidence.policy)
        return members(evidence.walk(tape, {tape.outputs: Points(torch.arange(24))}, tape.inputs[0], Options()))

    with mode():
        for fused, plain in pairs:
            torch.testing.assert_close(fused(x), plain(x))
            assert signed(fused) == signed(plain)
        assert signed(pairs[0][0]) == {(i, bool(weight[i // 4 % 3] < 0)) for i in range(24)}


def test_a_length_is_traced_to_the_largest_magnitude():
    x = torch.randn(2, 3, 4, 5)
    points = [(n, c, 0, w) for n in range(2) for c in range(3) for w in range(5)]
    rows = x.abs().argmax(2)
    expected = [{(n, c, int(rows[n, c, w]), w)} for n, c, _, w in points]
    everywhere = [{(n, c, h, w) for h in range(4)} for n, c, _, w in points]  # all contribute to what is explained
    one = torch.eye(3)[:, :, None, None]
    for length in (lambda x: x.norm(p=2, dim=2, keepdim=True), lambda x: torch.linalg.vector_norm(x, 1, 2, True)):
        assert traced(lambda x, f=length: F.conv2d(f(x), one), x, points) == expected
        assert traced(length, x, points) == everywhere
