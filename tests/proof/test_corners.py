"""The corner cases by which kernels are proven are right: the kernels of the CPU, which are tested elsewhere, pass."""

import pytest
import torch

from pyfast_xai import ops
from pyfast_xai.ops.registry import OPS
from pyfast_xai.proof import corners
from pyfast_xai.proof.examine import REFERENCE

CPU = torch.device("cpu")


def passed(op, backend):
    count = 0
    for corner in getattr(corners, op)(corners.Draw(CPU)):
        if corner.memory <= 1e9:
            with ops.backend(backend):
                result = corners.results(corner.run())
            with ops.backend(REFERENCE):
                expected = corners.results((corner.expected or corner.run)())
            assert corner.agree(result, expected), corner.description
            count += 1
    return count


@pytest.mark.parametrize("op", OPS)
def test_a_right_kernel_passes(op):
    if OPS[op].missing("cpp", "cpu") is not None:
        pytest.skip(OPS[op].missing("cpp", "cpu"))
    assert passed(op, "cpp") >= 2


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_with_one_wrong_number_does_not(op):
    corner = next(
        corner
        for corner in getattr(corners, op)(corners.Draw(CPU))
        if corners.results(corner.run())[0].numel() > 1 and not corner.expected
    )
    expected = corners.results(corner.run())
    results = [result.clone() for result in expected]
    place = (0,) * results[0].dim()
    results[0][place] = 1 + results[0].abs().nan_to_num(0, 0, 0).max()
    assert corner.agree(expected, expected)
    assert not corner.agree(results, expected)
