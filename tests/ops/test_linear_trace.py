import threading

import pytest
import torch
from case_ids import case_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfast_xai import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def trace_slowly(input, weight, points, negative=None):
    outputs, features = weight.shape
    input, weight = input.tolist(), weight.tolist()
    reached = set()
    for i, point in enumerate(points.tolist()):
        row, neuron = divmod(point, outputs)
        for j in range(features):
            evidence = input[row][j] * weight[neuron][j]
            if evidence < 0 if negative is not None and negative[i] else evidence > 0:
                reached.add(row * features + j)
    return sorted(reached)


def layer(rows, features, outputs, count, dtype=torch.float32):
    # Small whole numbers: many zeros on both sides, and products that no dtype rounds or flushes.
    input = torch.randint(-2, 3, (rows, features)).to(dtype)
    weight = torch.randint(-1, 2, (outputs, features)).to(dtype)
    return input, weight, torch.randint(0, rows * outputs, (count,)), torch.rand(count) < 0.4


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(
    ("rows", "features", "outputs", "count"),
    [(1, 1, 1, 1), (1, 63, 5, 1), (3, 64, 4, 6), (2, 65, 7, 3), (4, 130, 3, 2), (1, 4200, 11, 2), (5, 257, 1, 3)],
)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_union_of_contributions(backend, rows, features, outputs, count, dtype, signed):
    input, weight, points, negative = layer(rows, features, outputs, count, dtype)
    negative = negative if signed else None
    reached = ops.linear_trace(input, *ops.sign_bits(weight), points, negative)
    assert reached.dtype == torch.int64
    assert reached.tolist() == trace_slowly(input, weight, points, negative)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(0, 140), st.integers(1, 9), st.integers(0, 12), st.integers(0, 2**31))
def test_any_layer(backend, rows, features, outputs, count, seed):
    torch.manual_seed(seed)
    input, weight, points, negative = layer(rows, features, outputs, count)
    reached = ops.linear_trace(input, *ops.sign_bits(weight), points, negative)
    assert reached.tolist() == trace_slowly(input, weight, points, negative)


def test_many_points_agree_with_the_reference(backend):
    input, weight = torch.randn(9, 1000).relu(), torch.randn(300, 1000)
    bits = ops.sign_bits(weight)
    points = torch.randint(0, 9 * 300, (40,))
    negative = torch.rand(40) < 0.5
    with ops.backend("reference"):
        expected = ops.linear_trace(input, *bits, points, negative)
    assert torch.equal(ops.linear_trace(input, *bits, points, negative), expected)


def test_zero_weights_and_activations_excite_nothing(backend):
    bits = ops.sign_bits(torch.tensor([[0.0, -0.0, 1.0, 1.0]]))
    assert ops.linear_trace(torch.tensor([[1.0, 1.0, 0.0, -0.0]]), *bits, torch.tensor([0])).numel() == 0


def test_nan_excites_nothing(backend):
    bits = ops.sign_bits(torch.tensor([[1.0, torch.nan, -1.0]]))
    input = torch.tensor([[torch.nan, 1.0, -2.0]])
    assert ops.linear_trace(input, *bits, torch.tensor([0])).tolist() == [2]
    assert ops.linear_trace(input, *bits, torch.tensor([0]), torch.tensor([True])).tolist() == []


def test_a_negative_point_collects_what_speaks_against_it(backend):
    bits = ops.sign_bits(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
    input = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    assert ops.linear_trace(input, *bits, torch.tensor([0]), torch.tensor([False])).tolist() == [0, 3]
    assert ops.linear_trace(input, *bits, torch.tensor([0]), torch.tensor([True])).tolist() == [1, 2]
    both = ops.linear_trace(input, *bits, torch.tensor([0, 0]), torch.tensor([True, False]))
    assert both.tolist() == [0, 1, 2, 3]


def test_rows_do_not_mix(backend):
    input, weight, points, negative = layer(6, 100, 8, 20)
    bits = ops.sign_bits(weight)
    together = ops.linear_trace(input, *bits, points, negative)
    alone = []
    for row in range(6):
        actual = points // 8 == row
        part = ops.linear_trace(input[row : row + 1], *bits, points[actual] - row * 8, negative[actual])
        alone.append(part + row * 100)
    assert torch.equal(together, torch.cat(alone))


def test_order_and_repetition_of_points_do_not_matter(backend):
    input, weight, points, negative = layer(3, 200, 5, 10)
    bits = ops.sign_bits(weight)
    repeated = torch.cat([torch.randperm(10), torch.randint(0, 10, (5,))])
    assert torch.equal(
        ops.linear_trace(input, *bits, points, negative),
        ops.linear_trace(input, *bits, points[repeated], negative[repeated]),
    )


def test_strided_input(backend):
    input, weight, points, negative = layer(3, 200, 5, 4)
    bits = ops.sign_bits(weight)
    expected = ops.linear_trace(input, *bits, points, negative)
    assert torch.equal(ops.linear_trace(input.T.contiguous().T, *bits, points, negative), expected)
    wide = input.repeat_interleave(2, 1)[:, ::2]
    strided = [b.T.contiguous().T for b in bits]
    assert torch.equal(ops.linear_trace(wide, *strided, points.repeat(2, 1).T[:, 0], negative), expected)


def test_no_points(backend):
    input, weight, points, negative = layer(3, 200, 5, 0)
    reached = ops.linear_trace(input, *ops.sign_bits(weight), points, negative)
    assert reached.shape == (0,)
    assert reached.dtype == torch.int64


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("sizes", [(1, 63, 5, 4), (3, 130, 4, 6), (5, 257, 1, 3), (2, 4200, 11, 8)], ids=case_id)
def test_no_points_among_points(backend, sizes, signed):
    input, weight, points, negative = layer(*sizes)
    bits = ops.sign_bits(weight)
    expected = ops.linear_trace(input, *bits, points, negative if signed else None)
    where = torch.randperm(len(points) + 7)
    points = torch.cat([points, torch.full((7,), -1)])[where]
    negative = torch.cat([negative, torch.rand(7) < 0.5])[where] if signed else None
    assert torch.equal(ops.linear_trace(input, *bits, points, negative), expected)
    capacity = min(sizes[0], sizes[3]) * sizes[1]
    filled = ops.linear_trace(input, *bits, points, negative, capacity)
    assert filled.dtype == torch.int64
    assert filled.tolist() == expected.tolist() + [-1] * (capacity - len(expected))
    absent = torch.full((7,), -1)
    assert ops.linear_trace(input, *bits, absent).tolist() == []
    assert ops.linear_trace(input, *bits, absent, None, 3).tolist() == [-1] * 3


def test_a_capacity_that_does_not_suffice(backend):
    bits = ops.sign_bits(torch.ones(1, 70))
    assert ops.linear_trace(torch.ones(1, 70), *bits, torch.tensor([0]), None, 70).tolist() == list(range(70))
    with pytest.raises(RuntimeError, match="capacity must"):
        ops.linear_trace(torch.ones(1, 70), *bits, torch.tensor([0]), None, 69)


def test_threads_agree(backend):
    input, weight, points, negative = layer(8, 3000, 50, 100)
    bits = ops.sign_bits(weight)
    expected = ops.linear_trace(input, *bits, points, negative)
    results = {}

    def work(i):
        with ops.backend(backend):
            results[i] = [ops.linear_trace(input, *bits, points, negative) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for each in results.values() for result in each)


def _arguments(**changed):
    arguments = {
        "input": torch.ones(2, 70),
        "weight_positive": torch.zeros(3, 2, dtype=torch.int64),
        "weight_negative": torch.zeros(3, 2, dtype=torch.int64),
        "points": torch.tensor([0, 5]),
        "negative": None,
        "capacity": None,
    }
    return arguments | changed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("points", torch.tensor([6])),
        ("points", torch.tensor([-2])),
        ("points", torch.tensor([[1]])),
        ("points", torch.tensor([1], dtype=torch.int32)),
        ("negative", torch.tensor([True])),
        ("negative", torch.tensor([1, 0])),
        ("input", torch.ones(70)),
        ("input", torch.ones(2, 70, dtype=torch.int64)),
        ("weight_positive", torch.zeros(3, 3, dtype=torch.int64)),
        ("weight_positive", torch.zeros(3, 2)),
        ("weight_negative", torch.zeros(4, 2, dtype=torch.int64)),
        ("weight_negative", torch.zeros(3, 2, dtype=torch.int32)),
        ("capacity", -1),
    ],
)
def test_bad_arguments_are_named(backend, argument, value):
    with pytest.raises(RuntimeError, match=argument):
        ops.linear_trace(**_arguments(**{argument: value}))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("sizes", [(2, 70, 3, 4), (1, 64, 2, 1), (3, 5, 2, 0)], ids=case_id)
def test_opcheck(sizes, signed):
    input, weight, points, negative = layer(*sizes)
    arguments = (input, *ops.sign_bits(weight), points, negative if signed else None)
    for capacity in ((), (sizes[0] * sizes[1],)):
        torch.library.opcheck(torch.ops.pyfast_xai.linear_trace.default, (*arguments, *capacity))
