"""Reference of `relu_backward`."""

import torch
from torch import Tensor

from pyfast_xai.kernels import checks
from pyfast_xai.kernels.enums import Rectify
from pyfast_xai.kernels.reference.relu_forward import BYTE, in_memory_order

GRADIENT, DECONVNET, GUIDED = map(int, Rectify)


def _unpack(bits: Tensor, size: int) -> Tensor:
    return ((bits[:, None] >> torch.arange(BYTE, dtype=torch.uint8, device=bits.device)) & 1).flatten()[:size].bool()


def relu_backward(grad: Tensor, bits: Tensor | None, rule: int, negative_slope: float, out: Tensor) -> None:
    """Write to `out` what of each `grad[k]` passes: by the bits (GRADIENT), its sign (DECONVNET) or both (GUIDED)."""
    checks.relu_backward(grad, bits, rule, negative_slope, out)
    if not grad.numel():
        return
    g = in_memory_order(grad).view(len(grad), -1)
    passes = torch.ones_like(g, dtype=torch.bool)
    if bits is not None:
        passes &= _unpack(bits, g.shape[1])
    if rule != GRADIENT:
        passes &= ~(g <= 0)
    # Never slope * g without a slope: 0 times infinity is NaN.
    leaked = g * negative_slope if negative_slope else 0
    in_memory_order(out).copy_(torch.where(passes, g, leaked).flatten())
