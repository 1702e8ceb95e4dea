"""The adjoint of a strided convolution onto an image, as a convolution without a stride.

Kernels for transposed convolutions are made for many channels on both sides; onto the three of an image they take
three times as long as the arithmetic would. The pixels of one phase, those as far from a multiple of the stride, each
see their own part of the kernel. All parts together are a convolution with a channel for each phase, whose results
interleave (Shi et al., Real-time single image and video super-resolution using an efficient sub-pixel convolutional
neural network, 2016).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# The most channels of the result.
_FEW_CHANNELS = 4
# Below, there is too little arithmetic to save for the interleaving to pay.
_LEAST_KERNEL = 16


def takes(grad: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Returns whether an adjoint is better done this way.

    In float64 it is not: results keep the order in which autograd's kernels sum.
    """
    if max(stride) == 1 or max(dilation) > 1 or groups > 1:
        return False
    if weight.dim() != 4 or weight.shape[1] > _FEW_CHANNELS or math.prod(weight.shape[2:]) < _LEAST_KERNEL:
        return False
    return grad.device.type == "cpu" and grad.dtype == weight.dtype == torch.float32 and grad.numel() > 0


def adjoint(grad: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], size: Sequence[int]) -> Tensor:
    """Returns the gradient of the input of `conv2d(input, weight, stride=stride, padding=padding)`.

    Args:
        grad: gradient of the result, `[N, O, h, w]`.
        weight: `[O, C, kh, kw]`.
        stride: two numbers.
        padding: two numbers.
        size: `(H, W)` of the input.

    Returns:
        `[N, C, H, W]`.
    """
    outputs, channels, *kernel = weight.shape
    # Steps of the stride that cover the kernel, which zeros fill up.
    steps = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
    fill = [m * s - k for m, s, k in zip(steps, stride, kernel, strict=True)]
    parts = functional.pad(weight, (0, fill[1], 0, fill[0])).view(outputs, channels, steps[0], stride[0], -1, stride[1])
    parts = parts.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(-1, outputs, *steps)
    phases = functional.conv2d(grad, parts, padding=[m - 1 for m in steps])  # [N, C * phases, ...]
    rows, columns = phases.shape[2:]
    phases = phases.view(len(grad), channels, *stride, rows, columns).permute(0, 1, 4, 2, 5, 3)
    whole = phases.reshape(len(grad), channels, rows * stride[0], columns * stride[1])
    # It begins at the padding, and lacks the rows that no window reached.
    after = [n + p - have for n, p, have in zip(size, padding, whole.shape[2:], strict=True)]
    return functional.pad(whole, (-padding[1], after[1], -padding[0], after[0]))
