"""Agreement of a kernel with plain PyTorch."""

from collections.abc import Callable, Sequence

from torch import Tensor

Agreement = Callable[[Sequence[Tensor], Sequence[Tensor]], bool]


def equal(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns whether all results are equal, with NaN where NaN is expected."""
    return all(
        _same_kind(a, b) and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in _pairs(results, expected)
    )


def close(tolerance: float) -> Agreement:
    """Returns an agreement up to a difference relative to the largest expected number."""

    def agree(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        for a, b in _pairs(results, expected):
            if not _same_kind(a, b):
                return False
            if b.numel() and not (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max():
                return False
        return True

    return agree


def mostly_equal(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns whether 99 of 100 numbers are equal: sums in another order sometimes decide a near tie differently."""
    return all(_same_kind(a, b) and float((a == b).double().mean()) > 0.99 for a, b in _pairs(results, expected))


def first_triplets(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns whether the first singular triplets agree, signs included, for the matrices that the reference has done.

    Their singular values stand out, so that the vectors are determined. The other singular values must agree roughly.
    """
    count = len(expected[1])
    if not all(_same_kind(a[:count], b) for a, b in _pairs(results, expected)):
        return False
    (left, values, right, residual), (expected_left, expected_values, expected_right, _) = results, expected
    vectors = [(left[:count], expected_left), (right[:count], expected_right)]
    return (
        bool(((values[:count, 0] - expected_values[:, 0]).abs() <= 1e-3 * expected_values[:, 0]).all())
        and bool(((values[:count] - expected_values).abs() <= 1e-2 * expected_values[:, :1]).all())
        and all(bool(((a[..., 0] - b[..., 0]).abs() <= 1e-2).all()) for a, b in vectors)
        and bool((residual[:, 0] <= 1e-2).all())
    )


def _pairs(results: Sequence[Tensor], expected: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(results, expected, strict=True))


def _same_kind(result: Tensor, expected: Tensor) -> bool:
    return result.shape == expected.shape and result.dtype == expected.dtype and result.device == expected.device
