import numpy as np
import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops
from pyfast_xai.ops import Solver

METHODS = [Solver.AUTO, Solver.GRAM, Solver.SUBSPACE]
# Wide, tall, square; the last three are large enough that the subspace route is not replaced by a full one.
SHAPES = [(3, 4, 9), (2, 9, 4), (1, 7, 7), (2, 31, 130), (2, 129, 33), (1, 40, 40)]


def decaying(batch, rows, columns, dtype=torch.float32, base=0.5):
    """Matrices with singular values 10, 10 * base, 10 * base^2, ..."""
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(batch, rows, small, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(batch, columns, small, dtype=torch.float64)).Q
    values = 10 * base ** torch.arange(small, dtype=torch.float64)
    return ((left * values) @ right.mT).to(dtype)


def assert_triplets(matrices, result, bound):
    """Shapes, order, sign rule, norms, and that the residual is what it claims to be."""
    left, singular, right, residual = (part.double() for part in result)
    exact = matrices.double()
    batch, rows, columns = matrices.shape
    k = singular.shape[1]
    assert left.shape == (batch, rows, k)
    assert right.shape == (batch, columns, k)
    assert residual.shape == (batch, k)
    assert {part.dtype for part in result} == {torch.promote_types(matrices.dtype, torch.float32)}
    assert (singular[:, :-1] >= singular[:, 1:]).all()
    assert (left.sum(1) >= -1e-5).all()
    torch.testing.assert_close(left.norm(dim=1), torch.ones(batch, k).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(right.norm(dim=1), torch.ones(batch, k).double(), rtol=0, atol=1e-5)
    error = torch.maximum(
        (exact.mT @ left - right * singular[:, None]).norm(dim=1),
        (exact @ right - left * singular[:, None]).norm(dim=1),
    )
    torch.testing.assert_close(residual, error / singular[:, :1], rtol=1e-3, atol=1e-5)
    # Each value lies within its residual of a true one.
    true = torch.from_numpy(np.linalg.svd(exact.numpy(), compute_uv=False))
    nearest = (singular[:, :, None] - true[:, None]).abs().amin(-1)
    assert (nearest <= (residual + 1e-6) * singular[:, :1]).all()
    assert (residual <= bound).all()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=case_id)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_agrees_with_a_full_svd(backend, shape, method, k):
    matrices = decaying(*shape)
    left, singular, right, residual = ops.leading_singular(matrices, k, method)
    u, s, vt = np.linalg.svd(matrices.double().numpy(), full_matrices=False)
    sign = np.where(u.sum(1, keepdims=True) < 0, -1.0, 1.0)
    maps = torch.from_numpy((u * sign * s[:, None])[:, :, :k])
    other = torch.from_numpy((vt.swapaxes(1, 2) * sign * s[:, None])[:, :, :k])
    scale = float(s.max())
    torch.testing.assert_close(singular.double(), torch.from_numpy(s[:, :k]), rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close((left * singular[:, None]).double(), maps, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close((right * singular[:, None]).double(), other, rtol=0, atol=1e-5 * scale)
    assert_triplets(matrices, (left, singular, right, residual), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=case_id)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_dtypes(backend, dtype, method):
    matrices = decaying(2, 30, 50, dtype)
    assert_triplets(matrices, ops.leading_singular(matrices, 2, method), 1e-5)


def test_float64_is_not_computed_in_float32(backend):
    matrices = decaying(2, 20, 30, torch.float64)
    _, singular, _, residual = ops.leading_singular(matrices, 2, Solver.GRAM)
    true = np.linalg.svd(matrices.numpy(), compute_uv=False)[:, :2]
    torch.testing.assert_close(singular, torch.from_numpy(true), rtol=1e-12, atol=0)
    assert (residual < 1e-12).all()


@pytest.mark.parametrize("shape", [(2, 31, 130), (2, 129, 33)], ids=case_id)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_strided_matrices(backend, shape, method):
    matrices = decaying(*shape)
    expected = ops.leading_singular(matrices, 2, method)
    for same in (matrices.mT.contiguous().mT, matrices.repeat_interleave(2, 2)[:, :, ::2]):
        for part, reference in zip(ops.leading_singular(same, 2, method), expected, strict=True):
            torch.testing.assert_close(part, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 31, 130), (2, 129, 33)], ids=case_id)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_rank_one(backend, shape, method):
    batch, rows, columns = shape
    matrices = 5 * torch.rand(batch, rows, 1) @ torch.rand(batch, 1, columns)
    left, singular, right, residual = ops.leading_singular(matrices, 3, method)
    torch.testing.assert_close((left[:, :, :1] * singular[:, None, :1]) @ right[:, :, :1].mT, matrices)
    assert (singular[:, 1:] <= 1e-5 * singular[:, :1]).all()
    for part in (left, right, residual):
        assert part.isfinite().all()
    assert (residual <= 1e-5).all()


@pytest.mark.parametrize("shape", [(1, 4, 9), (2, 60, 40)], ids=case_id)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_zero_matrices(backend, shape, method):
    left, singular, right, residual = ops.leading_singular(torch.zeros(shape), 2, method)
    assert not singular.any()
    assert not residual.any()
    for vectors in (left, right):
        norms = vectors.norm(dim=1)
        assert (((norms - 1).abs() < 1e-5) | (norms == 0)).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_zero_matrix_leaves_the_others_alone(backend, method):
    matrices = decaying(3, 40, 60)
    matrices[1] = 0
    together = ops.leading_singular(matrices, 1, method)
    alone = ops.leading_singular(matrices[2:], 1, method)
    for part, item in zip(together, alone, strict=True):
        assert part.isfinite().all()
        torch.testing.assert_close(part[2:], item, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_close_singular_values_keep_their_residual(backend, method):
    # Vectors of values this close are free to turn into each other; the residual bound holds all the same.
    matrices = decaying(2, 40, 90, base=0.9999)
    assert_triplets(matrices, ops.leading_singular(matrices, 3, method), 1.0)


@pytest.mark.parametrize("shape", [(2, 90, 160), (2, 160, 90)], ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)
def test_a_flat_spectrum_too_large_to_iterate_on(backend, shape, dtype):
    # Ninety values within a percent of the first: no small space holds the leading vectors.
    matrices = decaying(*shape, dtype, base=0.9999)
    result = ops.leading_singular(matrices, 2, Solver.GRAM)
    if backend == "reference on a device":  # which iterates on a small space, and says how far it came
        assert_triplets(matrices, result, 1e-2)
        return
    assert_triplets(matrices, result, 1e-5)
    true = np.linalg.svd(matrices.double().numpy(), compute_uv=False)[:, :2]
    torch.testing.assert_close(result[1].double(), torch.from_numpy(true), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 80, 200), (1, 200, 80)], ids=case_id)
def test_equal_singular_values_are_all_found(backend, shape):
    # Three values of 10, then a gap: a start of one vector would see one of them.
    rows, columns = shape[1:]
    left = torch.linalg.qr(torch.randn(rows, 6, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, 6, dtype=torch.float64)).Q
    values = torch.tensor([10, 10, 10, 5, 2, 1], dtype=torch.float64)
    matrices = ((left * values) @ right.mT)[None].float()
    result = ops.leading_singular(matrices, 4, Solver.GRAM)
    assert_triplets(matrices, result, 1e-5)
    torch.testing.assert_close(result[1], values[None, :4].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [3, 5, 66, 67])
def test_rows_that_no_block_divides(backend, rows):
    matrices = decaying(2, rows, 71, torch.float64)
    true = np.linalg.svd(matrices.numpy(), compute_uv=False)[:, :1]
    for same in (matrices, matrices.mT, matrices.mT.contiguous().mT, matrices[:, :, 1:].clone()):
        expected = true if same.shape[-1] != 70 else np.linalg.svd(same.numpy(), compute_uv=False)[:, :1]
        _, singular, _, _ = ops.leading_singular(same, 1, Solver.GRAM)
        torch.testing.assert_close(singular, torch.from_numpy(expected), rtol=1e-12, atol=0)


def test_passes_of_the_subspace_iteration_help(backend):
    matrices = decaying(2, 60, 90, base=0.9)
    few, many = (ops.leading_singular(matrices, 1, Solver.SUBSPACE, n)[3].max() for n in (0, 30))
    assert many < 1e-5
    assert many < few


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_deterministic_for_a_seed(backend, method):
    matrices = torch.randn(2, 50, 70)
    state = torch.get_rng_state()
    first = ops.leading_singular(matrices, 2, method, iterations=1, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = ops.leading_singular(matrices, 2, method, iterations=1, seed=7)
    for part, same in zip(first, second, strict=True):
        assert torch.equal(part, same)


def test_another_seed_is_another_start(backend):
    matrices = torch.randn(1, 50, 70)
    one, two = (ops.leading_singular(matrices, 1, Solver.SUBSPACE, 0, seed)[1] for seed in (1, 2))
    assert not torch.equal(one, two)


def test_vectors_of_activations_keep_one_sign(backend):
    # Perron and Frobenius: a positive matrix has a positive leading pair, so the sign rule makes the map positive.
    left, _, right, _ = ops.leading_singular(torch.rand(2, 49, 64) + 0.01)
    assert (left > 0).all()
    assert (right > 0).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_no_matrices(backend, method):
    left, singular, right, residual = ops.leading_singular(torch.zeros(0, 20, 30), 2, method)
    assert (left.shape, singular.shape, right.shape, residual.shape) == ((0, 20, 2), (0, 2), (0, 30, 2), (0, 2))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("matrices", torch.zeros(3, 4)),
        ("matrices", torch.zeros(2, 3, 4, dtype=torch.int64)),
        ("k", 0),
        ("k", 4),
        ("solver", 3),
        ("solver", -1),
        ("iterations", -1),
    ],
)
def test_bad_arguments_are_named(backend, argument, value):
    arguments = {"matrices": torch.zeros(2, 3, 4), "k": 1, "solver": 0, "iterations": 1} | {argument: value}
    with pytest.raises(RuntimeError, match=rf"\b{argument}\b"):
        ops.leading_singular(**arguments)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=case_id)
def test_opcheck(method, dtype):
    arguments = (decaying(2, 20, 30, dtype), 2, int(method), 2, 0)
    torch.library.opcheck(torch.ops.pyfast_xai.leading_singular.default, arguments)
