"""Triton twin of `points_union`: a bitmap, whose set bits are counted a chunk at a time and then written down."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.reference.points_union import points_union as by_sorting

BITS = tl.constexpr(32)  # of a word: atomics are fastest on these
BLOCK = 256  # points of a program
WORDS = 64  # words of a chunk: 2048 places, 16 a thread of 4 warps
# Beyond so many places, 8 MiB of bits, a bitmap of more than so many a point costs more than a sort.
SMALL, SPARSE = 1 << 26, 1 << 16


@triton.jit
def _mark_kernel(points_ptr, bits_ptr, count, BLOCK: tl.constexpr):
    o_point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    point = tl.load(points_ptr + o_point, mask=o_point < count, other=-1)
    m_point = point >= 0
    place = tl.where(m_point, point, 0)
    bit = tl.full([BLOCK], 1, tl.int32) << (place % BITS).to(tl.int32)
    tl.atomic_or(bits_ptr + place // BITS, bit, mask=m_point, sem="relaxed")


@triton.jit
def _places(bits_ptr, words, WORDS: tl.constexpr):
    """Returns whether each place of this program's chunk holds a point, `[WORDS, 32]`, and the places."""
    o_word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    o_bit = tl.arange(0, BITS)
    word = tl.load(bits_ptr + o_word, mask=o_word < words, other=0)
    return (word[:, None] >> o_bit[None, :]) & 1, o_word[:, None] * BITS + o_bit[None, :]


@triton.jit
def _count_chunk_kernel(bits_ptr, counts_ptr, words, WORDS: tl.constexpr):
    holds, _ = _places(bits_ptr, words, WORDS)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.sum(holds, 1), 0).to(tl.int64))


@triton.jit
def _write_points_kernel(
    bits_ptr,  # [words]
    ends_ptr,  # [chunks], points up to the end of each chunk
    out_ptr,  # [capacity], in rising order
    words,
    capacity,
    WORDS: tl.constexpr,
):
    holds, place = _places(bits_ptr, words, WORDS)
    total = tl.sum(holds, 1)  # [WORDS]
    first = tl.load(ends_ptr + tl.program_id(0)) - tl.sum(total, 0)
    before = first + (tl.cumsum(total, 0) - total)[:, None] + tl.cumsum(holds, 1) - holds
    tl.store(out_ptr + before, place, mask=(holds != 0) & (before < capacity))


def points_union(points: Tensor, size: int, capacity: int | None = None) -> Tensor:
    """Sorted distinct values of `points` [P], each in [0, size) or -1, which is left out."""
    checks.points_union(points, size, capacity)
    if not len(points) or size > max(SMALL, SPARSE * len(points)):
        return by_sorting(points, size, capacity)
    words = triton.cdiv(size, BITS.value)
    chunks = triton.cdiv(words, WORDS)
    bits = torch.zeros(words, dtype=torch.int32, device=points.device)
    counts = torch.empty(chunks, dtype=torch.int64, device=points.device)
    with torch.cuda.device_of(points):
        _mark_kernel[(triton.cdiv(len(points), BLOCK),)](points.contiguous(), bits, len(points), BLOCK=BLOCK)
        _count_chunk_kernel[(chunks,)](bits, counts, words, WORDS=WORDS)
        ends = counts.cumsum(0)
        if capacity is None:
            out = torch.empty(int(ends[-1]), dtype=torch.int64, device=points.device)
        else:
            if points.device.type == "cpu":
                checks.capacity_suffices(capacity, int(ends[-1]))
            else:
                enough = f"capacity must be at least the number of points, got {capacity}"
                torch._assert_async(ends[-1] <= capacity, enough)
            out = torch.full((capacity,), -1, dtype=torch.int64, device=points.device)
        if len(out):
            _write_points_kernel[(chunks,)](bits, ends, out, words, len(out), WORDS=WORDS)
    return out
