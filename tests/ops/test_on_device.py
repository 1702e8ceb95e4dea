"""Every op on a CUDA device, by every backend that serves it there, against the reference on the CPU.

Sizes of real networks: several blocks, many points in a place. `triton_agree.py` has the corners. With
PYFAST_XAI_TEST_DEVICE=cpu the same bodies run on the CPU, by the backends there.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from case_ids import case_id

from pyfast_xai import ops
from pyfast_xai.kernels.reference.sign_bits import sign_bits
from pyfast_xai.ops import Location, Rectify
from pyfast_xai.ops.registry import OPS

DEVICE = os.environ.get("PYFAST_XAI_TEST_DEVICE", "cuda")
REAL = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(REAL and not torch.cuda.is_available(), reason="needs a device"),
]
on_a_real_device = pytest.mark.skipif(not REAL or not torch.cuda.is_available(), reason="needs a device")
BACKENDS = ["cuda", "triton", "reference"] if REAL else ["cpp", "reference"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
FORMATS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", FORMATS, ids=case_id)


@pytest.fixture(params=BACKENDS)
def device_backend(request):
    return request.param


def both(backend, name, call, *tensors):
    """What `call` gives on the device by a backend, brought to the CPU, and there by the reference."""
    missing = OPS[name].missing(backend, torch.device(DEVICE).type)
    if missing is not None:
        pytest.skip(f"{name} on {backend}: {missing}")
    with ops.backend("reference"):
        expected = call(*tensors)
    with ops.backend(backend):
        result = call(*(None if tensor is None else tensor.to(DEVICE) for tensor in tensors))
    pairs = [(result, expected)] if isinstance(result, torch.Tensor) else list(zip(result, expected, strict=True))
    assert all(item.device.type == torch.device(DEVICE).type for item, _ in pairs)
    return [(item.cpu(), other) for item, other in pairs]


def whole(*shape, dtype=torch.float32):
    """Small whole numbers: no sum of them is rounded, and ties are common."""
    return torch.randint(-2, 3, shape).to(dtype)


def with_gaps(points):
    """A third of the points is none."""
    return points.masked_fill(torch.rand(len(points)) < 0.3, -1)


CONVOLUTIONS = {
    "3x3": ((4, 64, 28, 28), (96, 64, 3, 3), (1, 1), (1, 1), 1),
    "1x1-stride": ((4, 256, 14, 14), (64, 256, 1, 1), (2, 2), (0, 0), 1),
    "7x7": ((2, 3, 64, 64), (64, 3, 7, 7), (2, 2), (3, 3), 1),
    "depthwise": ((4, 96, 14, 14), (96, 1, 3, 3), (1, 1), (1, 1), 96),
}


@every_layout
@every_dtype
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_trace(device_backend, name, dtype, layout):
    shape, filters, stride, padding, groups = CONVOLUTIONS[name]
    input = whole(*shape, dtype=dtype).contiguous(memory_format=layout)
    weight = whole(*filters, dtype=dtype)
    size = torch.nn.functional.conv2d(input.float(), weight.float(), None, stride, padding, 1, groups).shape
    points, negative = with_gaps(torch.randint(0, math.prod(size), (3000,))), torch.rand(3000) < 0.3
    for location in (Location.PRODUCT, Location.ACTIVATION):

        def call(input, weight, points, negative, where=location):
            return ops.conv_trace(input, weight, points, negative, size[2:], stride, padding, (1, 1), groups, where)

        for result, expected in both(device_backend, "conv_trace", call, input, weight, points, negative):
            assert torch.equal(result, expected)


@every_dtype
@pytest.mark.parametrize("signed", [False, True])
def test_linear_trace(device_backend, dtype, signed):
    input, weight = whole(6, 3000, dtype=dtype), whole(500, 3000)
    points = with_gaps(torch.randint(0, 6 * 500, (200,)))
    negative = torch.rand(200) < 0.4 if signed else None
    tensors = (input, *sign_bits(weight), points, negative)
    for capacity in (None, 6 * 3000):

        def call(*options, most=capacity):
            return ops.linear_trace(*options, most)

        for result, expected in both(device_backend, "linear_trace", call, *tensors):
            assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (100_000, 3_000), (50_000, 12_345_678), (10, 1 << 33)], ids=case_id
)
def test_points_union(device_backend, count, size):
    points = with_gaps(torch.randint(0, size, (count,)))
    for capacity in (None, count, count + 999):

        def call(actual, most=capacity):
            return ops.points_union(actual, size, most)

        assert torch.equal(*both(device_backend, "points_union", call, points)[0])


@every_dtype
def test_sign_bits(device_backend, dtype):
    for result, expected in both(device_backend, "sign_bits", ops.sign_bits, whole(33, 1000, dtype=dtype)):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("sigma", [0.5, 12.7])
def test_point_density(device_backend, sigma):
    points = torch.cat([torch.randint(0, 3 * 100 * 120, (5000,)), torch.full((3000,), 777)])
    pairs = both(device_backend, "point_density", lambda actual: ops.point_density(actual, 3, 100, 120, sigma), points)
    torch.testing.assert_close(*pairs[0], rtol=1e-4, atol=1e-4)


@every_layout
@every_dtype
@pytest.mark.parametrize(
    ("upper", "bounded", "clamp"), [(math.inf, False, False), (6.0, False, False), (2.0, True, True)]
)
def test_relu_forward(device_backend, dtype, layout, upper, bounded, clamp):
    input, bound = (torch.randn(3, 17, 45, 31).mul(4).to(dtype).contiguous(memory_format=layout) for _ in range(2))

    def call(x, bound):
        return ops.relu_forward(x, upper=upper, bound=bound, clamp=clamp)

    for result, expected in both(device_backend, "relu_forward", call, input, bound if bounded else None):
        assert torch.equal(result, expected)


@every_dtype
@pytest.mark.parametrize("rule", Rectify, ids=lambda rule: rule.name)
def test_relu_backward(device_backend, dtype, rule):
    grad = torch.randn(3, 5, 7, 61, 33).to(dtype)
    bits = torch.randint(0, 256, (math.ceil(grad[0].numel() / 8),), dtype=torch.uint8)

    def call(grad, bits):
        return ops.relu_backward(grad, bits, rule, negative_slope=0.25 if rule is Rectify.GRADIENT else 0)

    pairs = both(device_backend, "relu_backward", call, grad, None if rule is Rectify.DECONVNET else bits)
    assert torch.equal(*pairs[0])


POOLS = {
    "halving": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlapping": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "dense": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
}


@every_layout
@every_dtype
@pytest.mark.parametrize("pool", POOLS)
def test_max_pool(device_backend, pool, dtype, layout):
    input = whole(3, 70, 37, 29, dtype=dtype).contiguous(memory_format=layout)
    for result, expected in both(
        device_backend, "max_pool_forward", lambda x: ops.max_pool_forward(x, *POOLS[pool]), input
    ):
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=layout)
    with ops.backend("reference"):
        output, offsets = ops.max_pool_forward(input, *POOLS[pool])
    grad = whole(2, *output.shape, dtype=dtype)

    def call(grad, offsets):
        return ops.max_pool_backward(grad, offsets, (37, 29), *POOLS[pool][:4])

    assert torch.equal(*both(device_backend, "max_pool_backward", call, grad, offsets)[0])


@every_dtype
def test_response_argmax(device_backend, dtype):
    responses, classes = whole(9, 3, 3, 61, 53, dtype=dtype), torch.randint(-1, 50, (9, 3))

    def call(responses, classes):
        wide = torch.promote_types(responses.dtype, torch.float32)
        best = torch.full((3, 61, 53), -math.inf, dtype=wide, device=responses.device)
        winner = torch.full((3, 61, 53), -1, device=responses.device)
        for part, names in zip(responses.split(4), classes.split(4), strict=True):
            ops.response_argmax(part, names, best, winner)
        return best, winner

    for result, expected in both(device_backend, "response_argmax", call, responses, classes):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(40, 49, 512), (8, 196, 256), (4, 700, 130), (2, 1100, 1200)], ids=case_id)
def test_leading_singular(device_backend, shape):
    count, rows, columns = shape
    # Like maps after a rectifier, in which one direction stands out.
    matrices = torch.randn(shape).relu() + 0.5 * torch.rand(count, rows, 1) * torch.rand(count, 1, columns)
    result = both(device_backend, "leading_singular", lambda item: ops.leading_singular(item, 2), matrices)
    left, singular, right, residual = (item.double() for item, _ in result)
    torch.testing.assert_close(singular[:, 0].float(), result[1][1][:, 0], rtol=1e-4, atol=0)
    exact = matrices.double()
    error = torch.linalg.vector_norm(exact @ right[..., :1] - left[..., :1] * singular[:, None, :1], dim=1)
    assert (error <= 1e-4 * singular[:, :1]).all()
    assert (residual[:, 0] <= 1e-3).all()
    torch.testing.assert_close(left[..., 0].float(), result[0][1][..., 0], rtol=0, atol=1e-3)


BAD = {
    "conv_trace": "conv_trace(torch.ones(1, 2, 5, 5, device=at), torch.ones(3, 2, 3, 3, device=at),"
    " torch.tensor([75], device=at), None, (5, 5), (1, 1), (1, 1), (1, 1))",
    "linear_trace": "linear_trace(torch.ones(2, 70, device=at), *bits, torch.tensor([6], device=at), None, 140)",
    "points_union": "points_union(torch.tensor([3, -2], device=at), 4, 2)",
    "point_density": "point_density(torch.tensor([70], device=at), 2, 5, 7, 2.0)",
}


@pytest.mark.parametrize("name", BAD)
def test_a_point_outside_is_refused(device_backend, name):
    """In a process of its own: what a device asserts, it does not survive."""
    if OPS[name].missing(device_backend, torch.device(DEVICE).type) is not None:
        pytest.skip(f"no {name} on {device_backend}")
    code = (
        f"import torch; from pyfast_xai import ops; at = {DEVICE!r}; bits = torch.zeros(2, 3, 2, device=at).long()\n"
        f"with ops.backend({device_backend!r}): ops.{BAD[name]}.cpu()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "points must lie in" in done.stdout + done.stderr


@on_a_real_device
@pytest.mark.parametrize("name", ["relu_forward", "relu_backward"])
def test_addresses_beyond_32_bits(device_backend, name):
    size = (1 << 31) + 24
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    if device_backend == "reference" or OPS[name].missing(device_backend, "cuda") is not None:
        pytest.skip(f"no {name} on {device_backend}")
    values = torch.zeros(1, size, dtype=torch.bfloat16, device=DEVICE)
    values[0, -3:] = torch.tensor([2.0, -3.0, 4.0])
    with ops.backend(device_backend):
        if name == "relu_forward":
            output, bits = ops.relu_forward(values)
            assert output[0, -3:].tolist() == [2, 0, 4]
            assert bits[-1] == 0b10100000
            assert not bits[:-1].any()
        else:
            bits = torch.zeros(size // 8, dtype=torch.uint8, device=DEVICE)
            bits[-1] = 0b11000000
            out = ops.relu_backward(values, bits, Rectify.GRADIENT)
            assert out[0, -3:].tolist() == [0, -3, 4]
            assert out.count_nonzero() == 2


@on_a_real_device
def test_another_stream_is_waited_for_by_nobody_else(device_backend):
    """An op runs on the current stream: behind what that stream does, not behind the default one."""
    if OPS["points_union"].missing(device_backend, "cuda") is not None:
        pytest.skip(f"no points_union on {device_backend}")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ops.backend(device_backend):
        points = torch.zeros(100_000, dtype=torch.int64, device=DEVICE)
        torch.cuda._sleep(50_000_000)  # what follows must come after it
        points.copy_(torch.arange(100_000, device=DEVICE) % 5000)
        result = ops.points_union(points, 5000)
    stream.synchronize()
    assert torch.equal(result.cpu(), torch.arange(5000))


@on_a_real_device
def test_the_last_device_that_is_not_the_current_one(device_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    there = f"cuda:{torch.cuda.device_count() - 1}"
    for name, call in {
        "points_union": lambda: ops.points_union(torch.tensor([4, 1, 4], device=there), 5),
        "relu_forward": lambda: ops.relu_forward(torch.randn(1000, device=there))[0],
    }.items():
        if OPS[name].missing(device_backend, "cuda") is None:
            with torch.cuda.device(0), ops.backend(device_backend):
                assert str(call().device) == there
                assert torch.cuda.current_device() == 0


CAPTURED = {
    "relu_forward": lambda x: ops.relu_forward(x, upper=2.0)[0],
    "relu_backward": lambda x: ops.relu_backward(
        x[None], torch.full((512,), 0xA5, device=x.device).byte(), Rectify.GUIDED
    ),
    "max_pool_forward": lambda x: ops.max_pool_forward(x.view(1, 4, 32, 32), *POOLS["overlapping"])[0],
}


@on_a_real_device
@pytest.mark.parametrize("name", CAPTURED)
def test_triton_kernels_can_be_part_of_a_graph(name):
    if OPS[name].missing("triton", "cuda") is not None:
        pytest.skip(f"{name}: {OPS[name].missing('triton', 'cuda')}")
    source = torch.randn(4096, device=DEVICE)
    with ops.backend("triton"):
        CAPTURED[name](source)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = CAPTURED[name](source)
        source.copy_(torch.randn(4096, device=DEVICE))
        graph.replay()
        torch.testing.assert_close(result, CAPTURED[name](source))


POINTS = {
    "conv_trace": lambda points: ops.conv_trace(
        torch.ones(2, 8, 16, 16, device=points.device),
        torch.ones(8, 8, 3, 3, device=points.device),
        points,
        points > 99,
        (16, 16),
        (1, 1),
        (1, 1),
        (1, 1),
    ),
    "linear_trace": lambda points: ops.linear_trace(
        torch.ones(64, 70, device=points.device),
        *(torch.full((64, 2), 0x5A5A5A, device=points.device) for _ in range(2)),
        points,
        None,
        64 * 70,
    ),
    "points_union": lambda points: ops.points_union(points, 4096, 1000),
}


@on_a_real_device
@pytest.mark.parametrize("name", POINTS)
def test_lists_of_points_can_be_part_of_a_graph(device_backend, name):
    if OPS[name].missing(device_backend, "cuda") is not None:
        pytest.skip(f"no {name} on {device_backend}")
    points = with_gaps(torch.randint(0, 4096, (1000,))).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with ops.backend(device_backend):
        with torch.cuda.stream(stream):
            POINTS[name](points)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = POINTS[name](points)
        points.copy_(with_gaps(torch.randint(0, 4096, (1000,))).to(DEVICE))
        graph.replay()
        assert torch.equal(result, POINTS[name](points))
