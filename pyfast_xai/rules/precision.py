"""Numbers that rules compute with: shares are small, for which half precision is too coarse."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Casts floating-point numbers to float32 or more, and leaves others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """Returns a tensor that autograd accepts: a copy of what was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
