import math

import pytest
import torch
from case_ids import case_id
from torch.nn import functional as F

from pyfast_xai import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Kernel, stride, padding, dilation, ceil mode.
POOLS = {
    "halving": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlapping": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "uneven": ((2, 3), (1, 2), (1, 0), (1, 1), False),
    "dilated": ((3, 2), (2, 1), (1, 1), (2, 3), False),
    "skipping": ((1, 2), (3, 4), (0, 0), (1, 1), False),
    "largest": ((16, 16), (3, 3), (8, 8), (1, 1), False),
}
FORMATS = [torch.contiguous_format, torch.channels_last]


def expected(input, kernel, stride, padding, dilation, ceil_mode):
    """PyTorch's own pool, its index turned into the number of a tap."""
    output, index = F.max_pool2d(input, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    row = index // input.shape[3] - torch.arange(output.shape[2])[:, None] * stride[0] + padding[0]
    column = index % input.shape[3] - torch.arange(output.shape[3]) * stride[1] + padding[1]
    assert (row % dilation[0] == 0).all()
    return output, row // dilation[0] * kernel[1] + column // dilation[1]


@pytest.mark.parametrize("memory_format", FORMATS, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("pool", POOLS)
def test_equals_torch(backend, pool, dtype, memory_format):
    # Few values: windows with several maxima, of which the first wins.
    input = torch.randint(-3, 4, (2, 67, 13, 11)).to(dtype).contiguous(memory_format=memory_format)
    output, offsets = ops.max_pool_forward(input, *POOLS[pool])
    torch_output, torch_offsets = expected(input, *POOLS[pool])
    assert torch.equal(output, torch_output)
    assert torch.equal(offsets.long(), torch_offsets)
    assert output.is_contiguous(memory_format=memory_format)
    assert offsets.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 5, 1, 1), (3, 1, 4, 4), (1, 64, 2, 1), (2, 130, 5, 3)], ids=case_id
)
def test_shapes_in_both_formats_at_once(backend, shape):
    input = torch.randn(shape)
    settings = ((2, 2), (2, 2), (1, 1), (1, 1), False)
    output, offsets = ops.max_pool_forward(input, *settings)
    torch_output, torch_offsets = expected(input, *settings)
    assert torch.equal(output, torch_output)
    assert torch.equal(offsets.long(), torch_offsets)


@pytest.mark.parametrize("memory_format", FORMATS, ids=case_id)
def test_special_values(backend, memory_format):
    input = torch.full((1, 2, 4, 4), -math.inf).contiguous(memory_format=memory_format)
    input[0, 1, 1, 0] = math.nan
    input[0, 1, 0, 3], input[0, 1, 1, 2] = math.inf, -0.0
    settings = ((2, 2), (2, 2), (0, 0), (1, 1), False)
    output, offsets = ops.max_pool_forward(input, *settings)
    torch_output, torch_offsets = expected(input, *settings)
    assert torch.equal(output.nan_to_num(9), torch_output.nan_to_num(9))
    assert torch.equal(output.isnan(), torch_output.isnan())
    assert torch.equal(offsets.long(), torch_offsets)


def test_strided_input(backend):
    settings = POOLS["overlapping"]
    input = torch.randn(2, 6, 20, 18)[:, ::2, 1:-1, ::2]
    output, offsets = ops.max_pool_forward(input, *settings)
    torch_output, torch_offsets = expected(input, *settings)
    assert torch.equal(output, torch_output)
    assert torch.equal(offsets.long(), torch_offsets)


def test_no_images(backend):
    output, offsets = ops.max_pool_forward(torch.zeros(0, 3, 8, 8), *POOLS["halving"])
    assert output.shape == offsets.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": (17, 16)}, "kernel must have at most 256 taps, which a byte can tell apart, got 272"),
        ({"input": torch.zeros(2, 3, 40, 40, dtype=torch.int32)}, "input must be float16"),
        ({"output": torch.zeros(2, 4, 20, 20)}, "output must have shape"),
        ({"output": torch.zeros(2, 3, 20, 20, dtype=torch.float64)}, "output must be"),
        ({"offsets": torch.zeros(2, 3, 20, 20)}, "offsets must be uint8"),
        ({"offsets": torch.zeros(2, 3, 20, 19, dtype=torch.uint8)}, "offsets must have shape"),
        ({"stride": (0, 1)}, "stride must be 2 numbers of at least 1"),
        ({"padding": (0, -1)}, "padding must be 2 numbers of at least 0"),
        ({"dilation": (1,)}, "dilation must be 2 numbers of at least 1"),
    ],
    ids=case_id,
)
def test_errors(backend, change, message):
    options = {
        "input": torch.zeros(2, 3, 40, 40),
        **{"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)},
        "output": torch.zeros(2, 3, 20, 20),
        "offsets": torch.zeros(2, 3, 20, 20, dtype=torch.uint8),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.registry.OPS["max_pool_forward"](*{**options, **change}.values())


def test_memory_formats_that_differ():
    output = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    offsets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with ops.backend("cpp"), pytest.raises(RuntimeError, match="must be all contiguous or all channels_last"):
        ops.registry.OPS["max_pool_forward"](torch.zeros(2, 3, 8, 8), (2, 2), (2, 2), (0, 0), (1, 1), output, offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_opcheck(dtype):
    output, offsets = torch.zeros(2, 3, 4, 4, dtype=dtype), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    arguments = (torch.randn(2, 3, 8, 8).to(dtype), [2, 2], [2, 2], [0, 0], [1, 1], output, offsets)
    torch.library.opcheck(torch.ops.pyfast_xai.max_pool_forward.default, arguments)


def test_results_have_the_strides_that_pytorch_gives_them():
    for shape in ((1, 4, 6, 6), (2, 4, 6, 6), (2, 1, 6, 6), (1, 1, 6, 6), (2, 4, 6, 2), (1, 3, 2, 2)):
        plain = torch.randn(shape)
        last = plain.to(memory_format=torch.channels_last)
        for base in (plain, last):
            for x in (base, base[..., 1:], base[:, :1], base[:, ::2], base.transpose(2, 3), base[:1].expand(shape)):
                expected = torch.nn.functional.max_pool2d(x, 2, 1, 1)
                result, offsets = ops.max_pool_forward(x, [2, 2], [1, 1], [1, 1], [1, 1])
                assert torch.equal(result, expected)
                assert result.stride() == offsets.stride() == expected.stride(), (x.shape, x.stride())
