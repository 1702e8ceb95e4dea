import math

import numpy as np
import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def packed(mask):
    padded = np.zeros((mask.shape[0], -(-mask.shape[1] // 64) * 64), dtype=bool)
    padded[:, : mask.shape[1]] = mask
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int64))


def assert_bits(weight):
    positive, negative = ops.sign_bits(weight)
    values = weight.double().numpy()
    assert torch.equal(positive, packed(values > 0))
    assert torch.equal(negative, packed(values < 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (5, 65), (7, 127), (4, 1000)], ids=case_id)
def test_bits_of_signs(backend, shape, dtype):
    assert_bits((torch.randn(shape) * (torch.rand(shape) > 0.3)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_special_values(backend, dtype):
    smallest = math.ldexp(torch.finfo(dtype).tiny, -2)  # subnormal
    values = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, smallest, -smallest]
    positive, negative = ops.sign_bits(torch.tensor([values], dtype=dtype))
    assert positive.item() == 0b01010000
    assert negative.item() == 0b10100000


def test_bit_63_is_the_sign_of_the_word(backend):
    weight = torch.zeros(1, 64)
    weight[0, 63] = 1
    positive, negative = ops.sign_bits(weight)
    assert positive.item() == -(2**63)
    assert negative.item() == 0


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w[:, ::3], lambda w: w[1::2, 5:]], ids=["T", "step", "cut"])
def test_strided_weights(backend, view):
    assert_bits(view(torch.randn(70, 90)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=case_id)
def test_empty_weights(backend, shape):
    for bits in ops.sign_bits(torch.zeros(shape)):
        assert bits.shape == (shape[0], -(-shape[1] // 64))


def test_parameters_are_read_like_tensors(backend):
    weight = torch.nn.Parameter(torch.randn(3, 70))
    for bits, same in zip(ops.sign_bits(weight), ops.sign_bits(weight.detach()), strict=True):
        assert torch.equal(bits, same)
        assert not bits.requires_grad


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(3, 3, 3), torch.zeros(3, 3, dtype=torch.int32)], ids=["1d", "3d", "int"]
)
def test_bad_weight(backend, weight):
    with pytest.raises(RuntimeError, match="weight"):
        ops.sign_bits(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("shape", [(3, 70), (1, 64), (0, 3)], ids=case_id)
def test_opcheck(shape, dtype):
    torch.library.opcheck(torch.ops.pyfast_xai.sign_bits.default, (torch.randn(shape).to(dtype),))
