"""Compiles what the Triton launchers launch, to machine code for a compute capability and without a device.

A program of its own, `python triton_compile.py 80 out`, because it replaces the driver that Triton would look for. It
prints a line for every kernel: name, shared memory in bytes, warps of a block, and the file with its machine code.
"""

import itertools
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pyfast_xai.kernels.triton.conv_trace import conv_trace
from pyfast_xai.kernels.triton.leading_singular import leading_singular
from pyfast_xai.kernels.triton.linear_trace import linear_trace
from pyfast_xai.kernels.triton.max_pool_backward import max_pool_backward
from pyfast_xai.kernels.triton.max_pool_forward import max_pool_forward
from pyfast_xai.kernels.triton.point_density import point_density
from pyfast_xai.kernels.triton.points_union import points_union
from pyfast_xai.kernels.triton.relu_backward import relu_backward
from pyfast_xai.kernels.triton.relu_forward import relu_forward
from pyfast_xai.kernels.triton.response_argmax import response_argmax
from pyfast_xai.kernels.triton.sign_bits import sign_bits


class NoDriver:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


launch = JITFunction.run
number = itertools.count()


def compile_alone(kernel, *arguments, grid, warmup, **options):
    compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
    assert len(compiled.asm["cubin"]) > 0
    cubin = Path(sys.argv[2], f"{next(number)}.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    print(kernel.__name__, compiled.metadata.shared, compiled.metadata.num_warps, cubin)


triton.runtime.driver.set_active(NoDriver())
JITFunction.run = compile_alone
torch.empty = torch.zeros  # nothing runs, so that launchers read what no kernel wrote

for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    values, bits = torch.ones(2, 7, dtype=dtype), torch.zeros(1, dtype=torch.uint8)
    for bound, clamp in ((None, False), (values, True)):
        relu_forward(values, 6.0, bound, clamp, values)
    relu_backward(values, bits, 0, 0.1, values)
    relu_backward(values, None, 1, 0.0, values)
    # As maps are: their size is a multiple of 16, and loads can be vectors.
    values, bits = torch.ones(1, 4096, dtype=dtype), torch.zeros(512, dtype=torch.uint8)
    relu_forward(values, 6.0, None, False, values)
    relu_backward(values, bits, 0, 0.0, values)
    wide = torch.promote_types(dtype, torch.float32)
    pixels = torch.zeros(1, 5, 6, dtype=wide), torch.zeros(1, 5, 6, dtype=torch.int64)
    response_argmax(torch.zeros(2, 1, 3, 5, 6, dtype=dtype), torch.zeros(2, 1, dtype=torch.int64), *pixels)
    words, points = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 2])
    linear_trace(torch.zeros(1, 70, dtype=dtype), words, words, points, points > 0)

# Windows of each kind that networks have: on halves and overlapping, channels innermost and columns innermost.
for dtype, kernel, stride, padding, layout in (
    (torch.bfloat16, [3, 3], [2, 2], [1, 1], torch.channels_last),
    (torch.float16, [3, 3], [1, 1], [1, 1], torch.contiguous_format),
    (torch.float32, [2, 2], [2, 2], [0, 0], torch.channels_last),
    (torch.float64, [3, 3], [2, 2], [1, 1], torch.contiguous_format),
):
    size = (2, 200, *((8 + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in range(2)))
    image = torch.zeros(2, 200, 8, 8, dtype=dtype).contiguous(memory_format=layout)
    pooled = torch.zeros(size, dtype=dtype).contiguous(memory_format=layout)
    # A tap inside the image for every window: the one in the middle.
    middle = kernel[0] // 2 * kernel[1] + kernel[1] // 2
    taps = torch.full(size, middle, dtype=torch.uint8).contiguous(memory_format=layout)
    max_pool_forward(image, kernel, stride, padding, [1, 1], pooled, taps)
    max_pool_backward(pooled, taps, kernel, stride, padding, [1, 1], image)

points = torch.tensor([0, 7])
points_union(points, 100, 2)
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    sign_bits(torch.ones(2, 70, dtype=dtype))
point_density(points, 1, 9, 9, 2.0)
for dtype, channels, size, location in (
    (torch.bfloat16, 64, 3, 0),
    (torch.float16, 3, 7, 1),
    (torch.float32, 200, 1, 2),
    (torch.float64, 1, 3, 3),
    (torch.float64, 6, 3, 0),
):
    input, weight = torch.zeros(1, channels, 9, 9, dtype=dtype), torch.zeros(2, channels, size, size, dtype=dtype)
    geometry = ([9, 9], [1, 1], [size // 2] * 2, [1, 1], 1)
    conv_trace(input.to(memory_format=torch.channels_last), weight, points, points > 0, *geometry, location)

# The iteration holds a basis in registers and slices of the Gram matrix in shared memory: the largest of each kind.
for dtype, small, k in (
    (torch.float32, 49, 1),
    (torch.float32, 512, 3),
    (torch.float32, 1024, 20),
    (torch.float64, 512, 1),
):
    leading_singular(torch.zeros(1, small, small, dtype=dtype), k, 1, 1, 0)
