"""Triton twin of `leading_singular`: no library solver, and nothing is read back.

The parts of `kernels.reference.triplets`: products; one program a matrix that iterates a basis on the Gram matrix of
the small side while a row of that fits into a block; and one that diagonalises by rotations. Beyond, and for the other
route, the matrix and its transpose multiply the basis in turn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.reference.leading_singular import leading_singular as plain_leading_singular
from pyfast_xai.kernels.reference.triplets import NEGLIGIBLE, OVERSAMPLE, Parts, has_gram, triplets
from pyfast_xai.kernels.triton.accumulate import accumulator

WIDTHS = (16, 32)  # vectors of a basis: 16 is the least side of a tl.dot, and more than 32 do not fit into registers
FITS = 4096  # bytes of a row of the Gram matrix that one program takes at once: 1024 numbers in float32
TILE = 32  # side of the tiles of a product
STEP = 16  # rows of the Gram matrix in shared memory at once
PASSES = 64  # of the iteration on the Gram matrix, most of which a leading value that stands out saves
SWEEPS = 24  # of rotations; a random matrix takes six, equal eigenvalues at most twenty in trials
INDEPENDENT = tl.constexpr(NEGLIGIBLE)
# Rounding reached: what a vector of the iteration lacks to an eigenvector, in units of the largest eigenvalue, ...
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
# ... and what is left beside the diagonal, in units of the norm.
OFF_DIAGONAL = {torch.float32: 1e-7, torch.float64: 1e-15}


@triton.jit(do_not_specialize=["rows", "columns", "inner", "row_tiles", "column_tiles"])
def _product_kernel(
    a_ptr,  # [B, rows, inner]
    b_ptr,  # [B, inner, columns]
    out_ptr,  # [B, rows, columns]
    rows,
    columns,
    inner,
    row_tiles,
    column_tiles,
    a_stride_b,
    a_stride_r,
    a_stride_i,
    b_stride_b,
    b_stride_i,
    b_stride_c,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    matrix = program // (row_tiles * column_tiles)
    o_row = program // column_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    o_column = program % column_tiles * TILE + tl.arange(0, TILE)
    o_inner = tl.arange(0, TILE).to(tl.int64)
    p_a = a_ptr + matrix * a_stride_b + o_row[:, None] * a_stride_r
    p_b = b_ptr + matrix * b_stride_b + o_column[None, :] * b_stride_c
    out = tl.zeros([BLOCK_R, TILE], ACC)
    for _ in range(0, inner, TILE):
        m_inner = o_inner < inner
        a = tl.load(p_a + o_inner[None, :] * a_stride_i, mask=(o_row < rows)[:, None] & m_inner[None, :], other=0)
        b = tl.load(p_b + o_inner[:, None] * b_stride_i, mask=m_inner[:, None] & (o_column < columns)[None, :], other=0)
        # Full float32, whatever torch.backends.cuda.matmul allows: the residual is only as good as this.
        out = tl.dot(a, b, out, input_precision="ieee", out_dtype=ACC)
        o_inner += TILE
    p_out = out_ptr + (matrix * rows + o_row[:, None]) * columns + o_column[None, :]
    tl.store(p_out, out, mask=(o_row < rows)[:, None] & (o_column < columns)[None, :])


@triton.jit
def _orthonormal(basis, WIDTH: tl.constexpr):
    """Orthonormalises the rows of a block by Gram and Schmidt; a row that lies within those before it becomes zero."""
    o_vector = tl.arange(0, WIDTH)
    for i in range(WIDTH):
        selected = (o_vector == i)[:, None]
        row = tl.sum(tl.where(selected, basis, 0.0), 0)
        share = tl.where(o_vector < i, tl.sum(basis * row[None, :], 1), 0.0)
        row -= tl.sum(share[:, None] * basis, 0)
        before = tl.sqrt(tl.sum(row * row, 0))
        # Twice is enough (Kahan, in Parlett, 1998, 6.9), unless the second time takes most of what the first left: that
        # was rounding, and what is left of it is not orthogonal.
        share = tl.where(o_vector < i, tl.sum(basis * row[None, :], 1), 0.0)
        row -= tl.sum(share[:, None] * basis, 0)
        norm = tl.sqrt(tl.sum(row * row, 0))
        independent = norm > INDEPENDENT * before
        row = tl.where(independent, row / tl.where(independent, norm, 1.0), 0.0)
        basis = tl.where(selected, row[None, :], basis)
    return basis


@triton.jit(do_not_specialize=["n_vectors", "passes"])
def _iterate_kernel(
    gram_ptr,  # [B, size, size]
    basis_ptr,  # [B, WIDTH, size], a start that becomes orthonormal; rows of zeros stay so
    size,
    n_vectors,
    passes,
    tolerance,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    o_vector = tl.arange(0, WIDTH)
    o_row = tl.arange(0, BLOCK)
    m_row = (o_row < size)[None, :]
    p_vector = basis_ptr + (matrix * WIDTH + o_vector[:, None]) * size
    p_gram = gram_ptr + matrix * size * size + o_row[None, :]
    basis = _orthonormal(tl.load(p_vector + o_row[None, :], mask=m_row, other=0), WIDTH)  # [WIDTH, BLOCK]
    done = 0
    error = tl.full([], 1, ACC)
    largest = tl.full([], 0, ACC)
    while (done < passes) & (error > tolerance * largest):
        # A product needs slices of the basis, which registers do not give: through memory, where all threads must
        # have written before any reads, and have read before any writes.
        tl.store(p_vector + o_row[None, :], basis, mask=m_row)
        tl.debug_barrier()
        product = tl.zeros([WIDTH, BLOCK], ACC)
        for at in range(0, size, STEP):
            o_inner = (at + tl.arange(0, STEP)).to(tl.int64)
            m_inner = o_inner < size
            slice_ = tl.load(p_vector + o_inner[None, :], mask=m_inner[None, :], other=0)
            gram = tl.load(p_gram + o_inner[:, None] * size, mask=m_inner[:, None] & m_row, other=0)
            product = tl.dot(slice_, gram, product, input_precision="ieee", out_dtype=ACC)
        tl.debug_barrier()
        value = tl.sum(basis * product, 1)
        apart = product - value[:, None] * basis
        largest = tl.max(value, 0)
        error = tl.max(tl.where(o_vector < n_vectors, tl.sqrt(tl.sum(apart * apart, 1)), 0.0), 0)
        basis = _orthonormal(product, WIDTH)
        done += 1
    tl.store(p_vector + o_row[None, :], basis, mask=m_row)


@triton.jit
def _off_diagonal(matrix, diagonal):
    return tl.sqrt(tl.sum(tl.sum(tl.where(diagonal, 0.0, matrix * matrix), 1), 0))


@triton.jit
def _diagonalise_kernel(
    matrix_ptr,  # [B, WIDTH, WIDTH], symmetric
    vectors_ptr,  # [B, WIDTH, WIDTH], one a row
    values_ptr,  # [B, WIDTH], in no order
    sweeps,
    tolerance,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Applies Jacobi's rotations, WIDTH / 2 disjoint ones at a time: i with i ^ mask, for every mask of a sweep."""
    o_row = tl.arange(0, WIDTH)[:, None]
    o_column = tl.arange(0, WIDTH)[None, :]
    diagonal = o_row == o_column
    o_matrix = tl.program_id(0).to(tl.int64) * WIDTH
    o_element = (o_matrix + o_row) * WIDTH + o_column
    matrix = tl.load(matrix_ptr + o_element)
    vectors = tl.where(diagonal, 1.0, 0.0).to(ACC)
    norm = tl.sqrt(tl.sum(tl.sum(matrix * matrix, 1), 0))
    off = _off_diagonal(matrix, diagonal)
    done = 0
    while (done < sweeps) & (off > tolerance * norm):
        for mask in range(1, WIDTH):
            partner = (o_row ^ mask) == o_column
            off_element = 2 * tl.sum(tl.where(partner, matrix, 0.0), 1)
            diagonal_here = tl.sum(tl.where(diagonal, matrix, 0.0), 1)
            partner_diagonal = tl.sum(tl.where(partner, tl.sum(tl.where(diagonal, matrix, 0.0), 0)[None, :], 0.0), 1)
            # tan of the angle that makes the pair's element zero (Golub and Van Loan, 8.5.2), the smaller of two; the
            # partner finds its negative. Scaled, so that no square overflows.
            gap = partner_diagonal - diagonal_here
            scale = tl.maximum(tl.abs(gap), tl.abs(off_element))
            scale = tl.where(scale > 0, scale, 1.0)
            gap = gap / scale
            off_element = off_element / scale
            lower = tl.arange(0, WIDTH) < (tl.arange(0, WIDTH) ^ mask)
            direction = tl.where((gap > 0) | ((gap == 0) & lower), 1.0, -1.0)
            length = tl.abs(gap) + tl.sqrt(gap * gap + off_element * off_element)
            tangent = direction * off_element / tl.where(length > 0, length, 1.0)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            rotation = tl.where(diagonal, cosine[:, None], 0.0)
            rotation = tl.where(partner, (-tangent * cosine)[:, None], rotation).to(ACC)
            vectors = tl.dot(rotation, vectors, input_precision="ieee", out_dtype=ACC)
            matrix = tl.dot(rotation, matrix, input_precision="ieee", out_dtype=ACC)
            matrix = tl.dot(matrix, tl.trans(rotation), input_precision="ieee", out_dtype=ACC)
            # Rounding must not tear the pair apart: both take the angle from their own half.
            matrix = 0.5 * (matrix + tl.trans(matrix))
        off = _off_diagonal(matrix, diagonal)
        done += 1
    tl.store(vectors_ptr + o_element, vectors)
    tl.store(values_ptr + o_matrix + tl.arange(0, WIDTH), tl.sum(tl.where(diagonal, matrix, 0.0), 1))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the batched product of `[B, M, K]` and `[B, K, N]`, any strides, in full precision."""
    count, rows, inner = a.shape
    columns = b.shape[2]
    out = torch.empty(count, rows, columns, dtype=a.dtype, device=a.device)
    block = min(max(16, triton.next_power_of_2(rows)), TILE)
    tiles = triton.cdiv(rows, block), triton.cdiv(columns, TILE)
    _product_kernel[(count * tiles[0] * tiles[1],)](
        a,
        b,
        out,
        rows,
        columns,
        inner,
        *tiles,
        *a.stride(),
        *b.stride(),
        ACC=accumulator(a.dtype),
        BLOCK_R=block,
        TILE=TILE,
    )
    return out


def _diagonalise(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eigenvectors, one a row, and eigenvalues of symmetric matrices `[B, WIDTH, WIDTH]`."""
    vectors, values = torch.empty_like(matrices), torch.empty_like(matrices[:, 0])
    _diagonalise_kernel[(len(matrices),)](
        matrices,
        vectors,
        values,
        SWEEPS,
        OFF_DIAGONAL[matrices.dtype],
        ACC=accumulator(matrices.dtype),
        WIDTH=matrices.shape[1],
    )
    return vectors, values


def _orthonormalise(basis: Tensor) -> Tensor:
    """Returns the rows that span what those of `[B, WIDTH, size]` do, orthonormal but for what rounding hides.

    From the eigenvectors of their products (Stathopoulos and Wu, 2002); squaring loses half of the digits, hence twice.
    """
    info = torch.finfo(basis.dtype)
    for _ in range(2):
        vectors, values = _diagonalise(_product(basis, basis.mT))
        least = (info.eps * values.amax(1, keepdim=True)).clamp_min(info.tiny)
        basis = _product(vectors * torch.maximum(values, least).rsqrt()[:, :, None], basis)
    return basis


def _iterate(gram: Tensor, basis: Tensor, k: int) -> Tensor:
    """Returns a basis after iterations on the Gram matrix, one program a matrix."""
    width, size = basis.shape[1:]
    block = max(16, triton.next_power_of_2(size))
    _iterate_kernel[(len(basis),)](
        gram,
        basis,
        size,
        k,
        PASSES,
        TOLERANCE[basis.dtype],
        ACC=accumulator(basis.dtype),
        WIDTH=width,
        BLOCK=block,
        STEP=STEP,
        num_warps=max(4, min(16, width * block // 512)),  # 16 numbers of a basis a thread, up to 512 threads
        # Loads run ahead where there is shared memory for it: every device since 8.0 has 99 KiB.
        num_stages=3 if 2 * block * basis.itemsize <= FITS else 1,
    )
    return basis


def leading_singular(
    matrices: Tensor, k: int, solver: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the `k` leading singular triplets of `matrices` [B, M, N] and residuals; see `ops.leading_singular`."""
    checks.leading_singular(matrices, k, solver, iterations, seed)
    if not len(matrices) or k + OVERSAMPLE > WIDTHS[-1]:
        return plain_leading_singular(matrices, k, solver, iterations, seed)
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    small = min(matrices.shape[1:])
    on_gram = has_gram(matrices, k, solver)
    with torch.cuda.device_of(matrices):
        return triplets(
            matrices.detach(),
            k,
            width=next(width for width in WIDTHS if k + OVERSAMPLE <= width),
            passes=PASSES if on_gram else iterations,
            seed=seed,
            dtype=dtype,
            parts=Parts(
                _product,
                _diagonalise,
                _orthonormalise,
                _iterate if on_gram and small * dtype.itemsize <= FITS else None,
            ),
        )
