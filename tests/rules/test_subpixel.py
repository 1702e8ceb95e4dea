"""Adjoints of strided convolutions onto an image."""

import pytest
import torch
from case_ids import case_id
from torch.nn import functional

from pyfast_xai.rules.gradient import subpixel

# Kernel, stride, padding: of AlexNet, ResNet, a vision transformer's patches; unequal sides; windows that do not reach
# the last rows; strides wider than the kernel.
GEOMETRIES = [
    ((11, 11), (4, 4), (2, 2)),
    ((7, 7), (2, 2), (3, 3)),
    ((4, 4), (4, 4), (0, 0)),
    ((5, 4), (2, 3), (0, 2)),
    ((4, 6), (1, 2), (3, 0)),
    ((4, 4), (5, 7), (0, 0)),
    ((4, 4), (5, 3), (3, 1)),
]


@pytest.mark.parametrize("size", [(23, 29), (24, 28), (11, 12)], ids=case_id)
@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES, ids=case_id)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=case_id)
def test_it_is_autograds(kernel, stride, padding, channels, size, layout):
    images = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, channels, *kernel, dtype=torch.float64)
    result = functional.conv2d(images, weight, None, stride, padding)
    grad = torch.randn_like(result).contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(result, images, grad)
    torch.testing.assert_close(subpixel.adjoint(grad, weight, stride, padding, size), expected, rtol=0, atol=1e-12)


def test_where_it_is_used():
    def takes(weight=(8, 3, 7, 7), stride=2, dilation=1, groups=1, dtype=torch.float32, rows=1, device="cpu"):
        grad = torch.empty(rows, weight[0], 5, 5, dtype=dtype, device=device)
        weight = torch.empty(weight, dtype=dtype, device=device)
        return subpixel.takes(grad, weight, [stride] * 2, [dilation] * 2, groups)

    assert takes()
    assert takes((8, 4, 4, 4))
    others = [{"stride": 1}, {"dilation": 2}, {"groups": 3}, {"dtype": torch.float64}, {"rows": 0}, {"device": "meta"}]
    others += [{"weight": shape} for shape in ((8, 5, 7, 7), (8, 3, 3, 3), (8, 3, 7))]
    for other in others:
        assert not takes(**other), other
