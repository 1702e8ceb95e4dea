import math

import numpy as np
import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


def start(responses):
    _, images, _, height, width = responses.shape
    wide = torch.float64 if responses.dtype == torch.float64 else torch.float32
    return torch.full((images, height, width), -math.inf, dtype=wide), torch.full((images, height, width), -1)


def fold(responses, classes, chunk=None):
    best, winner = start(responses)
    chunk = chunk or max(1, len(responses))
    for part, names in zip(responses.split(chunk), classes.split(chunk), strict=True):
        ops.response_argmax(part, names, best, winner)
    return best, winner


def fold_slowly(responses, classes):
    """The definition in float64, a class at a time; exact where the numbers are small and whole."""
    totals = responses.double().numpy().sum(2)
    best, winner = np.full(totals.shape[1:], -np.inf), np.full(totals.shape[1:], -1)
    for total, index in zip(totals, classes.numpy(), strict=True):
        for n, y, x in np.ndindex(*best.shape):
            if index[n] >= 0 and total[n, y, x] > best[n, y, x]:
                best[n, y, x], winner[n, y, x] = total[n, y, x], index[n]
    return torch.from_numpy(best), torch.from_numpy(winner)


def whole_numbers(*shape, dtype=torch.float32):
    """Sums often tie; about a quarter of the classes is skipped, the others are in no order and may repeat."""
    return torch.randint(-2, 3, shape).to(dtype), torch.randint(-2, 6, shape[:2])


def assert_folded(folded, responses, classes):
    for result, expected in zip(folded, fold_slowly(responses, classes), strict=True):
        assert torch.equal(result, expected.to(result.dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 2, 3, 4, 7), (4, 3, 6, 17, 19), (7, 1, 1, 3, 300)], ids=case_id)
def test_definition(backend, dtype, shape):
    responses, classes = whole_numbers(*shape, dtype=dtype)
    assert_folded(fold(responses, classes), responses, classes)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: t.flip(0).permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.cat([t, t], 3)[:, :, :, 2:-3],
        lambda t: t[:, :, :1].expand(t.shape),
        lambda t: t[..., :1],
        lambda t: t[:, :, :, 1:2],
    ],
    ids=["channels_last", "transposed", "reversed", "step", "cut", "expanded", "column", "row"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=case_id)
def test_any_strides(backend, dtype, layout):
    responses, classes = whole_numbers(4, 2, 3, 9, 13, dtype=dtype)
    responses = layout(responses)
    assert_folded(fold(responses, classes), responses, classes)
    assert_folded(fold(responses, classes.T.contiguous().T), responses, classes)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_a_few_classes_at_a_time_are_all_at_once(backend, chunk):
    responses, classes = whole_numbers(7, 2, 3, 5, 6)
    for result, expected in zip(fold(responses, classes, chunk), fold(responses, classes), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_first_of_equals_wins(backend, chunk):
    best, winner = fold(torch.ones(3, 1, 2, 2, 2), torch.tensor([[8], [2], [5]]), chunk)
    assert best.eq(2).all()
    assert winner.eq(8).all()


def test_negative_classes_are_skipped(backend):
    responses = torch.tensor([1.0, 9.0, 2.0]).view(3, 1, 1, 1, 1)
    best, winner = fold(responses, torch.tensor([[4], [-1], [0]]))
    assert (best.item(), winner.item()) == (2.0, 0)
    best, winner = fold(responses, torch.tensor([[-1], [-7], [-1]]))
    assert (best.item(), winner.item()) == (-math.inf, -1)


def test_nan_and_minus_infinity_never_win(backend):
    responses = torch.tensor([[math.nan, -math.inf, math.inf], [1.0, -math.inf, 2.0], [math.nan, math.nan, math.inf]])
    best, winner = fold(responses.view(3, 1, 1, 1, 3), torch.tensor([[0], [1], [2]]))
    assert best.flatten().tolist() == [1.0, -math.inf, math.inf]
    assert winner.flatten().tolist() == [1, -1, 0]


def test_channels_are_summed_in_their_order(backend):
    # In another order, or with partial sums, the ones would not be lost beside 2 ** 24.
    channels = torch.tensor([2.0**24, 1.0, 1.0, 1.0, 1.0, -(2.0**24), 3.0])
    responses = channels.view(1, 1, 7, 1, 1).expand(1, 1, 7, 4, 40)
    for layout in (responses.contiguous(), responses.movedim(2, -1).contiguous().movedim(-1, 2)):
        assert fold(layout, torch.tensor([[0]]))[0].eq(3).all()


def test_half_precision_is_summed_in_float32(backend):
    best, _ = fold(torch.full((1, 1, 3, 1, 1), 40000.0, dtype=torch.float16), torch.tensor([[0]]))
    assert best.item() == 120_000  # infinite in float16


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)], ids=case_id)
def test_nothing(backend, shape):
    best, winner = fold(torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64))
    assert best.eq(-math.inf).all()
    assert winner.eq(-1).all()


def test_no_channels_respond_with_zero(backend):
    best, winner = fold(torch.zeros(2, 1, 0, 2, 2), torch.tensor([[3], [4]]))
    assert best.eq(0).all()
    assert winner.eq(3).all()


def test_parameters_are_read_like_tensors(backend):
    responses, classes = whole_numbers(4, 2, 3, 5, 6)
    for result, expected in zip(fold(torch.nn.Parameter(responses), classes), fold(responses, classes), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"responses": torch.ones(3, 2, 4, 5, 6, dtype=torch.int32)}, "responses must be float16, bfloat16, float32"),
        ({"responses": torch.ones(3, 2, 4, 5)}, r"responses must have shape \[K, N, C, H, W\], got \[3, 2, 4, 5\]"),
        ({"responses": torch.ones(3, 2, 4, 5, 6).double()}, "best must be .*float64, got .*float32"),
        ({"classes": torch.ones(3, 2, dtype=torch.int32)}, "classes must be .*int64, got .*int32"),
        ({"classes": torch.ones(2, 3, dtype=torch.int64)}, r"classes must have shape \[3, 2\], got \[2, 3\]"),
        ({"best": torch.ones(2, 5, 6).half()}, "best must be .*float32, got .*float16"),
        ({"best": torch.ones(2, 6, 5)}, r"best must have shape \[2, 5, 6\], got \[2, 6, 5\]"),
        ({"best": torch.ones(2, 6, 5).mT}, r"best must be contiguous, got strides \[30, 1, 5\]"),
        ({"winner": torch.ones(2, 5, 6)}, "winner must be .*int64, got .*float32"),
        ({"winner": torch.ones(5, 6, dtype=torch.int64)}, r"winner must have shape \[2, 5, 6\], got \[5, 6\]"),
        ({"winner": torch.ones(2, 5, 12, dtype=torch.int64)[:, :, ::2]}, "winner must be contiguous, got strides"),
    ],
)
def test_bad_arguments(backend, changed, message):
    arguments = {
        "responses": torch.ones(3, 2, 4, 5, 6),
        "classes": torch.ones(3, 2, dtype=torch.int64),
        "best": torch.ones(2, 5, 6),
        "winner": torch.ones(2, 5, 6, dtype=torch.int64),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.response_argmax(**(arguments | changed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=case_id)
@pytest.mark.parametrize("shape", [(3, 2, 4, 5, 6), (0, 2, 4, 5, 6)], ids=case_id)
def test_opcheck(dtype, shape):
    responses, classes = whole_numbers(*shape, dtype=dtype)
    torch.library.opcheck(torch.ops.pyfast_xai.response_argmax.default, (responses, classes, *start(responses)))
