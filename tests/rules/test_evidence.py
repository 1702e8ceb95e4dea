"""Sets of points: what is absent stays so, and where branches meet there is room for all."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyfast_xai.rules import evidence
from pyfast_xai.rules.evidence import Options, Points, backward, points
from pyfast_xai.rules.evidence.points import gather, marking, unravel
from pyfast_xai.tape import record

MODES = {"left out": contextlib.nullcontext, "marked": marking}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def members(found):
    """The points that are there, with their signs."""
    negative = [False] * len(found) if found.negative is None else found.negative.tolist()
    return {(i, low) for i, low in zip(found.index.tolist(), negative, strict=True) if i >= 0}


def lists(size=6):
    one = st.tuples(st.integers(0, size - 1), st.booleans(), st.booleans())
    return st.lists(st.lists(one, min_size=1, max_size=8), min_size=1, max_size=3)


@every_mode
@settings(max_examples=60, deadline=None)
@given(lists(), st.booleans())
def test_union_is_that_of_sets(mode, parts, signed):
    """Of shares of what may be there twice, with signs or without."""
    with mode():
        kept, expected = [], set()
        for part in parts:
            index, low, keep = map(torch.tensor, zip(*part, strict=True))
            kept.append(Points(index, low if signed else None).to(index, keep))
            expected |= {(i, b and signed) for i, b, k in part if k}
        found = points.union(kept, 6)
    assert members(found) == expected
    assert found.distinct
    assert (found.index >= 0).sum() == len(expected)
    if mode is not marking:
        assert len(found) == len(expected)


@every_mode
def test_what_is_absent_stays_absent(mode):
    with mode():
        given = Points(torch.tensor([4, 1, 3])).to(torch.tensor([4, 1, 3]), torch.tensor([True, False, True]))
        moved = given.to(given.index + 1).flip()
        assert members(moved) == {(5, True), (4, True)}
        assert members(moved.to(moved.index, moved.index == 5)) == {(5, True)}
        assert len(moved) == (3 if mode is marking else 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
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
        again = points.union([whole.to(whole.index, here), whole.to(whole.index + 50, ~here)], 1000)
        assert len(again) == 10
        assert members(again) == {(i if i < 4 else i + 50, False) for i in range(10)}
        # Other points, and places that are fewer than points.
        assert len(points.union([again, Points(torch.arange(7))], 1000)) == 17
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
    monkeypatch.setattr(backward, "_saves", dict(backward._saves))


class Sum(nn.Module):
    def forward(self, x):
        return torch.add(x.flip(-1), x.roll(1, -1))


@every_mode
@pytest.mark.usefixtures("_own_rules")
@pytest.mark.parametrize("spelling", ["the same to both", "a share to one"])
def test_a_rule_may_send_the_same_points_both_ways(mode, spelling):
    @evidence.rule("add")
    def both(step, first, second, **_):
        left = step.points.to(step.points.index, step.points.index > 1) if "share" in spelling else step.points
        step.send(first, left)
        step.send(second, step.points)

    x = torch.randn(1, 8)
    tape = record(Sum(), x, reading=evidence.reading)
    with mode():
        starts = {tape.outputs: Points(torch.tensor([1, 2, 5]))}
        found = evidence.walk(tape, starts, tape.inputs[0], Options())
    left = {2, 5} if "share" in spelling else {1, 2, 5}
    assert {i for i, _ in members(found)} == {7 - i for i in left} | {0, 1, 4}


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
    tape = record(Halves(20), torch.randn(1, 64, 3), reading=evidence.reading)
    with marking():
        starts = {tape.outputs: Points(torch.tensor([5, 100]))}
        found = evidence.walk(tape, starts, tape.inputs[0], Options())
    assert len(found) == 2
    assert len(members(found)) == 2


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
    tape = record(model, x, reading=evidence.reading)
    with mode():
        starts = {tape.outputs: Points(torch.tensor([1, 3 + 1]))}
        found = evidence.walk(tape, starts, tape.inputs[0], Options(first_fc="all"))
    strongest = 48 + 16 + int(x[1, 1].argmax())
    assert members(found) == {(i, False) for i in (*range(16, 32), strongest)}
