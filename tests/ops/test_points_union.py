import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfast_xai import ops


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 1000, 100_003])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_sorted_and_distinct(backend, size, count):
    points = torch.randint(0, size, (count,))
    assert ops.points_union(points, size).tolist() == sorted(set(points.tolist()))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=40))))
def test_any_list(backend, case):
    size, points = case
    assert ops.points_union(torch.tensor(points, dtype=torch.int64), size).tolist() == sorted(set(points))


def test_first_and_last_place(backend):
    assert ops.points_union(torch.tensor([639, 0, 639]), 640).tolist() == [0, 639]


def test_every_place(backend):
    assert torch.equal(ops.points_union(torch.randperm(1025), 1025), torch.arange(1025))


@pytest.mark.parametrize("size", [0, 5, 1 << 20])
def test_no_points(backend, size):
    union = ops.points_union(torch.empty(0, dtype=torch.int64), size)
    assert union.shape == (0,)
    assert union.dtype == torch.int64


def test_places_beyond_32_bits(backend):
    far = (1 << 32) + 5
    assert ops.points_union(torch.tensor([far, 3, far]), far + 1).tolist() == [3, far]


def test_strided_points(backend):
    points = torch.randint(0, 90, (60, 2))[:, 1]
    assert ops.points_union(points, 90).tolist() == sorted(set(points.tolist()))


def test_points_stay_as_they_are(backend):
    points = torch.tensor([4, 1, 4])
    ops.points_union(points, 5)
    assert points.tolist() == [4, 1, 4]


@pytest.mark.parametrize(
    ("points", "size"),
    [
        (torch.tensor([3, 12]), 12),
        (torch.tensor([-2, 3]), 12),
        (torch.tensor([0]), 0),
        (torch.tensor([[1]]), 12),
        (torch.tensor([1], dtype=torch.int32), 12),
        (torch.tensor([1.0]), 12),
    ],
    ids=["above", "below", "nowhere", "rank", "int32", "float"],
)
def test_bad_points(backend, points, size):
    with pytest.raises(RuntimeError, match="points"):
        ops.points_union(points, size)


def test_error_says_what_was_expected_and_what_came(backend):
    if backend == "cuda_emulation":
        pytest.skip("an assertion on a device has no numbers")
    with pytest.raises(RuntimeError, match=r"points must lie in \[0, 12\) or be -1, got 17"):
        ops.points_union(torch.tensor([3, 17]), 12)


@pytest.mark.parametrize("size", [1, 65, 1000, 100_003, 1 << 33])
@pytest.mark.parametrize("count", [0, 1, 7, 500])
@pytest.mark.parametrize("spare", [0, 1, 70])
def test_a_capacity_is_filled_up_with_no_points(backend, size, count, spare):
    points = torch.randint(0, size, (count,))
    points = torch.where(torch.rand(count) < 0.3, -1, points)
    expected = sorted(set(points.tolist()) - {-1})
    assert ops.points_union(points, size).tolist() == expected
    union = ops.points_union(points, size, len(expected) + spare)
    assert union.dtype == torch.int64
    assert union.tolist() == expected + [-1] * spare


@pytest.mark.parametrize("size", [5, 1 << 20])
def test_nothing_but_no_points(backend, size):
    absent = torch.full((9,), -1)
    assert ops.points_union(absent, size).tolist() == []
    assert ops.points_union(absent, size, 2).tolist() == [-1, -1]
    assert ops.points_union(absent, size, 0).tolist() == []


@pytest.mark.parametrize("size", [12, 1 << 20])
@pytest.mark.parametrize("capacity", [-1, 0, 2])
def test_a_capacity_that_does_not_suffice(backend, size, capacity):
    with pytest.raises(RuntimeError, match="capacity must"):
        ops.points_union(torch.tensor([3, -1, 7, 3, 1]), size, capacity)


@pytest.mark.parametrize(("points", "size"), [([5, 2, 5], 9), ([], 4), ([100_000], 100_001)])
def test_opcheck(points, size):
    op = torch.ops.pyfast_xai.points_union.default
    for capacity in ((), (None,), (5,)):
        torch.library.opcheck(op, (torch.tensor(points, dtype=torch.int64), size, *capacity))
