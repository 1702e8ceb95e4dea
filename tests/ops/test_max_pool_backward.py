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
    "dense": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "dilated": ((3, 2), (2, 1), (1, 1), (2, 3), False),
    "skipping": ((1, 2), (3, 4), (0, 0), (1, 1), False),
    "largest": ((16, 16), (1, 1), (7, 7), (1, 1), False),
}
FORMATS = [torch.contiguous_format, torch.channels_last]


def by_autograd(input, grad, kernel, stride, padding, dilation, ceil_mode):
    leaf = input.clone().requires_grad_()
    output = F.max_pool2d(leaf, kernel, stride, padding, dilation, ceil_mode)
    return torch.stack([torch.autograd.grad(output, leaf, item, retain_graph=True)[0] for item in grad])


@pytest.mark.parametrize("memory_format", FORMATS, ids=case_id)
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("pool", POOLS)
def test_equals_autograd(backend, pool, dtype, targets, memory_format):
    input = torch.randint(-3, 4, (2, 67, 13, 11)).to(dtype).contiguous(memory_format=memory_format)
    output, offsets = ops.max_pool_forward(input, *POOLS[pool])
    # Whole numbers: sums are exact in any order and any dtype.
    grad = torch.randint(-8, 9, (targets, *output.shape)).to(dtype)
    out = ops.max_pool_backward(grad, offsets, input.shape[2:], *POOLS[pool][:4])
    assert torch.equal(out, by_autograd(input, grad, *POOLS[pool]))
    assert out[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("pool", ["overlapping", "dense"])
def test_sums_in_the_order_of_autograd(pool):
    input = torch.randn(2, 5, 13, 11, dtype=torch.float64)
    output, offsets = ops.max_pool_forward(input, *POOLS[pool])
    grad = torch.randn(1, *output.shape, dtype=torch.float64)
    out = ops.max_pool_backward(grad, offsets, input.shape[2:], *POOLS[pool][:4])
    assert torch.equal(out, by_autograd(input, grad, *POOLS[pool]))


def test_gradients_of_another_memory_format(backend):
    input = torch.randn(2, 5, 8, 8).contiguous(memory_format=torch.channels_last)
    output, offsets = ops.max_pool_forward(input, *POOLS["overlapping"])
    grad = torch.randn(3, *output.shape)
    out = ops.max_pool_backward(
        grad.transpose(3, 4).contiguous().transpose(3, 4), offsets, (8, 8), *POOLS["overlapping"][:4]
    )
    torch.testing.assert_close(out, by_autograd(input, grad, *POOLS["overlapping"]))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 5, 1, 1), (3, 1, 4, 4), (1, 64, 2, 1), (0, 3, 4, 4)], ids=case_id)
def test_shapes_in_both_formats_at_once(backend, shape):
    input, settings = torch.randn(shape), ((2, 2), (2, 2), (1, 1), (1, 1), False)
    output, offsets = ops.max_pool_forward(input, *settings)
    grad = torch.randn(2, *output.shape)
    out = ops.max_pool_backward(grad, offsets, shape[2:], *settings[:4])
    torch.testing.assert_close(out, by_autograd(input, grad, *settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(4, 3, 4, 5)}, "offsets must have shape"),
        ({"grad": torch.zeros(3, 3, 4, 4), "out": torch.zeros(3, 3, 8, 8)}, "offsets must have shape"),
        ({"offsets": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "offsets must be uint8"),
        ({"out": torch.zeros(4, 3, 8)}, r"out must have shape \[N, C, H, W\]"),
        ({"grad": torch.zeros(4, 3, 4, 4, dtype=torch.float64)}, "grad must be"),
        ({"kernel": (2,)}, "kernel must be 2 numbers"),
    ],
    ids=case_id,
)
def test_errors(backend, change, message):
    options = {
        "grad": torch.zeros(4, 3, 4, 4),
        "offsets": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        **{"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)},
        "out": torch.zeros(4, 3, 8, 8),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.registry.OPS["max_pool_backward"](*{**options, **change}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_opcheck(dtype):
    output, offsets = ops.max_pool_forward(torch.randn(2, 3, 8, 8).to(dtype), *POOLS["halving"])
    arguments = (output, offsets, [2, 2], [2, 2], [0, 0], [1, 1], torch.zeros(2, 3, 8, 8, dtype=dtype))
    torch.library.opcheck(torch.ops.pyfast_xai.max_pool_backward.default, arguments)
